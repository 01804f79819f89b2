"""Reference: the unrolled formula, its gradients of U by autograd, recorded like everything else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvae_kernels import _checks, _torch
from hvae_kernels.ops.gaussian_leapfrog.reference import trajectory

Potential = Callable[[Tensor], Tensor]


def leapfrog(
    z: Tensor, rho: Tensor, potential: Potential, step_size: Tensor, tempering: Tensor, *, gradient: str = "full"
) -> tuple[Tensor, Tensor]:
    """``z (..., d)`` with energies ``(...)``; shapes of the others as in :func:`gaussian_leapfrog`, replicas too."""
    full = gradient == "full"

    def field(position: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or _torch.functorch_is_active():
            grad, _ = functional_gradient(potential, position)
            return grad if full else grad.detach()
        if torch.is_inference_mode_enabled():  # where nothing is recorded, not even for the potential's own gradient
            with torch.inference_mode(False):
                return gradient_of(potential, position.clone(), False)[0]
        return gradient_of(potential, position, full and torch.is_grad_enabled())[0]

    return trajectory(z, rho, field, step_size, tempering)


def gradient_of(
    potential: Potential, z: Tensor, record: bool, function: str = "leapfrog", argument: str = "potential"
) -> tuple[Tensor, Tensor]:
    """``(grad U(z), U(z))``; with ``record`` the gradient is differentiable itself; errors name the argument."""
    with torch.enable_grad():
        # by an alias: what the potential has captured may depend on z too, and that way is not U's
        position = z.view_as(z) if z.requires_grad else z.detach().requires_grad_()
        energy = potential(position)
        if not isinstance(energy, Tensor) or not energy.requires_grad:
            raise _checks.value_error(function, argument, "a differentiable function of z", energy)
        (grad,) = torch.autograd.grad(energy.sum(), position, create_graph=record, allow_unused=True)
    if grad is None:
        expected = "a differentiable function of z"
        raise _checks.value_error(function, argument, expected, "energies that do not depend on it")
    return grad, energy


def functional_gradient(potential: Potential, z: Tensor) -> tuple[Tensor, Tensor]:
    """The same for ``torch.func`` and ``torch.compile``, which do not take ``torch.autograd.grad``."""

    def total(position: Tensor) -> tuple[Tensor, Tensor]:
        energy = potential(position)
        return energy.sum(), energy

    return torch.func.grad(total, has_aux=True)(z)
