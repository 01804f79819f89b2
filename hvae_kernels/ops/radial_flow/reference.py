"""Reference: the layers one after the other, as the literature writes them."""

from __future__ import annotations

from torch import Tensor


def _length(y: Tensor) -> Tensor:
    """``|y|``, whose derivatives at 0, of any order, count as 0: those of ``norm`` are NaN from the second on."""
    square = y.square().sum(-1)
    is_zero = square == 0
    return square.where(~is_zero, 1).sqrt().where(~is_zero, 0)


def radial_flow(z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """K radial layers; arguments as for the public function."""
    log_abs_det = z.new_zeros(z.shape[:-1])
    for k in range(len(alpha)):
        y = z - center[k]
        h = 1 / (alpha[k] + _length(y))
        stretch, along = 1 + beta[k] * h, 1 + alpha[k] * beta[k] * h * h
        log_abs_det = log_abs_det + (z.shape[-1] - 1) * stretch.abs().log() + along.abs().log()
        z = z + (beta[k] * h).unsqueeze(-1) * y
    return z + 0, log_abs_det  # without layers a new tensor all the same
