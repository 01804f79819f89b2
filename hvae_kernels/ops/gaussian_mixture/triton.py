"""GPU kernels of Gaussian mixtures: densities and gradients. Weights of components exist for a block of rows alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._triton.device import exponential, load
from hvae_kernels._triton.launch import cdiv, next_power_of_2, on_device_of

_ACCUMULATORS = {torch.float64: tl.float64}
#: Sums are taken in runs of so many terms: fewer digits are lost.
_RUN = tl.constexpr(16)
#: A program's tile, and how many weights, (components, rows), there are at a time.
_ROWS, _COLUMNS, _WEIGHTS = 64, 32, 1 << 22
#: Programs that a GPU has room for; of fewer rows a program takes fewer, and more components at a time.
_PROGRAMS, _FEW_ROWS, _MANY_COLUMNS = 1024, 16, 128


@triton.jit
def _log_joint(
    value, loc, inverse, base, h_value, h_loc, h_scale, h_base, row, component, rows, components, features,
    SECOND: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``(components, rows)``: log joint densities less the shift and, if wanted, their slopes; features come first."""
    inside, known = row < rows, component < components
    total = tl.zeros((component.shape[0], row.shape[0]), DTYPE)
    slope = tl.zeros((component.shape[0], row.shape[0]), DTYPE)
    for start in range(0, features, _RUN):
        run = tl.zeros_like(total)
        slope_run = tl.zeros_like(slope)
        for j in range(start, tl.minimum(features, start + _RUN)):
            at, of = j * tl.full([], 1, tl.int64) * rows + row, j * components + component
            scale = load(inverse, of, known, DTYPE)[:, None]
            t = (load(value, at, inside, DTYPE)[None, :] - load(loc, of, known, DTYPE)[:, None]) * scale
            run += t * t
            if SECOND:
                moved = load(h_value, at, inside, DTYPE)[None, :] - load(h_loc, of, known, DTYPE)[:, None]
                slope_run += t * (moved * scale - t * load(h_scale, of, known, DTYPE)[:, None])
        total += run
        slope += slope_run
    joint = load(base, component, known, DTYPE)[:, None] - 0.5 * total
    if SECOND:
        slope = load(h_base, component, known, DTYPE)[:, None] - slope
    return tl.where(known[:, None], joint, -float("inf")), slope


@triton.jit
def _log_prob_kernel(
    value, loc, inverse, base, output, shift, rows, components, features,
    DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COMPONENTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    top = tl.full((BLOCK_ROWS,), -float("inf"), DTYPE)
    total = tl.zeros((BLOCK_ROWS,), tl.float64)
    for start in range(0, components, BLOCK_COMPONENTS):
        component = start + tl.arange(0, BLOCK_COMPONENTS)
        joint, _ = _log_joint(
            value, loc, inverse, base, None, None, None, None, row, component, rows, components, features, False, DTYPE
        )
        higher = tl.maximum(top, tl.max(joint, 0))
        finite = tl.where(higher == -float("inf"), 0.0, higher)
        total *= exponential(top - finite)
        total += tl.sum(exponential(joint - finite[None, :]).to(tl.float64), 0)
        top = higher
    tl.store(output + row, tl.load(shift) + top + tl.log(total), mask=row < rows)


@triton.jit
def _log_joint_kernel(
    value, loc, inverse, base, h_value, h_loc, h_scale, h_base, joint_out, slope_out, rows, components, features,
    SECOND: tl.constexpr, DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COMPONENTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    component = tl.program_id(1) * BLOCK_COMPONENTS + tl.arange(0, BLOCK_COMPONENTS)
    joint, slope = _log_joint(
        value, loc, inverse, base, h_value, h_loc, h_scale, h_base, row, component, rows, components, features,
        SECOND, DTYPE,
    )  # fmt: skip
    at = component[:, None].to(tl.int64) * rows + row[None, :]
    mask = (component < components)[:, None] & (row < rows)[None, :]
    tl.store(joint_out + at, joint, mask=mask)
    if SECOND:
        tl.store(slope_out + at, slope, mask=mask)


@triton.jit
def _pull(
    x, h_x, loc, inverse, h_loc, h_scale, weight, slope_weight, at, inside,
    SECOND: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """``(pull, across, inverse)``: of one component, what moves its rows and itself, and what widens it."""
    scale = load(inverse, at, inside, DTYPE)[None, :]
    t = (x - load(loc, at, inside, DTYPE)[None, :]) * scale
    pull = weight * t
    across = weight * (t * t - 1.0)
    if SECOND:
        widened = t * load(h_scale, at, inside, DTYPE)[None, :]
        turned = (h_x - load(h_loc, at, inside, DTYPE)[None, :]) * scale - widened
        pull += slope_weight * (turned - widened)
        across += 2.0 * slope_weight * t * turned
    return pull, across, scale


@triton.jit
def _value_kernel(
    value, loc, inverse, h_value, h_loc, h_scale, weights, slope_weights, d_value, rows, components, features,
    SECOND: tl.constexpr, DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    inside = column < features
    at = row[:, None] * features + column[None, :]
    mask = (row < rows)[:, None] & inside[None, :]
    x, h_x = load(value, at, mask, DTYPE), load(h_value, at, mask, DTYPE)
    total = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), tl.float64)
    for start in range(0, components, _RUN):
        run = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
        for c in range(start, tl.minimum(components, start + _RUN)):
            of = c * tl.full([], 1, tl.int64) * rows + row
            weight = load(weights, of, row < rows, DTYPE)[:, None]
            slope_weight = load(slope_weights, of, row < rows, DTYPE)[:, None]
            pull, _, scale = _pull(
                x, h_x, loc, inverse, h_loc, h_scale, weight, slope_weight, c * features + column, inside, SECOND, DTYPE
            )
            run -= pull * scale
        total += run
    tl.store(d_value + at, total, mask=mask)


@triton.jit
def _parameters_kernel(
    value, loc, inverse, h_value, h_loc, h_scale, weights, slope_weights, d_loc, d_log_scale, rows, features,
    SECOND: tl.constexpr, DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_FEATURES + tl.arange(0, BLOCK_FEATURES)
    inside = column < features
    of = c * features + column
    to = tl.program_id(2) * tl.num_programs(0) * features + of
    along = load(d_loc, to, inside, tl.float64)
    wide = load(d_log_scale, to, inside, tl.float64)
    step = tl.num_programs(2) * BLOCK_ROWS
    for first in range(tl.program_id(2) * BLOCK_ROWS, rows, step * _RUN):
        along_run = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
        wide_run = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
        for start in range(first, tl.minimum(rows, first + step * _RUN), step):
            row = start + tl.arange(0, BLOCK_ROWS)
            at = row[:, None].to(tl.int64) * features + column[None, :]
            mask = (row < rows)[:, None] & inside[None, :]
            pull, across, scale = _pull(
                load(value, at, mask, DTYPE), load(h_value, at, mask, DTYPE), loc, inverse, h_loc, h_scale,
                load(weights, c * rows + row, row < rows, DTYPE)[:, None],
                load(slope_weights, c * rows + row, row < rows, DTYPE)[:, None], of, inside, SECOND, DTYPE,
            )  # fmt: skip
            along_run += tl.where(mask, pull * scale, 0.0)
            wide_run += tl.where(mask, across, 0.0)
        along += tl.sum(along_run.to(tl.float64), 0)
        wide += tl.sum(wide_run.to(tl.float64), 0)
    tl.store(d_loc + to, along, mask=inside)
    tl.store(d_log_scale + to, wide, mask=inside)


@dataclass(frozen=True)
class _Packed:
    """Components, or a direction, with 1 / scale or log scale beside loc; columns have the features first."""

    loc: Tensor
    other: Tensor
    base: Tensor

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.loc, self.other

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.loc.mT.contiguous(), self.other.mT.contiguous(), self.base


def _typical(base: Tensor, log_weight: Tensor) -> Tensor:
    """The median of the finite bases, each as often as its component's weight says; 0 where there is none.

    What is typical by number alone may be switched off, and the largest may be that of a component that has collapsed.
    """
    is_finite = base.isfinite()
    base, order = base.where(is_finite, -math.inf).sort()
    below = log_weight.double().where(is_finite, -math.inf).softmax(0)[order].cumsum(0)
    return base[(below < 0.5).sum().clamp(max=len(base) - 1)].nan_to_num(neginf=0.0)


def _components(log_weight: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[_Packed, Tensor]:
    """The components, and what all their log joint densities lack, so that they keep digits."""
    normaliser = log_scale.sum(-1, dtype=torch.float64) + 0.5 * math.log(2 * math.pi) * loc.shape[1]
    base = log_weight - normaliser
    shift = _typical(base, log_weight)
    inverse = torch.exp(-log_scale).contiguous()
    return _Packed(loc.contiguous(), inverse, (base - shift).to(loc.dtype)), shift


def _direction(log_weight: Tensor, loc: Tensor, log_scale: Tensor) -> _Packed:
    base = log_weight - log_scale.sum(-1, dtype=torch.float64)
    return _Packed(loc.contiguous(), log_scale.contiguous(), base.to(loc.dtype))


def _launch(kernel, programs: int, columns: int, block: str, *arguments, parts: int = 1, **options) -> None:
    """``programs`` for each block of columns: of components or of features; ``parts`` of each share its rows."""
    size = _COLUMNS if block == "BLOCK_COMPONENTS" else min(_COLUMNS, next_power_of_2(columns))
    if programs and columns:
        with on_device_of(arguments[0]):
            dtype = _ACCUMULATORS.get(arguments[0].dtype, tl.float32)
            grid = (programs, cdiv(columns, size), parts)
            kernel[grid](*arguments, **options, DTYPE=dtype, BLOCK_ROWS=_ROWS, **{block: size})


def _parts(components: int, features: int, rows: int) -> int:
    """How many programs share the rows of a block of parameters: enough for a GPU, each of which has a run of tiles."""
    wanted = cdiv(_PROGRAMS, max(1, components * cdiv(features, _COLUMNS)))
    return max(1, min(wanted, cdiv(rows, _ROWS * _RUN.value)))


def _log_joint_of(rows: Tensor, packed: _Packed, h_rows: Tensor | None, h: _Packed | None) -> tuple[Tensor, Tensor]:
    """``(components, rows)``: log joint densities and, along a direction, their slopes."""
    (n, features), components = rows.shape, len(packed.loc)
    joint, slope = (rows.new_empty(components, n) for _ in range(2))
    direction = (None,) * 4 if h is None else (h_rows.mT.contiguous(), *h.columns)
    _launch(
        _log_joint_kernel, cdiv(n, _ROWS), components, "BLOCK_COMPONENTS", rows.mT.contiguous(), *packed.columns,
        *direction, joint, slope, n, components, features, SECOND=h is not None,
    )  # fmt: skip
    return joint, slope


def _sum(x: Tensor) -> Tensor:
    """Over components, in double: all weights of a row would share its error."""
    return x.sum(0, dtype=torch.float64).to(x.dtype)


def _responsibilities(joint: Tensor) -> Tensor:
    share = (joint - joint.amax(0)).exp()
    return share / _sum(share)


def _centred(responsibilities: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values less their mean, and it; first less that of the most responsible component, which may be nearly alone."""
    top = values.gather(0, responsibilities.argmax(0, keepdim=True))
    values = values - top
    mean = _sum(responsibilities * values)
    return values - mean, top[0] + mean


def _weights(
    share: Tensor, slope: Tensor | None, grad: Tensor, responsibilities: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Cotangents of the log joint densities and of their slopes, and the output's derivative."""
    centred = _centred(share, grad)[0] if responsibilities else grad
    if slope is None:
        return share * centred, None, None
    slope, mean = _centred(share, slope)
    if responsibilities:
        return share * (slope * centred - _sum(share * slope * centred)), share * centred, share * slope
    return share * slope * grad, share * grad, mean


def _gradients(
    direction: tuple[Tensor, ...] | None, grad: Tensor, value: Tensor, log_weight: Tensor, loc: Tensor,
    log_scale: Tensor, responsibilities: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The output's derivative along the direction, and the gradients; along a direction their derivatives."""
    packed, _ = _components(log_weight, loc, log_scale)
    n, (components, features) = value.shape[:-1].numel(), loc.shape
    rows = value.reshape(n, features).contiguous()
    h = h_rows = None
    if direction is not None:
        h_rows, h = direction[0].reshape(n, features).contiguous(), _direction(*direction[1:])
    grad = grad.contiguous()
    d_output, d_rows = torch.empty_like(grad), torch.empty_like(rows)
    matrices = (None, None) if h is None else h.matrices
    block = max(_ROWS, _WEIGHTS // components)
    parts = _parts(components, features, min(n, block))
    d_weight = log_weight.new_zeros(components, dtype=torch.float64)
    d_loc, d_log_scale = (x.new_zeros((parts, *x.shape), dtype=torch.float64) for x in (loc, log_scale))
    for start in range(0, n, block):
        part = slice(start, min(n, start + block))
        here, h_here = rows[part], None if h is None else h_rows[part]
        joint, slope = _log_joint_of(here, packed, h_here, h)
        g = grad.view(n, -1)[part].mT if responsibilities else grad.view(n)[part]
        share = _responsibilities(joint)
        weights, slope_weights, moved = _weights(share, None if h is None else slope, g, responsibilities)
        if moved is not None:
            d_output.view(n, -1)[part] = moved.mT if responsibilities else moved[:, None]
        read = (here, *packed.matrices, h_here, *matrices, weights, slope_weights)
        options = {"SECOND": h is not None}
        _launch(
            _value_kernel, cdiv(len(here), _ROWS), features, "BLOCK_FEATURES", *read, d_rows[part], len(here),
            components, features, **options,
        )  # fmt: skip
        _launch(
            _parameters_kernel, components, features, "BLOCK_FEATURES", *read, d_loc, d_log_scale, len(here), features,
            parts=parts, **options,
        )  # fmt: skip
        d_weight += weights.sum(1, dtype=torch.float64)
    of_parameters = d_weight, d_loc.sum(0), d_log_scale.sum(0)
    return d_output, d_rows.view(value.shape), *(x.to(value.dtype) for x in of_parameters)


def gaussian_mixture(
    value: Tensor, log_weight: Tensor, loc: Tensor, log_scale: Tensor, responsibilities: bool
) -> Tensor:
    """Launch the forward kernel of either output."""
    packed, shift = _components(log_weight, loc, log_scale)
    n, (components, features) = value.shape[:-1].numel(), loc.shape
    rows = value.reshape(n, features)
    if responsibilities:
        joint, _ = _log_joint_of(rows, packed, None, None)
        return _responsibilities(joint).mT.contiguous().view(*value.shape[:-1], components)
    output = value.new_empty(value.shape[:-1])
    is_small = cdiv(n, _ROWS) < _PROGRAMS // 8
    block_rows, block_components = (_FEW_ROWS, _MANY_COLUMNS) if is_small else (_ROWS, _COLUMNS)
    if n:
        with on_device_of(value):
            _log_prob_kernel[(cdiv(n, block_rows),)](
                rows.mT.contiguous(), *packed.columns, output, shift, n, components, features,
                DTYPE=_ACCUMULATORS.get(value.dtype, tl.float32), BLOCK_ROWS=block_rows,
                BLOCK_COMPONENTS=min(block_components, next_power_of_2(components)),
            )  # fmt: skip
    return output


def gaussian_mixture_backward(
    grad: Tensor, value: Tensor, log_weight: Tensor, loc: Tensor, log_scale: Tensor, responsibilities: bool
) -> tuple[Tensor, ...]:
    """Launch the backward kernels for one block of rows after the other."""
    return _gradients(None, grad, value, log_weight, loc, log_scale, responsibilities)[1:]


def gaussian_mixture_double_backward(
    h_value: Tensor | None, h_log_weight: Tensor | None, h_loc: Tensor | None, h_log_scale: Tensor | None,
    grad: Tensor, value: Tensor, log_weight: Tensor, loc: Tensor, log_scale: Tensor, responsibilities: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same along a direction, whose absent parts are zero."""
    inputs = (value, log_weight, loc, log_scale)
    given = (h_value, h_log_weight, h_loc, h_log_scale)
    direction = tuple(torch.zeros_like(x) if h is None else h for h, x in zip(given, inputs, strict=True))
    return _gradients(direction, grad, *inputs, responsibilities)
