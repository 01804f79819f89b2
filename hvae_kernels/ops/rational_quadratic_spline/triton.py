"""GPU kernels of ``rational_quadratic_spline``: a program owns whole rows, and reads its parameters where they lie.

The formulas are those of csrc/kernels/rational_quadratic_spline.h, under the same names.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._triton.device import exponential, load, log1p_unit, logistic, square_root, store
from hvae_kernels._triton.dual import (
    Dual,
    Plain,
    add,
    add_product,
    constant,
    derivative_part,
    dot,
    inverse,
    mul,
    scaled,
    sub,
)
from hvae_kernels._triton.launch import cdiv, next_power_of_2, on_device_of
from hvae_kernels.ops.rational_quadratic_spline.autograd import (
    NEEDS_LOG_ABS_DET,
    NEEDS_OUTPUT,
    NEEDS_PARAMETERS,
    NEEDS_X,
    as_parameters,
)
from hvae_kernels.ops.rational_quadratic_spline.spline import STYLES, TAILS

_ACCUMULATORS = {torch.float64: tl.float64}
_LINEAR, _CIRCULAR, _NONE = (tl.constexpr(TAILS.index(tails)) for tails in ("linear", "circular", None))
#: By the tails' code: how many raw derivatives there are, less the bins.
_MORE_SLOPES = tl.constexpr((-1, 0, 1))
_ZUKO = tl.constexpr(STYLES.index("zuko"))


class Numbers(NamedTuple):
    """What of a spline the kernels compute with, in double."""

    low: Any  # of widths and heights: the first knot, the last
    high: Any
    span: Any
    floor: Any
    rest: Any  # what the floors leave to the softmax
    scale: Any
    clip: Any  # zuko's rates, of logits and of slopes
    slope_clip: Any
    least: Any
    outer: Any


class Strides(NamedTuple):
    """Of parameters ``(rows, features, P)``."""

    row: Any
    feature: Any
    parameter: Any


class Side(NamedTuple):
    """Widths or heights around the bins of a block: the softmax, the bin's length, its first and last knot."""

    most: Any
    inverse_total: Any
    share: Any
    below: Any
    above: Any
    length: Any
    knot: Any
    next: Any


class Bins(NamedTuple):
    """Where the elements of a block are."""

    outside: Any
    index: Any
    columns: Any
    rows: Any
    lower_raw: Any
    upper_raw: Any
    lower: Any
    upper: Any
    z: Any
    zc: Any


@triton.jit
def _double(NUMBER: tl.constexpr):
    return tl.full([1, 1], NUMBER, tl.float64)


@triton.jit
def _numbers(C: tl.constexpr):
    """:class:`Numbers` from constants, as kernels take numbers in single precision."""
    return Numbers(
        low=(_double(C[0]), _double(C[1])),
        high=(_double(C[2]), _double(C[3])),
        span=(_double(C[4]), _double(C[5])),
        floor=(_double(C[6]), _double(C[7])),
        rest=(_double(C[8]), _double(C[9])),
        scale=_double(C[10]),
        clip=_double(C[11]),
        slope_clip=_double(C[12]),
        least=_double(C[13]),
        outer=_double(C[14]),
    )


@triton.jit
def _clip(r, rate):
    """``(value, first, second)`` of ``r / (1 + rate |r|)``."""
    q = 1.0 / (1.0 + tl.abs(r) * rate)
    sign = tl.where(r > 0, 1.0, tl.where(r < 0, -1.0, 0.0))
    return r * q, q * q, -2.0 * sign * rate * q * q * q


@triton.jit
def _logit(raw, scale, rate, STYLE: tl.constexpr):
    if STYLE == _ZUKO:
        value, _, _ = _clip(raw * scale, rate)
        return value
    else:
        return raw * scale


@triton.jit
def _slope(r, rate, least, STYLE: tl.constexpr):
    """``(value, first, second)`` of a knot's derivative, by its raw value."""
    if STYLE == _ZUKO:
        clipped, first, second = _clip(r, rate)
        value = exponential(clipped)
        return value, value * first, value * (first * first + second)
    else:
        e, p, rest = logistic(r)
        return least + tl.where(r < 0, 0.0, r) + log1p_unit(e), p, p * rest


@triton.jit
def _two_sum(hi, lo, e):
    """``hi + lo + e``, with what rounding the sum loses."""
    total = hi + e
    part = total - hi
    return total, lo + (hi - (total - part)) + (e - part)


@triton.jit
def _most(parameters, at, stride, first, mask, BINS: tl.constexpr, DTYPE: tl.constexpr):
    """The largest raw value, NaN if one is."""
    most = load(parameters, at + first * stride, mask, DTYPE)
    for k in range(1, BINS):
        raw = load(parameters, at + (first + k) * stride, mask, DTYPE)
        most = tl.where((raw > most) | (raw != raw), raw, most)
    return most


@triton.jit
def _side(hi, lo, below_hi, below_lo, chosen, index, most, low, span, floor, rest, high, BINS: tl.constexpr):
    """A side, its knots in double: x - x0 is small where x0 is not."""
    i = 1.0 / (hi.to(tl.float64) + lo.to(tl.float64))
    share = chosen.to(tl.float64) * i
    below = (below_hi.to(tl.float64) + below_lo.to(tl.float64)) * i
    length = span * (floor + rest * share)
    knot = low + span * (floor * index.to(tl.float64) + rest * below)
    following = tl.where(index == BINS - 1, high, knot + length)
    kind = hi.dtype
    above = (1.0 - below) - share
    return Side(most, i.to(kind), share.to(kind), below.to(kind), above.to(kind), length.to(kind), knot, following)


@triton.jit
def _locate(
    x, parameters, at, stride, mask, numbers,
    BINS: tl.constexpr, TAIL: tl.constexpr, STYLE: tl.constexpr, INVERSE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The bin of each x, counted on its axis, and all that stands in it."""
    A: tl.constexpr = 1 if INVERSE else 0
    B: tl.constexpr = 1 - A
    SLOPES: tl.constexpr = BINS + _MORE_SLOPES[TAIL]
    low, last = numbers.low[A].to(DTYPE), numbers.high[A].to(DTYPE)
    outside = (x < low) | (x > last)
    x = tl.where(outside, 0.5 * (low + last), x)
    zero = tl.zeros_like(x)
    scale, rate = numbers.scale.to(DTYPE), numbers.clip.to(DTYPE)
    top = _most(parameters, at, stride, A * BINS, mask, BINS, DTYPE)
    most = _logit(top, scale, rate, STYLE)
    hi, lo = zero, zero
    for k in range(BINS):
        logit = _logit(load(parameters, at + (A * BINS + k) * stride, mask, DTYPE), scale, rate, STYLE)
        hi, lo = _two_sum(hi, lo, exponential(logit - most))
    # knots below x, in units of the softmax' sum; a bin missed by rounding is as good at its knot
    limit = (x - low) * (hi / (numbers.span[A] * numbers.rest[A]).to(DTYPE))
    step = hi * (numbers.floor[A] / numbers.rest[A]).to(DTYPE)
    index, run_hi, run_lo, below_hi, below_lo, chosen = zero, zero, zero, zero, zero, zero
    for k in range(BINS):
        logit = _logit(load(parameters, at + (A * BINS + k) * stride, mask, DTYPE), scale, rate, STYLE)
        e = exponential(logit - most)
        take = (limit >= run_hi) | (k == 0)
        index = tl.where(take, zero + k, index)
        below_hi = tl.where(take, run_hi, below_hi)
        below_lo = tl.where(take, run_lo, below_lo)
        chosen = tl.where(take, e, chosen)
        run_hi, run_lo = _two_sum(run_hi, run_lo, e)
        limit -= step
    one = _side(
        hi, lo, below_hi, below_lo, chosen, index, most,
        numbers.low[A], numbers.span[A], numbers.floor[A], numbers.rest[A], numbers.high[A], BINS,
    )  # fmt: skip
    top = _most(parameters, at, stride, B * BINS, mask, BINS, DTYPE)
    most = _logit(top, scale, rate, STYLE)
    hi, lo, below_hi, below_lo, chosen = zero, zero, zero, zero, zero
    for k in range(BINS):
        logit = _logit(load(parameters, at + (B * BINS + k) * stride, mask, DTYPE), scale, rate, STYLE)
        e = exponential(logit - most)
        take = index >= k
        below_hi = tl.where(take, hi, below_hi)
        below_lo = tl.where(take, lo, below_lo)
        chosen = tl.where(take, e, chosen)
        hi, lo = _two_sum(hi, lo, e)
    two = _side(
        hi, lo, below_hi, below_lo, chosen, index, most,
        numbers.low[B], numbers.span[B], numbers.floor[B], numbers.rest[B], numbers.high[B], BINS,
    )  # fmt: skip
    here = index.to(tl.int32)
    lower_at = here - 1 if TAIL == _LINEAR else here
    upper_at = here if TAIL == _LINEAR else here + 1
    if TAIL == _CIRCULAR:
        upper_at = tl.where(upper_at == BINS, 0, upper_at)
    lower_raw = load(parameters, at + (2 * BINS + tl.maximum(lower_at, 0)) * stride, mask, DTYPE)
    upper_raw = load(parameters, at + (2 * BINS + tl.minimum(upper_at, SLOPES - 1)) * stride, mask, DTYPE)
    least, slope_rate, outer = numbers.least.to(DTYPE), numbers.slope_clip.to(DTYPE), numbers.outer.to(DTYPE)
    lower, _, _ = _slope(lower_raw, slope_rate, least, STYLE)
    upper, _, _ = _slope(upper_raw, slope_rate, least, STYLE)
    if TAIL == _LINEAR:
        lower = tl.where(lower_at < 0, outer, lower)
        upper = tl.where(upper_at >= SLOPES, outer, upper)
    from_lower = x.to(tl.float64) - one.knot
    from_upper = one.next - x.to(tl.float64)
    from_lower = tl.where(from_lower < 0, 0.0, from_lower).to(DTYPE)
    from_upper = tl.where(from_upper < 0, 0.0, from_upper).to(DTYPE)
    z, zc = from_lower / one.length, from_upper / one.length
    if INVERSE:  # the quadratic's root: nothing cancels
        s = one.length / two.length
        u = lower * zc - upper * z
        r = square_root(u * u + 4.0 * s * s * z * zc)
        near, far = 2.0 * s * tl.where(u < 0, zc, z), tl.abs(u) + r
        n, c = tl.where(u < 0, far, near), tl.where(u < 0, near, far)
        whole = 1.0 / (n + c)
        return Bins(outside, here, two, one, lower_raw, upper_raw, lower, upper, n * whole, c * whole)
    else:
        return Bins(outside, here, one, two, lower_raw, upper_raw, lower, upper, z, zc)


# ---- In the bin: numbers are Plain or Dual ----


class Form(NamedTuple):
    """y = y0 + h f(z), everything by D."""

    z: Any
    zc: Any
    inverse_w: Any
    s: Any
    q: Any
    inverse_d: Any
    sigma: Any
    a0: Any
    a1: Any
    nu: Any
    f: Any
    fc: Any
    jacobian: Any


class Partials(NamedTuple):
    """Derivatives of y and of L = log dy/dx."""

    y_x: Any
    y_w: Any
    y_h: Any
    y_d0: Any
    y_d1: Any
    l_x: Any
    l_w: Any
    l_h: Any
    l_d0: Any
    l_d1: Any


@triton.jit
def _form(z, zc, w, h, d0, d1):
    inverse_w = inverse(w)
    s = mul(h, inverse_w)
    q = mul(z, zc)
    zz, cc = mul(z, z), mul(zc, zc)
    inverse_d = inverse(dot(s, add(zz, cc), add(d0, d1), q))
    sigma, a0, a1 = mul(s, inverse_d), mul(d0, inverse_d), mul(d1, inverse_d)
    nu = add_product(dot(a1, zz, a0, cc), scaled(2.0, sigma), q)
    f = mul(z, dot(sigma, z, a0, zc))
    fc = mul(zc, dot(sigma, zc, a1, z))
    return Form(z, zc, inverse_w, s, q, inverse_d, sigma, a0, a1, nu, f, fc, mul(s, mul(sigma, nu)))


@triton.jit
def _partials(p, h):
    zz, cc = mul(p.z, p.z), mul(p.zc, p.zc)
    inverse_nu = inverse(p.nu)
    both = add(p.a0, p.a1)
    rise = mul(mul(p.sigma, p.q), sub(mul(p.a1, zz), mul(p.a0, cc)))
    hq = mul(mul(h, p.inverse_d), p.q)
    q2 = scaled(2.0, p.q)
    by_s = mul(q2, add_product(both, p.sigma, inverse_nu))
    across = sub(p.zc, p.z)
    half = mul(sub(dot(p.a1, p.z, p.sigma, across), mul(p.a0, p.zc)), inverse_nu)
    half = sub(half, mul(sub(both, scaled(2.0, p.sigma)), across))
    by_z = scaled(2.0, half)
    return Partials(
        y_x=p.jacobian,
        y_w=scaled(-1.0, dot(p.jacobian, p.z, p.s, rise)),
        y_h=add(p.f, rise),
        y_d0=mul(hq, p.fc),
        y_d1=scaled(-1.0, mul(hq, p.f)),
        l_x=mul(by_z, p.inverse_w),
        l_w=scaled(-1.0, mul(add_product(by_s, p.z, by_z), p.inverse_w)),
        l_h=mul(by_s, inverse(h)),
        l_d0=mul(p.inverse_d, sub(mul(cc, inverse_nu), q2)),
        l_d1=mul(p.inverse_d, sub(mul(zz, inverse_nu), q2)),
    )


@triton.jit
def _pulled(p, g, log, INVERSE: tl.constexpr):
    """Gradients of x, then of what stands in the bin: the first knot and length of both sides, the slopes."""
    if INVERSE:
        x = mul(sub(g, mul(log, p.l_x)), inverse(p.y_x))
        g, log = scaled(-1.0, x), scaled(-1.0, log)
        by_x = dot(g, p.y_x, log, p.l_x)
    else:
        by_x = dot(g, p.y_x, log, p.l_x)
        x = by_x
    return (
        x,
        scaled(-1.0, by_x),
        dot(g, p.y_w, log, p.l_w),
        g,
        dot(g, p.y_h, log, p.l_h),
        dot(g, p.y_d0, log, p.l_d0),
        dot(g, p.y_d1, log, p.l_d1),
    )


@triton.jit
def _weights(knot, length, share, below, above):
    """What each e of a bin below, in and above is multiplied by."""
    return (
        sub(mul(knot, add(above, share)), mul(length, share)),
        sub(mul(length, add(below, above)), mul(knot, below)),
        scaled(-1.0, dot(knot, below, length, share)),
    )


# ---- Kernels ----


@triton.jit
def _place(rows, features, start, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (start + tl.arange(0, BLOCK_FEATURES)).to(tl.int64)
    mask = (row < rows)[:, None] & (column < features)[None, :]
    return row[:, None] * features + column[None, :], row[:, None], column[None, :], mask


@triton.jit
def _forward_kernel(
    x, parameters, output, log_abs_det, rows, features, strides,
    C: tl.constexpr, BINS: tl.constexpr, TAIL: tl.constexpr, STYLE: tl.constexpr, INVERSE: tl.constexpr,
    SUMS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    numbers = _numbers(C)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    for start in range(0, features, BLOCK_FEATURES):
        at, rows_at, column, mask = _place(rows, features, start, BLOCK_ROWS, BLOCK_FEATURES)
        given = load(x, at, mask, DTYPE)
        where = rows_at * strides.row + column * strides.feature
        b = _locate(
            given, parameters, where, strides.parameter, mask, numbers, BINS, TAIL, STYLE, INVERSE, DTYPE
        )  # fmt: skip
        w, h = b.columns.length, b.rows.length
        p = _form(Plain(b.z), Plain(b.zc), Plain(w), Plain(h), Plain(b.lower), Plain(b.upper))
        log = tl.log(p.jacobian.value)
        if INVERSE:
            log = -log
            near = b.z < b.zc
            off = tl.where(near, b.z, -b.zc) * w
            knot = tl.where(near, b.columns.knot, b.columns.next)
        else:
            near = p.f.value < p.fc.value
            off = tl.where(near, p.f.value, -p.fc.value) * h
            knot = tl.where(near, b.rows.knot, b.rows.next)
        result = (knot + off.to(tl.float64)).to(DTYPE)
        if TAIL == _NONE:
            result = tl.where(b.outside, float("nan"), result)
            log = tl.where(b.outside, float("nan"), log)
        else:
            result = tl.where(b.outside, given, result)
            log = tl.where(b.outside, 0.0, log)
        store(output, at, result, mask)
        if SUMS:
            sums += tl.where(mask, log, 0.0)
        else:
            store(log_abs_det, at, log, mask)
    if SUMS:
        store(log_abs_det, row, tl.sum(sums.to(tl.float64), 1), row < rows)


@triton.jit
def _backward_kernel(
    grad, grad_log, x, parameters, d_x, d_parameters, rows, features, strides, to,
    C: tl.constexpr, BINS: tl.constexpr, TAIL: tl.constexpr, STYLE: tl.constexpr, INVERSE: tl.constexpr,
    SUMS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    SLOPES: tl.constexpr = BINS + _MORE_SLOPES[TAIL]
    numbers = _numbers(C)
    for start in range(0, features, BLOCK_FEATURES):
        at, row, column, mask = _place(rows, features, start, BLOCK_ROWS, BLOCK_FEATURES)
        where = row * strides.row + column * strides.feature
        g = load(grad, at, mask, DTYPE)
        log = load(grad_log, row + column * 0 if SUMS else at, mask, DTYPE)
        b = _locate(
            load(x, at, mask, DTYPE), parameters, where, strides.parameter, mask, numbers,
            BINS, TAIL, STYLE, INVERSE, DTYPE,
        )  # fmt: skip
        w, h = Plain(b.columns.length), Plain(b.rows.length)
        form = _form(Plain(b.z), Plain(b.zc), w, h, Plain(b.lower), Plain(b.upper))
        by_x, x0, by_w, y0, by_h, by_d0, by_d1 = _pulled(_partials(form, h), Plain(g), Plain(log), INVERSE)
        if d_x is not None:
            store(d_x, at, tl.where(b.outside, 0.0 if TAIL == _NONE else g, by_x.value), mask)
        if d_parameters is not None:
            target = row * to.row + column * to.feature
            for A in tl.static_range(2):
                side = b.columns if A == 0 else b.rows
                knot, length = (x0, by_w) if A == 0 else (y0, by_h)
                below, own, above = _weights(knot, length, Plain(side.share), Plain(side.below), Plain(side.above))
                size = (numbers.span[A] * numbers.rest[A] * numbers.scale).to(DTYPE) * side.inverse_total
                for k in range(BINS):
                    raw = load(parameters, where + (A * BINS + k) * strides.parameter, mask, DTYPE)
                    scaled_raw = raw * numbers.scale.to(DTYPE)
                    e = exponential(_logit(raw, numbers.scale.to(DTYPE), numbers.clip.to(DTYPE), STYLE) - side.most)
                    weight = tl.where(b.index > k, below.value, tl.where(b.index == k, own.value, above.value))
                    d = e * weight * size
                    if STYLE == _ZUKO:
                        _, first, _ = _clip(scaled_raw, numbers.clip.to(DTYPE))
                        d *= first
                    store(d_parameters, target + (A * BINS + k) * to.parameter, tl.where(b.outside, 0.0, d), mask)
            least, rate = numbers.least.to(DTYPE), numbers.slope_clip.to(DTYPE)
            _, lower, _ = _slope(b.lower_raw, rate, least, STYLE)
            _, upper, _ = _slope(b.upper_raw, rate, least, STYLE)
            _store_slopes(
                d_parameters, target + 2 * BINS * to.parameter, to.parameter, b, by_d0.value * lower,
                by_d1.value * upper, mask, BINS, TAIL, SLOPES,
            )  # fmt: skip


@triton.jit
def _store_slopes(to, at, stride, b, lower, upper, mask, BINS: tl.constexpr, TAIL: tl.constexpr, SLOPES: tl.constexpr):
    """The gradients of the two slopes where they belong, zeros elsewhere."""
    for k in range(SLOPES):
        knot = k + 1 if TAIL == _LINEAR else k
        following = b.index + 1
        if TAIL == _CIRCULAR:
            following = tl.where(following == BINS, 0, following)
        d = tl.where(b.index == knot, lower, tl.where(following == knot, upper, 0.0))
        store(to, at + k * stride, tl.where(b.outside, 0.0, d), mask)


@triton.jit
def _tangents(h, at, stride, parameters, where, raw_stride, side, b, numbers, mask, A: tl.constexpr,
              BINS: tl.constexpr, STYLE: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """``(mean, below, share)``: the softmax' mean of the logits' tangents, the tangents of its sums."""
    scale, rate = numbers.scale.to(DTYPE), numbers.clip.to(DTYPE)
    total, low, own = tl.zeros_like(side.share), tl.zeros_like(side.share), tl.zeros_like(side.share)
    for k in range(BINS):
        raw = load(parameters, where + (A * BINS + k) * raw_stride, mask, DTYPE)
        e = exponential(_logit(raw, scale, rate, STYLE) - side.most)
        t = load(h, at + (A * BINS + k) * stride, mask, DTYPE) * scale
        if STYLE == _ZUKO:
            _, first, _ = _clip(raw * scale, rate)
            t *= first
        total += e * t
        low += tl.where(b.index > k, e * t, 0.0)
        own = tl.where(b.index == k, t, own)
    mean = total * side.inverse_total
    return mean, low * side.inverse_total - side.below * mean, side.share * (own - mean)


@triton.jit
def _double_backward_kernel(
    h_x, h_parameters, grad, grad_log, x, parameters, output, log_abs_det, d_x, d_parameters, rows, features,
    h_strides, strides, to,
    C: tl.constexpr, BINS: tl.constexpr, TAIL: tl.constexpr, STYLE: tl.constexpr, INVERSE: tl.constexpr,
    SUMS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    SLOPES: tl.constexpr = BINS + _MORE_SLOPES[TAIL]
    numbers = _numbers(C)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    for start in range(0, features, BLOCK_FEATURES):
        at, row, column, mask = _place(rows, features, start, BLOCK_ROWS, BLOCK_FEATURES)
        where = row * strides.row + column * strides.feature
        h_at = row * h_strides.row + column * h_strides.feature
        hx, g = load(h_x, at, mask, DTYPE), load(grad, at, mask, DTYPE)
        log = load(grad_log, row + column * 0 if SUMS else at, mask, DTYPE)
        b = _locate(
            load(x, at, mask, DTYPE), parameters, where, strides.parameter, mask, numbers,
            BINS, TAIL, STYLE, INVERSE, DTYPE,
        )  # fmt: skip
        mean0, below0, share0 = _tangents(
            h_parameters, h_at, h_strides.parameter, parameters, where, strides.parameter, b.columns, b, numbers, mask,
            0, BINS, STYLE, DTYPE,
        )  # fmt: skip
        mean1, below1, share1 = _tangents(
            h_parameters, h_at, h_strides.parameter, parameters, where, strides.parameter, b.rows, b, numbers, mask,
            1, BINS, STYLE, DTYPE,
        )  # fmt: skip
        across = (numbers.span[0] * numbers.rest[0]).to(DTYPE)
        along = (numbers.span[1] * numbers.rest[1]).to(DTYPE)
        lower_at = b.index - 1 if TAIL == _LINEAR else b.index
        upper_at = b.index if TAIL == _LINEAR else b.index + 1
        if TAIL == _CIRCULAR:
            upper_at = tl.where(upper_at == BINS, 0, upper_at)
        slopes_at = h_at + 2 * BINS * h_strides.parameter
        least, slope_rate = numbers.least.to(DTYPE), numbers.slope_clip.to(DTYPE)
        _, rate0, curve0 = _slope(b.lower_raw, slope_rate, least, STYLE)
        _, rate1, curve1 = _slope(b.upper_raw, slope_rate, least, STYLE)
        if TAIL == _LINEAR:
            fixed0, fixed1 = lower_at < 0, upper_at >= SLOPES
            rate0, curve0 = tl.where(fixed0, 0.0, rate0), tl.where(fixed0, 0.0, curve0)
            rate1, curve1 = tl.where(fixed1, 0.0, rate1), tl.where(fixed1, 0.0, curve1)
        t0 = load(h_parameters, slopes_at + tl.maximum(lower_at, 0) * h_strides.parameter, mask, DTYPE)
        t1 = load(h_parameters, slopes_at + tl.minimum(upper_at, SLOPES - 1) * h_strides.parameter, mask, DTYPE)
        w, h = Dual(b.columns.length, across * share0), Dual(b.rows.length, along * share1)
        d0, d1 = Dual(b.lower, rate0 * t0), Dual(b.upper, rate1 * t1)
        plain = _form(Plain(b.z), Plain(b.zc), Plain(w.value), Plain(h.value), Plain(b.lower), Plain(b.upper))
        p = _partials(plain, Plain(h.value))
        by_bin = p.y_w.value * w.tangent + p.y_h.value * h.tangent + p.y_d0.value * d0.tangent
        by_bin += p.y_d1.value * d1.tangent + along * below1
        moved = (hx - by_bin) / p.y_x.value if INVERSE else hx - across * below0  # the tangent of x - x0
        t_log = p.l_x.value * moved + p.l_w.value * w.tangent + p.l_h.value * h.tangent
        t_log += p.l_d0.value * d0.tangent + p.l_d1.value * d1.tangent
        if INVERSE:
            t_log = -t_log
            t_y = moved + across * below0
        else:
            t_y = p.y_x.value * moved + by_bin
        if output is not None:
            store(output, at, tl.where(b.outside, 0.0 if TAIL == _NONE else hx, t_y), mask)
        t_log = tl.where(b.outside, 0.0, t_log)
        if log_abs_det is not None:
            if SUMS:
                sums += tl.where(mask, t_log, 0.0)
            else:
                store(log_abs_det, at, t_log, mask)
        tz = (moved - b.z * w.tangent) / w.value
        form = _form(Dual(b.z, tz), Dual(b.zc, -tz), w, h, d0, d1)
        by_x, x0, by_w, y0, by_h, by_d0, by_d1 = _pulled(
            _partials(form, h), constant(g, True), constant(log, True), INVERSE
        )
        if d_x is not None:
            store(d_x, at, tl.where(b.outside, 0.0, derivative_part(by_x)), mask)
        if d_parameters is not None:
            target = row * to.row + column * to.feature
            scale, rate = numbers.scale.to(DTYPE), numbers.clip.to(DTYPE)
            for A in tl.static_range(2):
                side = b.columns if A == 0 else b.rows
                knot, length = (x0, by_w) if A == 0 else (y0, by_h)
                mean, below_t, share_t = (mean0, below0, share0) if A == 0 else (mean1, below1, share1)
                below, own, above = _weights(
                    knot, length, Dual(side.share, share_t), Dual(side.below, below_t),
                    Dual(side.above, -(below_t + share_t)),
                )  # fmt: skip
                size = (across if A == 0 else along) * scale * side.inverse_total
                for k in range(BINS):
                    raw = load(parameters, where + (A * BINS + k) * strides.parameter, mask, DTYPE)
                    direction = load(h_parameters, h_at + (A * BINS + k) * h_strides.parameter, mask, DTYPE) * scale
                    e = exponential(_logit(raw, scale, rate, STYLE) - side.most) * size
                    value = e * tl.where(b.index > k, below.value, tl.where(b.index == k, own.value, above.value))
                    bent = tl.where(b.index > k, below.tangent, tl.where(b.index == k, own.tangent, above.tangent))
                    if STYLE == _ZUKO:
                        _, first, second = _clip(raw * scale, rate)
                        d = (value * (direction * first - mean) + e * bent) * first + value * second * direction
                    else:
                        d = value * (direction - mean) + e * bent
                    store(d_parameters, target + (A * BINS + k) * to.parameter, tl.where(b.outside, 0.0, d), mask)
            _store_slopes(
                d_parameters, target + 2 * BINS * to.parameter, to.parameter, b,
                by_d0.tangent * rate0 + by_d0.value * curve0 * t0, by_d1.tangent * rate1 + by_d1.value * curve1 * t1,
                mask, BINS, TAIL, SLOPES,
            )  # fmt: skip
    if SUMS and log_abs_det is not None:
        store(log_abs_det, first_row, tl.sum(sums.to(tl.float64), 1), first_row < rows)


# ---- Launchers ----


def _constants(
    bins: int, style: int, left: float, right: float, bottom: float, top: float, min_width: float, min_height: float,
    min_derivative: float, logit_scale: float,
) -> tuple[float, ...]:  # fmt: skip
    """What :func:`_numbers` takes."""
    zuko, pyro = style == STYLES.index("zuko"), style == STYLES.index("pyro")
    floors = (0.0, 0.0) if zuko else (min_width, min_height)
    rate = abs(math.log(min_derivative)) if zuko else 1.0
    spans, rests = (right - left, top - bottom), tuple(1 - bins * floor for floor in floors)
    outer = 1 - min_derivative if pyro else 1.0
    return (left, bottom, right, top, *spans, *floors, *rests, logit_scale, 2 / rate, 1 / rate, min_derivative, outer)


def _rows(parameters: Tensor) -> Tensor:
    """``(rows, features, P)``; a copy only where the strides are not those of such rows."""
    return parameters.reshape(math.prod(parameters.shape[:-2]), *parameters.shape[-2:])


def _launch(kernel, before: tuple, parameters: tuple[Tensor | None, ...], x: Tensor, options: tuple, **given) -> None:
    """Run a kernel with the tensors ``before``, then the strides of ``parameters``, of which the last is written."""
    if x.numel() == 0:
        return
    bins, tails, style, *numbers, inverse, event_ndims = options
    features, tile = x.shape[-1], 128 if given.pop("dual", False) else 256
    rows = x.numel() // features
    block_features = min(tile, next_power_of_2(features))
    block_rows = max(1, min(tile // block_features, next_power_of_2(rows)))
    strides = [Strides(*(1, 1, 1) if p is None else p.stride()) for p in parameters]
    with on_device_of(x):
        kernel[(cdiv(rows, block_rows),)](
            *before, rows, features, *strides, C=_constants(bins, style, *numbers), BINS=bins, TAIL=tails,
            STYLE=style, INVERSE=bool(inverse), SUMS=event_ndims > 0, DTYPE=_ACCUMULATORS.get(x.dtype, tl.float32),
            BLOCK_ROWS=block_rows, BLOCK_FEATURES=block_features, num_warps=4,
        )  # fmt: skip


def _row_logs(x: Tensor, event_ndims: int) -> Tensor:
    """What the kernels write of a log-determinant: one a row, or an element; zeros where there is nothing to sum."""
    shape = x.shape[:-1] if event_ndims else x.shape
    return (x.new_empty if x.numel() else x.new_zeros)(shape)


def _summed(logs: Tensor, event_ndims: int) -> Tensor:
    """Over the event dimensions before the last."""
    return logs.flatten(logs.dim() - event_ndims + 1).sum(-1) if event_ndims > 1 else logs


def _of_rows(grad_log: Tensor | None, x: Tensor, event_ndims: int) -> Tensor | None:
    """A cotangent of the log-determinant as one of what :func:`_row_logs` is."""
    if grad_log is None:
        return None
    if event_ndims > 1:
        grad_log = grad_log[(...,) + (None,) * (event_ndims - 1)].expand(x.shape[:-1])
    return grad_log.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def rational_quadratic_spline(x: Tensor, parameters: Tensor, *options) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel."""
    x, parameters = x.contiguous(), _rows(parameters)
    output, logs = torch.empty_like(x), _row_logs(x, options[-1])
    _launch(_forward_kernel, (x, parameters, output, logs), (parameters,), x, options)
    return output, _summed(logs, options[-1])


def rational_quadratic_spline_backward(
    grad_output: Tensor | None, grad_log_abs_det: Tensor | None, x: Tensor, parameters: Tensor, *last
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel."""
    *options, needs = last
    x, rows = x.contiguous(), _rows(parameters)
    d_x = torch.empty_like(x) if needs & NEEDS_X else None
    d_parameters = as_parameters(parameters) if needs & NEEDS_PARAMETERS else None
    to = None if d_parameters is None else _rows(d_parameters)
    given = _contiguous(grad_output), _of_rows(grad_log_abs_det, x, options[-1])
    _launch(_backward_kernel, (*given, x, rows, d_x, to), (rows, to), x, tuple(options))
    return tuple(x.new_empty(0) if result is None else result for result in (d_x, d_parameters))


def rational_quadratic_spline_double_backward(
    h_x: Tensor | None,
    h_parameters: Tensor | None,
    grad_output: Tensor | None,
    grad_log_abs_det: Tensor | None,
    x: Tensor,
    parameters: Tensor,
    *last,
) -> tuple[Tensor, ...]:
    """Launch the double backward kernel."""
    *options, needs = last
    event_ndims = options[-1]
    x, rows = x.contiguous(), _rows(parameters)
    h_rows = None if h_parameters is None else _rows(h_parameters)
    output = torch.empty_like(x) if needs & NEEDS_OUTPUT else None
    logs = _row_logs(x, event_ndims) if needs & NEEDS_LOG_ABS_DET else None
    d_x = torch.empty_like(x) if needs & NEEDS_X else None
    d_parameters = as_parameters(parameters) if needs & NEEDS_PARAMETERS else None
    to = None if d_parameters is None else _rows(d_parameters)
    given = _contiguous(h_x), h_rows, _contiguous(grad_output), _of_rows(grad_log_abs_det, x, event_ndims)
    results = output, logs, d_x, to
    _launch(_double_backward_kernel, (*given, x, rows, *results), (h_rows, rows, to), x, tuple(options), dual=True)
    log_abs_det = None if logs is None else _summed(logs, event_ndims)
    results = output, log_abs_det, d_x, d_parameters
    return tuple(x.new_empty(0) if result is None else result for result in results)
