"""GPU kernels of ``masked_linear``: matrix products that compare degrees as they go and skip empty tiles.

No mask is ever stored. A program looks at the degrees along its sum first: where no term is connected it stops, where
all are it multiplies as if there were no mask, and between these it compares the degrees of its tile beside the tile.
Weights behind the mask have no influence, sums run in one fixed order, and there are no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._checks import HALF_PRECISION
from hvae_kernels._triton.device import load
from hvae_kernels._triton.launch import cdiv, interpreted, next_power_of_2, on_device_of

_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
#: Large tiles reuse more of what they read, but there should be about as many as a large GPU has multiprocessors. Half
#: precision goes to tensor cores, which want larger ones.
FEWEST_SIDE, MANY_PROGRAMS = 16, 128
SIDES = ((64, 64), (32, 64), (32, 32))
HALF_SIDES = ((128, 128), (64, 128), *SIDES)
BLOCK_TERMS, HALF_BLOCK_TERMS = 32, 64
#: Degrees that a program looks at together.
_LOOK = tl.constexpr(512)


@dataclass(frozen=True)
class Launch:
    """Result tiles of ``block_rows x block_columns``; sizes alone decide, so sums are the same on every device."""

    block_rows: int
    block_columns: int
    block_terms: int
    grid: tuple[int, int]

    @property
    def options(self) -> dict[str, int]:
        """Block sizes and, for the largest tiles, two groups of warps and more tiles on their way."""
        blocks = {"BLOCK_ROWS": self.block_rows, "BLOCK_COLUMNS": self.block_columns, "BLOCK_TERMS": self.block_terms}
        return blocks | ({"num_warps": 8, "num_stages": 4} if self.block_rows * self.block_columns > 8192 else {})


def launch(rows: int, columns: int, half: bool = False) -> Launch:
    """The largest tiles that make many programs of a ``(rows, columns)`` result, or else the smallest."""
    for row_side, column_side in HALF_SIDES if half else SIDES:
        block_rows = min(row_side, max(FEWEST_SIDE, next_power_of_2(rows)))
        block_columns = min(column_side, max(FEWEST_SIDE, next_power_of_2(columns)))
        grid = cdiv(rows, block_rows), cdiv(columns, block_columns)
        if grid[0] * grid[1] >= MANY_PROGRAMS:
            break
    return Launch(block_rows, block_columns, HALF_BLOCK_TERMS if half else BLOCK_TERMS, grid)


# ---- Kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _connected(out_degree, in_degree, STRICT: tl.constexpr):
    if STRICT:
        return out_degree > in_degree
    else:
        return out_degree >= in_degree


@triton.jit
def _degrees(degrees, at, size):
    """Past the end the last degree again, which changes neither the smallest nor the largest."""
    return tl.load(degrees + tl.minimum(at, size - 1))


@triton.jit
def _sees(column_degree, term_degree, FORWARD: tl.constexpr, STRICT: tl.constexpr):
    """Columns are outputs and terms inputs if ``FORWARD``, otherwise the other way round."""
    if FORWARD:
        return _connected(column_degree, term_degree, STRICT)
    else:
        return _connected(term_degree, column_degree, STRICT)


@triton.jit
def _ranges(
    degrees, terms, widest, narrowest, FORWARD: tl.constexpr, STRICT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``(first, last, dense_begin, dense_end)``, in blocks of terms, for columns between these extreme degrees.

    All that is connected to the columns lies between the first two, and all between the others, which lie within, is
    connected. If degrees are sorted, ascending or descending, no ranges could be better.
    """
    first, last = terms, terms * 0
    first_gap, last_gap = terms, terms * 0 - 1
    for start in range(0, terms, _LOOK):
        at = start + tl.arange(0, _LOOK)
        degree, known = _degrees(degrees, at, terms), at < terms
        some = known & _sees(widest, degree, FORWARD, STRICT)
        gap = known & (_sees(narrowest, degree, FORWARD, STRICT) == 0)
        first = tl.minimum(first, tl.min(tl.where(some, at, terms), 0))
        last = tl.maximum(last, tl.max(tl.where(some, at + 1, 0), 0))
        first_gap = tl.minimum(first_gap, tl.min(tl.where(gap, at, terms), 0))
        last_gap = tl.maximum(last_gap, tl.max(tl.where(gap, at, -1), 0))
    last = tl.cdiv(last, BLOCK)
    first = tl.minimum(first // BLOCK, last)
    complete = tl.minimum(last, terms // BLOCK)  # the last block may stick out
    before, behind = tl.minimum(first_gap // BLOCK, complete), tl.maximum((last_gap + BLOCK) // BLOCK, first)
    if before - first >= complete - behind:
        return first, last, first, tl.maximum(before, first)
    else:
        return first, last, behind, tl.maximum(complete, behind)


@triton.jit
def _product_kernel(
    left, weight, bias, result, term_degrees, column_degrees, rows, columns, terms,
    left_row, left_term, weight_term, weight_column,
    FORWARD: tl.constexpr, STRICT: tl.constexpr, DTYPE: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_TERMS: tl.constexpr,
):  # fmt: skip
    """``result[r, c] = sum_t left[r, t] weight[t, c] + bias[c]`` over the connected t."""
    block = tl.program_id(1)
    if FORWARD:
        block = tl.num_programs(1) - 1 - block  # with ascending degrees the last columns are the longest sums
    top, edge = tl.program_id(0).to(tl.int64) * BLOCK_ROWS, block.to(tl.int64) * BLOCK_COLUMNS
    down, across = tl.arange(0, BLOCK_ROWS).to(tl.int64), tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
    row, column, within = top + down, edge + across, tl.arange(0, BLOCK_TERMS).to(tl.int64)
    column_degree = _degrees(column_degrees, column, columns)
    if FORWARD:
        widest, narrowest = tl.max(column_degree, 0), tl.min(column_degree, 0)
    else:
        widest, narrowest = tl.min(column_degree, 0), tl.max(column_degree, 0)
    first, last, dense_begin, dense_end = _ranges(term_degrees, terms, widest, narrowest, FORWARD, STRICT, BLOCK_TERMS)
    n_dense = dense_end - dense_begin
    left += top * left_row + (down[:, None] * left_row + within[None, :] * left_term)
    weight += edge * weight_column + (within[:, None] * weight_term + across[None, :] * weight_column)
    known_row, known_column = (row < rows)[:, None], (column < columns)[None, :]
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACCUMULATOR)
    for i in tl.range(first, last - n_dense, num_stages=1):
        start = tl.where(i < dense_begin, i, i + n_dense).to(tl.int64) * BLOCK_TERMS
        known = start + within < terms
        degree = _degrees(term_degrees, start + within, terms)
        if tl.max(_sees(widest, degree, FORWARD, STRICT).to(tl.int32), 0) > 0:
            connected = _sees(column_degree[None, :], degree[:, None], FORWARD, STRICT)
            a = load(left, start * left_term, known_row & known[None, :], DTYPE)
            b = load(weight, start * weight_term, known_column & known[:, None], DTYPE)
            b = tl.where(connected, b, tl.zeros_like(b))
            sums += tl.dot(a, b, input_precision="ieee", out_dtype=ACCUMULATOR)
    for i in range(dense_begin, dense_end):
        start = tl.cast(i, tl.int64) * BLOCK_TERMS
        a = load(left, start * left_term, known_row, DTYPE)
        b = load(weight, start * weight_term, known_column, DTYPE)
        sums += tl.dot(a, b, input_precision="ieee", out_dtype=ACCUMULATOR)
    if bias is not None:
        sums += load(bias, column, column < columns, ACCUMULATOR)[None, :]
    result += top * columns + edge + (down[:, None] * columns + across[None, :])
    tl.store(result, sums.to(result.dtype.element_ty), mask=known_row & known_column)


@triton.jit
def _weight_grad_kernel(
    grad, x, result, in_degrees, out_degrees, rows, columns, terms,
    grad_term, grad_row, x_term, x_column,
    STRICT: tl.constexpr, DTYPE: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_TERMS: tl.constexpr,
):  # fmt: skip
    """``result[r, c] = sum_t grad[t, r] x[t, c]`` if connected: rows are outputs, columns inputs, terms the batch."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    out_degree = _degrees(out_degrees, row, rows)
    in_degree = _degrees(in_degrees, column, columns)
    within = tl.arange(0, BLOCK_TERMS).to(tl.int64)
    grad += row[:, None] * grad_row + within[None, :] * grad_term
    x += within[:, None] * x_term + column[None, :] * x_column
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACCUMULATOR)
    if _connected(tl.max(out_degree, 0), tl.min(in_degree, 0), STRICT):
        for i in range(0, tl.cdiv(terms, BLOCK_TERMS)):
            start = tl.cast(i, tl.int64) * BLOCK_TERMS
            known = start + within < terms
            left = load(grad, start * grad_term, (row < rows)[:, None] & known[None, :], DTYPE)
            right = load(x, start * x_term, (column < columns)[None, :] & known[:, None], DTYPE)
            sums += tl.dot(left, right, input_precision="ieee", out_dtype=ACCUMULATOR)
    connected = _connected(out_degree[:, None], in_degree[None, :], STRICT)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    sums = tl.where(connected, sums, 0.0)
    tl.store(result + row[:, None] * columns + column[None, :], sums.to(result.dtype.element_ty), mask=inside)


# ---- Launchers -------------------------------------------------------------------------------------------------------


def _types(x: Tensor) -> dict[str, tl.dtype]:
    """What tiles are multiplied in and added up in."""
    accumulator = tl.float64 if x.dtype == torch.float64 else tl.float32
    wrong = interpreted() and x.dtype in HALF_PRECISION
    return {"DTYPE": accumulator if wrong else _TYPES[x.dtype], "ACCUMULATOR": accumulator}


def _launch(
    kernel: triton.JITFunction, operands: tuple[Tensor | None, ...], result: Tensor, degrees: tuple[Tensor, Tensor],
    strides: tuple[int, ...], terms: int, **options: bool,
) -> Tensor:  # fmt: skip
    """Launch one kernel on ``operands``, two strided matrices and perhaps a bias, if there is anything to write."""
    rows, columns = result.shape
    if result.numel() == 0:
        return result
    plan = launch(rows, columns, result.dtype in HALF_PRECISION)
    with on_device_of(result):
        kernel[plan.grid](
            *operands, result, *(x.contiguous() for x in degrees), rows, columns, terms, *strides,
            **options, **_types(result), **plan.options,
        )  # fmt: skip
    return result


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_degrees: Tensor, out_degrees: Tensor, strict: bool
) -> Tensor:
    """Launch the forward kernel."""
    bias = None if bias is None else bias.contiguous()
    return _launch(
        _product_kernel, (x, weight, bias), x.new_empty(x.shape[0], weight.shape[0]), (in_degrees, out_degrees),
        (*x.stride(), *weight.mT.stride()), x.shape[1], FORWARD=True, STRICT=strict,
    )  # fmt: skip


def masked_linear_input_grad(
    grad: Tensor, weight: Tensor, in_degrees: Tensor, out_degrees: Tensor, strict: bool
) -> Tensor:
    """Launch the kernel of the input's gradient."""
    return _launch(
        _product_kernel, (grad, weight, None), grad.new_empty(grad.shape[0], weight.shape[1]),
        (out_degrees, in_degrees), (*grad.stride(), *weight.stride()), grad.shape[1], FORWARD=False, STRICT=strict,
    )  # fmt: skip


def masked_linear_weight_grad(grad: Tensor, x: Tensor, in_degrees: Tensor, out_degrees: Tensor, strict: bool) -> Tensor:
    """Launch the kernel of the weight's gradient."""
    return _launch(
        _weight_grad_kernel, (grad, x), grad.new_empty(grad.shape[1], x.shape[1]), (in_degrees, out_degrees),
        (*grad.stride(), *x.stride()), x.shape[0], STRICT=strict,
    )  # fmt: skip
