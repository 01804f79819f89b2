"""GPU kernels of ``draw_read`` and ``draw_write``: a program holds an image of a sample, and takes filter by filter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._triton.device import exponential, load
from hvae_kernels._triton.launch import next_power_of_2, on_device_of
from hvae_kernels.ops.draw.autograd import ATTENTION, SOURCE


@triton.jit
def _filter(place, length, precision, pixel):
    """A filter at ``place``: values, and derivatives by the place and by log sigma^2; as in csrc/kernels/draw.h."""
    nearest = tl.minimum(tl.maximum(tl.floor(place + 0.5), 1.0), length)
    inside = pixel <= length
    step = tl.where(inside, pixel - nearest, 0.0)
    square = step * (step + 2.0 * (nearest - place))
    value = tl.where(inside, exponential(-0.5 * precision * square), 0.0)
    axis: tl.constexpr = len(value.shape) - 1
    value = value / tl.sum(value, axis, keep_dims=True)
    by_place = value * (step - tl.sum(value * step, axis, keep_dims=True)) * precision
    by_variance = value * (square - tl.sum(value * square, axis, keep_dims=True)) * (0.5 * precision)
    return value, by_place, by_variance


@triton.jit
def _sample_kernel(
    attention, image, patch, d_image, d_patch, d_attention, channels, height, width, size,
    WRITES: tl.constexpr, DTYPE: tl.constexpr, BLOCK_HEIGHT: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    numbers = attention + sample * 5
    center_x = 0.5 * (width + 1) * (tl.load(numbers).to(DTYPE) + 1.0)
    center_y = 0.5 * (height + 1) * (tl.load(numbers + 1).to(DTYPE) + 1.0)
    precision = exponential(-tl.load(numbers + 2).to(DTYPE))
    one = tl.full((), 1, DTYPE)  # sizes of 1 are Python's numbers here, which no method casts
    stride = (tl.maximum(width, height) - 1) * one / (tl.maximum(size - 1, 1) * one)
    stride = stride * exponential(tl.load(numbers + 3).to(DTYPE))
    log_scale = tl.load(numbers + 4).to(DTYPE)
    scale = exponential(-log_scale if WRITES else log_scale)
    half = 0.5 - 0.5 * (size * one)
    row, column, place = tl.arange(0, BLOCK_HEIGHT), tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_SIZE)
    filters = place < size
    places = center_x + (place.to(DTYPE) + half) * stride
    across, across_by_place, across_by_variance = _filter(
        places[:, None], width * one, precision, (column + 1).to(DTYPE)[None, :]
    )
    across = tl.where(filters[:, None], across, 0.0)
    pixels = row[:, None] * width + column[None, :]
    inside = (row < height)[:, None] & (column < width)[None, :]
    total = tl.zeros((BLOCK_SIZE,), DTYPE)
    by_x = tl.zeros((BLOCK_SIZE,), DTYPE)
    by_y = tl.zeros((BLOCK_SIZE,), DTYPE)
    by_variance = tl.zeros((BLOCK_SIZE,), DTYPE)
    for c in range(0, channels):
        at_image = (sample * channels + c) * height * width
        at_patch = (sample * channels + c) * size * size
        x = load(image, at_image + pixels, inside, DTYPE)
        spread_over = tl.zeros((BLOCK_HEIGHT, BLOCK_WIDTH), DTYPE)
        mixed = tl.zeros((BLOCK_SIZE, BLOCK_WIDTH), DTYPE)
        for i in range(0, size):
            center = center_y + (i + half) * stride
            down, down_by_place, down_by_variance = _filter(center, height * one, precision, (row + 1).to(DTYPE))
            here = place == i
            if image is not None:
                seen = tl.sum(down[:, None] * x, 0)
            if d_patch is not None:
                result = scale * tl.sum(across * seen[None, :], 1)
                tl.store(d_patch + at_patch + i * size + place, result, mask=filters)
            if patch is not None:
                p = load(patch, at_patch + i * size + place, filters, DTYPE)
                spread = tl.sum(p[:, None] * across, 0)
            if d_image is not None:
                spread_over += down[:, None] * spread[None, :]
            if d_attention is not None:
                mixed += p[:, None] * seen[None, :]
                total += tl.where(here, tl.sum(spread * seen, 0), 0.0)
                moved = tl.sum(down_by_place[:, None] * x, 0)
                by_y += tl.where(here, tl.sum(spread * moved, 0), 0.0)
                wider = tl.sum(down_by_variance[:, None] * x, 0)
                by_variance += tl.where(here, tl.sum(spread * wider, 0), 0.0)
        if d_image is not None:
            tl.store(d_image + at_image + pixels, scale * spread_over, mask=inside)
        if d_attention is not None:
            by_x += tl.sum(mixed * across_by_place, 1)
            by_variance += tl.sum(mixed * across_by_variance, 1)
    if d_attention is not None:
        to = d_attention + sample * 5
        tl.store(to, scale * 0.5 * (width + 1) * tl.sum(by_x, 0))
        tl.store(to + 1, scale * 0.5 * (height + 1) * tl.sum(by_y, 0))
        tl.store(to + 2, scale * tl.sum(by_variance, 0))
        tl.store(to + 3, scale * stride * tl.sum((place.to(DTYPE) + half) * (by_x + by_y), 0))
        tl.store(to + 4, (-scale if WRITES else scale) * tl.sum(total, 0))


def _launch(
    writes: bool,
    attention: Tensor,
    image: Tensor | None,
    patch: Tensor | None,
    d_image: Tensor | None,
    d_patch: Tensor | None,
    d_attention: Tensor | None,
    sizes: tuple[int, int, int, int],
) -> None:
    channels, height, width, size = sizes
    if not len(attention):
        return
    block_height, block_width = next_power_of_2(height), next_power_of_2(width)
    if d_attention is None:  # the gradient by an image does not depend on it, nor that by a patch
        image, patch = None if d_patch is None else image, None if d_image is None else patch
    given = [x if x is None else x.contiguous() for x in (attention, image, patch)]
    with on_device_of(attention):
        _sample_kernel[(len(attention),)](
            *given, d_image, d_patch, d_attention, channels, height, width, size,
            WRITES=writes, DTYPE=tl.float64 if attention.dtype == torch.float64 else tl.float32,
            BLOCK_HEIGHT=block_height, BLOCK_WIDTH=block_width, BLOCK_SIZE=next_power_of_2(size),
            num_warps=min(16, max(4, block_height * block_width // 512)),
        )  # fmt: skip


def draw_read(images: Tensor, attention: Tensor, size: int) -> Tensor:
    """Launch the kernel for the patch."""
    result = images.new_empty((*images.shape[:2], size, size))
    _launch(False, attention, images, None, None, result, None, (*images.shape[1:], size))
    return result


def draw_write(patch: Tensor, attention: Tensor, height: int, width: int) -> Tensor:
    """Launch the kernel for the image."""
    result = patch.new_empty((*patch.shape[:2], height, width))
    _launch(True, attention, None, patch, result, None, None, (patch.shape[1], height, width, patch.shape[2]))
    return result


def _wanted(like: Tensor, bit: int) -> tuple[Tensor, Tensor | None]:
    """What is returned, and what the kernel writes."""
    result = like.new_empty(like.shape if bit else 0)
    return result, result if bit else None


def draw_read_backward(grad: Tensor, images: Tensor, attention: Tensor, needs: int) -> tuple[Tensor, Tensor]:
    """Launch the kernel for the gradients that are wanted."""
    (d_images, to_images), (d_attention, to_attention) = (
        _wanted(images, needs & SOURCE),
        _wanted(attention, needs & ATTENTION),
    )
    sizes = (*images.shape[1:], grad.shape[2])
    _launch(False, attention, images, grad, to_images, None, to_attention, sizes)
    return d_images, d_attention


def draw_write_backward(grad: Tensor, patch: Tensor, attention: Tensor, needs: int) -> tuple[Tensor, Tensor]:
    """Launch the kernel for the gradients that are wanted."""
    (d_patch, to_patch), (d_attention, to_attention) = (
        _wanted(patch, needs & SOURCE),
        _wanted(attention, needs & ATTENTION),
    )
    sizes = (patch.shape[1], *grad.shape[2:], patch.shape[2])
    _launch(True, attention, grad, patch, None, to_patch, to_attention, sizes)
    return d_patch, d_attention
