"""GPU kernels of whole autoregressive networks: the inverse, and the solve with the transposed Jacobian, in one launch.

A program owns a tile of samples and walks through all steps alone: at step t the units that see t features are
computed, then the feature of rank t. Nothing passes between programs, and sums run in one fixed order. A tile's values
lie in global memory unit by unit, ``work[unit, lane]``, so that the lanes of a unit are neighbours; they stay in the
caches.

Units are ranked by degree, in each layer for itself (layer 0 is the features, layer s + 1 is stage s), so that a unit
sees a leading range of its source and is seen by a trailing range of its readers: see :class:`Plan`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._triton.device import (
    decay,
    expm1_nonpositive,
    exponential,
    hyperbolic_tangent,
    load,
    log1p_unit,
    store,
)
from hvae_kernels._triton.launch import cdiv, on_device_of
from hvae_kernels.ops.affine_autoregressive.gates import CODES
from hvae_kernels.ops.affine_autoregressive.triton import _gate, _logistic
from hvae_kernels.ops.autoregressive_network.network import ACTIVATION_CODES, FEATURES, NONE

_RELU = tl.constexpr(ACTIVATION_CODES["relu"])
_ELU = tl.constexpr(ACTIVATION_CODES["elu"])
_TANH = tl.constexpr(ACTIVATION_CODES["tanh"])
_SOFTPLUS = tl.constexpr(ACTIVATION_CODES["softplus"])
_SIGMOID = tl.constexpr(ACTIVATION_CODES["sigmoid"])
_GELU = tl.constexpr(ACTIVATION_CODES["gelu"])
_SILU = tl.constexpr(ACTIVATION_CODES["silu"])
_BLENDS = tl.constexpr(CODES["sigmoid"])
_NONE = tl.constexpr(NONE)

#: A group of units times a chunk of terms is one ``tl.dot``, which takes no less than 16 of either.
_UNITS, _TERMS = tl.constexpr(16), tl.constexpr(32)
#: Where the wires of a stage, ``(layer that it reads, stage whose raw value is added, activation)``, hold what.
_SOURCE, _RESIDUAL, _ACTIVATION = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

FEWEST_ROWS, MOST_ROWS, MANY_PROGRAMS = 16, 64, 512
#: A block is as many steps as bring about so many units of the widest stage: enough for large products with what is
#: known before the block, few enough that little is left to add step by step.
BLOCK_UNITS, FEWEST_STEPS = 64, 4


@dataclass(frozen=True)
class Launch:
    """A program for each ``block_rows`` samples, blocks of ``steps`` steps; sizes alone decide."""

    block_rows: int
    programs: int
    steps: int


def launch(rows: int, features: int, widest: int) -> Launch:
    """The narrowest tiles that do not make too many programs: a program's time hardly depends on its lanes."""
    block_rows = FEWEST_ROWS
    while block_rows < MOST_ROWS and cdiv(rows, block_rows) > MANY_PROGRAMS:
        block_rows *= 2
    steps = max(FEWEST_STEPS, BLOCK_UNITS * features // max(1, widest))
    return Launch(block_rows, cdiv(rows, block_rows), steps)


class Plan(NamedTuple):
    """Who sees whom, for the units of all layers in a row, each layer ascending by degree: N entries, int32.

    Args:
        order: ``(N,)``: which unit of its layer that is.
        upto: ``(layers, N)``: how many units of a layer have no higher degree: those that it sees.
        below: ``(layers, N)``: how many have a lower degree: those before the first one that sees it. At feature t - 1,
            how many units of a layer are finished before step t.
        entries: N.
    """

    order: Tensor
    upto: Tensor
    below: Tensor
    entries: int


def plan(degrees: list[Tensor]) -> Plan:
    """Made on the tensors' device, without a look at their values on the host."""
    values, orders = zip(*(layer.sort(stable=True) for layer in degrees), strict=True)
    every = torch.cat(values)

    def counts(right: bool) -> Tensor:
        return torch.stack([torch.searchsorted(layer, every, right=right, out_int32=True) for layer in values])

    return Plan(torch.cat(orders).to(torch.int32), counts(True), counts(False), every.shape[0])


class Layer(NamedTuple):
    """Where a layer lies: its first entry in the plan, its size, and the place of its values among a tile's."""

    first: int
    size: int
    value: int


class Stage(NamedTuple):
    """A stage's tensors, None where absent, with the strides of the weights' rows; ``raw`` is a place as in Layer."""

    weight: Tensor
    weight_row: int
    skip: Tensor | None
    skip_row: int
    bias: Tensor | None
    offset: Tensor | None
    gate: Tensor | None
    raw: int


class Net(NamedTuple):
    """All that the kernels take of a network; layer 0 is the features, layer s + 1 is stage s."""

    plan: Plan
    layers: tuple[Layer, ...]
    stages: tuple[Stage, ...]


# ---- Element-wise parts ----------------------------------------------------------------------------------------------


@triton.jit
def _normal_distribution(x):
    return 0.5 + 0.5 * tl.erf(0.7071067811865476 * x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """An activation, by its code."""
    if ACTIVATION == _RELU:
        return tl.where(x < 0, 0.0, x)
    elif ACTIVATION == _ELU:
        return tl.where(x > 0, x, expm1_nonpositive(tl.where(x > 0, 0.0, x)))
    elif ACTIVATION == _TANH:
        return hyperbolic_tangent(x)
    elif ACTIVATION == _SOFTPLUS:
        return tl.where(x < 0, 0.0, x) + log1p_unit(decay(x))
    elif ACTIVATION == _SIGMOID:
        return _logistic(x)[1]
    elif ACTIVATION == _GELU:
        return x * _normal_distribution(x)
    elif ACTIVATION == _SILU:
        return x * _logistic(x)[1]
    else:
        return x


@triton.jit
def _derivative(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == _RELU:
        return tl.where(x > 0, tl.full(x.shape, 1.0, x.dtype), 0.0)
    elif ACTIVATION == _ELU:
        return exponential(tl.where(x > 0, 0.0, x))
    elif ACTIVATION == _TANH:
        _, p, rest = _logistic(x + x)
        return 4.0 * p * rest
    elif ACTIVATION == _SOFTPLUS:
        return _logistic(x)[1]
    elif ACTIVATION == _SIGMOID:
        _, p, rest = _logistic(x)
        return p * rest
    elif ACTIVATION == _GELU:
        return _normal_distribution(x) + x * 0.3989422804014327 * exponential(-0.5 * x * x)
    elif ACTIVATION == _SILU:
        _, p, rest = _logistic(x)
        return p + x * p * rest
    else:
        return tl.full(x.shape, 1.0, x.dtype)


# ---- A group of units, (unit, entry in the plan, whether it is one), in a tile, (row, rows, work, lane) --------------


@triton.jit
def _finished(plan, LAYER: tl.constexpr, step):
    """How many units of a layer are finished before a step."""
    if LAYER == 0:
        return step
    else:
        return tl.load(plan.below + LAYER * plan.entries + step - 1, mask=step > 0, other=0)


@triton.jit
def _group(plan, layer, at, end):
    """The units of ranks ``at`` to ``at + _UNITS``, as far as they are below ``end``."""
    rank = at + tl.arange(0, _UNITS)
    inside = rank < end
    entry = layer.first + rank
    return tl.load(plan.order + entry, mask=inside, other=0), entry, inside


@triton.jit
def _read(tile, place, group):
    _, _, work, lane = tile
    unit, _, inside = group
    return tl.load(work + (place + unit)[:, None] * lane.shape[0] + lane[None, :], mask=inside[:, None], other=0.0)


@triton.jit
def _write(tile, place, group, values):
    _, _, work, lane = tile
    unit, _, inside = group
    tl.store(work + (place + unit)[:, None] * lane.shape[0] + lane[None, :], values, mask=inside[:, None])


@triton.jit
def _context(tensor, size, tile, group):
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
    begin = _finished(net.plan, SOURCE, step)
    end = tl.load(upto + last)
    high = tl.load(upto + entry, mask=inside, other=0)
    if BEFORE:
        end = tl.minimum(end, begin)
        begin = 0
    low, source = tl.zeros_like(high), net.layers[SOURCE]
    terms = net.plan.order + source.first
    return _products(sums, weight, weight_row, 1, unit, low, high, begin, end, terms, source.value, tile)


@triton.jit
def _from_sources(sums, net, WIRES: tl.constexpr, S: tl.constexpr, group, last, step, BEFORE: tl.constexpr, tile):
    stage = net.stages[S]
    source: tl.constexpr = WIRES[S][_SOURCE]
    sums = _from_source(sums, net, source, stage.weight, stage.weight_row, group, last, step, BEFORE, tile)
    if stage.skip is not None:
        sums = _from_source(sums, net, 0, stage.skip, stage.skip_row, group, last, step, BEFORE, tile)
    return sums


@triton.jit
def _begun(net, WIRES: tl.constexpr, S: tl.constexpr, group, last, step, tile):
    """Sums of a group of stage S, as far as they are known before a step."""
    unit, _, inside = group
    stage = net.stages[S]
    sums = _context(stage.offset, net.layers[S + 1].size, tile, group)
    sums += load(stage.bias, unit, inside, sums.dtype)[:, None]
    return _from_sources(sums, net, WIRES, S, group, last, step, True, tile)


@triton.jit
def _finish(raw, net, WIRES: tl.constexpr, S: tl.constexpr, group, tile):
    """From all that a group of stage S has gathered to its raw value and its value."""
    stage, layer = net.stages[S], net.layers[S + 1]
    if stage.gate is not None:
        raw *= _context(stage.gate, layer.size, tile, group)
    if WIRES[S][_RESIDUAL] != _NONE:
        raw += _read(tile, net.stages[WIRES[S][_RESIDUAL]].raw, group)
    tl.debug_barrier()  # several threads may have read one element of what is now overwritten
    _write(tile, stage.raw, group, raw)
    _write(tile, layer.value, group, activate(raw, WIRES[S][_ACTIVATION]))


# ---- Against the connections: cotangents of a group, from its readers ------------------------------------------------


@triton.jit
def _from_readers(sums, net, WIRES: tl.constexpr, LAYER: tl.constexpr, group, first, step, AFTER: tl.constexpr, tile):
    """Add to cotangents of values what comes from readers at or after a step (AFTER), or from all before it.

    ``first`` is the entry of the group's first unit, the one that is seen by most.
    """
    unit, entry, inside = group
    for S in tl.static_range(LAYER, len(WIRES)):
        stage, reader = net.stages[S], net.layers[S + 1]
        below = net.plan.below + (S + 1) * net.plan.entries
        begin, end = tl.load(below + first), _finished(net.plan, S + 1, step)
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
def _finish_cotangent(grad, net, WIRES: tl.constexpr, S: tl.constexpr, group, tile):
    """From the cotangent of a group's values to those of its raw values and, in the values' place, of its sums."""
    stage, layer = net.stages[S], net.layers[S + 1]
    grad *= _derivative(_read(tile, stage.raw, group), WIRES[S][_ACTIVATION])
    for READER in tl.static_range(S + 1, len(WIRES)):
        if WIRES[READER][_RESIDUAL] == S:
            grad += _read(tile, net.stages[READER].raw, group)
    weighted = grad
    if stage.gate is not None:
        weighted = grad * _context(stage.gate, layer.size, tile, group)
    tl.debug_barrier()  # several threads may have read one element of what is now overwritten
    _write(tile, stage.raw, group, grad)
    _write(tile, layer.value, group, weighted)


# ---- Kernels ---------------------------------------------------------------------------------------------------------
#
# Threads of a program hand values on to each other through `work`: debug_barrier() stands between what is written and
# what reads it, or overwrites what was read.


@triton.jit
def _tile(work, values, rows, ROWS: tl.constexpr):
    """This program's samples, and where their values lie."""
    lane = tl.arange(0, ROWS)
    return tl.program_id(0).to(tl.int64) * ROWS + lane, rows, work + tl.program_id(0).to(tl.int64) * values * ROWS, lane


@triton.jit
def _invert_feature(
    y, x, net, outputs, place, t, features, GATE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, tile
):
    """The feature of rank t, from its finished outputs; returns the logarithm of its scale."""
    row, rows, work, lane = tile
    DTYPE: tl.constexpr = work.dtype.element_ty
    shift_first, shift_step, scale_first, scale_step = outputs
    feature = tl.load(net.plan.order + t)
    last = work + place * lane.shape[0] + lane
    shift = tl.load(last + (shift_first + shift_step * feature) * lane.shape[0])
    raw = tl.load(last + (scale_first + scale_step * feature) * lane.shape[0])
    scale, rest, log, _, _, _, _ = _gate(raw, tl.full([1], FIRST, DTYPE), tl.full([1], SECOND, DTYPE), GATE)
    value = (load(y, row * features + feature, row < rows, DTYPE) - rest * shift) / scale
    tl.store(work + feature * lane.shape[0] + lane, value)
    store(x, row * features + feature, value, row < rows)
    return log


@triton.jit
def _inverse_kernel(
    y, x, log_abs_det, work, net, outputs, rows, features, values, steps,
    WIRES: tl.constexpr, GATE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Blocks of steps: sums over what is known before the block, then, step by step, what is missing in them."""
    STAGES: tl.constexpr = len(WIRES)
    tile = _tile(work, values, rows, ROWS)
    log_det = tl.zeros([ROWS], tl.float64)
    for t0 in range(0, features, steps):
        t1 = tl.minimum(t0 + steps, features)
        for S in tl.static_range(STAGES):
            layer, end = net.layers[S + 1], _finished(net.plan, S + 1, t1)
            for at in range(_finished(net.plan, S + 1, t0), end, _UNITS):
                group, last = _group(net.plan, layer, at, end), layer.first + tl.minimum(at + _UNITS, end) - 1
                _write(tile, net.stages[S].raw, group, _begun(net, WIRES, S, group, last, t0, tile))
        tl.debug_barrier()  # sums begun here are finished below, by other threads
        for t in range(t0, t1):
            for S in tl.static_range(STAGES):
                layer, end = net.layers[S + 1], _finished(net.plan, S + 1, t + 1)
                for at in range(_finished(net.plan, S + 1, t), end, _UNITS):
                    group, last = _group(net.plan, layer, at, end), layer.first + tl.minimum(at + _UNITS, end) - 1
                    sums = _read(tile, net.stages[S].raw, group)
                    sums = _from_sources(sums, net, WIRES, S, group, last, t0, False, tile)
                    _finish(sums, net, WIRES, S, group, tile)
                tl.debug_barrier()  # the next stage, or the tail, reads these values
            last_place = net.layers[STAGES].value
            log_det -= _invert_feature(y, x, net, outputs, last_place, t, features, GATE, FIRST, SECOND, tile)
            tl.debug_barrier()  # the next step reads this feature
    row = tile[0]
    store(log_abs_det, row, log_det.to(work.dtype.element_ty), row < rows)


@triton.jit
def _evaluate(net, WIRES: tl.constexpr, S: tl.constexpr, features, tile):
    """Raw values and values of stage S; zeros in units that no feature uses, which are not asked for theirs."""
    layer, used = net.layers[S + 1], _finished(net.plan, S + 1, features)
    for at in range(0, used, _UNITS):
        group, last = _group(net.plan, layer, at, used), layer.first + tl.minimum(at + _UNITS, used) - 1
        _finish(_begun(net, WIRES, S, group, last, features, tile), net, WIRES, S, group, tile)
    for at in range(used, layer.size, _UNITS):
        group = _group(net.plan, layer, at, layer.size)
        zeros = _context(None, 0, tile, group)
        _write(tile, net.stages[S].raw, group, zeros)
        _write(tile, layer.value, group, zeros)


@triton.jit
def _solve_feature(
    grad, gl, x, solution, grad_outputs, through, net, outputs, raw_place, place, t, features,
    GATE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, tile,
):  # fmt: skip
    """The solution at the feature of rank t, and the cotangents of its two outputs."""
    row, rows, work, lane = tile
    DTYPE: tl.constexpr = work.dtype.element_ty
    shift_first, shift_step, scale_first, scale_step = outputs
    feature, raws = tl.load(net.plan.order + t), work + raw_place * lane.shape[0] + lane
    here = row * features + feature
    shift_unit, scale_unit = shift_first + shift_step * feature, scale_first + scale_step * feature
    raw = tl.load(raws + scale_unit * lane.shape[0])
    scale, rest, _, d_scale, d_log, _, _ = _gate(raw, tl.full([1], FIRST, DTYPE), tl.full([1], SECOND, DTYPE), GATE)
    value = (load(grad, here, row < rows, DTYPE) - through) / scale
    slope = load(x, here, row < rows, DTYPE)
    if GATE == _BLENDS:
        slope -= tl.load(raws + shift_unit * lane.shape[0])
    d_shift, d_raw = value * rest, value * d_scale * slope + gl * d_log
    store(solution, here, value, row < rows)
    store(grad_outputs, row * (2 * features) + shift_unit, d_shift, row < rows)
    store(grad_outputs, row * (2 * features) + scale_unit, d_raw, row < rows)
    tl.store(work + (place + shift_unit) * lane.shape[0] + lane, d_shift)
    tl.store(work + (place + scale_unit) * lane.shape[0] + lane, d_raw)


@triton.jit
def _solve_kernel(
    grad, grad_log, x, solution, grad_outputs, work, net, outputs, rows, features, values, steps,
    WIRES: tl.constexpr, GATE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The network at x, then blocks of steps as in the inverse, backwards: cotangents lie where values lay."""
    STAGES: tl.constexpr = len(WIRES)
    tile = _tile(work, values, rows, ROWS)
    row = tile[0]
    for at in range(0, features, _UNITS):
        unit = at + tl.arange(0, _UNITS)
        group = unit, unit, unit < features
        _write(tile, 0, group, _context(x, features, tile, group))
    tl.debug_barrier()  # the first stage reads the features
    for S in tl.static_range(STAGES):
        _evaluate(net, WIRES, S, features, tile)
        tl.debug_barrier()  # the next stage reads these values, and then they are overwritten
    gl = load(grad_log, row, row < rows, work.dtype.element_ty)
    for before in range(0, features, steps):
        t1 = features - before
        t0 = tl.maximum(t1 - steps, 0)
        for LAYER in tl.static_range(STAGES):
            layer, end = net.layers[LAYER], _finished(net.plan, LAYER, t1)
            for at in range(_finished(net.plan, LAYER, t0), end, _UNITS):
                group, sums = _group(net.plan, layer, at, end), tl.zeros([_UNITS, ROWS], work.dtype.element_ty)
                sums = _from_readers(sums, net, WIRES, LAYER, group, layer.first + at, t1, True, tile)
                _write(tile, layer.value, group, sums)
        tl.debug_barrier()  # sums begun here are finished below, by other threads
        for back in range(0, t1 - t0):
            t = t1 - 1 - back
            group = _group(net.plan, net.layers[0], t, t + 1)
            sums = _from_readers(_read(tile, 0, group), net, WIRES, 0, group, t, t1, False, tile)
            through = tl.sum(tl.where(group[2][:, None], sums, 0.0), 0)
            _solve_feature(
                grad, gl, x, solution, grad_outputs, through, net, outputs, net.stages[STAGES - 1].raw,
                net.layers[STAGES].value, t, features, GATE, FIRST, SECOND, tile,
            )  # fmt: skip
            tl.debug_barrier()  # the last stage reads the cotangents of its values
            for S in tl.static_range(STAGES - 1, -1, -1):
                layer, end = net.layers[S + 1], _finished(net.plan, S + 1, t + 1)
                for at in range(_finished(net.plan, S + 1, t), end, _UNITS):
                    group = _group(net.plan, layer, at, end)
                    sums = _from_readers(
                        _read(tile, layer.value, group), net, WIRES, S + 1, group, layer.first + at, t1, False, tile
                    )
                    _finish_cotangent(sums, net, WIRES, S, group, tile)
                tl.debug_barrier()  # the stage before, or the next step, reads these cotangents


# ---- Launchers -------------------------------------------------------------------------------------------------------


def require(fits: bool) -> None:
    """Refuse what does not fit.

    Raises:
        RuntimeError: it does not.
    """
    if not fits:
        raise RuntimeError("autoregressive network: shapes or dtypes do not fit")


def _present(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """The tensor, of this shape, or None if it is empty."""
    if tensor.numel() == 0:
        return None
    require(tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous())
    return tensor


def _matrix(weight: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, int]:
    """A weight of this shape, and the stride of its rows."""
    require(weight.shape == shape and weight.dtype == dtype and (shape[1] <= 1 or weight.stride(1) == 1))
    return weight, weight.stride(0)


def parts(known: Tensor, weights, biases, offsets, gates, degrees, program) -> tuple[tuple, tuple, tuple, int]:
    """A network's layers, stages and wires for the kernels, and how many values a sample has in ``work``."""
    rows, features, dtype = *known.shape, known.dtype
    count, sizes = len(degrees) - 1, [layer.numel() for layer in degrees]
    require(count >= 1 and sizes[0] == features and sizes[-1] == 2 * features and len(program) == 4 + 4 * count)
    require(len(biases) == len(offsets) == len(gates) == count <= len(weights))
    require(all(layer.dtype == torch.int64 and layer.dim() == 1 for layer in degrees))
    for first, step in (program[:2], program[2:4]):
        require(min(first, step) >= 0 and first + step * (features - 1) < sizes[-1])
    layers, stages, wires = [Layer(0, features, 0)], [], []
    first = place = features
    for s, size in enumerate(sizes[1:]):
        source, residual, activation, skip = program[4 + 4 * s : 8 + 4 * s]
        require(FEATURES <= source < s and NONE <= residual < s and NONE <= skip < len(weights))
        require(residual == NONE or sizes[residual + 1] == size)
        wires.append((source + 1, residual, activation))
        stages.append(
            Stage(
                *_matrix(weights[s], (size, sizes[source + 1]), dtype),
                *((None, 0) if skip == NONE else _matrix(weights[skip], (size, features), dtype)),
                bias=_present(biases[s], (size,), dtype),
                offset=_present(offsets[s], (rows, size), dtype),
                gate=_present(gates[s], (rows, size), dtype),
                raw=place,
            )
        )
        layers.append(Layer(first, size, place + size))
        first, place = first + size, place + 2 * size
    return tuple(layers), tuple(stages), tuple(wires), place


def _launch(kernel, tensors: tuple[Tensor | None, ...], known: Tensor, network: tuple) -> None:
    *lists, (gate,), (first, second) = network
    rows, features = known.shape
    if known.numel() == 0:
        return
    layers, stages, wires, values = parts(known, *lists)
    net = Net(plan(lists[4]), layers, stages)
    shape = launch(rows, features, max(layer.size for layer in net.layers[1:]))
    dtype = torch.float64 if known.dtype == torch.float64 else torch.float32
    work = known.new_empty(shape.programs * values * shape.block_rows, dtype=dtype)
    with on_device_of(known):
        kernel[(shape.programs,)](
            *tensors, work, net, tuple(lists[-1][:4]), rows, features, values, shape.steps,
            WIRES=wires, GATE=gate, FIRST=first, SECOND=second, ROWS=shape.block_rows,
        )  # fmt: skip


def autoregressive_inverse(y: Tensor, *network) -> tuple[Tensor, Tensor]:
    """Launch the kernel of the inverse."""
    x = torch.empty_like(y, memory_format=torch.contiguous_format)
    log_abs_det = (y.new_empty if y.shape[1] else y.new_zeros)(y.shape[:1])
    _launch(_inverse_kernel, (y.contiguous(), x, log_abs_det), y, network)
    return x, log_abs_det


def autoregressive_solve(
    grad: Tensor | None, grad_log_abs_det: Tensor | None, x: Tensor, *network
) -> tuple[Tensor, Tensor]:
    """Launch the kernel of the solve with the transposed Jacobian."""
    require(all(g is None or g.dtype == x.dtype for g in (grad, grad_log_abs_det)))
    require(grad is None or grad.shape == x.shape)
    require(grad_log_abs_det is None or grad_log_abs_det.shape == x.shape[:1])
    solution = torch.empty_like(x, memory_format=torch.contiguous_format)
    outputs = x.new_empty(x.shape[0], 2 * x.shape[1])
    given = (None if g is None else g.contiguous() for g in (grad, grad_log_abs_det))
    _launch(_solve_kernel, (*given, x.contiguous(), solution, outputs), x, network)
    return solution, outputs
