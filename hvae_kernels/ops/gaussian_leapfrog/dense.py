"""``dense_gaussian_leapfrog`` out of matrix products and the fused update; both differentiate themselves.

Where reverse mode alone may follow, stepping is one Function: then the precision's gradient is one product over all
points, not a product and a sum for each.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels.ops.leapfrog_update.autograd import NEEDS_PARAMETERS, NEEDS_STATE, RAW_BACKWARD, RAW_FORWARD
from hvae_kernels.ops.leapfrog_update.trajectory import Update, coefficients, leapfrog_trajectory, update_of

#: That one product adds up: MKL's rounding grows with them.
_MOST_ROWS = 1024


def dense_gaussian_leapfrog(
    implementation: str, z: Tensor, rho: Tensor, precision: Tensor, loc: Tensor, step_size: Tensor, tempering: Tensor
) -> tuple[Tensor, Tensor]:
    """K steps on validated arguments, by stepping or through the composed map, whichever is cheaper."""
    features, n_steps = z.shape[-1], tempering.shape[0]
    if n_steps == 0:
        return z.clone(memory_format=torch.contiguous_format), rho.clone(memory_format=torch.contiguous_format)
    decay, kick, drift = coefficients(step_size, tempering, features)
    steps = decay, kick / 2, drift  # gradients are taken doubled: P + P^T, without a pass for the half
    if composing_is_cheaper(math.prod(z.shape[:-1]), features, n_steps):
        return _compose(update_of(implementation), z, rho, precision + precision.mT, loc, steps)
    inputs = z, rho, precision, loc, *steps
    if _library.only_reverse_mode() and not _library.nothing_differentiates(*inputs):
        return Stepping.apply(implementation, *inputs)
    return _step(implementation, *inputs)


def composing_is_cheaper(rows: int, features: int, n_steps: int) -> bool:
    """Compare multiply-adds, in units of d^2.

    Stepping takes K + 1 products with the batch; composing K with the 2d basis rows, and four with the batch.
    Measured on two cores (K = 10, float32, forward and backward) the two are level at B = 150 for d = 50 and between
    800 and 1,200 for d = 400; the count says 143 and 1,143.
    """
    return 2 * n_steps * features + 4 * rows < (n_steps + 1) * rows


def _step(
    implementation: str, z: Tensor, rho: Tensor, precision: Tensor, loc: Tensor, *steps: Tensor
) -> tuple[Tensor, Tensor]:
    """Every operation differentiates itself."""
    doubled = precision + precision.mT
    return leapfrog_trajectory(
        update_of(implementation), z, rho, (z - loc) @ doubled, lambda z: (z - loc) @ doubled, *steps
    )


class Stepping(OpFunction):
    """``(z, rho, precision, loc, decay, kick, drift) -> (z_K, rho_K)``; twice differentiable by ``_step``."""

    @staticmethod
    def forward(ctx, implementation, z, rho, precision, loc, decay, kick, drift):
        """Step, and keep what the gradients need of every point."""
        ctx.implementation = implementation
        doubled, points = precision + precision.mT, decay.shape[0]
        away = z.new_empty(points, *z.shape)  # from loc, at every point
        momenta, gradients = [], []

        def gradient(z):
            return torch.sub(z, loc, out=away[len(gradients)]) @ doubled

        def update(z, rho, grad, *step):
            momenta.append(rho)
            gradients.append(grad)
            return RAW_FORWARD[implementation](z, rho, grad, *step)

        results = leapfrog_trajectory(update, z, rho, gradient(z), gradient, decay, kick, drift)
        if any(ctx.needs_input_grad):
            inputs = z, rho, precision, loc, decay, kick, drift
            ctx.save_for_backward(*inputs, doubled, away, *momenta, *gradients)
        return results

    @staticmethod
    def backward(ctx, grad_z, grad_rho):
        """Back along the points; the precision's gradient once, at the end."""
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad[1:]
        inputs, (doubled, away), trajectory = saved[:7], saved[7:9], saved[9:]
        if torch.is_grad_enabled():
            return None, *_differentiable_gradients(ctx.implementation, inputs, wanted, grad_z, grad_rho)
        needs = NEEDS_STATE | NEEDS_PARAMETERS * any(wanted[4:])
        points = len(trajectory) // 2
        steps = [x.unbind() for x in inputs[4:]]
        of_gradients, of_steps = [], []
        for k in reversed(range(points)):
            tensors = trajectory[k], trajectory[points + k], *(x[k] for x in steps)
            direct = grad_z if k < points - 1 else None  # the last update moves only rho
            grad_rho, d_gradient, *d_step = RAW_BACKWARD[ctx.implementation](direct, grad_rho, *tensors, needs)
            grad_z = grad_z + d_gradient @ doubled
            of_gradients.append(d_gradient)
            of_steps.append(d_step)
        of_gradients = torch.stack(of_gradients[::-1])
        d_precision = _precision_gradient(away, of_gradients) if wanted[2] else None
        d_loc = -(_rows(of_gradients).sum(0) @ doubled) if wanted[3] else None
        of_steps = zip(zip(*reversed(of_steps), strict=True), wanted[4:], strict=True)
        d_steps = [torch.stack(x) if want else None for x, want in of_steps]
        return None, grad_z, grad_rho, d_precision, d_loc, *d_steps


def _rows(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _precision_gradient(away: Tensor, of_gradients: Tensor) -> Tensor:
    """Of few rows one product over all points, of many one a point."""
    features, points = away.shape[-1], away.shape[0]
    some = max(1, _MOST_ROWS * points * features // max(1, away.numel()))
    products = [_rows(a).mT @ _rows(b) for a, b in zip(away.split(some), of_gradients.split(some), strict=True)]
    product = functools.reduce(torch.add, products)
    return product + product.mT


def _differentiable_gradients(
    implementation: str, inputs: tuple[Tensor, ...], wanted: tuple[bool, ...], *cotangents: Tensor
) -> list[Tensor | None]:
    """Of the trajectory once more, recorded; views tell apart what is one tensor."""
    views = [x.view_as(x) for x in inputs]
    leaves = [x for x, want in zip(views, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(_step(implementation, *views), leaves, cotangents, create_graph=True))
    return [next(found) if want else None for want in wanted]


def _compose(
    update: Update, z: Tensor, rho: Tensor, doubled: Tensor, loc: Tensor, steps: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Step the basis rows ``[I, 0]`` and ``[0, I]`` of ``[z - loc, rho]``: the results' rows are the linear map.

    What is stepped is the displacement from the basis, as what is returned is ``z`` plus the displacement:
    ``(z - loc) + loc`` would round away what a small step does to ``z``, and to the gradient of ``loc``.
    """
    zeros = torch.zeros_like(doubled)
    at_basis = torch.cat([doubled, zeros])
    basis_rho = torch.cat([zeros, torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)])
    displacement, map_rho = leapfrog_trajectory(
        update,
        torch.zeros_like(at_basis),
        basis_rho,
        at_basis,
        lambda moved: torch.addmm(at_basis, moved, doubled),
        *steps,
    )
    state = torch.cat([z - loc, rho], dim=-1)
    return state @ displacement + z, state @ map_rho  # in this order: the result is laid out as the product
