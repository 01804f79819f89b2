"""``draw_read`` and ``draw_write``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.ops._row import Case, Row
from hvae_kernels import functional

#: Filters along a side, by the pixels of an image's.
SIZES = {28: 5, 100: 12}
SIDES = {size: side for side, size in SIZES.items()}
CASES = (
    Case("(128, 1, 28, 28), N = 5", {"batch": 128, "side": 28}),
    Case("(64, 1, 100, 100), N = 12", {"batch": 64, "side": 100}),
)


def _filters(attention: Tensor, size: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both banks in memory; rows by softmax, as a sum that underflows needs no guard there."""
    x, y, log_variance, log_stride, log_gamma = attention[:, :, None, None].unbind(1)
    stride = (side - 1) / (size - 1) * log_stride.exp()
    places = (torch.arange(size, dtype=attention.dtype, device=attention.device) + 0.5 - size / 2)[:, None]
    pixels = torch.arange(1, side + 1, dtype=attention.dtype, device=attention.device)

    def bank(center: Tensor) -> Tensor:
        distance = pixels - (side + 1) / 2 * (center + 1) - places * stride
        return torch.softmax(-(distance**2) / (2 * log_variance.exp()), -1).unsqueeze(1)

    return bank(y), bank(x), log_gamma.exp().unsqueeze(1)


def _read(images: Tensor, attention: Tensor) -> tuple[Tensor]:
    side = images.shape[-1]
    down, across, gamma = _filters(attention, SIZES[side], side)
    return (gamma * (down @ images @ across.mT),)


def _write(patch: Tensor, attention: Tensor) -> tuple[Tensor]:
    size = patch.shape[-1]
    down, across, gamma = _filters(attention, size, SIDES[size])
    return (down.mT @ patch @ across / gamma,)


def _read_by_us(images: Tensor, attention: Tensor) -> tuple[Tensor]:
    return (functional.draw_read(images, attention, SIZES[images.shape[-1]]),)


def _write_by_us(patch: Tensor, attention: Tensor) -> tuple[Tensor]:
    side = SIDES[patch.shape[-1]]
    return (functional.draw_write(patch, attention, (side, side)),)


def _inputs(reads: bool) -> Callable[..., tuple[Tensor, ...]]:
    def inputs(dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, side: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        length = side if reads else SIZES[side]
        source = torch.rand(batch, 1, length, length, generator=generator)
        return tuple(x.to(dtype).to(device) for x in (source, torch.randn(batch, 5, generator=generator) / 3))

    return inputs


def _images(times: int) -> Callable[..., int]:
    return lambda element_size, batch, side: times * element_size * batch * side * side


def _flops(forward: int, backward: int) -> Callable[..., int]:
    return lambda direction, batch, side: (
        {"forward": forward, "backward": backward}[direction] * SIZES[side] * batch * side * side
    )


ROWS = (
    Row(
        name="draw_read",
        op=_read_by_us,
        formula=_read,
        inputs=_inputs(reads=True),
        forward_bytes=_images(1),  # read the images
        backward_bytes=_images(2),  # and write their gradient
        flops=_flops(2, 6),
        cases=CASES,
    ),
    Row(
        name="draw_write",
        op=_write_by_us,
        formula=_write,
        inputs=_inputs(reads=False),
        forward_bytes=_images(1),  # write the images
        backward_bytes=_images(1),  # read their cotangent
        flops=_flops(2, 4),
        cases=CASES,
    ),
)
