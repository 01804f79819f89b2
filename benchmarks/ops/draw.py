"""``draw_read`` and ``draw_write``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.ops._row import Case, Row
from hvae_kernels import functional

CASES = (
    Case("(128, 1, 28, 28), N = 5", {"batch": 128, "side": 28, "size": 5}),
    Case("(64, 1, 100, 100), N = 12", {"batch": 64, "side": 100, "size": 12}),
)


def _filters(attention: Tensor, size: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """As public code has them, but right: both banks in memory, Z kept from 0 by a constant."""
    x, y, log_variance, log_stride, log_gamma = attention[:, :, None, None].unbind(1)
    stride = (side - 1) / (size - 1) * log_stride.exp()
    places = (torch.arange(size, dtype=attention.dtype, device=attention.device) + 0.5 - size / 2)[:, None]
    pixels = torch.arange(1, side + 1, dtype=attention.dtype, device=attention.device)

    def bank(center: Tensor) -> Tensor:
        weights = torch.exp(
            -((pixels - (side + 1) / 2 * (center + 1) - places * stride) ** 2) / (2 * log_variance.exp())
        )
        return (weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)).unsqueeze(1)

    return bank(y), bank(x), log_gamma.exp().unsqueeze(1)


def _read(images: Tensor, attention: Tensor, size: int) -> tuple[Tensor]:
    down, across, gamma = _filters(attention, size, images.shape[-1])
    return (gamma * (down @ images @ across.mT),)


def _write(patch: Tensor, attention: Tensor, side: int) -> tuple[Tensor]:
    down, across, gamma = _filters(attention, patch.shape[-1], side)
    return (down.mT @ patch @ across / gamma,)


def _inputs(source: str) -> Callable[..., tuple[Tensor, ...]]:
    def inputs(
        dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, side: int, size: int
    ) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        length = side if source == "images" else size
        tensors = (
            torch.rand(batch, 1, length, length, generator=generator),
            torch.randn(batch, 5, generator=generator) / 3,
        )
        return (*(x.to(dtype).to(device) for x in tensors), size if source == "images" else side)

    return inputs


def _images_once(element_size: int, batch: int, side: int, size: int) -> int:
    return element_size * batch * side * side


def _flops(forward: int, backward: int) -> Callable[..., int]:
    return lambda direction, batch, side, size: (
        {"forward": forward, "backward": backward}[direction] * size * batch * side * side
    )


ROWS = (
    Row(
        name="draw_read",
        op=lambda images, attention, size: (functional.draw_read(images, attention, size),),
        formula=_read,
        inputs=_inputs("images"),
        forward_bytes=_images_once,  # read the images
        backward_bytes=lambda *sizes, **named: 2 * _images_once(*sizes, **named),  # and write their gradient
        flops=_flops(2, 8),
        cases=CASES,
        n_constants=1,
    ),
    Row(
        name="draw_write",
        op=lambda patch, attention, side: (functional.draw_write(patch, attention, (side, side)),),
        formula=_write,
        inputs=_inputs("patch"),
        forward_bytes=_images_once,  # write the images
        backward_bytes=_images_once,  # read their cotangent
        flops=_flops(2, 6),
        cases=CASES,
        n_constants=1,
    ),
)
