"""GPU kernels of whole autoregressive networks: the inverse, and the solve with the transposed Jacobian, in one launch.

A program owns a tile of samples and walks through all steps alone: at step t the units that see t features are
computed, then the feature of rank t. Nothing passes between programs, and sums run in one fixed order. Threads of a
program hand values on to each other through the tile: debug_barrier() stands between what is written and what reads
it, or overwrites what was read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._triton.device import load, store
from hvae_kernels._triton.launch import cdiv, on_device_of
from hvae_kernels.ops.autoregressive_network.triton.groups import (
    UNITS,
    begun,
    context,
    finish,
    finish_cotangent,
    finished,
    from_readers,
    from_sources,
    group_at,
    read,
    write,
)
from hvae_kernels.ops.autoregressive_network.triton.network import Net, parts, plan, require
from hvae_kernels.ops.autoregressive_network.triton.tail import compiled_in, inverted, solved

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


# ---- Kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(work, values, rows, ROWS: tl.constexpr):
    """This program's samples, and where their values lie."""
    lane = tl.arange(0, ROWS)
    return tl.program_id(0).to(tl.int64) * ROWS + lane, rows, work + tl.program_id(0).to(tl.int64) * values * ROWS, lane


@triton.jit
def _invert_feature(y, x, net, outputs, place, t, features, TAIL: tl.constexpr, NUMBERS: tl.constexpr, tile):
    """The feature of rank t, from its finished outputs; returns the logarithm of the map's derivative."""
    row, rows, work, lane = tile
    first, step, stride = outputs
    feature = tl.load(net.plan.order + t)
    known = load(y, row * features + feature, row < rows, work.dtype.element_ty)
    at = (place + first + step * feature) * lane.shape[0] + lane
    value, log = inverted(known, work, at, stride * lane.shape[0], TAIL, NUMBERS)
    tl.store(work + feature * lane.shape[0] + lane, value)
    store(x, row * features + feature, value, row < rows)
    return log


@triton.jit
def _inverse_kernel(
    y, x, log_abs_det, work, net, outputs, rows, features, values, steps,
    WIRES: tl.constexpr, TAIL: tl.constexpr, NUMBERS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Blocks of steps: sums over what is known before the block, then, step by step, what is missing in them."""
    STAGES: tl.constexpr = len(WIRES)
    tile = _tile(work, values, rows, ROWS)
    log_det = tl.zeros([ROWS], tl.float64)
    for t0 in range(0, features, steps):
        t1 = tl.minimum(t0 + steps, features)
        for S in tl.static_range(STAGES):
            layer, end = net.layers[S + 1], finished(net.plan, S + 1, t1)
            for at in range(finished(net.plan, S + 1, t0), end, UNITS):
                group, last = group_at(net.plan, layer, at, end), layer.first + tl.minimum(at + UNITS, end) - 1
                write(tile, net.stages[S].raw, group, begun(net, WIRES, S, group, last, t0, tile))
        tl.debug_barrier()  # sums begun here are finished below, by other threads
        for t in range(t0, t1):
            for S in tl.static_range(STAGES):
                layer, end = net.layers[S + 1], finished(net.plan, S + 1, t + 1)
                for at in range(finished(net.plan, S + 1, t), end, UNITS):
                    group, last = group_at(net.plan, layer, at, end), layer.first + tl.minimum(at + UNITS, end) - 1
                    sums = read(tile, net.stages[S].raw, group)
                    sums = from_sources(sums, net, WIRES, S, group, last, t0, False, tile)
                    finish(sums, net, WIRES, S, group, tile)
                tl.debug_barrier()  # the next stage, or the tail, reads these values
            last_place = net.layers[STAGES].value
            log_det -= _invert_feature(y, x, net, outputs, last_place, t, features, TAIL, NUMBERS, tile)
            tl.debug_barrier()  # the next step reads this feature
    row = tile[0]
    store(log_abs_det, row, log_det.to(work.dtype.element_ty), row < rows)


@triton.jit
def _evaluate(net, WIRES: tl.constexpr, S: tl.constexpr, features, tile):
    """Raw values and values of stage S; zeros in units that no feature uses, which are not asked for theirs."""
    layer, used = net.layers[S + 1], finished(net.plan, S + 1, features)
    for at in range(0, used, UNITS):
        group, last = group_at(net.plan, layer, at, used), layer.first + tl.minimum(at + UNITS, used) - 1
        finish(begun(net, WIRES, S, group, last, features, tile), net, WIRES, S, group, tile)
    for at in range(used, layer.size, UNITS):
        group = group_at(net.plan, layer, at, layer.size)
        zeros = context(None, 0, tile, group)
        write(tile, net.stages[S].raw, group, zeros)
        write(tile, layer.value, group, zeros)


@triton.jit
def _solve_feature(
    grad, gl, x, solution, through, net, outputs, raw_place, place, t, features,
    TAIL: tl.constexpr, NUMBERS: tl.constexpr, tile,
):  # fmt: skip
    """The solution at the feature of rank t; the cotangents of its outputs take the place of their values."""
    row, rows, work, lane = tile
    DTYPE: tl.constexpr = work.dtype.element_ty
    first, step, stride = outputs
    feature = tl.load(net.plan.order + t)
    here, unit = row * features + feature, first + step * feature
    missing = load(grad, here, row < rows, DTYPE) - through
    known = load(x, here, row < rows, DTYPE)
    at, to = (raw_place + unit) * lane.shape[0] + lane, (place + unit) * lane.shape[0] + lane
    value = solved(missing, gl, known, work, at, stride * lane.shape[0], to, TAIL, NUMBERS)
    store(solution, here, value, row < rows)


@triton.jit
def _hand_out(grad_outputs, net, LAST: tl.constexpr, tile):
    """The cotangents of all outputs, from where the stages before have read them."""
    row, rows, _, _ = tile
    layer = net.layers[LAST]
    for at in range(0, layer.size, UNITS):
        unit = at + tl.arange(0, UNITS)
        group = unit, unit, unit < layer.size
        mask = (unit < layer.size)[:, None] & (row < rows)[None, :]
        store(grad_outputs, row[None, :] * layer.size + unit[:, None], read(tile, layer.value, group), mask)


@triton.jit
def _solve_kernel(
    grad, grad_log, x, solution, grad_outputs, work, net, outputs, rows, features, values, steps,
    WIRES: tl.constexpr, TAIL: tl.constexpr, NUMBERS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The network at x, then blocks of steps as in the inverse, backwards: cotangents lie where values lay."""
    STAGES: tl.constexpr = len(WIRES)
    tile = _tile(work, values, rows, ROWS)
    row = tile[0]
    for at in range(0, features, UNITS):
        unit = at + tl.arange(0, UNITS)
        group = unit, unit, unit < features
        write(tile, 0, group, context(x, features, tile, group))
    tl.debug_barrier()  # the first stage reads the features
    for S in tl.static_range(STAGES):
        _evaluate(net, WIRES, S, features, tile)
        tl.debug_barrier()  # the next stage reads these values, and then they are overwritten
    gl = load(grad_log, row, row < rows, work.dtype.element_ty)
    for before in range(0, features, steps):
        t1 = features - before
        t0 = tl.maximum(t1 - steps, 0)
        for LAYER in tl.static_range(STAGES):
            layer, end = net.layers[LAYER], finished(net.plan, LAYER, t1)
            for at in range(finished(net.plan, LAYER, t0), end, UNITS):
                group, sums = group_at(net.plan, layer, at, end), tl.zeros([UNITS, ROWS], work.dtype.element_ty)
                sums = from_readers(sums, net, WIRES, LAYER, group, layer.first + at, t1, True, tile)
                write(tile, layer.value, group, sums)
        tl.debug_barrier()  # sums begun here are finished below, by other threads
        for back in range(0, t1 - t0):
            t = t1 - 1 - back
            group = group_at(net.plan, net.layers[0], t, t + 1)
            sums = from_readers(read(tile, 0, group), net, WIRES, 0, group, t, t1, False, tile)
            through = tl.sum(tl.where(group[2][:, None], sums, 0.0), 0)
            _solve_feature(
                grad, gl, x, solution, through, net, outputs, net.stages[STAGES - 1].raw, net.layers[STAGES].value, t,
                features, TAIL, NUMBERS, tile,
            )  # fmt: skip
            tl.debug_barrier()  # the last stage reads the cotangents of its values
            for S in tl.static_range(STAGES - 1, -1, -1):
                layer, end = net.layers[S + 1], finished(net.plan, S + 1, t + 1)
                for at in range(finished(net.plan, S + 1, t), end, UNITS):
                    group = group_at(net.plan, layer, at, end)
                    sums = from_readers(
                        read(tile, layer.value, group), net, WIRES, S + 1, group, layer.first + at, t1, False, tile
                    )
                    finish_cotangent(sums, net, WIRES, S, group, tile)
                tl.debug_barrier()  # the stage before, or the next step, reads these cotangents
    _hand_out(grad_outputs, net, STAGES, tile)


# ---- Launchers -------------------------------------------------------------------------------------------------------


def _launch(kernel, tensors: tuple[Tensor | None, ...], known: Tensor, network: tuple) -> None:
    *lists, codes, numbers = network
    rows, features = known.shape
    if known.numel() == 0:
        return
    parameters, tail, constants = compiled_in(codes, numbers)
    layers, stages, wires, values = parts(known, *lists, parameters)
    first, step, second, _ = lists[-1][:4]
    net = Net(plan(lists[4]), layers, stages)
    shape = launch(rows, features, max(layer.size for layer in net.layers[1:]))
    dtype = torch.float64 if known.dtype == torch.float64 else torch.float32
    work = known.new_empty(shape.programs * values * shape.block_rows, dtype=dtype)
    with on_device_of(known):
        kernel[(shape.programs,)](
            *tensors, work, net, (first, step, second - first), rows, features, values, shape.steps,
            WIRES=wires, TAIL=tail, NUMBERS=constants, ROWS=shape.block_rows,
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
    outputs = x.new_empty(x.shape[0], network[4][-1].shape[0])
    given = (None if g is None else g.contiguous() for g in (grad, grad_log_abs_det))
    _launch(_solve_kernel, (*given, x.contiguous(), solution, outputs), x, network)
    return solution, outputs
