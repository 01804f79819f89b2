"""Reference: one update in plain PyTorch, beside its formula. Any dtype, any device, differentiable to any order."""

from __future__ import annotations

from torch import Tensor


def leapfrog_update(
    z: Tensor, rho: Tensor, grad: Tensor, decay: Tensor, kick: Tensor, drift: Tensor
) -> tuple[Tensor, Tensor]:
    """``rho' = decay rho - kick grad``, ``z' = z + drift rho'``."""
    shift, rho = increment(rho, grad, decay, kick, drift)
    return z + shift, rho


def increment(rho: Tensor, grad: Tensor, decay: Tensor, kick: Tensor, drift: Tensor) -> tuple[Tensor, Tensor]:
    """``(z' - z, rho')``: all that derivatives are about, as ``z`` only ever passes through."""
    rho = decay * rho - kick * grad
    return drift * rho, rho
