"""GPU kernel of the forward direction through a small network: one launch, hidden values never leave the chip.

A program owns a tile of samples and takes it through all stages in registers; each stage is one product with a weight
whose mask is made on the way, by comparing degrees. Sums run in one fixed order, and there are no atomics.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._triton.device import load, store
from hvae_kernels._triton.gates import gate
from hvae_kernels._triton.launch import cdiv, next_power_of_2, on_device_of
from hvae_kernels.ops.autoregressive_network.network import fits_whole
from hvae_kernels.ops.autoregressive_network.triton.network import activate, parts, require

#: Terms of a product: a thread holds that many of each factor at a time.
_TERMS = tl.constexpr(32)
#: ``tl.dot`` takes no less of anything.
FEWEST_SIDE = 16
FEWEST_ROWS, MOST_ROWS, MANY_PROGRAMS = 16, 32, 512


@dataclass(frozen=True)
class Launch:
    """A program for each ``block_rows`` samples; sizes alone decide."""

    block_rows: int
    programs: int


def launch(rows: int) -> Launch:
    """Narrow tiles until they are many: then wide ones, which read the weights half as often."""
    block_rows = FEWEST_ROWS if cdiv(rows, FEWEST_ROWS) <= MANY_PROGRAMS else MOST_ROWS
    return Launch(block_rows, cdiv(rows, block_rows))


@triton.jit
def _slice(values, at):
    """Columns ``at`` to ``at + _TERMS`` of values in registers, which cannot be indexed."""
    if values.shape[1] <= _TERMS:
        return values
    else:
        slices = tl.reshape(values, (values.shape[0], values.shape[1] // _TERMS, _TERMS))
        wanted = tl.arange(0, values.shape[1] // _TERMS) == at // _TERMS
        return tl.sum(tl.where(wanted[None, :, None], slices, 0.0), 1)


@triton.jit
def _stage(values, stage, in_degrees, out_degrees, terms, units, unit, inside, row, rows, ACTIVATION: tl.constexpr):
    """Values of some of a stage's units, from those of the layer before; weights behind the mask are not read."""
    DTYPE: tl.constexpr = values.dtype
    SIDE: tl.constexpr = min(values.shape[1], _TERMS)
    out_degree = tl.load(out_degrees + unit, mask=inside, other=0)
    raw = tl.zeros((values.shape[0], unit.shape[0]), DTYPE)
    for at in range(0, terms, SIDE):
        term = at + tl.arange(0, SIDE)
        in_degree = tl.load(in_degrees + term, mask=term < terms, other=0)
        connected = (term < terms)[:, None] & inside[None, :] & (out_degree[None, :] >= in_degree[:, None])
        right = load(stage.weight, unit.to(tl.int64)[None, :] * stage.weight_row + term[:, None], connected, DTYPE)
        raw += tl.dot(_slice(values, at), right, input_precision="ieee", out_dtype=DTYPE)
    raw += load(stage.bias, unit, inside, DTYPE)[None, :]
    mask = (row < rows)[:, None] & inside[None, :]
    raw += load(stage.offset, row[:, None] * units + unit[None, :], mask, DTYPE)
    return activate(raw, ACTIVATION)


@triton.jit
def _forward_kernel(
    x, y, log_abs_det, stages, degrees, sizes, outputs, rows,
    ACTIVATIONS: tl.constexpr, SIDES: tl.constexpr, GATE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    ROWS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    LAST: tl.constexpr = len(ACTIVATIONS) - 1
    features = sizes[0]
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    feature = tl.arange(0, SIDES[0])
    here = row[:, None] * features + feature[None, :]
    mask = (row < rows)[:, None] & (feature < features)[None, :]
    known = load(x, here, mask, DTYPE)
    values = known
    for S in tl.static_range(LAST):
        unit = tl.arange(0, SIDES[S + 1])
        values = _stage(
            values, stages[S], degrees[S], degrees[S + 1], sizes[S], sizes[S + 1], unit, unit < sizes[S + 1], row, rows,
            ACTIVATIONS[S],
        )  # fmt: skip
    # Each feature's shift and raw scale lie in its own column, wherever the last stage has them.
    shift_first, shift_step, scale_first, scale_step = outputs
    shift = _stage(
        values, stages[LAST], degrees[LAST], degrees[LAST + 1], sizes[LAST], sizes[LAST + 1],
        shift_first + shift_step * feature, feature < features, row, rows, ACTIVATIONS[LAST],
    )  # fmt: skip
    raw = _stage(
        values, stages[LAST], degrees[LAST], degrees[LAST + 1], sizes[LAST], sizes[LAST + 1],
        scale_first + scale_step * feature, feature < features, row, rows, ACTIVATIONS[LAST],
    )  # fmt: skip
    first, second = tl.full([1, 1], FIRST, DTYPE), tl.full([1, 1], SECOND, DTYPE)
    scale, rest, log, _, _, _, _ = gate(raw, first, second, GATE)
    store(y, here, scale * known + rest * shift, mask)
    store(log_abs_det, row, tl.sum(tl.where(mask, log, 0.0).to(tl.float64), 1).to(DTYPE), row < rows)


def autoregressive_forward(x: Tensor, *network) -> tuple[Tensor, Tensor]:
    """Launch the kernel, on a network that :func:`fits_whole`."""
    *lists, (gate,), (first, second) = network
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    log_abs_det = (x.new_empty if x.shape[1] else x.new_zeros)(x.shape[:1])
    if x.numel() == 0:
        return y, log_abs_det
    layers, stages, wires, _ = parts(x, *lists)
    *_, gates, degrees, program = lists
    require(fits_whole(gates, degrees, program))
    sizes = tuple(layer.size for layer in layers)
    sides = tuple(max(FEWEST_SIDE, next_power_of_2(size)) for size in sizes[:-1])
    shape = launch(x.shape[0])
    with on_device_of(x):
        _forward_kernel[(shape.programs,)](
            x.contiguous(), y, log_abs_det, stages, tuple(layer.contiguous() for layer in degrees), sizes,
            tuple(program[:4]), x.shape[0],
            ACTIVATIONS=tuple(activation for _, _, activation in wires), SIDES=sides,
            GATE=gate, FIRST=first, SECOND=second, ROWS=shape.block_rows,
            DTYPE=tl.float64 if x.dtype == torch.float64 else tl.float32, num_warps=8,
        )  # fmt: skip
    return y, log_abs_det
