"""GPU kernel of ``local_reparam_linear``: two matrix products that share the reads of x, and the sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._checks import HALF_PRECISION
from hvae_kernels._triton.device import exponential, load, square_root
from hvae_kernels._triton.launch import cdiv, interpreted, next_power_of_2, on_device_of

#: Two accumulators a program: tiles of half a usual product's columns. In full precision more than 16 terms at a time
#: do not fit into a Hopper GPU's registers.
BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_TERMS, HALF_BLOCK_TERMS, FEWEST = 64, 32, 16, 32, 16


@triton.jit
def _forward_kernel(
    x, loc, log_scale, bias, bias_log_scale, noise, y, std, rows, columns, terms,
    x_row, x_term, loc_column, loc_term, scale_column, scale_term,
    DTYPE: tl.constexpr, VARIANCE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_TERMS: tl.constexpr,
):  # fmt: skip
    """Columns are outputs, terms are inputs. Means are multiplied in DTYPE, variances and all else are VARIANCE."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    means = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), VARIANCE)
    variances = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), VARIANCE)
    for start in range(0, terms, BLOCK_TERMS):
        term = start + tl.arange(0, BLOCK_TERMS).to(tl.int64)
        inside = (row < rows)[:, None] & (term < terms)[None, :]
        left = load(x, row[:, None] * x_row + term[None, :] * x_term, inside, DTYPE)
        inside = (term < terms)[:, None] & (column < columns)[None, :]
        right = load(loc, term[:, None] * loc_term + column[None, :] * loc_column, inside, DTYPE)
        log = load(log_scale, term[:, None] * scale_term + column[None, :] * scale_column, inside, VARIANCE)
        means += tl.dot(left, right, input_precision="ieee", out_dtype=VARIANCE)
        square = left.to(VARIANCE) * left.to(VARIANCE)
        variances += tl.dot(square, exponential(2.0 * log), input_precision=PRECISION, out_dtype=VARIANCE)
    if bias is not None:
        means += load(bias, column, column < columns, VARIANCE)[None, :]
    if bias_log_scale is not None:
        variances += exponential(2.0 * load(bias_log_scale, column, column < columns, VARIANCE))[None, :]
    at = row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    deviation = square_root(variances)
    sample = means + deviation * load(noise, at, inside, VARIANCE)
    tl.store(std + at, deviation.to(std.dtype.element_ty), mask=inside)
    tl.store(y + at, sample.to(y.dtype.element_ty), mask=inside)


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32, torch.float64: tl.float64}


def _types(x: Tensor) -> dict[str, object]:
    """Squares of half-precision numbers need float32's range and no more than TF32's precision."""
    half = x.dtype in HALF_PRECISION
    variance = tl.float64 if x.dtype is torch.float64 else tl.float32
    dtype = variance if half and interpreted() else _TYPES[x.dtype]
    precision, terms = ("tf32", HALF_BLOCK_TERMS) if half else ("ieee", BLOCK_TERMS)
    return {"DTYPE": dtype, "VARIANCE": variance, "PRECISION": precision, "BLOCK_TERMS": terms}


def local_reparam_linear(
    x: Tensor,
    weight_loc: Tensor,
    weight_log_scale: Tensor,
    bias_loc: Tensor | None,
    bias_log_scale: Tensor | None,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel if there is anything to write."""
    rows, columns = noise.shape
    y, std = x.new_empty(rows, columns), x.new_empty(rows, columns)
    if y.numel() == 0:
        return y, std
    biases = (b if b is None else b.contiguous() for b in (bias_loc, bias_log_scale))
    block_rows = min(BLOCK_ROWS, max(FEWEST, next_power_of_2(rows)))
    block_columns = min(BLOCK_COLUMNS, max(FEWEST, next_power_of_2(columns)))
    with on_device_of(x):
        _forward_kernel[(cdiv(rows, block_rows), cdiv(columns, block_columns))](
            x, weight_loc, weight_log_scale, *biases, noise.contiguous(), y, std, rows, columns, x.shape[1],
            *x.stride(), *weight_loc.stride(), *weight_log_scale.stride(), **_types(x),
            BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns,
        )  # fmt: skip
    return y, std
