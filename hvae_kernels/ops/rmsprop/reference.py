"""Reference: ``clip_grad_norm_`` of each row, then ``torch.optim.RMSprop``."""

from __future__ import annotations

import torch
from torch import Tensor


def rmsprop_step_(
    parameter: Tensor,
    gradient: Tensor,
    square_average: Tensor,
    learning_rate: float,
    alpha: float,
    eps: float,
    max_norm: float,
) -> bool:
    """Arguments as for the public function."""
    norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True, dtype=torch.float64)
    if not norm.isfinite().all():
        return False
    gradient = gradient * (max_norm / (norm + 1e-6)).clamp_(max=1.0).to(gradient.dtype)
    square_average.mul_(alpha).addcmul_(gradient, gradient, value=1 - alpha)
    parameter.addcdiv_(gradient, square_average.sqrt().add_(eps), value=-learning_rate)
    return True
