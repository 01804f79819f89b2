"""GPU kernels of ``iwae_bound`` and its surrogates: a program owns its columns, which it reads again from the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._triton.device import exponential, load, store
from hvae_kernels._triton.launch import cdiv, next_power_of_2, on_device_of
from hvae_kernels.ops.iwae.autograd import kept_for

_ACCUMULATORS = {torch.float64: tl.float64}
#: Numbers of a tile, and columns: a sector of memory at least, fewer where too few programs would be at work.
_TILE, _COLUMNS, _FEWEST_COLUMNS, _PROGRAMS = 4096, 64, 8, 256


@triton.jit
def _log_weights(log_weights, start, column, samples, columns, DTYPE: tl.constexpr, BLOCK_SAMPLES: tl.constexpr):
    """``(offsets, mask, values)`` of a tile; what is not there is a weight of zero."""
    sample = start + tl.arange(0, BLOCK_SAMPLES).to(tl.int64)
    at = sample[:, None] * columns + column[None, :]
    mask = (sample < samples)[:, None] & (column < columns)[None, :]
    return at, mask, tl.where(mask, load(log_weights, at, mask, DTYPE), float("-inf"))


@triton.jit
def _largest(
    log_weights, column, samples, columns,
    DTYPE: tl.constexpr, BLOCK_SAMPLES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each column's largest value."""
    largest = tl.full((BLOCK_SAMPLES, BLOCK_COLUMNS), float("-inf"), DTYPE)
    for start in range(0, samples, BLOCK_SAMPLES):
        _, _, values = _log_weights(log_weights, start, column, samples, columns, DTYPE, BLOCK_SAMPLES)
        largest = tl.maximum(largest, values)
    return tl.max(largest, 0)


@triton.jit
def _shift(largest):
    """What weights are taken relative to: 0 where the largest is infinite."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, largest)[None, :]


@triton.jit
def _power(x, POWER: tl.constexpr):
    if POWER == 2:
        return x * x
    else:
        return x


@triton.jit
def _forward_kernel(
    log_weights, result, kept, samples, columns,
    KEEPS: tl.constexpr, POWER: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_SAMPLES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    largest = _largest(log_weights, column, samples, columns, DTYPE, BLOCK_SAMPLES, BLOCK_COLUMNS)
    shift = _shift(largest)
    totals = tl.zeros((BLOCK_SAMPLES, BLOCK_COLUMNS), tl.float64)
    weighted = tl.zeros((BLOCK_SAMPLES, BLOCK_COLUMNS), tl.float64)
    for start in range(0, samples, BLOCK_SAMPLES):
        _, _, values = _log_weights(log_weights, start, column, samples, columns, DTYPE, BLOCK_SAMPLES)
        weight = exponential(values - shift).to(tl.float64)
        totals += weight
        if POWER:
            weight = _power(weight, POWER)
            weighted += tl.where(weight == 0, 0.0, weight * values)
    total = tl.sum(totals, 0)
    if KEEPS:
        store(kept, column, largest, column < columns)
        store(kept, columns + column, 1 / tl.where(total == 0, 1.0, total), column < columns)
    if POWER:
        value = tl.sum(weighted, 0) / _power(tl.where(total == 0, 1.0, total), POWER)
    else:
        count = tl.zeros_like(total) + samples  # a number of Python's would be in single precision on a GPU
        value = tl.sum(shift, 0).to(tl.float64) + (tl.log(total) - tl.log(count))
    store(result, column, value, column < columns)


@triton.jit
def _backward_kernel(
    grad, log_weights, kept, d_log_weights, samples, columns,
    POWER: tl.constexpr, DTYPE: tl.constexpr, BLOCK_SAMPLES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    shift = _shift(load(kept, column, column < columns, DTYPE))
    inverse = load(kept, columns + column, column < columns, DTYPE)[None, :]
    g = load(grad, column, column < columns, DTYPE)[None, :]
    negligible = 1e-154 if tl.float64 == DTYPE else 1e-20
    for start in range(0, samples, BLOCK_SAMPLES):
        at, mask, values = _log_weights(log_weights, start, column, samples, columns, DTYPE, BLOCK_SAMPLES)
        weight = _power(exponential(values - shift) * inverse, POWER)
        store(d_log_weights, at, g * tl.where(weight < negligible, 0.0, weight), mask)


def _launch(kernel, tensors: tuple[Tensor, ...], log_weights: Tensor, **constants: int) -> None:
    """Tiles of at most ``_TILE`` elements; sizes alone decide."""
    if log_weights.numel() == 0:
        return
    samples = log_weights.shape[0]
    columns = log_weights.numel() // samples
    block_columns = min(_COLUMNS, next_power_of_2(columns))
    while block_columns > _FEWEST_COLUMNS and cdiv(columns, block_columns) < _PROGRAMS:
        block_columns //= 2
    block_samples = min(_TILE // block_columns, next_power_of_2(samples))
    with on_device_of(log_weights):
        kernel[(cdiv(columns, block_columns),)](
            *tensors, samples, columns, **constants,
            DTYPE=_ACCUMULATORS.get(log_weights.dtype, tl.float32), BLOCK_SAMPLES=block_samples,
            BLOCK_COLUMNS=block_columns, num_warps=8 if block_samples * block_columns > 1024 else 4,
        )  # fmt: skip


def iwae(log_weights: Tensor, power: int, keeps: bool) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel."""
    log_weights = log_weights.contiguous()
    result, kept = log_weights.new_empty(log_weights.shape[1:]), kept_for(log_weights, keeps)
    _launch(_forward_kernel, (log_weights, result, kept), log_weights, KEEPS=keeps, POWER=power)
    return result, kept


def iwae_backward(grad: Tensor, log_weights: Tensor, kept: Tensor, power: int) -> Tensor:
    """Launch the backward kernel."""
    log_weights = log_weights.contiguous()
    d_log_weights = torch.empty_like(log_weights)
    tensors = (grad.contiguous(), log_weights, kept.contiguous(), d_log_weights)
    _launch(_backward_kernel, tensors, log_weights, POWER=power)
    return d_log_weights
