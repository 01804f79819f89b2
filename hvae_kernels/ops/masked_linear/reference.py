"""Reference: the layer in plain PyTorch, beside its formula. Any dtype, any device, differentiable to any order."""

from __future__ import annotations

import torch
from torch import Tensor


def connections(in_degrees: Tensor, out_degrees: Tensor, strict: bool = False) -> Tensor:
    """``mask[o, i] = out_degrees[o] >= in_degrees[i]``, ``>`` if strict."""
    return torch.gt(out_degrees[:, None], in_degrees) if strict else torch.ge(out_degrees[:, None], in_degrees)


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_degrees: Tensor, out_degrees: Tensor, strict: bool = False
) -> Tensor:
    """``y = x (mask * weight)^T + bias``; a selection, not a product, so that NaN behind the mask stays there."""
    return torch.nn.functional.linear(x, torch.where(connections(in_degrees, out_degrees, strict), weight, 0), bias)
