"""The spline on the device: an element's bin, the map in it, its derivatives, and the gradients of raw parameters.

A block is ``(rows, features)`` elements; parameter p of those lies ``p`` strides after ``where``.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from hvae_kernels._triton.device import exponential, load, log1p_unit, logistic, square_root, store
from hvae_kernels._triton.dual import Plain, add, add_product, dot, inverse, mul, scaled, sub
from hvae_kernels.ops.rational_quadratic_spline.spline import STYLES, TAILS

LINEAR, CIRCULAR, NONE = (tl.constexpr(TAILS.index(tails)) for tails in ("linear", "circular", None))
#: Whose gradients: of the map, of its inverse, or what a solve with the map's transposed Jacobian takes.
MAP, INVERSE, SOLVE = (tl.constexpr(which) for which in range(3))
#: By the tails' code: how many raw derivatives there are, less the bins.
MORE_SLOPES = tl.constexpr((-1, 0, 1))
ZUKO = tl.constexpr(STYLES.index("zuko"))


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
def numbers_of(C: tl.constexpr):
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
def clip(r, rate):
    """``(value, first, second)`` of ``r / (1 + rate |r|)``."""
    q = 1.0 / (1.0 + tl.abs(r) * rate)
    sign = tl.where(r > 0, 1.0, tl.where(r < 0, -1.0, 0.0))
    return r * q, q * q, -2.0 * sign * rate * q * q * q


@triton.jit
def logit_of(raw, scale, rate, STYLE: tl.constexpr):
    """What the softmax of widths or heights is of."""
    if STYLE == ZUKO:
        value, _, _ = clip(raw * scale, rate)
        return value
    else:
        return raw * scale


@triton.jit
def slope_of(r, rate, least, STYLE: tl.constexpr):
    """``(value, first, second)`` of a knot's derivative, by its raw value."""
    if STYLE == ZUKO:
        clipped, first, second = clip(r, rate)
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
def locate(
    x, parameters, at, stride, mask, numbers,
    BINS: tl.constexpr, TAIL: tl.constexpr, STYLE: tl.constexpr, INVERTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The bin of each x, counted on its axis, and all that stands in it."""
    A: tl.constexpr = 1 if INVERTS else 0
    B: tl.constexpr = 1 - A
    SLOPES: tl.constexpr = BINS + MORE_SLOPES[TAIL]
    low, last = numbers.low[A].to(DTYPE), numbers.high[A].to(DTYPE)
    outside = (x < low) | (x > last)
    x = tl.where(outside, 0.5 * (low + last), x)
    zero = tl.zeros_like(x)
    scale, rate = numbers.scale.to(DTYPE), numbers.clip.to(DTYPE)
    top = _most(parameters, at, stride, A * BINS, mask, BINS, DTYPE)
    most = logit_of(top, scale, rate, STYLE)
    hi, lo = zero, zero
    for k in range(BINS):
        logit = logit_of(load(parameters, at + (A * BINS + k) * stride, mask, DTYPE), scale, rate, STYLE)
        hi, lo = _two_sum(hi, lo, exponential(logit - most))
    # knots below x, in units of the softmax' sum; a bin missed by rounding is as good at its knot
    limit = (x - low) * (hi / (numbers.span[A] * numbers.rest[A]).to(DTYPE))
    step = hi * (numbers.floor[A] / numbers.rest[A]).to(DTYPE)
    index, run_hi, run_lo, below_hi, below_lo, chosen = zero, zero, zero, zero, zero, zero
    for k in range(BINS):
        logit = logit_of(load(parameters, at + (A * BINS + k) * stride, mask, DTYPE), scale, rate, STYLE)
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
    most = logit_of(top, scale, rate, STYLE)
    hi, lo, below_hi, below_lo, chosen = zero, zero, zero, zero, zero
    for k in range(BINS):
        logit = logit_of(load(parameters, at + (B * BINS + k) * stride, mask, DTYPE), scale, rate, STYLE)
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
    lower_at = here - 1 if TAIL == LINEAR else here
    upper_at = here if TAIL == LINEAR else here + 1
    if TAIL == CIRCULAR:
        upper_at = tl.where(upper_at == BINS, 0, upper_at)
    lower_raw = load(parameters, at + (2 * BINS + tl.maximum(lower_at, 0)) * stride, mask, DTYPE)
    upper_raw = load(parameters, at + (2 * BINS + tl.minimum(upper_at, SLOPES - 1)) * stride, mask, DTYPE)
    least, slope_rate, outer = numbers.least.to(DTYPE), numbers.slope_clip.to(DTYPE), numbers.outer.to(DTYPE)
    lower, _, _ = slope_of(lower_raw, slope_rate, least, STYLE)
    upper, _, _ = slope_of(upper_raw, slope_rate, least, STYLE)
    if TAIL == LINEAR:
        lower = tl.where(lower_at < 0, outer, lower)
        upper = tl.where(upper_at >= SLOPES, outer, upper)
    from_lower = x.to(tl.float64) - one.knot
    from_upper = one.next - x.to(tl.float64)
    from_lower = tl.where(from_lower < 0, 0.0, from_lower).to(DTYPE)
    from_upper = tl.where(from_upper < 0, 0.0, from_upper).to(DTYPE)
    z, zc = from_lower / one.length, from_upper / one.length
    if INVERTS:  # the quadratic's root: nothing cancels
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
def form_of(z, zc, w, h, d0, d1):
    """Of places from both knots, the bin's width and height, and the slopes at its knots."""
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
def partials_of(p, h):
    """Of a :class:`Form` in a bin of this height."""
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
def pulled(p, g, log, OF: tl.constexpr):
    """Gradients of x, then of what stands in the bin: the first knot and length of both sides, the slopes.

    A solve has the gradient of the inverse for x, and of the rest what the map makes of it.
    """
    if OF == MAP:
        by_x = dot(g, p.y_x, log, p.l_x)
        x = by_x
    else:
        x = mul(sub(g, mul(log, p.l_x)), inverse(p.y_x))
        g = x
        if OF == INVERSE:
            g, log = scaled(-1.0, x), scaled(-1.0, log)
        by_x = dot(g, p.y_x, log, p.l_x)
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
def weights_of(knot, length, share, below, above):
    """What each e of a bin below, in and above is multiplied by."""
    return (
        sub(mul(knot, add(above, share)), mul(length, share)),
        sub(mul(length, add(below, above)), mul(knot, below)),
        scaled(-1.0, dot(knot, below, length, share)),
    )


@triton.jit
def transformed(
    x, parameters, where, stride, mask, numbers,
    BINS: tl.constexpr, TAIL: tl.constexpr, STYLE: tl.constexpr, INVERTS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The image of x by the spline, or by its inverse, and the logarithm of that one's derivative."""
    b = locate(x, parameters, where, stride, mask, numbers, BINS, TAIL, STYLE, INVERTS, DTYPE)
    w, h = b.columns.length, b.rows.length
    p = form_of(Plain(b.z), Plain(b.zc), Plain(w), Plain(h), Plain(b.lower), Plain(b.upper))
    log = tl.log(p.jacobian.value)
    if INVERTS:
        log = -log
        near = b.z < b.zc
        off = tl.where(near, b.z, -b.zc) * w
        knot = tl.where(near, b.columns.knot, b.columns.next)
    else:
        near = p.f.value < p.fc.value
        off = tl.where(near, p.f.value, -p.fc.value) * h
        knot = tl.where(near, b.rows.knot, b.rows.next)
    result = (knot + off.to(tl.float64)).to(DTYPE)
    if TAIL == NONE:
        return tl.where(b.outside, float("nan"), result), tl.where(b.outside, float("nan"), log)
    else:
        return tl.where(b.outside, x, result), tl.where(b.outside, 0.0, log)


@triton.jit
def pulled_back(b, g, log, TAIL: tl.constexpr, OF: tl.constexpr):
    """``(gradient of x, gradients of what stands in the bin)``, outside of which only that of x has a meaning."""
    h = Plain(b.rows.length)
    form = form_of(Plain(b.z), Plain(b.zc), Plain(b.columns.length), h, Plain(b.lower), Plain(b.upper))
    by_x, x0, by_w, y0, by_h, by_d0, by_d1 = pulled(partials_of(form, h), Plain(g), Plain(log), OF)
    return tl.where(b.outside, 0.0 if TAIL == NONE else g, by_x.value), (x0, by_w, y0, by_h, by_d0, by_d1)


@triton.jit
def store_gradients(
    to, at, to_stride, by, b, parameters, where, stride, mask, numbers,
    BINS: tl.constexpr, TAIL: tl.constexpr, STYLE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradients of all raw parameters, from those of what stands in the bin."""
    x0, by_w, y0, by_h, by_d0, by_d1 = by
    scale, rate = numbers.scale.to(DTYPE), numbers.clip.to(DTYPE)
    for A in tl.static_range(2):
        side = b.columns if A == 0 else b.rows
        knot, length = (x0, by_w) if A == 0 else (y0, by_h)
        below, own, above = weights_of(knot, length, Plain(side.share), Plain(side.below), Plain(side.above))
        size = (numbers.span[A] * numbers.rest[A] * numbers.scale).to(DTYPE) * side.inverse_total
        for k in range(BINS):
            raw = load(parameters, where + (A * BINS + k) * stride, mask, DTYPE)
            e = exponential(logit_of(raw, scale, rate, STYLE) - side.most)
            weight = tl.where(b.index > k, below.value, tl.where(b.index == k, own.value, above.value))
            d = e * weight * size
            if STYLE == ZUKO:
                _, first, _ = clip(raw * scale, rate)
                d *= first
            store(to, at + (A * BINS + k) * to_stride, tl.where(b.outside, 0.0, d), mask)
    least, slope_rate = numbers.least.to(DTYPE), numbers.slope_clip.to(DTYPE)
    _, lower, _ = slope_of(b.lower_raw, slope_rate, least, STYLE)
    _, upper, _ = slope_of(b.upper_raw, slope_rate, least, STYLE)
    store_slopes(
        to, at + 2 * BINS * to_stride, to_stride, b, by_d0.value * lower, by_d1.value * upper, mask, BINS, TAIL
    )  # fmt: skip


@triton.jit
def store_slopes(to, at, stride, b, lower, upper, mask, BINS: tl.constexpr, TAIL: tl.constexpr):
    """The gradients of the two slopes where they belong, zeros elsewhere."""
    SLOPES: tl.constexpr = BINS + MORE_SLOPES[TAIL]
    for k in range(SLOPES):
        knot = k + 1 if TAIL == LINEAR else k
        following = b.index + 1
        if TAIL == CIRCULAR:
            following = tl.where(following == BINS, 0, following)
        d = tl.where(b.index == knot, lower, tl.where(following == knot, upper, 0.0))
        store(to, at + k * stride, tl.where(b.outside, 0.0, d), mask)


# ---- On the host ----


def constants(
    bins: int, style: int, left: float, right: float, bottom: float, top: float, min_width: float, min_height: float,
    min_derivative: float, logit_scale: float,
) -> tuple[float, ...]:  # fmt: skip
    """What :func:`numbers_of` takes."""
    zuko, pyro = style == STYLES.index("zuko"), style == STYLES.index("pyro")
    floors = (0.0, 0.0) if zuko else (min_width, min_height)
    rate = abs(math.log(min_derivative)) if zuko else 1.0
    spans, rests = (right - left, top - bottom), tuple(1 - bins * floor for floor in floors)
    outer = 1 - min_derivative if pyro else 1.0
    return (left, bottom, right, top, *spans, *floors, *rests, logit_scale, 2 / rate, 1 / rate, min_derivative, outer)
