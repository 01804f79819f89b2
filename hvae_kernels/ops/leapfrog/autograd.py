"""The reversible trajectory: nothing is kept of it, and the backward pass rebuilds it from its end.

All tensors here but ``params`` are double, whatever the potential computes in: a step that is undone in float32 leaves
its rounding behind, and that of ``1 / tempering`` adds up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hvae_kernels.ops.leapfrog.field import Field
from hvae_kernels.ops.leapfrog_update import leapfrog_update_vjp
from hvae_kernels.ops.leapfrog_update.trajectory import leapfrog_trajectory, update_of


class ReversibleLeapfrog(torch.autograd.Function):
    """``(z, rho, decay, kick, drift, *params) -> (z_K, rho_K)``; saves its results and the coefficients.

    ``grad`` is the gradient at ``z``, known already; ``full`` whether second-order terms count; ``on_drift`` is None
    or takes the distance of the rebuilt start from the true one, which is then kept too.
    """

    @staticmethod
    def forward(ctx, field: Field, implementation: str, full, on_drift, z, rho, grad, decay, kick, drift, *params):
        latest, update = [grad], update_of(implementation)

        def gradient(position: Tensor) -> Tensor:
            latest[0] = field(position)
            return latest[0]

        with field.held():
            end = leapfrog_trajectory(update, z, rho, grad, gradient, decay, kick, drift)
        field.settle(latest[0], end[1])
        ctx.field, ctx.implementation, ctx.full, ctx.on_drift = field, implementation, full, on_drift
        ctx.params = params  # the potential's own tensors; those saved only watch for changes in place
        ctx.save_for_backward(*end, decay, kick, drift, z if on_drift else None, *params)
        return end

    @staticmethod
    def backward(ctx, *cotangents):
        z, rho, *coefficients, start = ctx.saved_tensors[:6]
        with ctx.field.again(), torch.no_grad(), requiring(ctx.params if ctx.full else ()):
            # what is made in inference mode is no part of a graph
            cotangents = tuple(x.clone() if x.is_inference() else x for x in cotangents)
            gradients, rebuilt = _backward(ctx, *cotangents, z.detach(), rho.detach(), *coefficients)
        if ctx.on_drift:
            ctx.on_drift((rebuilt - start).abs().max())
        if torch.is_grad_enabled():
            name = "leapfrog: memory='reversible'"
            gradients = OnceDifferentiable.apply(name, len(gradients), *gradients, *ctx.saved_tensors, *cotangents)
        grad_z, grad_rho, *rest = gradients
        return (None, None, None, None, grad_z, grad_rho, None, *rest)


@contextlib.contextmanager
def requiring(params: Sequence[Tensor]) -> Iterator[None]:
    """Gradients of what has been frozen since the forward pass are taken too, and let go by autograd."""
    frozen = [x for x in params if not x.requires_grad]
    for x in frozen:
        x.requires_grad_()
    try:
        yield
    finally:
        for x in frozen:
            x.requires_grad_(False)


def _backward(
    ctx, grad_z: Tensor, grad_rho: Tensor, z: Tensor, rho: Tensor, decay: Tensor, kick: Tensor, drift: Tensor
) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of ``z, rho, decay, kick, drift, *params``, and the rebuilt start.

    At each point the gradient of U takes the trajectory one step back and, by its own backward pass, the cotangents.
    """
    totals: list[Any] = [torch.zeros_like(x) if ctx.full else None for x in ctx.params]
    of_coefficients, update = [], update_of(ctx.implementation)
    arrivals = torch.cat([torch.zeros_like(drift[:1]), drift[:-1]])  # the drift that led to each point
    for k in reversed(range(decay.shape[0])):
        z.requires_grad_(ctx.full)
        grad = ctx.field(z, record=ctx.full)
        if k == len(decay) - 1 and not ctx.on_drift:
            ctx.field.check(grad, rho, ", and on_drift takes the distance in place of this error")
        before = update(z, rho, grad, 1 / decay[k], -kick[k] / decay[k], -arrivals[k])
        step = decay[k], kick[k], drift[k]
        grad_rho, grad_grad, *of_step = leapfrog_update_vjp(
            grad_z, grad_rho, before[1], grad.detach(), *step, implementation=ctx.implementation
        )
        of_coefficients.append(of_step)
        if ctx.full and grad.requires_grad:  # not that of a linear potential
            with torch.enable_grad():  # as a scalar: for grad_outputs torch imports sympy, a second and 36 MB
                pairing = (grad * grad_grad).sum()
            results = products(pairing, (z, *ctx.params), ctx.field.shared, "leapfrog: potential")
            grad_z = grad_z + results[0]
            for total, product in zip(totals, results[1:], strict=True):
                total += product
        z, rho = before
    stacked = (torch.stack(column[::-1]) for column in zip(*of_coefficients, strict=True))
    return [grad_z, grad_rho, *stacked, *totals], z


def products(pairing: Tensor, wanted: tuple[Tensor, ...], shared: bool, whose: str) -> tuple[Tensor, ...]:
    """Derivatives of ``pairing`` by ``wanted``; ``shared``: the graph goes on to what others need too."""
    try:
        return torch.autograd.grad(pairing, wanted, materialize_grads=True, retain_graph=shared)
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        raise RuntimeError(
            f"{whose} cannot be differentiated twice, {error}: use gradient='detached', or other kernels "
            "(for attention those of torch.nn.attention.sdpa_kernel(SDPBackend.MATH))"
        ) from error


class OnceDifferentiable(torch.autograd.Function):
    """``(name, n, *gradients, *what they depend on) -> gradients``; differentiated it is an error, no missing term."""

    @staticmethod
    def forward(ctx, name, n, *tensors):
        ctx.name = name
        return tuple(x if x is None else x.clone() for x in tensors[:n])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.name} is differentiable once; memory='store' as often as the potential is")
