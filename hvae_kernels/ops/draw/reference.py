"""Reference: the filter banks of Gregor et al. 2015, section 3.2, as matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def filters(attention: Tensor, size: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(F_Y, F_X, gamma)`` of shapes ``(B, 1, size, height)``, ``(B, 1, size, width)`` and ``(B, 1, 1, 1)``.

    Rows are softmaxes of ``-(a - mu)^2 / 2 sigma^2``: they sum to 1 wherever the grid lies, however narrow the filters.
    """
    x, y, log_variance, log_stride, log_gamma = attention.unbind(-1)
    stride = (max(width, height) - 1) / max(size - 1, 1) * log_stride.exp()
    places = torch.arange(size, dtype=attention.dtype, device=attention.device) + 0.5 - size / 2

    def bank(center: Tensor, length: int) -> Tensor:
        pixels = torch.arange(1, length + 1, dtype=attention.dtype, device=attention.device)
        centers = 0.5 * (length + 1) * (center + 1).unsqueeze(-1) + places * stride.unsqueeze(-1)
        distance = pixels - centers.unsqueeze(-1)
        return torch.softmax(-0.5 * distance.square() * (-log_variance).exp()[:, None, None], -1).unsqueeze(1)

    return bank(y, height), bank(x, width), log_gamma.exp()[:, None, None, None]


def draw_read(images: Tensor, attention: Tensor, size: int) -> Tensor:
    """``gamma F_Y images F_X^T``; arguments as for the public function."""
    down, across, gamma = filters(attention, size, *images.shape[-2:])
    return gamma * (down @ images @ across.mT)


def draw_write(patch: Tensor, attention: Tensor, image_size: tuple[int, int]) -> Tensor:
    """``F_Y^T patch F_X / gamma``; arguments as for the public function."""
    down, across, gamma = filters(attention, patch.shape[-1], *image_size)
    return down.mT @ patch @ across / gamma
