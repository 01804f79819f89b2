"""GPU kernels of whole autoregressive networks: the inverse, and the solve with the transposed Jacobian, in one launch.

A program owns a tile of samples and walks through all steps alone: at step t the units that see t features are computed,
then the feature of rank t. Nothing passes between programs, and sums run in one fixed order. A tile's values lie in
global memory unit by unit, ``work[unit, lane]``, so that the lanes of a unit are neighbours; they stay in the caches.

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
    exponential,
    expm1_nonpositive,
    hyperbolic_tangent,
    load,
    log1p_unit,
    store,
)
from hvae_kernels._triton.launch import cdiv, on_device_of
from hvae_kernels.ops.autoregressive.gates import CODES
from hvae_kernels.ops.autoregressive.triton import _gate, _logistic
from hvae_kernels.ops.autoregressive_network.network import ACTIVATIONS, FEATURES, NONE

_ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
_RELU = tl.constexpr(_ACTIVATION_CODES["relu"])
_ELU = tl.constexpr(_ACTIVATION_CODES["elu"])
_TANH = tl.constexpr(_ACTIVATION_CODES["tanh"])
_SOFTPLUS = tl.constexpr(_ACTIVATION_CODES["softplus"])
_SIGMOID = tl.constexpr(_ACTIVATION_CODES["sigmoid"])
_GELU = tl.constexpr(_ACTIVATION_CODES["gelu"])
_SILU = tl.constexpr(_ACTIVATION_CODES["silu"])
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
def _activate(x, ACTIVATION: tl.constexpr):
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


# ---- A group of units ------------------------------------------------------------------------------------------------


@triton.jit
def _finished(plan, LAYER: tl.constexpr, step):
    """How many units of a layer are finished before a step."""
    if LAYER == 0:
        return step
    else:
        return tl.load(plan.below + LAYER * plan.entries + step - 1, mask=step > 0, other=0)


@triton.jit
def _group(plan, layer, at, end):
    """The units of ranks ``at`` to ``at + _UNITS``: which, their entries in the plan, and whether they are below ``end``."""
    rank = at + tl.arange(0, _UNITS)
    inside = rank < end
    entry = layer.first + rank
    return tl.load(plan.order + entry, mask=inside, other=0), entry, inside


@triton.jit
def _at(work, place, unit, lane):
    """Pointers to units' values in a tile."""
    return work + (place + unit)[:, None] * lane.shape[0] + lane[None, :]


@triton.jit
def _products(sums, weight, unit_step, term_step, unit, low, high, begin, end, terms, values, lane):
    """Add ``weight[unit, term] values[term]`` over terms of ranks ``low`` to ``high``, all from ``begin`` to ``end``.

    Neither weights behind the mask nor values that are not finished are read.
    """
    DTYPE: tl.constexpr = sums.dtype
    for at in range(begin, end, _TERMS):
        rank = at + tl.arange(0, _TERMS)
        inside = rank < end
        term = tl.load(terms + rank, mask=inside, other=0)
        connected = (rank[None, :] >= low[:, None]) & (rank[None, :] < high[:, None])
        place = unit[:, None].to(tl.int64) * unit_step + term[None, :].to(tl.int64) * term_step
        left = tl.load(weight + place, mask=connected, other=0.0).to(DTYPE)
        right = tl.load(_at(values, 0, term, lane), mask=inside[:, None], other=0.0)
        sums += tl.dot(left, right, input_precision="ieee", out_dtype=DTYPE)
    return sums


@triton.jit
def _context(tensor, unit, inside, size, row, rows, DTYPE: tl.constexpr):
    """A group's part of a ``(rows, units)`` tensor, or of a ``(units,)`` one: units first."""
    mask = inside[:, None] & (row < rows)[None, :]
    return load(tensor, row[None, :] * size + unit[:, None], mask, DTYPE)


@triton.jit
def _own(net, S: tl.constexpr, unit, inside, row, rows, DTYPE: tl.constexpr):
    """What a group of stage S has before anything comes from its sources."""
    stage = net.stages[S]
    bias = load(stage.bias, unit, inside, DTYPE)
    return bias[:, None] + _context(stage.offset, unit, inside, net.layers[S + 1].size, row, rows, DTYPE)


@triton.jit
def _from_source(
    sums, net, SOURCE: tl.constexpr, BEFORE: tl.constexpr, weight, weight_row, unit, entry, inside, last, step, work, lane
):  # fmt: skip
    """Add to a group what comes from the units of one layer finished before a step (BEFORE), or from all later ones.

    ``last`` is the entry of the group's last unit, the one that sees most.
    """
    source = net.layers[SOURCE]
    upto = net.plan.upto + SOURCE * net.plan.entries
    begin = _finished(net.plan, SOURCE, step)
    end = tl.load(upto + last)
    high = tl.load(upto + entry, mask=inside, other=0)
    if BEFORE:
        end = tl.minimum(end, begin)
        high = tl.minimum(high, begin)
        begin = 0
    terms, values = net.plan.order + source.first, work + source.value * lane.shape[0]
    return _products(sums, weight, weight_row, 1, unit, tl.zeros_like(high), high, begin, end, terms, values, lane)


@triton.jit
def _from_sources(
    sums, net, WIRES: tl.constexpr, S: tl.constexpr, BEFORE: tl.constexpr, unit, entry, inside, last, step, work, lane
):  # fmt: skip
    """The same for all that a group of stage S reads."""
    stage = net.stages[S]
    sums = _from_source(
        sums, net, WIRES[S][_SOURCE], BEFORE, stage.weight, stage.weight_row, unit, entry, inside, last, step, work, lane
    )  # fmt: skip
    if stage.skip is not None:
        sums = _from_source(
            sums, net, 0, BEFORE, stage.skip, stage.skip_row, unit, entry, inside, last, step, work, lane
        )  # fmt: skip
    return sums


@triton.jit
def _finish(raw, net, WIRES: tl.constexpr, S: tl.constexpr, unit, inside, row, rows, work, lane):
    """From all that a group of stage S has gathered to its raw value and its value."""
    stage, layer = net.stages[S], net.layers[S + 1]
    if stage.gate is not None:
        raw *= _context(stage.gate, unit, inside, layer.size, row, rows, raw.dtype)
    if WIRES[S][_RESIDUAL] != _NONE:
        raw += tl.load(_at(work, net.stages[WIRES[S][_RESIDUAL]].raw, unit, lane), mask=inside[:, None], other=0.0)
    tl.store(_at(work, stage.raw, unit, lane), raw, mask=inside[:, None])
    tl.store(_at(work, layer.value, unit, lane), _activate(raw, WIRES[S][_ACTIVATION]), mask=inside[:, None])


@triton.jit
def _from_readers(
    sums,
    net,
    WIRES: tl.constexpr,
    LAYER: tl.constexpr,
    AFTER: tl.constexpr,
    unit,
    entry,
    inside,
    first,
    step,
    work,
    lane,
):
    """Add to cotangents of a group's values what comes from readers at or after a step (AFTER), or from all before it.

    ``first`` is the entry of the group's first unit, the one that is seen by most.
    """
    plan = net.plan
    for S in tl.static_range(LAYER, len(WIRES)):
        stage, reader = net.stages[S], net.layers[S + 1]
        terms, values = plan.order + reader.first, work + reader.value * lane.shape[0]
        known = _finished(plan, S + 1, step)
        below = plan.below + (S + 1) * plan.entries
        low = tl.load(below + entry, mask=inside, other=reader.size)
        begin, end = tl.load(below + first), known
        if AFTER:
            begin, end = tl.maximum(begin, known), reader.size
        high = tl.zeros_like(low) + end
        low = tl.maximum(low, begin)
        if WIRES[S][_SOURCE] == LAYER:
            sums = _products(sums, stage.weight, 1, stage.weight_row, unit, low, high, begin, end, terms, values, lane)
        if LAYER == 0 and stage.skip is not None:
            sums = _products(sums, stage.skip, 1, stage.skip_row, unit, low, high, begin, end, terms, values, lane)
    return sums


# ---- Kernels ---------------------------------------------------------------------------------------------------------
#
# Threads of a program hand values on to each other through `work`: debug_barrier() stands between what is written and
# what reads it, or overwrites what was read. Loads and stores of one group need none, as its units are its own.


@triton.jit
def _inverse_kernel(
    y, x, log_abs_det, work, net, rows, features, steps, shift_first, shift_step, scale_first, scale_step, tile,
    WIRES: tl.constexpr, GATE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = work.dtype.element_ty
    first, second = tl.full([1], FIRST, DTYPE), tl.full([1], SECOND, DTYPE)
    lane = tl.arange(0, ROWS)
    row = tl.program_id(0).to(tl.int64) * ROWS + lane
    work += tl.program_id(0).to(tl.int64) * tile
    log_det = tl.zeros([ROWS], tl.float64)
    for t0 in range(0, features, steps):
        t1 = tl.minimum(t0 + steps, features)
        for S in tl.static_range(len(WIRES)):
            layer, end = net.layers[S + 1], _finished(net.plan, S + 1, t1)
            for at in range(_finished(net.plan, S + 1, t0), end, _UNITS):
                unit, entry, inside = _group(net.plan, layer, at, end)
                last = layer.first + tl.minimum(at + _UNITS, end) - 1
                sums = _own(net, S, unit, inside, row, rows, DTYPE)
                sums = _from_sources(sums, net, WIRES, S, True, unit, entry, inside, last, t0, work, lane)
                tl.store(_at(work, net.stages[S].raw, unit, lane), sums, mask=inside[:, None])
        tl.debug_barrier()  # sums begun here are finished below, perhaps by other threads
        for t in range(t0, t1):
            for S in tl.static_range(len(WIRES)):
                layer, end = net.layers[S + 1], _finished(net.plan, S + 1, t + 1)
                for at in range(_finished(net.plan, S + 1, t), end, _UNITS):
                    unit, entry, inside = _group(net.plan, layer, at, end)
                    last = layer.first + tl.minimum(at + _UNITS, end) - 1
                    sums = tl.load(_at(work, net.stages[S].raw, unit, lane), mask=inside[:, None], other=0.0)
                    sums = _from_sources(sums, net, WIRES, S, False, unit, entry, inside, last, t0, work, lane)
                    _finish(sums, net, WIRES, S, unit, inside, row, rows, work, lane)
                tl.debug_barrier()  # the next stage, or the tail, reads this one's values
            feature = tl.load(net.plan.order + t)
            outputs = work + net.layers[len(WIRES)].value * ROWS + lane
            shift = tl.load(outputs + (shift_first + shift_step * feature) * ROWS)
            raw = tl.load(outputs + (scale_first + scale_step * feature) * ROWS)
            scale, rest, log, _, _, _, _ = _gate(raw, first, second, GATE)
            place = row * features + feature
            value = (load(y, place, row < rows, DTYPE) - rest * shift) / scale
            tl.store(work + feature * ROWS + lane, value)
            store(x, place, value, row < rows)
            log_det -= log
            tl.debug_barrier()  # the next step reads this feature
    tl.store(log_abs_det + row, log_det.to(log_abs_det.dtype.element_ty), mask=row < rows)


@triton.jit
def _evaluate(net, WIRES: tl.constexpr, S: tl.constexpr, features, row, rows, work, lane):
    """Raw values and values of stage S; zeros in units that no feature uses, which are never asked for theirs."""
    DTYPE: tl.constexpr = work.dtype.element_ty
    layer, used = net.layers[S + 1], _finished(net.plan, S + 1, features)
    for at in range(0, used, _UNITS):
        unit, entry, inside = _group(net.plan, layer, at, used)
        last = layer.first + tl.minimum(at + _UNITS, used) - 1
        sums = _own(net, S, unit, inside, row, rows, DTYPE)
        sums = _from_sources(sums, net, WIRES, S, True, unit, entry, inside, last, features, work, lane)
        _finish(sums, net, WIRES, S, unit, inside, row, rows, work, lane)
    for at in range(used, layer.size, _UNITS):
        unit, _, inside = _group(net.plan, layer, at, layer.size)
        zeros = tl.zeros([_UNITS, lane.shape[0]], DTYPE)
        tl.store(_at(work, net.stages[S].raw, unit, lane), zeros, mask=inside[:, None])
        tl.store(_at(work, layer.value, unit, lane), zeros, mask=inside[:, None])


@triton.jit
def _finish_cotangent(grad, net, WIRES: tl.constexpr, S: tl.constexpr, unit, inside, row, rows, work, lane):
    """From the cotangent of a group's values to those of its raw values and, in the values' place, of its sums."""
    stage, layer = net.stages[S], net.layers[S + 1]
    raw = tl.load(_at(work, stage.raw, unit, lane), mask=inside[:, None], other=0.0)
    grad *= _derivative(raw, WIRES[S][_ACTIVATION])
    for READER in tl.static_range(S + 1, len(WIRES)):
        if WIRES[READER][_RESIDUAL] == S:
            grad += tl.load(_at(work, net.stages[READER].raw, unit, lane), mask=inside[:, None], other=0.0)
    tl.store(_at(work, stage.raw, unit, lane), grad, mask=inside[:, None])
    if stage.gate is not None:
        grad *= _context(stage.gate, unit, inside, layer.size, row, rows, grad.dtype)
    tl.store(_at(work, layer.value, unit, lane), grad, mask=inside[:, None])


@triton.jit
def _solve_kernel(
    grad, grad_log, x, solution, outputs, work, net,
    rows, features, steps, shift_first, shift_step, scale_first, scale_step, tile,
    WIRES: tl.constexpr, GATE: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = work.dtype.element_ty
    STAGES: tl.constexpr = len(WIRES)
    first, second = tl.full([1], FIRST, DTYPE), tl.full([1], SECOND, DTYPE)
    lane = tl.arange(0, ROWS)
    row = tl.program_id(0).to(tl.int64) * ROWS + lane
    work += tl.program_id(0).to(tl.int64) * tile
    for at in range(0, features, _UNITS):
        unit = at + tl.arange(0, _UNITS)
        values = _context(x, unit, unit < features, features, row, rows, DTYPE)
        tl.store(_at(work, 0, unit, lane), values, mask=(unit < features)[:, None])
    tl.debug_barrier()
    for S in tl.static_range(STAGES):
        _evaluate(net, WIRES, S, features, row, rows, work, lane)
        tl.debug_barrier()  # the next stage reads these values; the last one's are overwritten below
    gl = load(grad_log, row, row < rows, DTYPE)
    values_last = work + net.layers[STAGES].value * ROWS + lane
    raw_last = work + net.stages[STAGES - 1].raw * ROWS + lane
    blocks = tl.cdiv(features, steps)
    for block in range(0, blocks):
        t0 = (blocks - 1 - block) * steps
        t1 = tl.minimum(t0 + steps, features)
        for LAYER in tl.static_range(STAGES):
            layer, end = net.layers[LAYER], _finished(net.plan, LAYER, t1)
            for at in range(_finished(net.plan, LAYER, t0), end, _UNITS):
                unit, entry, inside = _group(net.plan, layer, at, end)
                sums = tl.zeros([_UNITS, ROWS], DTYPE)
                sums = _from_readers(
                    sums, net, WIRES, LAYER, True, unit, entry, inside, layer.first + at, t1, work, lane
                )
                tl.store(_at(work, layer.value, unit, lane), sums, mask=inside[:, None])
        tl.debug_barrier()  # sums begun here are finished below, perhaps by other threads
        for back in range(0, t1 - t0):
            t = t1 - 1 - back
            unit, entry, inside = _group(net.plan, net.layers[0], t, t + 1)
            sums = tl.load(_at(work, 0, unit, lane), mask=inside[:, None], other=0.0)
            sums = _from_readers(sums, net, WIRES, 0, False, unit, entry, inside, t, t1, work, lane)
            through = tl.sum(tl.where(inside[:, None], sums, 0.0), 0)
            feature = tl.load(net.plan.order + t)
            place = row * features + feature
            shift_unit, scale_unit = shift_first + shift_step * feature, scale_first + scale_step * feature
            raw = tl.load(raw_last + scale_unit * ROWS)
            scale, rest, _, d_scale, d_log, _, _ = _gate(raw, first, second, GATE)
            value = (load(grad, place, row < rows, DTYPE) - through) / scale
            slope = load(x, place, row < rows, DTYPE)
            if GATE == _BLENDS:
                slope -= tl.load(raw_last + shift_unit * ROWS)
            d_raw = value * d_scale * slope + gl * d_log
            store(solution, place, value, row < rows)
            store(outputs, row * (2 * features) + shift_unit, value * rest, row < rows)
            store(outputs, row * (2 * features) + scale_unit, d_raw, row < rows)
            tl.store(values_last + shift_unit * ROWS, value * rest)
            tl.store(values_last + scale_unit * ROWS, d_raw)
            tl.debug_barrier()  # the last stage reads the cotangents of its values
            for S in tl.static_range(STAGES - 1, -1, -1):
                layer, end = net.layers[S + 1], _finished(net.plan, S + 1, t + 1)
                for at in range(_finished(net.plan, S + 1, t), end, _UNITS):
                    unit, entry, inside = _group(net.plan, layer, at, end)
                    sums = tl.load(_at(work, layer.value, unit, lane), mask=inside[:, None], other=0.0)
                    sums = _from_readers(
                        sums, net, WIRES, S + 1, False, unit, entry, inside, layer.first + at, t1, work, lane
                    )
                    _finish_cotangent(sums, net, WIRES, S, unit, inside, row, rows, work, lane)
                tl.debug_barrier()  # the stage before, or the next step, reads these cotangents


# ---- Launchers -------------------------------------------------------------------------------------------------------


def _require(fits: bool) -> None:
    if not fits:
        raise RuntimeError("autoregressive network: shapes or dtypes do not fit")


def _present(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """The tensor, of this shape, or None if it is empty."""
    if tensor.numel() == 0:
        return None
    _require(tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous())
    return tensor


def _matrix(weight: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, int]:
    """A weight of this shape, and the stride of its rows."""
    _require(weight.shape == shape and weight.dtype == dtype and (shape[1] <= 1 or weight.stride(1) == 1))
    return weight, weight.stride(0)


def _net(known: Tensor, weights, biases, offsets, gates, degrees, program) -> tuple[Net, tuple, int]:
    """The network for the kernels, its wires, and how many values a sample has in ``work``."""
    rows, features, dtype = *known.shape, known.dtype
    count, sizes = len(degrees) - 1, [layer.numel() for layer in degrees]
    _require(count >= 1 and sizes[0] == features and sizes[-1] == 2 * features and len(program) == 4 + 4 * count)
    _require(len(biases) == len(offsets) == len(gates) == count <= len(weights))
    _require(all(layer.dtype == torch.int64 and layer.dim() == 1 for layer in degrees))
    _require(
        all(0 <= at and 0 <= by and at + by * (features - 1) < sizes[-1] for at, by in (program[:2], program[2:4]))
    )
    layers, stages, wires = [Layer(0, features, 0)], [], []
    first = place = features
    for s, size in enumerate(sizes[1:]):
        source, residual, activation, skip = program[4 + 4 * s : 8 + 4 * s]
        _require(FEATURES <= source < s and NONE <= residual < s and NONE <= skip < len(weights))
        _require(residual == NONE or sizes[residual + 1] == size)
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
    return Net(plan(degrees), tuple(layers), tuple(stages)), tuple(wires), place


def _launch(kernel, tensors: tuple[Tensor | None, ...], known: Tensor, network: tuple) -> None:
    *lists, gate, first, second = network
    rows, features = known.shape
    if known.numel() == 0:
        return
    net, wires, values = _net(known, *lists)
    shape = launch(rows, features, max(layer.size for layer in net.layers[1:]))
    dtype = torch.float64 if known.dtype == torch.float64 else torch.float32
    work = known.new_empty(shape.programs * values * shape.block_rows, dtype=dtype)
    with on_device_of(known):
        kernel[(shape.programs,)](
            *tensors, work, net, rows, features, shape.steps, *lists[-1][:4], values * shape.block_rows,
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
    _require(all(g is None or g.dtype == x.dtype for g in (grad, grad_log_abs_det)))
    _require(grad is None or grad.shape == x.shape)
    _require(grad_log_abs_det is None or grad_log_abs_det.shape == x.shape[:1])
    solution = torch.empty_like(x, memory_format=torch.contiguous_format)
    outputs = x.new_empty(x.shape[0], 2 * x.shape[1])
    given = (None if g is None else g.contiguous() for g in (grad, grad_log_abs_det))
    _launch(_solve_kernel, (*given, x.contiguous(), solution, outputs), x, network)
    return solution, outputs
