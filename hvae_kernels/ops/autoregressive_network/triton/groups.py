"""What the sweep does with a group of units, (unit, entry in the plan, whether it is one), in a tile of samples.

A tile is (row, rows, work, lane): its values lie in global memory unit by unit, ``work[unit, lane]``, so that the lanes
of a unit are neighbours; they stay in the caches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hvae_kernels._triton.device import load
from hvae_kernels.ops.autoregressive_network.network import NONE
from hvae_kernels.ops.autoregressive_network.triton.network import activate, derivative

_NONE = tl.constexpr(NONE)

#: A group of units times a chunk of terms is one ``tl.dot``, which takes no less than 16 of either.
UNITS, _TERMS = tl.constexpr(16), tl.constexpr(32)
#: Where the wires of a stage, ``(layer that it reads, stage whose raw value is added, activation)``, hold what.
_SOURCE, _RESIDUAL, _ACTIVATION = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def finished(plan, LAYER: tl.constexpr, step):
    """How many units of a layer are finished before a step."""
    if LAYER == 0:
        return step
    else:
        return tl.load(plan.below + LAYER * plan.entries + step - 1, mask=step > 0, other=0)


@triton.jit
def group_at(plan, layer, at, end):
    """The units of ranks ``at`` to ``at + UNITS``, as far as they are below ``end``."""
    rank = at + tl.arange(0, UNITS)
    inside = rank < end
    entry = layer.first + rank
    return tl.load(plan.order + entry, mask=inside, other=0), entry, inside


@triton.jit
def read(tile, place, group):
    """A group's values, of the layer or stage whose values begin at ``place``."""
    _, _, work, lane = tile
    unit, _, inside = group
    return tl.load(work + (place + unit)[:, None] * lane.shape[0] + lane[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def write(tile, place, group, values):
    """What ``read`` reads."""
    _, _, work, lane = tile
    unit, _, inside = group
    tl.store(work + (place + unit)[:, None] * lane.shape[0] + lane[None, :], values, mask=inside[:, None])


@triton.jit
def context(tensor, size, tile, group):
    """A group's part of a ``(rows, size)`` tensor, units first; zeros if it is absent (None)."""
    row, rows, work, _ = tile
    unit, _, inside = group
    mask = inside[:, None] & (row < rows)[None, :]
    return load(tensor, row[None, :] * size + unit[:, None], mask, work.dtype.element_ty)


@triton.jit
def _products(sums, weight, unit_step, term_step, unit, low, high, begin, end, terms, place, tile):
    """Add ``weight[unit, term] values[term]`` over terms of ranks ``low`` to ``high``, all from ``begin`` to ``end``.

    Neither weights behind the mask nor values that are not finished are read.
    """
    DTYPE: tl.constexpr = sums.dtype
    _, _, work, lane = tile
    for at in range(begin, end, _TERMS):
        rank = at + tl.arange(0, _TERMS)
        inside = rank < end
        term = tl.load(terms + rank, mask=inside, other=0)
        connected = inside[None, :] & (rank[None, :] >= low[:, None]) & (rank[None, :] < high[:, None])
        here = unit[:, None].to(tl.int64) * unit_step + term[None, :].to(tl.int64) * term_step
        left = tl.load(weight + here, mask=connected, other=0.0).to(DTYPE)
        there = (place + term)[:, None] * lane.shape[0] + lane[None, :]
        right = tl.load(work + there, mask=inside[:, None], other=0.0)
        sums += tl.dot(left, right, input_precision="ieee", out_dtype=DTYPE)
    return sums


# ---- Along the connections: sums of a group, from its sources --------------------------------------------------------


@triton.jit
def _from_source(sums, net, SOURCE: tl.constexpr, weight, weight_row, group, last, step, BEFORE: tl.constexpr, tile):
    """Add what comes from one layer's units finished before a step (BEFORE), or from all later ones.

    ``last`` is the entry of the group's last unit, the one that sees most.
    """
    unit, entry, inside = group
    upto = net.plan.upto + SOURCE * net.plan.entries
    begin = finished(net.plan, SOURCE, step)
    end = tl.load(upto + last)
    high = tl.load(upto + entry, mask=inside, other=0)
    if BEFORE:
        end = tl.minimum(end, begin)
        begin = 0
    low, source = tl.zeros_like(high), net.layers[SOURCE]
    terms = net.plan.order + source.first
    return _products(sums, weight, weight_row, 1, unit, low, high, begin, end, terms, source.value, tile)


@triton.jit
def from_sources(sums, net, WIRES: tl.constexpr, S: tl.constexpr, group, last, step, BEFORE: tl.constexpr, tile):
    """Add what comes to a group of stage S from the layer that it reads, and along its skip connection."""
    stage = net.stages[S]
    source: tl.constexpr = WIRES[S][_SOURCE]
    sums = _from_source(sums, net, source, stage.weight, stage.weight_row, group, last, step, BEFORE, tile)
    if stage.skip is not None:
        sums = _from_source(sums, net, 0, stage.skip, stage.skip_row, group, last, step, BEFORE, tile)
    return sums


@triton.jit
def begun(net, WIRES: tl.constexpr, S: tl.constexpr, group, last, step, tile):
    """Sums of a group of stage S, as far as they are known before a step."""
    unit, _, inside = group
    stage = net.stages[S]
    sums = context(stage.offset, net.layers[S + 1].size, tile, group)
    sums += load(stage.bias, unit, inside, sums.dtype)[:, None]
    return from_sources(sums, net, WIRES, S, group, last, step, True, tile)


@triton.jit
def finish(raw, net, WIRES: tl.constexpr, S: tl.constexpr, group, tile):
    """From all that a group of stage S has gathered to its raw value and its value."""
    stage, layer = net.stages[S], net.layers[S + 1]
    if stage.gate is not None:
        raw *= context(stage.gate, layer.size, tile, group)
    if WIRES[S][_RESIDUAL] != _NONE:
        raw += read(tile, net.stages[WIRES[S][_RESIDUAL]].raw, group)
    tl.debug_barrier()  # several threads may have read one element of what is now overwritten
    write(tile, stage.raw, group, raw)
    write(tile, layer.value, group, activate(raw, WIRES[S][_ACTIVATION]))


# ---- Against the connections: cotangents of a group, from its readers ------------------------------------------------


@triton.jit
def from_readers(sums, net, WIRES: tl.constexpr, LAYER: tl.constexpr, group, first, step, AFTER: tl.constexpr, tile):
    """Add to cotangents of values what comes from readers at or after a step (AFTER), or from all before it.

    ``first`` is the entry of the group's first unit, the one that is seen by most.
    """
    unit, entry, inside = group
    for S in tl.static_range(LAYER, len(WIRES)):
        stage, reader = net.stages[S], net.layers[S + 1]
        below = net.plan.below + (S + 1) * net.plan.entries
        begin, end = tl.load(below + first), finished(net.plan, S + 1, step)
        if AFTER:
            begin, end = tl.maximum(begin, end), reader.size
        low = tl.maximum(tl.load(below + entry, mask=inside, other=end), begin)
        high, terms, place = tl.zeros_like(low) + end, net.plan.order + reader.first, reader.value
        if WIRES[S][_SOURCE] == LAYER:
            sums = _products(sums, stage.weight, 1, stage.weight_row, unit, low, high, begin, end, terms, place, tile)
        if LAYER == 0 and stage.skip is not None:
            sums = _products(sums, stage.skip, 1, stage.skip_row, unit, low, high, begin, end, terms, place, tile)
    return sums


@triton.jit
def finish_cotangent(grad, net, WIRES: tl.constexpr, S: tl.constexpr, group, tile):
    """From the cotangent of a group's values to those of its raw values and, in the values' place, of its sums."""
    stage, layer = net.stages[S], net.layers[S + 1]
    grad *= derivative(read(tile, stage.raw, group), WIRES[S][_ACTIVATION])
    for READER in tl.static_range(S + 1, len(WIRES)):
        if WIRES[READER][_RESIDUAL] == S:
            grad += read(tile, net.stages[READER].raw, group)
    weighted = grad
    if stage.gate is not None:
        weighted = grad * context(stage.gate, layer.size, tile, group)
    tl.debug_barrier()  # several threads may have read one element of what is now overwritten
    write(tile, stage.raw, group, grad)
    write(tile, layer.value, group, weighted)
