"""GPU kernels of ``gaussian_leapfrog``: one pass over the batch whatever K is.

The K steps of a dimension are one 2x2 map ``P_K = M_K ... M_1`` of ``(z - loc, rho)``. Composing it ("the chain") costs
O(d K) and runs in float64; the batch runs in float32, or float64 for float64 tensors. Launches:

- forward: 1, every program composes the map of its own features while its first tile is in flight.
- backward and double backward: 1 when the batch is small (each replica is one program) or when no parameter needs a
  gradient; otherwise 2, a pass that leaves partial column sums and one that adds them in a fixed order and runs the
  chain backwards; 3 when that second one splits the features, because tempering's gradient sums over them.
- one more where K is long and many programs would repeat the chain.

There are no atomics, so results are bitwise repeatable; launch configurations depend on shapes only, so they are the
same on every GPU.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._triton.device import dot_dual, load, load_scalar, mul_dual, store
from hvae_kernels._triton.launch import cdiv, next_power_of_2, on_device_of
from hvae_kernels.ops.gaussian_leapfrog._layout import Layout, layout
from hvae_kernels.ops.gaussian_leapfrog.autograd import NEEDS_OUTPUTS, NEEDS_PARAMETERS, NEEDS_STATE

# ---- Launch configurations -------------------------------------------------------------------------------------------

#: Above this many steps the chain gets a launch of its own, if several programs would repeat it: at 10 to 16 float64
#: instructions a step and feature, 64 steps in each of some 500 programs cost about what the launch does.
FUSED_STEPS = 64
#: A batch of at most this many elements a replica is one program's work (10 x 400 is): it would take a single
#: multiprocessor 2 to 3 us, less than a second launch.
SMALL_ELEMENTS = 8192
SMALL_FEATURES = 512
#: Rows are handed out so that there are at least this many programs, 32 for each of an H200's 132 multiprocessors:
#: several waves, so that the last one's idle tail is short.
MANY_PROGRAMS = 4224
#: Tiles a program: at least 4 to repay composing the map, at most 128 to bound the error of float32 column sums, and
#: between these as many as keep the partial sums to some 512 rows: reading them is latency, nothing else runs then.
FEWEST_TILES, MOST_TILES, MANY_CHUNKS = 4, 128, 512
#: The kernel that adds the partial sums keeps all features in one program up to this many partial rows x features;
#: beyond, its programs take 8 features each, one 32-byte sector of float32 and many rows at once.
FINISH_TOGETHER = 8192
FINISH_FEATURES = 8


@dataclass(frozen=True)
class Tiling:
    """Each program takes ``tiles`` tiles of ``block_rows x block_features``, one below the other."""

    block_rows: int
    block_features: int
    tiles: int
    chunks: int
    feature_blocks: int
    num_warps: int


def _block_features(features: int) -> int:
    """128 or 64, whichever pads less (400 is 7 x 64 or 4 x 128); fewer when there are fewer."""
    widest = min(next_power_of_2(features), 128)
    return min((widest, 64), key=lambda block: cdiv(features, block) * block) if features > 64 else widest


@functools.lru_cache(maxsize=1024)
def row_tiling(replicas: int, rows: int, features: int, elements: int) -> Tiling:
    """Tiles of ``elements`` (8 a thread keep enough bytes in flight; 4 where many accumulators want registers)."""
    block_features = _block_features(features)
    block_rows = min(elements // block_features, next_power_of_2(rows))
    feature_blocks = cdiv(features, block_features)
    row_tiles = cdiv(rows, block_rows)
    wanted = max(replicas * row_tiles * feature_blocks // MANY_PROGRAMS, row_tiles // MANY_CHUNKS)
    tiles = min(row_tiles, max(FEWEST_TILES, min(MOST_TILES, wanted)))
    return Tiling(block_rows, block_features, tiles, cdiv(row_tiles, tiles), feature_blocks, 4)


@functools.lru_cache(maxsize=1024)
def small_tiling(rows: int, features: int) -> Tiling | None:
    """One program a replica, which then also runs the chain backwards; ``None`` if the batch is too large for that."""
    if features > SMALL_FEATURES or rows * features > SMALL_ELEMENTS:
        return None
    block_features = next_power_of_2(features)
    block_rows = min(1024 // block_features, next_power_of_2(rows))
    num_warps = 8 if block_rows * block_features > 512 else 4  # 4 entries a thread, as the sums are float64 here
    return Tiling(block_rows, block_features, cdiv(rows, block_rows), 1, 1, num_warps)


@functools.lru_cache(maxsize=1024)
def finish_tiling(chunks: int, features: int) -> Tiling:
    """How to read ``chunks`` rows of partial sums: one program if they are few, else many narrow ones share them."""
    together = features <= SMALL_FEATURES and chunks * features <= FINISH_TOGETHER
    block_features = next_power_of_2(features) if together else min(FINISH_FEATURES, next_power_of_2(features))
    block_rows = max(1, min(1024 // block_features, next_power_of_2(chunks)))
    return Tiling(block_rows, block_features, cdiv(chunks, block_rows), 1, cdiv(features, block_features), 8)


# ---- The step and its composition ------------------------------------------------------------------------------------
# M = [[c, e], [alpha s, alpha c]], c = 1 - p e^2 / 2, s = -p e (1 - p e^2 / 4). Names with a leading t are tangents.


@triton.jit
def _step(p, e):
    q = 0.25 * p * e * e
    return 1.0 - 2.0 * q, -(p * e) * (1.0 - q)


@triton.jit
def _step_dual(p, tp, e, te):
    pe, tpe = mul_dual(p, tp, e, te)
    q, tq = mul_dual(0.25 * pe, 0.25 * tpe, e, te)
    return 1.0 - 2.0 * q, -2.0 * tq, -pe * (1.0 - q), pe * tq - tpe * (1.0 - q)


@triton.jit
def _step_offsets(replica, k, cols, features, n_steps, SHARED: tl.constexpr, SCALAR: tl.constexpr):
    """Where the step sizes of step k are: ``()``, ``(R, 1, d)`` if shared by all steps, else ``(R, K, d)``."""
    if SCALAR:
        return cols * 0
    elif SHARED:
        return replica * features + cols
    else:
        return (replica * n_steps + k) * features + cols


@triton.jit
def _keep(prefixes, at, stride, mask, A, B, C, D):
    tl.store(prefixes + at, A, mask=mask)
    tl.store(prefixes + at + stride, B, mask=mask)
    tl.store(prefixes + at + 2 * stride, C, mask=mask)
    tl.store(prefixes + at + 3 * stride, D, mask=mask)


@triton.jit
def _kept(prefixes, at, stride, mask):
    A = tl.load(prefixes + at, mask=mask, other=0.0)
    B = tl.load(prefixes + at + stride, mask=mask, other=0.0)
    C = tl.load(prefixes + at + 2 * stride, mask=mask, other=0.0)
    D = tl.load(prefixes + at + 3 * stride, mask=mask, other=0.0)
    return A, B, C, D


@triton.jit
def _compose(
    precision, step_size, tempering, prefixes, replica, cols, mask, keep, features, n_steps,
    SHARED: tl.constexpr, SCALAR: tl.constexpr,
):  # fmt: skip
    """P_K in float64; stores P_0 .. P_K to ``prefixes (R, K + 1, 4, d)`` where ``keep``, if there are any."""
    p = load(precision, replica * features + cols, mask, tl.float64)
    A = p * 0.0 + 1.0
    B = tl.zeros(cols.shape, tl.float64)
    C = tl.zeros(cols.shape, tl.float64)
    D = A
    at = replica * (n_steps + 1) * 4 * features + cols
    if SHARED:
        e = load(step_size, _step_offsets(replica, 0, cols, features, n_steps, SHARED, SCALAR), mask, tl.float64)
    for k in range(n_steps):
        if prefixes is not None:
            _keep(prefixes, at, features, keep, A, B, C, D)
            at += 4 * features
        if not SHARED:
            e = load(step_size, _step_offsets(replica, k, cols, features, n_steps, SHARED, SCALAR), mask, tl.float64)
        alpha = load_scalar(tempering, replica * n_steps + k, tl.float64)
        c, s = _step(p, e)
        A, C = c * A + e * C, (alpha * s) * A + (alpha * c) * C
        B, D = c * B + e * D, (alpha * s) * B + (alpha * c) * D
    if prefixes is not None:
        _keep(prefixes, at, features, keep, A, B, C, D)
    return A, B, C, D


@triton.jit
def _compose_dual(
    precision, step_size, tempering, h_precision, h_step_size, h_tempering,
    prefixes, replica, cols, mask, keep, features, n_steps, SHARED: tl.constexpr, SCALAR: tl.constexpr,
):  # fmt: skip
    """P_K and its tangent, both also stored as in ``_compose``, ``prefixes (R, K + 1, 8, d)``: values, tangents."""
    p = load(precision, replica * features + cols, mask, tl.float64)
    tp = load(h_precision, replica * features + cols, mask, tl.float64)
    zero = tl.zeros(cols.shape, tl.float64)
    A, B, C, D = zero + 1.0, zero, zero, zero + 1.0
    tA, tB, tC, tD = zero, zero, zero, zero
    at = replica * (n_steps + 1) * 8 * features + cols
    for k in range(n_steps):
        _keep(prefixes, at, features, keep, A, B, C, D)
        _keep(prefixes, at + 4 * features, features, keep, tA, tB, tC, tD)
        at += 8 * features
        step_at = _step_offsets(replica, k, cols, features, n_steps, SHARED, SCALAR)
        e = load(step_size, step_at, mask, tl.float64)
        te = load(h_step_size, step_at, mask, tl.float64)
        alpha = load_scalar(tempering, replica * n_steps + k, tl.float64)
        talpha = load_scalar(h_tempering, replica * n_steps + k, tl.float64)
        c, tc, s, ts = _step_dual(p, tp, e, te)
        tas, tac = alpha * ts + talpha * s, alpha * tc + talpha * c
        tA, tC = c * tA + tc * A + e * tC + te * C, alpha * (s * tA + c * tC) + tas * A + tac * C
        tB, tD = c * tB + tc * B + e * tD + te * D, alpha * (s * tB + c * tD) + tas * B + tac * D
        A, C = c * A + e * C, alpha * (s * A + c * C)
        B, D = c * B + e * D, alpha * (s * B + c * D)
    _keep(prefixes, at, features, keep, A, B, C, D)
    _keep(prefixes, at + 4 * features, features, keep, tA, tB, tC, tD)
    return A, B, C, D, tA, tB, tC, tD


@triton.jit
def _chain_backward(
    a, b, c, d, sum_z, sum_rho, precision, step_size, tempering, prefixes,
    d_precision, d_loc, d_step_size, d_tempering, replica, block, cols, mask, features, n_steps,
    total_stride, SHARED: tl.constexpr, SCALAR: tl.constexpr,
):  # fmt: skip
    """From the cotangent ``[[a, b], [c, d]]`` of P_K to the parameters' gradients (README.md, "Backward").

    ``d_tempering`` (and a scalar ``d_step_size``) has a row for each replica and feature block, ``total_stride`` apart.
    """
    here = replica * features + cols
    p = load(precision, here, mask, tl.float64)
    at = (replica * (n_steps + 1) + n_steps) * 4 * features + cols
    A, B, C, D = _kept(prefixes, at, features, mask)
    store(d_loc, here, (1.0 - A) * sum_z - C * sum_rho, mask)
    p_bar = tl.zeros(cols.shape, tl.float64)
    e_bar = tl.zeros(cols.shape, tl.float64)
    total = (replica * tl.cdiv(features, cols.shape[0]) + block) * total_stride
    for i in range(n_steps):
        k = n_steps - 1 - i
        at -= 4 * features
        A, B, C, D = _kept(prefixes, at, features, mask)
        step_at = _step_offsets(replica, k, cols, features, n_steps, SHARED, SCALAR)
        e = load(step_size, step_at, mask, tl.float64)
        alpha = load_scalar(tempering, replica * n_steps + k, tl.float64)
        cos, sin = _step(p, e)
        m21, m22 = c * A + d * B, c * C + d * D
        c_bar, s_bar = a * A + b * B + alpha * m22, alpha * m21
        pee = p * e * e
        p_bar += e * (s_bar * (0.5 * pee - 1.0) - 0.5 * e * c_bar)
        e_here = a * C + b * D + p * (s_bar * (0.75 * pee - 1.0) - e * c_bar)
        store(d_tempering, total + k, tl.sum(tl.where(mask, sin * m21 + cos * m22, 0.0), 0), None)
        if SHARED:
            e_bar += e_here
        else:
            store(d_step_size, step_at, e_here, mask)
        a, c = cos * a + alpha * sin * c, e * a + alpha * cos * c
        b, d = cos * b + alpha * sin * d, e * b + alpha * cos * d
    store(d_precision, here, p_bar, mask)
    if SCALAR:
        store(d_step_size, block * total_stride, tl.sum(tl.where(mask, e_bar, 0.0), 0), None)
    elif SHARED:
        store(d_step_size, here, e_bar, mask)


@triton.jit
def _chain_backward_dual(
    a, b, c, d, ta, tb, tc, td, sum_z, sum_rho,
    precision, step_size, tempering, h_precision, h_step_size, h_tempering, prefixes,
    d_precision, d_loc, d_step_size, d_tempering, replica, block, cols, mask, features, n_steps,
    total_stride, SHARED: tl.constexpr, SCALAR: tl.constexpr,
):  # fmt: skip
    """``_chain_backward`` on dual numbers; what it stores are the tangents of the gradients."""
    here = replica * features + cols
    p = load(precision, here, mask, tl.float64)
    tp = load(h_precision, here, mask, tl.float64)
    at = (replica * (n_steps + 1) + n_steps) * 8 * features + cols
    tA, tB, tC, tD = _kept(prefixes, at + 4 * features, features, mask)
    store(d_loc, here, -(tA * sum_z + tC * sum_rho), mask)
    p_bar = tl.zeros(cols.shape, tl.float64)
    e_bar = tl.zeros(cols.shape, tl.float64)
    total = (replica * tl.cdiv(features, cols.shape[0]) + block) * total_stride
    for i in range(n_steps):
        k = n_steps - 1 - i
        at -= 8 * features
        A, B, C, D = _kept(prefixes, at, features, mask)
        tA, tB, tC, tD = _kept(prefixes, at + 4 * features, features, mask)
        step_at = _step_offsets(replica, k, cols, features, n_steps, SHARED, SCALAR)
        e = load(step_size, step_at, mask, tl.float64)
        te = load(h_step_size, step_at, mask, tl.float64)
        alpha = load_scalar(tempering, replica * n_steps + k, tl.float64)
        talpha = load_scalar(h_tempering, replica * n_steps + k, tl.float64)
        cos, tcos, sin, tsin = _step_dual(p, tp, e, te)
        m11, tm11 = dot_dual(a, ta, A, tA, b, tb, B, tB)
        tm12 = a * tC + ta * C + b * tD + tb * D
        m21, tm21 = dot_dual(c, tc, A, tA, d, td, B, tB)
        m22, tm22 = dot_dual(c, tc, C, tC, d, td, D, tD)
        c_bar, tc_bar = m11 + alpha * m22, tm11 + alpha * tm22 + talpha * m22
        s_bar, ts_bar = mul_dual(alpha, talpha, m21, tm21)
        pe, tpe = mul_dual(p, tp, e, te)
        pee, tpee = mul_dual(pe, tpe, e, te)
        # d c / d p, d s / d p, d c / d e = -p e, d s / d e, each with its tangent
        c_p, tc_p = -0.5 * e * e, -e * te
        s_p, ts_p = mul_dual(e, te, 0.5 * pee - 1.0, 0.5 * tpee)
        s_e, ts_e = mul_dual(p, tp, 0.75 * pee - 1.0, 0.75 * tpee)
        p_bar += c_bar * tc_p + tc_bar * c_p + s_bar * ts_p + ts_bar * s_p
        e_here = tm12 - c_bar * tpe - tc_bar * pe + s_bar * ts_e + ts_bar * s_e
        alpha_bar = sin * tm21 + tsin * m21 + cos * tm22 + tcos * m22
        store(d_tempering, total + k, tl.sum(tl.where(mask, alpha_bar, 0.0), 0), None)
        if SHARED:
            e_bar += e_here
        else:
            store(d_step_size, step_at, e_here, mask)
        asin, tasin = mul_dual(alpha, talpha, sin, tsin)
        acos, tacos = mul_dual(alpha, talpha, cos, tcos)
        next_a, next_ta = dot_dual(cos, tcos, a, ta, asin, tasin, c, tc)
        next_b, next_tb = dot_dual(cos, tcos, b, tb, asin, tasin, d, td)
        c, tc = dot_dual(e, te, a, ta, acos, tacos, c, tc)
        d, td = dot_dual(e, te, b, tb, acos, tacos, d, td)
        a, ta, b, tb = next_a, next_ta, next_b, next_tb
    store(d_precision, here, p_bar, mask)
    if SCALAR:
        store(d_step_size, block * total_stride, tl.sum(tl.where(mask, e_bar, 0.0), 0), None)
    elif SHARED:
        store(d_step_size, here, e_bar, mask)


# ---- Kernels ---------------------------------------------------------------------------------------------------------
# A one-dimensional grid over (replica, chunk of rows, feature block), feature blocks fastest: programs that run at the
# same time read neighbouring memory. Sizes of the batch are never specialised on.


@triton.jit
def _locate(features, chunks, BLOCK_FEATURES: tl.constexpr):
    program = tl.program_id(0)
    blocks = tl.cdiv(features, BLOCK_FEATURES)
    block = program % blocks
    chunk = (program // blocks) % chunks
    replica = program // blocks // chunks
    cols = (block * BLOCK_FEATURES).to(tl.int64) + tl.arange(0, BLOCK_FEATURES)
    return replica.to(tl.int64), chunk.to(tl.int64), block, cols


@triton.jit
def _width(features, VECTOR: tl.constexpr):
    """``features`` in 64 bits (tensors may pass 2^31 elements), known to be a multiple of ``VECTOR``: wide loads."""
    return tl.multiple_of(tl.cast(features, tl.int64), VECTOR)


@triton.jit
def _tile(first, tile, replica, cols, rows, features, BLOCK_ROWS: tl.constexpr):
    """Offsets and mask of a tile of a ``(R, rows, features)`` tensor."""
    row = first + tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offsets = (replica * rows + row)[:, None] * features + cols[None, :]
    return offsets, (row < rows)[:, None] & (cols < features)[None, :]


@triton.jit(do_not_specialize=["n_steps"])
def _compose_kernel(
    precision, step_size, tempering, h_precision, h_step_size, h_tempering, prefixes, features, n_steps,
    DUAL: tl.constexpr, SHARED: tl.constexpr, SCALAR: tl.constexpr, VECTOR: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    replica, _, _, cols = _locate(features, 1, BLOCK_FEATURES)
    width = _width(features, VECTOR)
    mask = cols < width
    if DUAL:
        _compose_dual(
            precision, step_size, tempering, h_precision, h_step_size, h_tempering,
            prefixes, replica, cols, mask, mask, width, n_steps, SHARED, SCALAR,
        )  # fmt: skip
    else:
        _compose(
            precision, step_size, tempering, prefixes, replica, cols, mask, mask, width, n_steps, SHARED, SCALAR
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "n_steps", "chunks", "tiles"])
def _forward_kernel(
    z, rho, precision, loc, step_size, tempering, prefixes, z_out, rho_out, rows, features, n_steps, chunks, tiles,
    DTYPE: tl.constexpr, COMPOSE: tl.constexpr, SHARED: tl.constexpr, SCALAR: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    replica, chunk, _, cols = _locate(features, chunks, BLOCK_FEATURES)
    width = _width(features, VECTOR)
    mask = cols < width
    first = chunk * tiles * BLOCK_ROWS
    at, inside = _tile(first, 0, replica, cols, rows, width, BLOCK_ROWS)
    # Ask for the first tile before composing: the chain runs while memory answers. Then always one tile ahead.
    z_here = tl.load(z + at, mask=inside, other=0.0)
    rho_here = tl.load(rho + at, mask=inside, other=0.0)
    mu = load(loc, replica * width + cols, mask, DTYPE)[None, :]
    if COMPOSE:
        A, B, C, D = _compose(
            precision, step_size, tempering, None, replica, cols, mask, mask, width, n_steps, SHARED, SCALAR
        )
    else:
        A, B, C, D = _kept(prefixes, (replica * (n_steps + 1) + n_steps) * 4 * width + cols, width, mask)
    A, B, C, D = A.to(DTYPE)[None, :], B.to(DTYPE)[None, :], C.to(DTYPE)[None, :], D.to(DTYPE)[None, :]
    for tile in range(tiles):
        y, r = z_here.to(DTYPE) - mu, rho_here.to(DTYPE)
        next_at, next_inside = _tile(first, tile + 1, replica, cols, rows, width, BLOCK_ROWS)
        next_inside = next_inside & (tile + 1 < tiles)
        z_here = tl.load(z + next_at, mask=next_inside, other=0.0)
        rho_here = tl.load(rho + next_at, mask=next_inside, other=0.0)
        tl.store(z_out + at, mu + (A * y + B * r), mask=inside)
        tl.store(rho_out + at, C * y + D * r, mask=inside)
        at, inside = next_at, next_inside


@triton.jit(do_not_specialize=["rows", "n_steps", "chunks", "tiles"])
def _backward_kernel(
    grad_z, grad_rho, z, rho, precision, loc, step_size, tempering, prefixes, partials,
    d_z, d_rho, d_precision, d_loc, d_step_size, d_tempering, rows, features, n_steps, chunks, tiles,
    DTYPE: tl.constexpr, SUMS: tl.constexpr, STATE: tl.constexpr, PARAMETERS: tl.constexpr,
    COMPOSE: tl.constexpr, FINISH: tl.constexpr,
    SHARED: tl.constexpr, SCALAR: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """The batch's pass: dz, drho, and column sums, which it leaves in ``partials (R, chunks, 6, d)`` or finishes."""
    replica, chunk, block, cols = _locate(features, chunks, BLOCK_FEATURES)
    width = _width(features, VECTOR)
    mask = cols < width
    if COMPOSE:
        A, B, C, D = _compose(
            precision, step_size, tempering, prefixes, replica, cols, mask, mask & (chunk == 0), width, n_steps,
            SHARED, SCALAR,
        )  # fmt: skip
    else:
        A, B, C, D = _kept(prefixes, (replica * (n_steps + 1) + n_steps) * 4 * width + cols, width, mask)
    A, B, C, D = A.to(DTYPE)[None, :], B.to(DTYPE)[None, :], C.to(DTYPE)[None, :], D.to(DTYPE)[None, :]
    if PARAMETERS:
        mu = load(loc, replica * width + cols, mask, DTYPE)[None, :]
        zy = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), SUMS)
        zr, ry, rr, zs, rs = zy, zy, zy, zy, zy
    first = chunk * tiles * BLOCK_ROWS
    for tile in range(tiles):
        at, inside = _tile(first, tile, replica, cols, rows, width, BLOCK_ROWS)
        gz = load(grad_z, at, inside, DTYPE)
        gr = load(grad_rho, at, inside, DTYPE)
        if STATE:
            tl.store(d_z + at, A * gz + C * gr, mask=inside)
            tl.store(d_rho + at, B * gz + D * gr, mask=inside)
        if PARAMETERS:
            y = load(z, at, inside, DTYPE) - mu
            r = load(rho, at, inside, DTYPE)
            gz, gr, y, r = gz.to(SUMS), gr.to(SUMS), y.to(SUMS), r.to(SUMS)
            zy += gz * y
            zr += gz * r
            ry += gr * y
            rr += gr * r
            zs += gz
            rs += gr
    if PARAMETERS:
        zy, zr, ry, rr = tl.sum(zy, 0), tl.sum(zr, 0), tl.sum(ry, 0), tl.sum(rr, 0)
        zs, rs = tl.sum(zs, 0), tl.sum(rs, 0)
        if FINISH:
            tl.debug_barrier()  # the prefixes were stored by other threads of this program
            _chain_backward(
                zy, zr, ry, rr, zs, rs, precision, step_size, tempering, prefixes,
                d_precision, d_loc, d_step_size, d_tempering, replica, block, cols, mask, width, n_steps,
                n_steps, SHARED, SCALAR,
            )  # fmt: skip
        else:
            at_sums = (replica * chunks + chunk) * 6 * width + cols
            _keep(partials, at_sums, width, mask, zy, zr, ry, rr)
            tl.store(partials + at_sums + 4 * width, zs, mask=mask)
            tl.store(partials + at_sums + 5 * width, rs, mask=mask)


@triton.jit
def _add_partials(partials, replica, cols, mask, features, chunks, BLOCK: tl.constexpr, N: tl.constexpr):
    """Sums over the chunks, in float64 and a fixed order: 2 + 4 numbers a feature of each chunk's ``(N, d)`` sums."""
    first = tl.zeros((BLOCK, cols.shape[0]), tl.float64)
    second, third, fourth, fifth, sixth = first, first, first, first, first
    for start in range(0, chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        inside = (chunk < chunks)[:, None] & mask[None, :]
        at = (replica * chunks + chunk)[:, None] * N * features + cols[None, :]
        first += load(partials, at, inside, tl.float64)
        second += load(partials, at + features, inside, tl.float64)
        third += load(partials, at + 2 * features, inside, tl.float64)
        fourth += load(partials, at + 3 * features, inside, tl.float64)
        fifth += load(partials, at + 4 * features, inside, tl.float64)
        sixth += load(partials, at + 5 * features, inside, tl.float64)
    return (
        tl.sum(first, 0), tl.sum(second, 0), tl.sum(third, 0), tl.sum(fourth, 0), tl.sum(fifth, 0), tl.sum(sixth, 0)
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_steps", "chunks", "total_stride"])
def _backward_finish_kernel(
    partials, precision, step_size, tempering, prefixes, d_precision, d_loc, d_step_size, d_tempering,
    features, n_steps, chunks, total_stride,
    SHARED: tl.constexpr, SCALAR: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    replica, _, block, cols = _locate(features, 1, BLOCK_FEATURES)
    width = _width(features, VECTOR)
    mask = cols < width
    zy, zr, ry, rr, zs, rs = _add_partials(partials, replica, cols, mask, width, chunks, BLOCK_ROWS, 6)
    _chain_backward(
        zy, zr, ry, rr, zs, rs, precision, step_size, tempering, prefixes,
        d_precision, d_loc, d_step_size, d_tempering, replica, block, cols, mask, width, n_steps,
        total_stride, SHARED, SCALAR,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "n_steps", "chunks", "tiles"])
def _double_backward_kernel(
    h_z, h_rho, h_precision, h_loc, h_step_size, h_tempering, grad_z, grad_rho,
    z, rho, precision, loc, step_size, tempering, prefixes, partials,
    gg_z, gg_rho, d_z, d_rho, d_precision, d_loc, d_step_size, d_tempering, rows, features, n_steps, chunks, tiles,
    DTYPE: tl.constexpr, SUMS: tl.constexpr, OUTPUTS: tl.constexpr, STATE: tl.constexpr, PARAMETERS: tl.constexpr,
    COMPOSE: tl.constexpr, FINISH: tl.constexpr, SHARED: tl.constexpr, SCALAR: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """As ``_backward_kernel``; ``partials (R, chunks, 10, d)``: four sums of g x, then g u, then g."""
    replica, chunk, block, cols = _locate(features, chunks, BLOCK_FEATURES)
    width = _width(features, VECTOR)
    mask = cols < width
    if COMPOSE:
        A, B, C, D, tA, tB, tC, tD = _compose_dual(
            precision, step_size, tempering, h_precision, h_step_size, h_tempering,
            prefixes, replica, cols, mask, mask & (chunk == 0), width, n_steps, SHARED, SCALAR,
        )  # fmt: skip
    else:
        at_map = (replica * (n_steps + 1) + n_steps) * 8 * width + cols
        A, B, C, D = _kept(prefixes, at_map, width, mask)
        tA, tB, tC, tD = _kept(prefixes, at_map + 4 * width, width, mask)
    A, B, C, D = A.to(DTYPE)[None, :], B.to(DTYPE)[None, :], C.to(DTYPE)[None, :], D.to(DTYPE)[None, :]
    tA, tB, tC, tD = tA.to(DTYPE)[None, :], tB.to(DTYPE)[None, :], tC.to(DTYPE)[None, :], tD.to(DTYPE)[None, :]
    mu = load(loc, replica * width + cols, mask, DTYPE)[None, :]
    h_mu = load(h_loc, replica * width + cols, mask, DTYPE)[None, :]
    if PARAMETERS:
        zy = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), SUMS)
        zr, ry, rr, zu, zv, ru, rv, zs, rs = zy, zy, zy, zy, zy, zy, zy, zy, zy
    first = chunk * tiles * BLOCK_ROWS
    for tile in range(tiles):
        at, inside = _tile(first, tile, replica, cols, rows, width, BLOCK_ROWS)
        if OUTPUTS or PARAMETERS:
            u = load(h_z, at, inside, DTYPE) - h_mu
            v = load(h_rho, at, inside, DTYPE)
            y = load(z, at, inside, DTYPE) - mu
            r = load(rho, at, inside, DTYPE)
        if STATE or PARAMETERS:
            gz = load(grad_z, at, inside, DTYPE)
            gr = load(grad_rho, at, inside, DTYPE)
        if OUTPUTS:
            tl.store(gg_z + at, h_mu + (A * u + B * v + tA * y + tB * r), mask=inside)
            tl.store(gg_rho + at, C * u + D * v + tC * y + tD * r, mask=inside)
        if STATE:
            tl.store(d_z + at, tA * gz + tC * gr, mask=inside)
            tl.store(d_rho + at, tB * gz + tD * gr, mask=inside)
        if PARAMETERS:
            gz, gr, y, r = gz.to(SUMS), gr.to(SUMS), y.to(SUMS), r.to(SUMS)
            zy += gz * y
            zr += gz * r
            ry += gr * y
            rr += gr * r
            u, v = u.to(SUMS), v.to(SUMS)
            zu += gz * u
            zv += gz * v
            ru += gr * u
            rv += gr * v
            zs += gz
            rs += gr
    if PARAMETERS:
        zy, zr, ry, rr = tl.sum(zy, 0), tl.sum(zr, 0), tl.sum(ry, 0), tl.sum(rr, 0)
        zu, zv, ru, rv = tl.sum(zu, 0), tl.sum(zv, 0), tl.sum(ru, 0), tl.sum(rv, 0)
        zs, rs = tl.sum(zs, 0), tl.sum(rs, 0)
        if FINISH:
            tl.debug_barrier()  # the prefixes were stored by other threads of this program
            _chain_backward_dual(
                zy, zr, ry, rr, zu, zv, ru, rv, zs, rs,
                precision, step_size, tempering, h_precision, h_step_size, h_tempering, prefixes,
                d_precision, d_loc, d_step_size, d_tempering, replica, block, cols, mask, width, n_steps,
                n_steps, SHARED, SCALAR,
            )  # fmt: skip
        else:
            at_sums = (replica * chunks + chunk) * 10 * width + cols
            _keep(partials, at_sums, width, mask, zy, zr, ry, rr)
            _keep(partials, at_sums + 4 * width, width, mask, zu, zv, ru, rv)
            tl.store(partials + at_sums + 8 * width, zs, mask=mask)
            tl.store(partials + at_sums + 9 * width, rs, mask=mask)


@triton.jit(do_not_specialize=["n_steps", "chunks", "total_stride"])
def _double_backward_finish_kernel(
    partials, precision, step_size, tempering, h_precision, h_step_size, h_tempering, prefixes,
    d_precision, d_loc, d_step_size, d_tempering, features, n_steps, chunks, total_stride,
    SHARED: tl.constexpr, SCALAR: tl.constexpr, VECTOR: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    replica, _, block, cols = _locate(features, 1, BLOCK_FEATURES)
    width = _width(features, VECTOR)
    mask = cols < width
    zy, zr, ry, rr, _, _ = _add_partials(partials, replica, cols, mask, width, chunks, BLOCK_ROWS, 10)
    zu, zv, ru, rv, zs, rs = _add_partials(partials + 4 * width, replica, cols, mask, width, chunks, BLOCK_ROWS, 10)
    _chain_backward_dual(
        zy, zr, ry, rr, zu, zv, ru, rv, zs, rs,
        precision, step_size, tempering, h_precision, h_step_size, h_tempering, prefixes,
        d_precision, d_loc, d_step_size, d_tempering, replica, block, cols, mask, width, n_steps,
        total_stride, SHARED, SCALAR,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_steps", "feature_blocks"])
def _total_kernel(
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


# ---- Launchers: the raw overloads ------------------------------------------------------------------------------------


def _dtype(z: Tensor) -> tl.dtype:
    return tl.float64 if z.dtype == torch.float64 else tl.float32


def _new(x: Tensor, wanted: int = 1) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)


def _zeros(x: Tensor, wanted: int = 1) -> Tensor:
    return torch.zeros_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)


def _packed(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _flags(shape: Layout) -> dict[str, int]:
    # Triton itself looks for multiples of 16 only; 100, 200 and 300 features load four at a time too.
    return {"SHARED": shape.step_rows == 1, "SCALAR": shape.scalar_step, "VECTOR": math.gcd(shape.features, 16)}


def _repeats_a_long_chain(shape: Layout, tiling: Tiling) -> bool:
    return shape.n_steps > FUSED_STEPS and tiling.chunks > 1


def _prefixes(shape: Layout, z: Tensor, entries: int) -> Tensor:
    return z.new_empty((shape.replicas, shape.n_steps + 1, entries, shape.features), dtype=torch.float64)


def _launch_compose(
    shape: Layout, parameters: list[Tensor], directions: list[Tensor | None] | None, prefixes: Tensor
) -> None:
    block = min(next_power_of_2(shape.features), 32)
    _compose_kernel[(shape.replicas * cdiv(shape.features, block),)](
        *parameters, *(directions or (None, None, None)), prefixes, shape.features, shape.n_steps,
        DUAL=directions is not None, BLOCK_FEATURES=block, num_warps=1, **_flags(shape),
    )  # fmt: skip


def gaussian_leapfrog(
    z: Tensor, rho: Tensor, precision: Tensor, loc: Tensor, step_size: Tensor, tempering: Tensor
) -> tuple[Tensor, Tensor]:
    """The overload ``gaussian_leapfrog.triton``."""
    shape = layout(z, precision, step_size, tempering)
    if shape.n_steps == 0 or z.numel() == 0:
        return tuple(x.clone(memory_format=torch.contiguous_format) for x in (z, rho))
    z, rho, precision, loc, step_size, tempering = _packed((z, rho, precision, loc, step_size, tempering))
    z_out, rho_out = _new(z), _new(rho)
    tiling = row_tiling(shape.replicas, shape.rows, shape.features, 1024)
    separate = _repeats_a_long_chain(shape, tiling)
    with on_device_of(z):
        prefixes = _prefixes(shape, z, 4) if separate else None
        if separate:
            _launch_compose(shape, [precision, step_size, tempering], None, prefixes)
        _forward_kernel[(shape.replicas * tiling.chunks * tiling.feature_blocks,)](
            z, rho, precision, loc, step_size, tempering, prefixes, z_out, rho_out,
            shape.rows, shape.features, shape.n_steps, tiling.chunks, tiling.tiles,
            DTYPE=_dtype(z), COMPOSE=not separate, **_flags(shape),
            BLOCK_ROWS=tiling.block_rows, BLOCK_FEATURES=tiling.block_features, num_warps=tiling.num_warps,
        )  # fmt: skip
    return z_out, rho_out


@dataclass(frozen=True)
class _Pass:
    """What backward and double backward share on the host: tiling, workspaces, and the finishing launches."""

    shape: Layout
    tiling: Tiling
    prefixes: Tensor | None
    partials: Tensor | None
    finish: bool
    compose: bool
    dtype: tl.dtype

    @classmethod
    def plan(cls, shape: Layout, z: Tensor, parameters: bool, entries: int, sums: int) -> _Pass:
        small = small_tiling(shape.rows, shape.features) if parameters else None
        tiling = small or row_tiling(shape.replicas, shape.rows, shape.features, 512)
        separate = _repeats_a_long_chain(shape, tiling)
        partials = prefixes = None
        if parameters and small is None:
            dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
            partials = z.new_empty((shape.replicas, tiling.chunks, sums, shape.features), dtype=dtype)
        if parameters or separate or entries == 8:
            prefixes = _prefixes(shape, z, entries)
        return cls(shape, tiling, prefixes, partials, small is not None, not separate, _dtype(z))

    @property
    def grid(self) -> tuple[int]:
        return (self.shape.replicas * self.tiling.chunks * self.tiling.feature_blocks,)

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.shape.rows, self.shape.features, self.shape.n_steps, self.tiling.chunks, self.tiling.tiles

    @property
    def options(self) -> dict[str, object]:
        return {
            **_flags(self.shape),
            "SUMS": tl.float64 if self.finish else self.dtype,
            "DTYPE": self.dtype,
            "COMPOSE": self.compose,
            "FINISH": self.finish,
            "BLOCK_ROWS": self.tiling.block_rows,
            "BLOCK_FEATURES": self.tiling.block_features,
            "num_warps": self.tiling.num_warps,
        }

    def launch_finish(self, kernel, parameters: list[Tensor | None], results: list[Tensor]) -> None:
        """Add the partial sums and run the chain backwards into ``results``, the parameters' gradients."""
        shape = self.shape
        tiling = finish_tiling(self.tiling.chunks, shape.features)
        blocks, stride = tiling.feature_blocks, shape.n_steps
        d_precision, d_loc, d_step_size, d_tempering = results
        if blocks > 1:
            stride = shape.n_steps + 1
            d_tempering = self.prefixes.new_empty((shape.replicas, blocks, stride))
            d_step_size = d_tempering[0, 0, shape.n_steps :] if shape.scalar_step else d_step_size
        kernel[(shape.replicas * blocks,)](
            self.partials, *parameters, self.prefixes, d_precision, d_loc, d_step_size, d_tempering,
            shape.features, shape.n_steps, self.tiling.chunks, stride, **_flags(shape),
            BLOCK_ROWS=tiling.block_rows, BLOCK_FEATURES=tiling.block_features, num_warps=tiling.num_warps,
        )  # fmt: skip
        if blocks > 1:
            _total_kernel[(shape.replicas, cdiv(stride, 16))](
                d_tempering, results[3], results[2], shape.n_steps, blocks,
                SCALAR=shape.scalar_step, BLOCK_ROWS=64, BLOCK_STEPS=16, num_warps=4,
            )  # fmt: skip


def gaussian_leapfrog_backward(
    grad_z: Tensor | None,
    grad_rho: Tensor | None,
    z: Tensor,
    rho: Tensor,
    precision: Tensor,
    loc: Tensor,
    step_size: Tensor,
    tempering: Tensor,
    needs: int,
) -> tuple[Tensor, ...]:
    """The overload ``gaussian_leapfrog_backward.triton``."""
    shape = layout(z, precision, step_size, tempering)
    state, parameters = needs & NEEDS_STATE, needs & NEEDS_PARAMETERS
    make = _new if z.numel() else _zeros
    results = [make(x, state) for x in (z, rho)]
    results += [make(x, parameters) for x in (precision, loc, step_size, tempering)]
    if z.numel() == 0 or not state | parameters:
        return tuple(results)
    tensors = _packed((grad_z, grad_rho, z, rho, precision, loc, step_size, tempering))
    precision, _, step_size, tempering = tensors[4:]
    with on_device_of(z):
        plan = _Pass.plan(shape, z, bool(parameters), 4, 6)
        if not plan.compose:
            _launch_compose(shape, [precision, step_size, tempering], None, plan.prefixes)
        _backward_kernel[plan.grid](
            *tensors, plan.prefixes, plan.partials, *results, *plan.sizes,
            STATE=bool(state), PARAMETERS=bool(parameters), **plan.options,
        )  # fmt: skip
        if plan.partials is not None:
            plan.launch_finish(_backward_finish_kernel, [precision, step_size, tempering], results[2:])
    return tuple(results)


def gaussian_leapfrog_double_backward(
    h_z: Tensor | None,
    h_rho: Tensor | None,
    h_precision: Tensor | None,
    h_loc: Tensor | None,
    h_step_size: Tensor | None,
    h_tempering: Tensor | None,
    grad_z: Tensor | None,
    grad_rho: Tensor | None,
    z: Tensor,
    rho: Tensor,
    precision: Tensor,
    loc: Tensor,
    step_size: Tensor,
    tempering: Tensor,
    needs: int,
) -> tuple[Tensor, ...]:
    """The overload ``gaussian_leapfrog_double_backward.triton``."""
    shape = layout(z, precision, step_size, tempering)
    outputs, state, parameters = needs & NEEDS_OUTPUTS, needs & NEEDS_STATE, needs & NEEDS_PARAMETERS
    make = _new if z.numel() else _zeros
    results = [make(x, outputs) for x in (z, rho)] + [make(x, state) for x in (z, rho)]
    results += [make(x, parameters) for x in (precision, loc, step_size, tempering)]
    if z.numel() == 0 or not outputs | state | parameters:
        return tuple(results)
    directions = _packed((h_z, h_rho, h_precision, h_loc, h_step_size, h_tempering))
    tensors = _packed((grad_z, grad_rho, z, rho, precision, loc, step_size, tempering))
    chain, chain_directions = [tensors[4], *tensors[6:]], [directions[2], *directions[4:]]
    with on_device_of(z):
        plan = _Pass.plan(shape, z, bool(parameters), 8, 10)
        if not plan.compose:
            _launch_compose(shape, chain, chain_directions, plan.prefixes)
        _double_backward_kernel[plan.grid](
            *directions, *tensors, plan.prefixes, plan.partials, *results, *plan.sizes,
            OUTPUTS=bool(outputs), STATE=bool(state), PARAMETERS=bool(parameters), **plan.options,
        )  # fmt: skip
        if plan.partials is not None:
            plan.launch_finish(_double_backward_finish_kernel, chain + chain_directions, results[4:])
    return tuple(results)
