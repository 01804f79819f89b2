"""The kernels: what runs over the batch, what adds up its sums, and around them the chain.

A one-dimensional grid over (replica, chunk of rows, feature block), feature blocks fastest: programs that run at the
same time read neighbouring memory. Sizes of the batch are never specialised on. What is not wanted has no tensor.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hvae_kernels._triton.device import load, store
from hvae_kernels._triton.dual import (
    Dual,
    Plain,
    as_row,
    constant,
    derivative_part,
    dot,
    load_number,
    sub,
)
from hvae_kernels.ops.gaussian_leapfrog.triton.chain import (
    Columns,
    chain_backward,
    compose,
    load_composed,
    store_map,
)


@triton.jit
def _locate(features, chunks, VECTOR: tl.constexpr, BLOCK_FEATURES: tl.constexpr):
    """This program's columns and its chunk of rows.

    Sizes are in 64 bits, as tensors may pass 2^31 elements; ``features`` is a multiple of VECTOR: wide loads.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(features, BLOCK_FEATURES)
    block = program % blocks
    chunk = (program // blocks) % chunks
    replica = program // blocks // chunks
    cols = (block * BLOCK_FEATURES).to(tl.int64) + tl.arange(0, BLOCK_FEATURES)
    features = tl.multiple_of(tl.cast(features, tl.int64), VECTOR)
    return Columns(replica.to(tl.int64), block, cols, cols < features, features), chunk.to(tl.int64)


@triton.jit
def _tile(here, first, tile, rows, BLOCK_ROWS: tl.constexpr):
    """Offsets and mask of a tile of a ``(R, rows, features)`` tensor."""
    row = first + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offsets = (here.replica * rows + row)[:, None] * here.features + here.cols[None, :]
    return offsets, (row < rows)[:, None] & (here.cols < here.features)[None, :]


@triton.jit(do_not_specialize=["n_steps"])
def compose_kernel(
    inputs, prefixes, features, n_steps,
    DUAL: tl.constexpr, STEP: tl.constexpr, VECTOR: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """The chain alone: all maps to ``prefixes``."""
    here, _ = _locate(features, 1, VECTOR, BLOCK_FEATURES)
    compose(inputs, prefixes, here, here.mask, n_steps, STEP, DUAL)


@triton.jit(do_not_specialize=["rows", "n_steps", "chunks", "tiles"])
def forward_kernel(
    inputs, prefixes, z_out, rho_out, rows, features, n_steps, chunks, tiles,
    DTYPE: tl.constexpr, COMPOSE: tl.constexpr, STEP: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """The map of each feature, on all its rows."""
    z, rho = inputs.z.value, inputs.rho.value
    here, chunk = _locate(features, chunks, VECTOR, BLOCK_FEATURES)
    first = chunk * tiles * BLOCK_ROWS
    at, inside = _tile(here, first, 0, rows, BLOCK_ROWS)
    # Ask for the first tile before composing: the chain runs while memory answers. Then always one tile ahead.
    z_here = tl.load(z + at, mask=inside, other=0.0)
    rho_here = tl.load(rho + at, mask=inside, other=0.0)
    mu = load(inputs.loc.value, here.replica * here.features + here.cols, here.mask, DTYPE)[None, :]
    if COMPOSE:
        A, B, C, D = compose(inputs, None, here, here.mask, n_steps, STEP, False)
    else:
        A, B, C, D = load_composed(prefixes, here, n_steps, False)
    # z + (A - 1) (z - loc) keeps the digits of z where loc is far away
    A, B, C, D = as_row(Plain(A.value - 1.0), DTYPE), as_row(B, DTYPE), as_row(C, DTYPE), as_row(D, DTYPE)
    for tile in range(tiles):
        begun = z_here.to(DTYPE)
        y, r = Plain(begun - mu), Plain(rho_here.to(DTYPE))
        next_at, next_inside = _tile(here, first, tile + 1, rows, BLOCK_ROWS)
        next_inside = next_inside & (tile + 1 < tiles)
        z_here = tl.load(z + next_at, mask=next_inside, other=0.0)
        rho_here = tl.load(rho + next_at, mask=next_inside, other=0.0)
        tl.store(z_out + at, begun + dot(A, y, B, r).value, mask=inside)
        tl.store(rho_out + at, dot(C, y, D, r).value, mask=inside)
        at, inside = next_at, next_inside


@triton.jit
def _add(sums, g, x):
    """``sums + g x`` in the sums' precision, for a ``g`` without tangent."""
    value = sums.value + g * x.value.to(g.dtype)
    if len(x) == 1:
        return Plain(value)
    else:
        return Dual(value, sums.tangent + g * x.tangent.to(g.dtype))


@triton.jit
def _total(sums):
    if len(sums) == 1:
        return Plain(tl.sum(sums.value, 0))
    else:
        return Dual(tl.sum(sums.value, 0), tl.sum(sums.tangent, 0))


@triton.jit(do_not_specialize=["rows", "n_steps", "chunks", "tiles"])
def backward_kernel(
    inputs, grad_z, grad_rho, prefixes, partials, gg_z, gg_rho, gradients, rows, features, n_steps, chunks, tiles,
    DUAL: tl.constexpr, DTYPE: tl.constexpr, COMPOSE: tl.constexpr, STEP: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """The batch's pass of the backward, or if DUAL of the double backward.

    Column sums go to ``partials (R, chunks, N, d)``: the cotangent of P_K as ``store_map`` has it, then those of the
    cotangents. Without ``partials`` they are this program's alone, which then runs the chain backwards itself.
    """
    OUTPUTS: tl.constexpr = gg_z is not None
    STATE: tl.constexpr = gradients.z is not None
    PARAMETERS: tl.constexpr = gradients.loc is not None
    SUMS: tl.constexpr = tl.float64 if partials is None else DTYPE
    here, chunk = _locate(features, chunks, VECTOR, BLOCK_FEATURES)
    if COMPOSE:
        A, B, C, D = compose(inputs, prefixes, here, here.mask & (chunk == 0), n_steps, STEP, DUAL)
    else:
        A, B, C, D = load_composed(prefixes, here, n_steps, DUAL)
    if OUTPUTS:
        A = Dual(A.value - 1.0, A.tangent)
    A, B, C, D = as_row(A, DTYPE), as_row(B, DTYPE), as_row(C, DTYPE), as_row(D, DTYPE)
    if OUTPUTS or PARAMETERS:
        mu = load_number(inputs.loc, here.replica * here.features + here.cols, here.mask, DTYPE)
        mu = as_row(mu, DTYPE)
    if PARAMETERS:
        sum_z = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), SUMS)
        sum_rho = sum_z
        zy = constant(sum_z, DUAL)
        zr, ry, rr = zy, zy, zy
    first = chunk * tiles * BLOCK_ROWS
    for tile in range(tiles):
        at, inside = _tile(here, first, tile, rows, BLOCK_ROWS)
        if OUTPUTS or PARAMETERS:
            begun = load_number(inputs.z, at, inside, DTYPE)
            y = sub(begun, mu)
            r = load_number(inputs.rho, at, inside, DTYPE)
        if STATE or PARAMETERS:
            gz = load(grad_z, at, inside, DTYPE)
            gr = load(grad_rho, at, inside, DTYPE)
        if OUTPUTS:
            tl.store(gg_z + at, begun.tangent + dot(A, y, B, r).tangent, mask=inside)
            tl.store(gg_rho + at, dot(C, y, D, r).tangent, mask=inside)
        if STATE:
            tl.store(gradients.z + at, derivative_part(A) * gz + derivative_part(C) * gr, mask=inside)
            tl.store(gradients.rho + at, derivative_part(B) * gz + derivative_part(D) * gr, mask=inside)
        if PARAMETERS:
            gz, gr = gz.to(SUMS), gr.to(SUMS)
            zy, zr, ry, rr = _add(zy, gz, y), _add(zr, gz, r), _add(ry, gr, y), _add(rr, gr, r)
            sum_z += gz
            sum_rho += gr
    if PARAMETERS:
        zy, zr, ry, rr = _total(zy), _total(zr), _total(ry), _total(rr)
        sum_z, sum_rho = tl.sum(sum_z, 0), tl.sum(sum_rho, 0)
        if partials is None:
            tl.debug_barrier()  # the prefixes were stored by other threads of this program
            chain_backward(
                zy, zr, ry, rr, sum_z, sum_rho, inputs, prefixes, gradients, here, n_steps, n_steps, STEP, DUAL
            )
        else:
            ENTRIES: tl.constexpr = 8 if DUAL else 4
            at_sums = (here.replica * chunks + chunk) * (ENTRIES + 2) * here.features + here.cols
            store_map(partials, at_sums, here.features, here.mask, zy, zr, ry, rr)
            tl.store(partials + at_sums + ENTRIES * here.features, sum_z, mask=here.mask)
            tl.store(partials + at_sums + (ENTRIES + 1) * here.features, sum_rho, mask=here.mask)


@triton.jit
def _add_partials(partials, here, chunks, BLOCK: tl.constexpr, N: tl.constexpr):
    """Sums over the chunks, in float64 and a fixed order: 4 + 2 numbers a feature of each chunk's ``(N, d)`` sums."""
    features = here.features
    first = tl.zeros((BLOCK, here.cols.shape[0]), tl.float64)
    second, third, fourth, fifth, sixth = first, first, first, first, first
    for start in range(0, chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        inside = (chunk < chunks)[:, None] & here.mask[None, :]
        at = (here.replica * chunks + chunk)[:, None] * N * features + here.cols[None, :]
        first += load(partials, at, inside, tl.float64)
        second += load(partials, at + features, inside, tl.float64)
        third += load(partials, at + 2 * features, inside, tl.float64)
        fourth += load(partials, at + 3 * features, inside, tl.float64)
        fifth += load(partials, at + 4 * features, inside, tl.float64)
        sixth += load(partials, at + 5 * features, inside, tl.float64)
    entries = tl.sum(first, 0), tl.sum(second, 0), tl.sum(third, 0), tl.sum(fourth, 0)
    return entries, tl.sum(fifth, 0), tl.sum(sixth, 0)


@triton.jit(do_not_specialize=["n_steps", "chunks", "total_stride"])
def finish_kernel(
    partials, inputs, prefixes, gradients, features, n_steps, chunks, total_stride,
    DUAL: tl.constexpr, STEP: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """The chain backwards, from the sums that ``backward_kernel`` has left."""
    here, _ = _locate(features, 1, VECTOR, BLOCK_FEATURES)
    if DUAL:
        g, _, _ = _add_partials(partials, here, chunks, BLOCK_ROWS, 10)
        tangents = partials + 4 * here.features
        tg, sum_z, sum_rho = _add_partials(tangents, here, chunks, BLOCK_ROWS, 10)
        g11, g12, g21, g22 = Dual(g[0], tg[0]), Dual(g[1], tg[1]), Dual(g[2], tg[2]), Dual(g[3], tg[3])
    else:
        g, sum_z, sum_rho = _add_partials(partials, here, chunks, BLOCK_ROWS, 6)
        g11, g12, g21, g22 = Plain(g[0]), Plain(g[1]), Plain(g[2]), Plain(g[3])
    chain_backward(
        g11, g12, g21, g22, sum_z, sum_rho, inputs, prefixes, gradients, here, n_steps, total_stride, STEP, DUAL
    )


@triton.jit(do_not_specialize=["n_steps", "feature_blocks"])
def total_kernel(
    totals, d_tempering, d_step_size, n_steps, feature_blocks,
    SCALAR: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_STEPS: tl.constexpr,
):  # fmt: skip
    """Adds ``totals (R, feature blocks, K + 1)`` over the feature blocks; the last column is a scalar step size's."""
    replica = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_STEPS + tl.arange(0, BLOCK_STEPS)
    wanted = cols < n_steps + SCALAR
    total = tl.zeros((BLOCK_ROWS, BLOCK_STEPS), tl.float64)
    for start in range(0, feature_blocks, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        at = (replica * feature_blocks + row)[:, None] * (n_steps + 1) + cols[None, :]
        total += load(totals, at, (row < feature_blocks)[:, None] & wanted[None, :], tl.float64)
    total = tl.sum(total, 0)
    store(d_tempering, replica * n_steps + cols, total, cols < n_steps)
    if SCALAR:
        store(d_step_size, cols * 0, total, cols == n_steps)
