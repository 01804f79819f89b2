"""Reference: the importance-weighted bound in plain PyTorch. Any dtype, any device, differentiable to any order."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _scaled(log_weights: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(shift, exp(log_weights - shift), its sum)``, dimensions kept; shifted by the largest, where that is finite."""
    shift = log_weights.detach().amax(dim, keepdim=True)
    shift = torch.where(shift.isinf(), 0, shift)
    scaled = (log_weights - shift).exp()
    return shift, scaled, scaled.sum(dim, keepdim=True)


def normalized(log_weights: Tensor, dim: int) -> Tensor:
    """Weights that sum to 1; zeros where all are zero."""
    _, scaled, total = _scaled(log_weights, dim)
    return scaled / torch.where(total == 0, 1, total)


def iwae_bound(log_weights: Tensor, dim: int = 0) -> Tensor:
    """``log(sum_k w_k / K)``."""
    shift, _, total = _scaled(log_weights, dim)
    none = total == 0
    bound = shift + (torch.where(none, 1, total).log() - math.log(log_weights.shape[dim]))
    return torch.where(none, -math.inf, bound).squeeze(dim)


def surrogate(log_weights: Tensor, dim: int, power: int) -> Tensor:
    """``sum_k w~_k^power log w_k``, constant in ``w~``."""
    weights = normalized(log_weights.detach(), dim) ** power
    return torch.where(weights == 0, 0, weights * log_weights).sum(dim)
