"""GPU kernels of ``leapfrog_update``: one pass over the batch each, and a small second pass for the column sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._triton.device import load, load_scalar
from hvae_kernels._triton.launch import cdiv, next_power_of_2, on_device_of
from hvae_kernels.ops.leapfrog_update.autograd import NEEDS_OUTPUTS, NEEDS_PARAMETERS, NEEDS_STATE

_ACCUMULATORS = {torch.float64: tl.float64}


@dataclass(frozen=True)
class Launch:
    """A tile of ``block_rows`` x ``block_features``, and how many programs share the rows."""

    block_rows: int
    block_features: int
    row_programs: int
    column_programs: int

    @property
    def grid(self) -> tuple[int, int]:
        """Rows first: the second axis is limited to 65,535."""
        return self.row_programs, self.column_programs

    @property
    def blocks(self) -> dict[str, int]:
        """The kernels' block sizes."""
        return {"BLOCK_ROWS": self.block_rows, "BLOCK_FEATURES": self.block_features}


def launch(rows: int, features: int, *, tile: int, most_programs: int | None = None) -> Launch:
    """Tiles of about ``tile`` elements; with ``most_programs`` each program loops over its share of the rows.

    Sizes alone decide, so sums come out the same on every device.
    """
    block_features = min(128, next_power_of_2(features))
    block_rows = max(1, tile // block_features)
    row_programs, column_programs = cdiv(rows, block_rows), cdiv(features, block_features)
    if most_programs is not None:
        row_programs = min(row_programs, max(1, most_programs // column_programs))
    return Launch(block_rows, block_features, row_programs, column_programs)


@triton.jit
def _store(pointer, at, value, mask):
    """A result that is not wanted has no tensor."""
    if pointer is not None:
        tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(
    z, rho, grad, decay, kick, drift, z_out, rho_out, rows, features,
    DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = column < features
    mask = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * features + column[None, :]
    a = load_scalar(decay, 0, DTYPE)
    c = load(kick, column, inside, DTYPE)[None, :]
    e = load(drift, column, inside, DTYPE)[None, :]
    r = a * load(rho, at, mask, DTYPE) - c * load(grad, at, mask, DTYPE)
    _store(rho_out, at, r, mask)
    _store(z_out, at, load(z, at, mask, DTYPE) + e * r, mask)


@triton.jit
def _store_sums(decay_sum, kick_sum, drift_sum, column, inside, features, column_sums, totals):
    """One row of ``column_sums`` (row programs, 2, features) and one entry of ``totals`` a program, in double."""
    at = tl.program_id(0).to(tl.int64) * 2 * features + column
    tl.store(column_sums + at, tl.sum(kick_sum.to(tl.float64), 0), mask=inside)
    tl.store(column_sums + at + features, tl.sum(drift_sum.to(tl.float64), 0), mask=inside)
    total = tl.sum(tl.sum(decay_sum.to(tl.float64), 0), 0)
    tl.store(totals + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), total)


@triton.jit
def _backward_kernel(
    grad_z, grad_rho, rho, grad, decay, kick, drift, d_rho, d_grad, column_sums, totals, rows, features,
    DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    inside = column < features
    a = load_scalar(decay, 0, DTYPE)
    c = load(kick, column, inside, DTYPE)[None, :]
    e = load(drift, column, inside, DTYPE)[None, :]
    decay_sum = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    kick_sum = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    drift_sum = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    for start in range(first, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * features + column[None, :]
        gz = load(grad_z, at, mask, DTYPE)
        w = load(grad_rho, at, mask, DTYPE) + e * gz
        _store(d_rho, at, a * w, mask)
        _store(d_grad, at, -c * w, mask)
        if column_sums is not None:
            r = load(rho, at, mask, DTYPE)
            g = load(grad, at, mask, DTYPE)
            decay_sum += w * r
            kick_sum -= w * g
            drift_sum += gz * (a * r - c * g)
    if column_sums is not None:
        _store_sums(decay_sum, kick_sum, drift_sum, column, inside, features, column_sums, totals)


@triton.jit
def _double_backward_kernel(
    h_rho, h_grad, h_decay, h_kick, h_drift, grad_z, grad_rho, rho, grad, decay, kick, drift,
    gg_z, gg_rho, d_rho, d_grad, column_sums, totals, rows, features,
    DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    inside = column < features
    a = load_scalar(decay, 0, DTYPE)
    c = load(kick, column, inside, DTYPE)[None, :]
    e = load(drift, column, inside, DTYPE)[None, :]
    ha = load_scalar(h_decay, 0, DTYPE)
    hc = load(h_kick, column, inside, DTYPE)[None, :]
    he = load(h_drift, column, inside, DTYPE)[None, :]
    decay_sum = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    kick_sum = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    drift_sum = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    for start in range(first, rows, tl.num_programs(0) * BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        at = row.to(tl.int64)[:, None] * features + column[None, :]
        gz = load(grad_z, at, mask, DTYPE)
        w = load(grad_rho, at, mask, DTYPE) + e * gz
        r = load(rho, at, mask, DTYPE)
        g = load(grad, at, mask, DTYPE)
        u = load(h_rho, at, mask, DTYPE)
        v = load(h_grad, at, mask, DTYPE)
        q = a * u - c * v + ha * r - hc * g
        b = he * gz
        _store(gg_z, at, e * q + he * (a * r - c * g), mask)
        _store(gg_rho, at, q, mask)
        _store(d_rho, at, ha * w + a * b, mask)
        _store(d_grad, at, -(hc * w + c * b), mask)
        if column_sums is not None:
            decay_sum += w * u + b * r
            kick_sum -= w * v + b * g
            drift_sum += gz * q
    if column_sums is not None:
        _store_sums(decay_sum, kick_sum, drift_sum, column, inside, features, column_sums, totals)


@triton.jit
def _finish_kernel(
    column_sums, totals, d_decay, d_kick, d_drift, n_partial, n_totals, features,
    DTYPE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the partial sums in a fixed order, in double; the program after the last block of columns adds decay's."""
    block = tl.program_id(0)
    if block == tl.num_programs(0) - 1:
        total = tl.zeros((PARTS * BLOCK,), tl.float64)
        for start in range(0, n_totals, PARTS * BLOCK):
            at = start + tl.arange(0, PARTS * BLOCK)
            total += load(totals, at, at < n_totals, tl.float64)
        _store(d_decay, 0, tl.sum(total, 0).to(DTYPE), None)
    else:
        column = block * BLOCK + tl.arange(0, BLOCK)
        inside = column < features
        kick_sum = tl.zeros((PARTS, BLOCK), tl.float64)
        drift_sum = tl.zeros((PARTS, BLOCK), tl.float64)
        for start in range(0, n_partial, PARTS):
            partial = start + tl.arange(0, PARTS)
            mask = (partial < n_partial)[:, None] & inside[None, :]
            at = partial.to(tl.int64)[:, None] * 2 * features + column[None, :]
            kick_sum += load(column_sums, at, mask, tl.float64)
            drift_sum += load(column_sums, at + features, mask, tl.float64)
        _store(d_kick, column, tl.sum(kick_sum, 0).to(DTYPE), inside)
        _store(d_drift, column, tl.sum(drift_sum, 0).to(DTYPE), inside)


class _Sums:
    """The two-pass reduction: room for each program's partial sums, and the pass that adds them."""

    #: Columns of a program of the second pass, and of how many programs of the first it adds the sums at a time.
    BLOCK, PARTS = 32, 32

    def __init__(self, plan: Launch, features: int, parameters: tuple[Tensor, ...], wanted: int):
        self.plan, self.features = plan, features
        self.results = tuple(torch.empty_like(x) if wanted else x.new_empty(0) for x in parameters)
        self.column_sums = self.totals = None
        if wanted:
            make = parameters[0].new_empty
            self.column_sums = make((plan.row_programs, 2, features), dtype=torch.float64)
            self.totals = make((plan.row_programs, plan.column_programs), dtype=torch.float64)

    def finish(self) -> tuple[Tensor, ...]:
        if self.column_sums is not None:
            _finish_kernel[(cdiv(self.features, self.BLOCK) + 1,)](
                self.column_sums, self.totals, *self.results,
                self.plan.row_programs, self.totals.numel(), self.features,
                DTYPE=_accumulator(self.results[0]), PARTS=self.PARTS, BLOCK=self.BLOCK,
            )  # fmt: skip
        return self.results


def _sizes(x: Tensor) -> tuple[int, int]:
    features = x.shape[-1]
    return x.numel() // max(1, features), features


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [x if x is None else x.contiguous() for x in tensors]


def _results(wanted: int, *likes: Tensor) -> list[Tensor | None]:
    return [torch.empty_like(x) if wanted else None for x in likes]


def _or_empty(results: list[Tensor | None], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if x is None else x for x in results]


def _accumulator(x: Tensor) -> tl.dtype:
    return _ACCUMULATORS.get(x.dtype, tl.float32)


def leapfrog_update(
    z: Tensor, rho: Tensor, grad: Tensor, decay: Tensor, kick: Tensor, drift: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel."""
    z, rho, grad, kick, drift = _contiguous(z, rho, grad, kick, drift)
    z_out, rho_out = torch.empty_like(z), torch.empty_like(rho)
    if z.numel():
        rows, features = _sizes(z)
        plan = launch(rows, features, tile=2048)
        with on_device_of(z):
            _forward_kernel[plan.grid](
                z, rho, grad, decay, kick, drift, z_out, rho_out, rows, features, DTYPE=_accumulator(z), **plan.blocks
            )
    return z_out, rho_out


def leapfrog_update_backward(
    grad_z: Tensor | None, grad_rho: Tensor | None,
    rho: Tensor, grad: Tensor, decay: Tensor, kick: Tensor, drift: Tensor, needs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Launch the backward kernel."""
    grad_z, grad_rho, rho, grad, kick, drift = _contiguous(grad_z, grad_rho, rho, grad, kick, drift)
    state = _results(needs & NEEDS_STATE, rho, grad)
    inputs = (grad_z, grad_rho, rho, grad, decay, kick, drift)
    parameters = _reduce(_backward_kernel, inputs, state, needs & NEEDS_PARAMETERS)
    return (*_or_empty(state, rho), *parameters)


def leapfrog_update_double_backward(
    h_rho: Tensor | None, h_grad: Tensor | None,
    h_decay: Tensor | None, h_kick: Tensor | None, h_drift: Tensor | None,
    grad_z: Tensor | None, grad_rho: Tensor | None,
    rho: Tensor, grad: Tensor, decay: Tensor, kick: Tensor, drift: Tensor, needs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Launch the double backward kernel."""
    h_rho, h_grad, h_kick, h_drift = _contiguous(h_rho, h_grad, h_kick, h_drift)
    grad_z, grad_rho, rho, grad, kick, drift = _contiguous(grad_z, grad_rho, rho, grad, kick, drift)
    results = [*_results(needs & NEEDS_OUTPUTS, rho, rho), *_results(needs & NEEDS_STATE, rho, grad)]
    inputs = (h_rho, h_grad, h_decay, h_kick, h_drift, grad_z, grad_rho, rho, grad, decay, kick, drift)
    parameters = _reduce(_double_backward_kernel, inputs, results, needs & NEEDS_PARAMETERS)
    return (*_or_empty(results, rho), *parameters)


def _reduce(kernel, inputs: tuple[Tensor | None, ...], results: list[Tensor | None], wanted: int) -> tuple[Tensor, ...]:
    """Launch ``kernel``, whose last inputs are rho, grad and the parameters; returns the parameters' sums."""
    rho, parameters = inputs[-5], inputs[-3:]
    if rho.numel() == 0:
        return tuple(torch.zeros_like(x) if wanted else x.new_empty(0) for x in parameters)
    rows, features = _sizes(rho)
    plan = launch(rows, features, tile=1024, most_programs=512)
    with on_device_of(rho):
        sums = _Sums(plan, features, parameters, wanted)
        kernel[plan.grid](
            *inputs, *results, sums.column_sums, sums.totals, rows, features, DTYPE=_accumulator(rho), **plan.blocks
        )
        return sums.finish()
