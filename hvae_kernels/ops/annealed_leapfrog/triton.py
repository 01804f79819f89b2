"""GPU kernels of ``annealed_leapfrog_update``: one pass over the batch each, and a small second pass for column sums.

A program of the forward kernel owns whole rows, whose weights it adds up; one of the backward kernel owns columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._triton.device import load, load_scalar, store
from hvae_kernels._triton.launch import cdiv, next_power_of_2, on_device_of
from hvae_kernels.ops.annealed_leapfrog.autograd import NEEDS_PARAMETERS, NEEDS_STATE

_ACCUMULATORS = {torch.float64: tl.float64}
_TILE, _BLOCK = 1024, 128
#: Kicks and what mixes momenta: the sums of a column.
_SUMS = 7
#: Programs that share the batch's rows, at most.
_MOST_PROGRAMS = 512
#: Columns of a program of the second pass, and of how many programs of the first it adds the sums at a time.
_FINISHED, _PARTS = 32, 32


@triton.jit
def _middle(rho, base_grad, grad, noise, kicks, mixing, at, mask, column, inside, features, DTYPE: tl.constexpr):
    """``(q, p, g0, g, xi)``: momenta where a step ends and where the next one begins."""
    a0 = load(kicks, column, inside, DTYPE)[None, :]
    a = load(kicks, features + column, inside, DTYPE)[None, :]
    g0 = load(base_grad, at, mask, DTYPE)
    g = load(grad, at, mask, DTYPE)
    xi = load(noise, at, mask, DTYPE)
    q = load(rho, at, mask, DTYPE) - a0 * g0 - a * g
    p = load_scalar(mixing, 0, DTYPE) * q + load_scalar(mixing, 1, DTYPE) * xi
    return q, p, g0, g, xi


@triton.jit
def _forward_kernel(
    z, rho, base_grad, grad, noise, kicks, mixing, z_out, rho_out, log_weight, rows, features,
    DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    terms = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    for start in range(0, features, BLOCK_FEATURES):
        column = start + tl.arange(0, BLOCK_FEATURES)
        inside = column < features
        mask = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * features + column[None, :]
        q, p, g0, g, _ = _middle(rho, base_grad, grad, noise, kicks, mixing, at, mask, column, inside, features, DTYPE)
        b0 = load(kicks, 2 * features + column, inside, DTYPE)[None, :]
        b = load(kicks, 3 * features + column, inside, DTYPE)[None, :]
        e = load(kicks, 4 * features + column, inside, DTYPE)[None, :]
        r = p - b0 * g0 - b * g
        store(rho_out, at, r, mask)
        store(z_out, at, load(z, at, mask, DTYPE) + e * r, mask)
        terms += tl.where(mask, 0.5 * (p - q) * (p + q), 0.0)
    store(log_weight, row, tl.sum(terms.to(tl.float64), 1), row < rows)


@triton.jit
def _store(pointer, at, value, mask):
    """A result that is not wanted has no tensor."""
    if pointer is not None:
        store(pointer, at, value, mask)


@triton.jit
def _sum_to(sums, which: tl.constexpr, value, column, inside, features):
    """Row ``which`` of this program's column sums (programs, 7, features), in double."""
    at = (tl.program_id(0).to(tl.int64) * 7 + which) * features + column
    tl.store(sums + at, tl.sum(value.to(tl.float64), 0), mask=inside)


@triton.jit
def _total_to(sums, which: tl.constexpr, value, features, BLOCK_FEATURES: tl.constexpr):
    """What has no columns: one number a program, where its first column is."""
    at = (tl.program_id(0).to(tl.int64) * 7 + which) * features + tl.program_id(1) * BLOCK_FEATURES
    tl.store(sums + at, tl.sum(tl.sum(value.to(tl.float64), 0), 0))


@triton.jit
def _backward_kernel(
    grad_z, grad_rho, grad_weight, rho, base_grad, grad, noise, kicks, mixing,
    d_rho, d_base_grad, d_grad, d_noise, sums, rows, features,
    DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    inside = column < features
    a0 = load(kicks, column, inside, DTYPE)[None, :]
    a = load(kicks, features + column, inside, DTYPE)[None, :]
    b0 = load(kicks, 2 * features + column, inside, DTYPE)[None, :]
    b = load(kicks, 3 * features + column, inside, DTYPE)[None, :]
    e = load(kicks, 4 * features + column, inside, DTYPE)[None, :]
    eta, sigma = load_scalar(mixing, 0, DTYPE), load_scalar(mixing, 1, DTYPE)
    end_base = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    end = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    begin_base = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    begin = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    drift = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    of_eta = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    of_sigma = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    for start in range(first, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * features + column[None, :]
        q, p, g0, g, xi = _middle(rho, base_grad, grad, noise, kicks, mixing, at, mask, column, inside, features, DTYPE)
        gz = load(grad_z, at, mask, DTYPE)
        gw = load(grad_weight, row, row < rows, DTYPE)[:, None]
        v = load(grad_rho, at, mask, DTYPE) + e * gz
        dp = v + gw * p
        dq = eta * dp - gw * q
        _store(d_rho, at, dq, mask)
        _store(d_base_grad, at, -(b0 * v + a0 * dq), mask)
        _store(d_grad, at, -(b * v + a * dq), mask)
        _store(d_noise, at, sigma * dp, mask)
        if sums is not None:
            end_base -= dq * g0
            end -= dq * g
            begin_base -= v * g0
            begin -= v * g
            drift += gz * (p - b0 * g0 - b * g)
            of_eta += dp * q
            of_sigma += dp * xi
    if sums is not None:
        _sum_to(sums, 0, end_base, column, inside, features)
        _sum_to(sums, 1, end, column, inside, features)
        _sum_to(sums, 2, begin_base, column, inside, features)
        _sum_to(sums, 3, begin, column, inside, features)
        _sum_to(sums, 4, drift, column, inside, features)
        _total_to(sums, 5, of_eta, features, BLOCK_FEATURES)
        _total_to(sums, 6, of_sigma, features, BLOCK_FEATURES)


@triton.jit
def _finish_kernel(
    sums, d_kicks, d_mixing, n_programs, features,
    DTYPE: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the programs' sums, of ``WIDTH`` columns each, in a fixed order, in double.

    A program adds ``BLOCK`` columns of a row of kicks; the last two, all numbers of an entry of ``d_mixing``.
    """
    blocks = tl.cdiv(features, BLOCK)
    if tl.program_id(0) < 5 * blocks:
        which = tl.program_id(0) // blocks
        column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = column < features
        total = tl.zeros((PARTS, BLOCK), tl.float64)
        for start in range(0, n_programs, PARTS):
            program = start + tl.arange(0, PARTS)
            at = (program.to(tl.int64)[:, None] * 7 + which) * features + column[None, :]
            total += load(sums, at, (program < n_programs)[:, None] & inside[None, :], tl.float64)
        store(d_kicks, which * features + column, tl.sum(total, 0).to(DTYPE), inside)
    else:
        which = 5 + tl.program_id(0) - 5 * blocks
        groups = tl.cdiv(features, WIDTH)
        numbers = tl.zeros((PARTS * BLOCK,), tl.float64)
        for start in range(0, n_programs * groups, PARTS * BLOCK):
            entry = start + tl.arange(0, PARTS * BLOCK)
            at = (entry.to(tl.int64) // groups * 7 + which) * features + entry % groups * WIDTH
            numbers += load(sums, at, entry < n_programs * groups, tl.float64)
        tl.store(d_mixing + which - 5, tl.sum(numbers, 0).to(DTYPE).to(d_mixing.dtype.element_ty))


def _accumulator(x: Tensor) -> tl.dtype:
    return _ACCUMULATORS.get(x.dtype, tl.float32)


def _sizes(x: Tensor) -> tuple[int, int]:
    features = x.shape[-1]
    return x.numel() // max(1, features), features


def annealed_leapfrog_update(
    z: Tensor, rho: Tensor, base_grad: Tensor, grad: Tensor, noise: Tensor, kicks: Tensor, mixing: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel."""
    inputs = [x.contiguous() for x in (z, rho, base_grad, grad, noise, kicks, mixing)]
    z_out, rho_out = z.new_empty(z.shape), z.new_empty(z.shape)
    log_weight = (z.new_empty if z.shape[-1] else z.new_zeros)(z.shape[:-1])
    if z.numel():
        rows, features = _sizes(z)
        block_features = min(_TILE, next_power_of_2(features))
        block_rows = max(1, _TILE // block_features)
        with on_device_of(z):
            _forward_kernel[(cdiv(rows, block_rows),)](
                *inputs, z_out, rho_out, log_weight, rows, features,
                DTYPE=_accumulator(z), BLOCK_ROWS=block_rows, BLOCK_FEATURES=block_features,
            )  # fmt: skip
    return z_out, rho_out, log_weight


def annealed_leapfrog_update_backward(
    grad_z: Tensor | None, grad_rho: Tensor | None, grad_log_weight: Tensor | None,
    rho: Tensor, base_grad: Tensor, grad: Tensor, noise: Tensor, kicks: Tensor, mixing: Tensor, needs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Launch the backward kernel, and the one that adds its sums."""
    cotangents = [x if x is None else x.contiguous() for x in (grad_z, grad_rho, grad_log_weight)]
    inputs = [x.contiguous() for x in (rho, base_grad, grad, noise, kicks, mixing)]
    state = [rho.new_empty(rho.shape) if needs & NEEDS_STATE else None for _ in range(4)]
    make = rho.new_empty if rho.numel() else rho.new_zeros
    parameters = [make(x.shape) if needs & NEEDS_PARAMETERS else None for x in (kicks, mixing)]
    if rho.numel():
        rows, features = _sizes(rho)
        block_features = min(_BLOCK, next_power_of_2(features))
        block_rows, columns = max(1, _TILE // block_features), cdiv(features, block_features)
        programs = min(cdiv(rows, block_rows), max(1, _MOST_PROGRAMS // columns))
        wanted = needs & NEEDS_PARAMETERS
        sums = rho.new_empty((programs, _SUMS, features), dtype=torch.float64) if wanted else None
        kind = _accumulator(rho)
        with on_device_of(rho):
            _backward_kernel[(programs, columns)](
                *cotangents, *inputs, *state, sums, rows, features,
                DTYPE=kind, BLOCK_ROWS=block_rows, BLOCK_FEATURES=block_features,
            )  # fmt: skip
            if sums is not None:
                _finish_kernel[(5 * cdiv(features, _FINISHED) + 2,)](
                    sums, *parameters, programs, features,
                    DTYPE=kind, WIDTH=block_features, PARTS=_PARTS, BLOCK=_FINISHED,
                )  # fmt: skip
    return tuple(rho.new_empty(0) if x is None else x for x in (*state, *parameters))
