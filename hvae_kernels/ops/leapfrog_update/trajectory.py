"""A whole trajectory out of K + 1 updates, in the notation of :func:`leapfrog_update`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hvae_kernels.ops.leapfrog_update import autograd, reference

Update = Callable[..., tuple[Tensor, Tensor]]


def update_of(implementation: str) -> Update:
    """:func:`leapfrog_update` without its checks."""
    if implementation == "reference":
        return reference.leapfrog_update
    return functools.partial(autograd.call, implementation)


def coefficients(step_size: Tensor, tempering: Tensor, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """``decay (K + 1,)``, ``kick (K + 1, d)``, ``drift (K + 1, d)``; ``step_size`` is ``()``, ``(d,)`` or ``(K, d)``.

    The half kick that ends step k and the one that begins step k + 1 share a gradient: one kick
    ``(tempering_k step_k + step_{k+1}) / 2``, with ``step_0 = step_{K+1} = 0``.
    """
    steps = step_size.expand(tempering.shape[0], features)
    none = steps.new_zeros(1, features)
    drift = torch.cat([steps, none])
    decay = torch.cat([tempering.new_ones(1), tempering])
    kick = (torch.cat([none, tempering[:, None] * steps]) + drift) / 2
    return decay, kick, drift


def leapfrog_trajectory(
    update: Update,
    z: Tensor,
    rho: Tensor,
    grad: Tensor,
    gradient: Callable[[Tensor], Tensor],
    decay: Tensor,
    kick: Tensor,
    drift: Tensor,
) -> tuple[Tensor, Tensor]:
    """From ``grad``, the gradient at ``z``; the last update moves only ``rho``."""
    *steps, last = zip(decay.unbind(), kick.unbind(), drift.unbind(), strict=True)
    for step in steps:
        z, rho = update(z, rho, grad, *step)
        grad = gradient(z)
    return z, update(z, rho, grad, *last)[1]
