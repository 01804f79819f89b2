"""Reference: the sample in plain PyTorch, beside its formula. Any dtype, any device, differentiable to any order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear


def local_reparam_linear(
    x: Tensor,
    weight_loc: Tensor,
    weight_log_scale: Tensor,
    bias_loc: Tensor | None,
    bias_log_scale: Tensor | None,
    noise: Tensor,
) -> Tensor:
    """``y = x loc^T + b + sqrt(x^2 exp(2 log_scale)^T + exp(2 b_log_scale)) noise``."""
    bias_variance = None if bias_log_scale is None else (2 * bias_log_scale).exp()
    variance = linear(x.square(), (2 * weight_log_scale).exp(), bias_variance)
    certain = variance == 0  # the square root has no derivative there; ours is 0
    std = torch.where(certain, 0, torch.where(certain, 1, variance).sqrt())
    return linear(x, weight_loc, bias_loc) + std * noise
