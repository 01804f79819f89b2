"""GPU kernels of ``masked_linear``: matrix products that compare degrees as they go and skip empty tiles.

No mask is ever stored: a program reads the degrees of its tile beside the tile. Weights behind the mask are not read,
sums run in one fixed order, and there are no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._checks import HALF_PRECISION
from hvae_kernels._triton.device import load
from hvae_kernels._triton.launch import cdiv, next_power_of_2, on_device_of

_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
#: Large tiles reuse more of what they read, but there should be about as many as a large GPU has multiprocessors.
FEWEST_SIDE, SMALL_SIDE, LARGE_SIDE, MANY_PROGRAMS = 16, 32, 64, 128
BLOCK_TERMS = 32


@dataclass(frozen=True)
class Launch:
    """Result tiles of ``block_rows x block_columns``; sizes alone decide, so sums are the same on every device."""

    block_rows: int
    block_columns: int
    grid: tuple[int, int]

    @property
    def blocks(self) -> dict[str, int]:
        """The kernels' block sizes."""
        return {"BLOCK_ROWS": self.block_rows, "BLOCK_COLUMNS": self.block_columns, "BLOCK_TERMS": BLOCK_TERMS}


def launch(rows: int, columns: int) -> Launch:
    """The largest tiles that make many programs of a ``(rows, columns)`` result, or else the smallest."""
    for row_side, column_side in ((LARGE_SIDE, LARGE_SIDE), (SMALL_SIDE, LARGE_SIDE), (SMALL_SIDE, SMALL_SIDE)):
        block_rows = min(row_side, max(FEWEST_SIDE, next_power_of_2(rows)))
        block_columns = min(column_side, max(FEWEST_SIDE, next_power_of_2(columns)))
        grid = cdiv(rows, block_rows), cdiv(columns, block_columns)
        if grid[0] * grid[1] >= MANY_PROGRAMS:
            break
    return Launch(block_rows, block_columns, grid)


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
def _forward_kernel(
    x, weight, bias, result, in_degrees, out_degrees, rows, columns, terms,
    x_row, x_term, weight_column, weight_term, STRICT: tl.constexpr, DTYPE: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_TERMS: tl.constexpr,
):  # fmt: skip
    """``result[r, c] = sum_t x[r, t] weight[c, t] + bias[c]``: columns are outputs, terms are inputs."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # with sorted degrees the last columns are the longest sums
    column = block.to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    out_degree = _degrees(out_degrees, column, columns)
    largest = tl.max(out_degree, 0)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACCUMULATOR)
    for start in range(0, terms, BLOCK_TERMS):
        term = start + tl.arange(0, BLOCK_TERMS).to(tl.int64)
        in_degree = _degrees(in_degrees, term, terms)
        if _connected(largest, tl.min(in_degree, 0), STRICT):
            inside = (row < rows)[:, None] & (term < terms)[None, :]
            left = load(x, row[:, None] * x_row + term[None, :] * x_term, inside, DTYPE)
            inside = (term < terms)[:, None] & (column < columns)[None, :]
            connected = inside & _connected(out_degree[None, :], in_degree[:, None], STRICT)
            right = load(weight, term[:, None] * weight_term + column[None, :] * weight_column, connected, DTYPE)
            sums += tl.dot(left, right, input_precision="ieee", out_dtype=ACCUMULATOR)
    sums += load(bias, column, column < columns, ACCUMULATOR)[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(result + row[:, None] * columns + column[None, :], sums.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _input_grad_kernel(
    grad, weight, result, in_degrees, out_degrees, rows, columns, terms,
    grad_row, grad_term, weight_term, weight_column,
    STRICT: tl.constexpr, DTYPE: tl.constexpr, ACCUMULATOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_TERMS: tl.constexpr,
):  # fmt: skip
    """``result[r, c] = sum_t grad[r, t] weight[t, c]``: columns are inputs, terms are outputs."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    in_degree = _degrees(in_degrees, column, columns)
    smallest = tl.min(in_degree, 0)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACCUMULATOR)
    for start in range(0, terms, BLOCK_TERMS):
        term = start + tl.arange(0, BLOCK_TERMS).to(tl.int64)
        out_degree = _degrees(out_degrees, term, terms)
        if _connected(tl.max(out_degree, 0), smallest, STRICT):
            inside = (row < rows)[:, None] & (term < terms)[None, :]
            left = load(grad, row[:, None] * grad_row + term[None, :] * grad_term, inside, DTYPE)
            inside = (term < terms)[:, None] & (column < columns)[None, :]
            connected = inside & _connected(out_degree[:, None], in_degree[None, :], STRICT)
            right = load(weight, term[:, None] * weight_term + column[None, :] * weight_column, connected, DTYPE)
            sums += tl.dot(left, right, input_precision="ieee", out_dtype=ACCUMULATOR)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(result + row[:, None] * columns + column[None, :], sums.to(result.dtype.element_ty), mask=inside)


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
    sums = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), ACCUMULATOR)
    if _connected(tl.max(out_degree, 0), tl.min(in_degree, 0), STRICT):
        for start in range(0, terms, BLOCK_TERMS):
            term = start + tl.arange(0, BLOCK_TERMS).to(tl.int64)
            inside = (row < rows)[:, None] & (term < terms)[None, :]
            left = load(grad, row[:, None] * grad_row + term[None, :] * grad_term, inside, DTYPE)
            inside = (term < terms)[:, None] & (column < columns)[None, :]
            right = load(x, term[:, None] * x_term + column[None, :] * x_column, inside, DTYPE)
            sums += tl.dot(left, right, input_precision="ieee", out_dtype=ACCUMULATOR)
    connected = _connected(out_degree[:, None], in_degree[None, :], STRICT)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    sums = tl.where(connected, sums, 0.0)
    tl.store(result + row[:, None] * columns + column[None, :], sums.to(result.dtype.element_ty), mask=inside)


# ---- Launchers -------------------------------------------------------------------------------------------------------


def _types(x: Tensor) -> dict[str, tl.dtype]:
    """What tiles are multiplied in and added up in; the interpreter multiplies bfloat16 wrongly, so it gets float32."""
    accumulator = tl.float64 if x.dtype == torch.float64 else tl.float32
    interpreted = x.device.type == "cpu" and x.dtype in HALF_PRECISION
    return {"DTYPE": accumulator if interpreted else _TYPES[x.dtype], "ACCUMULATOR": accumulator}


def _launch(
    kernel: triton.JITFunction,
    operands: tuple[Tensor | None, ...],
    result: Tensor,
    degrees: tuple[Tensor, Tensor],
    terms: int,
    strict: bool,
) -> Tensor:
    """Launch one kernel on ``operands``, two strided matrices and perhaps a bias, if there is anything to write."""
    rows, columns = result.shape
    if result.numel() == 0:
        return result
    plan = launch(rows, columns)
    left, right = operands[:2]
    with on_device_of(result):
        kernel[plan.grid](
            *operands, result, *degrees, rows, columns, terms, *left.stride(), *right.stride(),
            STRICT=strict, **_types(left), **plan.blocks,
        )  # fmt: skip
    return result


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_degrees: Tensor, out_degrees: Tensor, strict: bool
) -> Tensor:
    """Launch the forward kernel."""
    bias = None if bias is None else bias.contiguous()
    degrees = in_degrees.contiguous(), out_degrees.contiguous()
    result = x.new_empty(x.shape[0], weight.shape[0])
    return _launch(_forward_kernel, (x, weight, bias), result, degrees, x.shape[1], strict)


def masked_linear_input_grad(
    grad: Tensor, weight: Tensor, in_degrees: Tensor, out_degrees: Tensor, strict: bool
) -> Tensor:
    """Launch the kernel of the input's gradient."""
    degrees = in_degrees.contiguous(), out_degrees.contiguous()
    result = grad.new_empty(grad.shape[0], weight.shape[1])
    return _launch(_input_grad_kernel, (grad, weight), result, degrees, grad.shape[1], strict)


def masked_linear_weight_grad(grad: Tensor, x: Tensor, in_degrees: Tensor, out_degrees: Tensor, strict: bool) -> Tensor:
    """Launch the kernel of the weight's gradient."""
    degrees = in_degrees.contiguous(), out_degrees.contiguous()
    result = grad.new_empty(grad.shape[1], x.shape[1])
    return _launch(_weight_grad_kernel, (grad, x), result, degrees, x.shape[0], strict)
