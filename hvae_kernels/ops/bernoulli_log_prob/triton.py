"""GPU kernels of ``bernoulli_log_prob``: one pass each, row sums taken by the program that owns the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._triton.device import decay, load, log1p_unit, store
from hvae_kernels._triton.launch import cdiv, next_power_of_2, on_device_of

_ACCUMULATORS = {torch.float64: tl.float64}
_TILE = 1024


@triton.jit
def _rows(outer, rows, total, BLOCK_ROWS: tl.constexpr):
    """This program's rows, those of the value that go with them, and which there are."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    events = tl.full([], 1, tl.int64) * outer * rows
    return row, row // events * rows + row % rows, row < total


@triton.jit
def _logistic(x):
    """The logistic function of ``-|x|`` and of ``|x|``."""
    e = decay(x)
    large = 1.0 / (1.0 + e)
    return e * large, large


@triton.jit
def _wrong(logit, x):
    """The weight of the unlikely outcome: what of ``x`` speaks against the logit."""
    return tl.where(logit > 0, 1.0 - x, x)


@triton.jit
def _residual(logit, x, small):
    """``x - sigmoid(logit)``, without cancellation."""
    wrong = _wrong(logit, x)
    return tl.where(logit > 0, small - wrong, wrong - small)


@triton.jit
def _forward_kernel(
    logits, value, log_prob, outer, rows, total, features,
    DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    row, value_row, inside = _rows(outer, rows, total, BLOCK_ROWS)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    for start in range(0, features, BLOCK_FEATURES):
        column = start + tl.arange(0, BLOCK_FEATURES)
        mask = inside[:, None] & (column < features)[None, :]
        logit = load(logits, row[:, None] * features + column[None, :], mask, DTYPE)
        wrong = _wrong(logit, load(value, value_row[:, None] * features + column[None, :], mask, DTYPE))
        linear = tl.where(wrong == 0, 0.0, wrong * tl.abs(logit))  # 0 log 0 is 0
        sums += tl.where(mask, linear + log1p_unit(decay(logit)), 0.0)
    store(log_prob, row, -tl.sum(sums.to(tl.float64), 1), inside)


@triton.jit
def _backward_kernel(
    grad, logits, value, d_logits, outer, rows, total, features,
    DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    row, value_row, inside = _rows(outer, rows, total, BLOCK_ROWS)
    g = load(grad, row, inside, DTYPE)[:, None]
    for start in range(0, features, BLOCK_FEATURES):
        column = start + tl.arange(0, BLOCK_FEATURES)
        mask = inside[:, None] & (column < features)[None, :]
        at = row[:, None] * features + column[None, :]
        logit = load(logits, at, mask, DTYPE)
        x = load(value, value_row[:, None] * features + column[None, :], mask, DTYPE)
        small, _ = _logistic(logit)
        store(d_logits, at, g * _residual(logit, x, small), mask)


@triton.jit
def _double_backward_kernel(
    h, grad, logits, value, d_grad, d_logits, outer, rows, total, features,
    DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    row, value_row, inside = _rows(outer, rows, total, BLOCK_ROWS)
    g = load(grad, row, inside, DTYPE)[:, None]
    sums = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    for start in range(0, features, BLOCK_FEATURES):
        column = start + tl.arange(0, BLOCK_FEATURES)
        mask = inside[:, None] & (column < features)[None, :]
        at = row[:, None] * features + column[None, :]
        logit = load(logits, at, mask, DTYPE)
        x = load(value, value_row[:, None] * features + column[None, :], mask, DTYPE)
        direction = load(h, at, mask, DTYPE)
        small, large = _logistic(logit)
        sums += direction * _residual(logit, x, small)
        store(d_logits, at, -g * direction * (small * large), mask)
    store(d_grad, row, tl.sum(sums.to(tl.float64), 1), inside)


def _launch(kernel, tensors: tuple[Tensor, ...], logits: Tensor, value: Tensor, *results: Tensor) -> None:
    """Tiles of whole rows, ``_TILE`` elements at a time; sizes alone decide."""
    if logits.numel() == 0:
        return
    _, outer, rows, features = logits.shape
    total = logits.numel() // features
    block_features = min(_TILE, next_power_of_2(features))
    block_rows = max(1, _TILE // block_features)
    value = value.view(torch.uint8) if value.dtype is torch.bool else value
    inputs = (x.contiguous() for x in (*tensors, logits, value))
    with on_device_of(logits):
        kernel[(cdiv(total, block_rows),)](
            *inputs, *results, outer, rows, total, features,
            DTYPE=_ACCUMULATORS.get(logits.dtype, tl.float32), BLOCK_ROWS=block_rows, BLOCK_FEATURES=block_features,
        )  # fmt: skip


def _row_values(logits: Tensor) -> Tensor:
    """Room for a value a row; zeros where no program would write them, there being nothing to add."""
    return (logits.new_empty if logits.shape[-1] else logits.new_zeros)(logits.shape[:-1])


def bernoulli_log_prob(logits: Tensor, value: Tensor) -> Tensor:
    """Launch the forward kernel."""
    log_prob = _row_values(logits)
    _launch(_forward_kernel, (), logits, value, log_prob)
    return log_prob


def bernoulli_log_prob_backward(grad: Tensor, logits: Tensor, value: Tensor) -> Tensor:
    """Launch the backward kernel."""
    d_logits = logits.new_empty(logits.shape)
    _launch(_backward_kernel, (grad,), logits, value, d_logits)
    return d_logits


def bernoulli_log_prob_double_backward(h: Tensor, grad: Tensor, logits: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the double backward kernel."""
    d_grad, d_logits = _row_values(logits), logits.new_empty(logits.shape)
    _launch(_double_backward_kernel, (h, grad), logits, value, d_grad, d_logits)
    return d_grad, d_logits
