"""Reference: the unrolled formula, its gradients of U by autograd, recorded like everything else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvae_kernels import _checks
from hvae_kernels.ops.gaussian_leapfrog.reference import trajectory

Potential = Callable[[Tensor], Tensor]


def leapfrog(
    z: Tensor, rho: Tensor, potential: Potential, step_size: Tensor, tempering: Tensor, *, gradient: str = "full"
) -> tuple[Tensor, Tensor]:
    """``z (..., d)`` with energies ``(...)``; shapes of the others as in :func:`gaussian_leapfrog`, replicas too."""
    record = torch.is_grad_enabled() and gradient == "full"
    return trajectory(z, rho, lambda position: gradient_of(potential, position, record)[0], step_size, tempering)


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
