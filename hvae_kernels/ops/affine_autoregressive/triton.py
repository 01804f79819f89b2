"""GPU kernels of ``affine_autoregressive``: one pass each, row sums taken by the program that owns the rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._triton.device import load, store
from hvae_kernels._triton.gates import SIGMOID, gate
from hvae_kernels._triton.launch import cdiv, next_power_of_2, on_device_of
from hvae_kernels.ops.affine_autoregressive.autograd import INPUT_BITS, NEEDS_LOG_ABS_DET, NEEDS_OUTPUT

_ACCUMULATORS = {torch.float64: tl.float64}


@dataclass(frozen=True)
class Launch:
    """A program takes ``block_rows`` whole rows, ``block_features`` columns at a time; sizes alone decide."""

    block_rows: int
    block_features: int
    programs: int

    @property
    def blocks(self) -> dict[str, int]:
        """The kernels' block sizes."""
        return {"BLOCK_ROWS": self.block_rows, "BLOCK_FEATURES": self.block_features}


def launch(rows: int, features: int, *, tile: int = 1024) -> Launch:
    """Tiles of about ``tile`` elements: sixteen live values an element must fit the registers."""
    block_features = min(tile, next_power_of_2(features))
    block_rows = max(1, tile // block_features)
    return Launch(block_rows, block_features, cdiv(rows, block_rows))


@triton.jit
def _store(pointer, at, value, mask):
    """A result that is not wanted has no tensor."""
    if pointer is not None:
        store(pointer, at, value, mask)


@triton.jit
def _forward_kernel(
    z, shift, log_scale, output, log_abs_det, rows, features,
    GATE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    first, second = tl.full([1, 1], FIRST, DTYPE), tl.full([1, 1], SECOND, DTYPE)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    logs = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    for start in range(0, features, BLOCK_FEATURES):
        column = start + tl.arange(0, BLOCK_FEATURES)
        mask = (row < rows)[:, None] & (column < features)[None, :]
        at = row[:, None] * features + column[None, :]
        scale, rest, log, _, _, _, _ = gate(load(log_scale, at, mask, DTYPE), first, second, GATE)
        _store(output, at, scale * load(z, at, mask, DTYPE) + rest * load(shift, at, mask, DTYPE), mask)
        logs += tl.where(mask, log, 0.0)
    _store(log_abs_det, row, tl.sum(logs.to(tl.float64), 1), row < rows)


@triton.jit
def _backward_kernel(
    grad, grad_log, z, shift, log_scale, d_z, d_shift, d_log_scale, rows, features,
    GATE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    first, second = tl.full([1, 1], FIRST, DTYPE), tl.full([1, 1], SECOND, DTYPE)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    gl = load(grad_log, row, row < rows, DTYPE)[:, None]
    for start in range(0, features, BLOCK_FEATURES):
        column = start + tl.arange(0, BLOCK_FEATURES)
        mask = (row < rows)[:, None] & (column < features)[None, :]
        at = row[:, None] * features + column[None, :]
        scale, rest, _, d_scale, d_log, _, _ = gate(load(log_scale, at, mask, DTYPE), first, second, GATE)
        g = load(grad, at, mask, DTYPE)
        y = load(z, at, mask, DTYPE)
        if GATE == SIGMOID:
            y -= load(shift, at, mask, DTYPE)
        by_z, by_shift, by_scale = g, g, g  # zeros where it is absent, which might meet an infinite y or scale
        if grad is not None:
            by_z, by_shift, by_scale = g * scale, g * rest, g * d_scale * y
        _store(d_z, at, by_z, mask)
        _store(d_shift, at, by_shift, mask)
        _store(d_log_scale, at, by_scale + gl * d_log, mask)


@triton.jit
def _double_backward_kernel(
    h_z, h_shift, h_log_scale, grad, grad_log, z, shift, log_scale,
    gg, gg_log, d_z, d_shift, d_log_scale, rows, features,
    GATE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    first, second = tl.full([1, 1], FIRST, DTYPE), tl.full([1, 1], SECOND, DTYPE)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    gl = load(grad_log, row, row < rows, DTYPE)[:, None]
    logs = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    for start in range(0, features, BLOCK_FEATURES):
        column = start + tl.arange(0, BLOCK_FEATURES)
        mask = (row < rows)[:, None] & (column < features)[None, :]
        at = row[:, None] * features + column[None, :]
        s = load(log_scale, at, mask, DTYPE)
        scale, rest, _, d_scale, d_log, dd_scale, dd_log = gate(s, first, second, GATE)
        g = load(grad, at, mask, DTYPE)
        y = load(z, at, mask, DTYPE)
        hz = load(h_z, at, mask, DTYPE)
        hb = load(h_shift, at, mask, DTYPE)
        hs = load(h_log_scale, at, mask, DTYPE)
        pulled = hs * g * d_scale
        hy = hz
        pushed = tl.zeros_like(pulled)
        if GATE == SIGMOID:
            y -= load(shift, at, mask, DTYPE)
            hy = hz - hb
            pushed = -pulled
        _store(gg, at, hz * scale + hb * rest + hs * d_scale * y, mask)
        _store(d_z, at, pulled, mask)
        _store(d_shift, at, pushed, mask)
        _store(d_log_scale, at, g * d_scale * hy + hs * (g * dd_scale * y + gl * dd_log), mask)
        logs += hs * d_log
    _store(gg_log, row, tl.sum(logs.to(tl.float64), 1), row < rows)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else x.contiguous() for x in tensors]


def _row_sums(z: Tensor) -> Tensor:
    """Room for a value a row; zeros where no program would write them, having no features to add."""
    return (z.new_empty if z.shape[-1] else z.new_zeros)(z.shape[:-1])


def _or_empty(results: list[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if x is None else x for x in results)


def _launch(kernel, tensors: list[Tensor | None], z: Tensor, gate: int, first: float, second: float) -> None:
    if z.numel() == 0:
        return
    rows, features = z.numel() // z.shape[-1], z.shape[-1]
    plan = launch(rows, features)
    with on_device_of(z):
        kernel[(plan.programs,)](
            *tensors, rows, features, GATE=gate, FIRST=first, SECOND=second,
            DTYPE=_ACCUMULATORS.get(z.dtype, tl.float32), **plan.blocks,
        )  # fmt: skip


def affine_autoregressive(
    z: Tensor, shift: Tensor, log_scale: Tensor, gate: int, first: float, second: float
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel."""
    output, log_abs_det = z.new_empty(z.shape), _row_sums(z)
    _launch(_forward_kernel, [*_contiguous(z, shift, log_scale), output, log_abs_det], z, gate, first, second)
    return output, log_abs_det


def affine_autoregressive_backward(
    grad_output: Tensor | None, grad_log_abs_det: Tensor | None, z: Tensor, shift: Tensor | None, log_scale: Tensor,
    gate: int, first: float, second: float, needs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Launch the backward kernel."""
    inputs = _contiguous(grad_output, grad_log_abs_det, z, shift, log_scale)
    results = [z.new_empty(z.shape) if needs & bit else None for bit in INPUT_BITS]
    _launch(_backward_kernel, [*inputs, *results], z, gate, first, second)
    return _or_empty(results, z)


def affine_autoregressive_double_backward(
    h_z: Tensor | None, h_shift: Tensor | None, h_log_scale: Tensor | None,
    grad_output: Tensor | None, grad_log_abs_det: Tensor | None, z: Tensor, shift: Tensor | None, log_scale: Tensor,
    gate: int, first: float, second: float, needs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Launch the double backward kernel."""
    inputs = _contiguous(h_z, h_shift, h_log_scale, grad_output, grad_log_abs_det, z, shift, log_scale)
    gg_output, *d_inputs = (z.new_empty(z.shape) if needs & bit else None for bit in (NEEDS_OUTPUT, *INPUT_BITS))
    results = [gg_output, _row_sums(z) if needs & NEEDS_LOG_ABS_DET else None, *d_inputs]
    _launch(_double_backward_kernel, [*inputs, *results], z, gate, first, second)
    return _or_empty(results, z)
