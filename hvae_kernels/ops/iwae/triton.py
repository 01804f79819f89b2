"""GPU kernels of ``iwae_bound`` and its surrogates: a program owns its columns, which it reads again from the cache."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._triton.device import exponential, load, store
from hvae_kernels._triton.launch import cdiv, next_power_of_2, on_device_of

_ACCUMULATORS = {torch.float64: tl.float64}
_TILE = 1024


@triton.jit
def _log_weights(log_weights, start, column, samples, columns, DTYPE: tl.constexpr, BLOCK_SAMPLES: tl.constexpr):
    """``(offsets, mask, values)`` of a tile; what is not there is a weight of zero."""
    sample = start + tl.arange(0, BLOCK_SAMPLES).to(tl.int64)
    at = sample[:, None] * columns + column[None, :]
    mask = (sample < samples)[:, None] & (column < columns)[None, :]
    return at, mask, tl.where(mask, load(log_weights, at, mask, DTYPE), float("-inf"))


@triton.jit
def _shift(
    log_weights, column, samples, columns,
    DTYPE: tl.constexpr, BLOCK_SAMPLES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each column's largest value, 0 where that is infinite."""
    largest = tl.full((BLOCK_SAMPLES, BLOCK_COLUMNS), float("-inf"), DTYPE)
    for start in range(0, samples, BLOCK_SAMPLES):
        _, _, values = _log_weights(log_weights, start, column, samples, columns, DTYPE, BLOCK_SAMPLES)
        largest = tl.maximum(largest, values)
    shift = tl.max(largest, 0)
    return tl.where(tl.abs(shift) == float("inf"), 0.0, shift)[None, :]


@triton.jit
def _power(x, POWER: tl.constexpr):
    if POWER == 2:
        return x * x
    else:
        return x


@triton.jit
def _forward_kernel(
    log_weights, result, samples, columns, log_samples,
    POWER: tl.constexpr, DTYPE: tl.constexpr, BLOCK_SAMPLES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    shift = _shift(log_weights, column, samples, columns, DTYPE, BLOCK_SAMPLES, BLOCK_COLUMNS)
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
    if POWER:
        value = tl.sum(weighted, 0) / _power(tl.where(total == 0, 1.0, total), POWER)
    else:
        value = tl.sum(shift, 0).to(tl.float64) + (tl.log(total) - log_samples)
    store(result, column, value, column < columns)


@triton.jit
def _backward_kernel(
    grad, log_weights, d_log_weights, samples, columns,
    POWER: tl.constexpr, DTYPE: tl.constexpr, BLOCK_SAMPLES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    shift = _shift(log_weights, column, samples, columns, DTYPE, BLOCK_SAMPLES, BLOCK_COLUMNS)
    totals = tl.zeros((BLOCK_SAMPLES, BLOCK_COLUMNS), tl.float64)
    for start in range(0, samples, BLOCK_SAMPLES):
        _, _, values = _log_weights(log_weights, start, column, samples, columns, DTYPE, BLOCK_SAMPLES)
        totals += exponential(values - shift).to(tl.float64)
    total = tl.sum(totals, 0)
    total = tl.where(total == 0, 1.0, total).to(DTYPE)[None, :]
    g = load(grad, column, column < columns, DTYPE)[None, :]
    negligible = 1e-154 if tl.float64 == DTYPE else 1e-20
    for start in range(0, samples, BLOCK_SAMPLES):
        at, mask, values = _log_weights(log_weights, start, column, samples, columns, DTYPE, BLOCK_SAMPLES)
        weight = _power(exponential(values - shift) / total, POWER)
        store(d_log_weights, at, g * tl.where(weight < negligible, 0.0, weight), mask)


def _launch(kernel, tensors: tuple[Tensor, ...], log_weights: Tensor, *numbers: float, power: int) -> None:
    """Tiles of about ``_TILE`` elements; sizes alone decide."""
    if log_weights.numel() == 0:
        return
    samples = log_weights.shape[0]
    columns = log_weights.numel() // samples
    block_samples = min(64, next_power_of_2(samples))
    block_columns = min(_TILE // block_samples, next_power_of_2(columns))
    with on_device_of(log_weights):
        kernel[(cdiv(columns, block_columns),)](
            *tensors, samples, columns, *numbers, POWER=power, DTYPE=_ACCUMULATORS.get(log_weights.dtype, tl.float32),
            BLOCK_SAMPLES=block_samples, BLOCK_COLUMNS=block_columns,
        )  # fmt: skip


def iwae(log_weights: Tensor, power: int) -> Tensor:
    """Launch the forward kernel."""
    log_weights = log_weights.contiguous()
    result = log_weights.new_empty(log_weights.shape[1:])
    _launch(_forward_kernel, (log_weights, result), log_weights, math.log(log_weights.shape[0]), power=power)
    return result


def iwae_backward(grad: Tensor, log_weights: Tensor, power: int) -> Tensor:
    """Launch the backward kernel."""
    log_weights = log_weights.contiguous()
    d_log_weights = torch.empty_like(log_weights)
    _launch(_backward_kernel, (grad.contiguous(), log_weights, d_log_weights), log_weights, power=power)
    return d_log_weights
