"""The kernels: a program owns whole rows, and reads their parameters where they lie."""

from __future__ import annotations

import triton
import triton.language as tl

from hvae_kernels._triton.device import exponential, load, store
from hvae_kernels._triton.dual import Dual, Plain, constant, derivative_part
from hvae_kernels.ops.rational_quadratic_spline.triton.bins import (
    CIRCULAR,
    INVERSE,
    LINEAR,
    MAP,
    MORE_SLOPES,
    NONE,
    ZUKO,
    clip,
    form_of,
    locate,
    logit_of,
    numbers_of,
    partials_of,
    pulled,
    pulled_back,
    slope_of,
    store_gradients,
    store_slopes,
    transformed,
    weights_of,
)


@triton.jit
def _place(rows, features, start, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (start + tl.arange(0, BLOCK_FEATURES)).to(tl.int64)
    mask = (row < rows)[:, None] & (column < features)[None, :]
    return row[:, None] * features + column[None, :], row[:, None], column[None, :], mask


@triton.jit
def forward_kernel(
    x, parameters, output, log_abs_det, rows, features, strides,
    C: tl.constexpr, BINS: tl.constexpr, TAIL: tl.constexpr, STYLE: tl.constexpr, INVERTS: tl.constexpr,
    SUMS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """The map or its inverse, and the log-determinant of either, summed over rows or not."""
    numbers = numbers_of(C)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    for start in range(0, features, BLOCK_FEATURES):
        at, rows_at, column, mask = _place(rows, features, start, BLOCK_ROWS, BLOCK_FEATURES)
        where = rows_at * strides.row + column * strides.feature
        result, log = transformed(
            load(x, at, mask, DTYPE), parameters, where, strides.parameter, mask, numbers,
            BINS, TAIL, STYLE, INVERTS, DTYPE,
        )  # fmt: skip
        store(output, at, result, mask)
        if SUMS:
            sums += tl.where(mask, log, 0.0)
        else:
            store(log_abs_det, at, log, mask)
    if SUMS:
        store(log_abs_det, row, tl.sum(sums.to(tl.float64), 1), row < rows)


@triton.jit
def backward_kernel(
    grad, grad_log, x, parameters, d_x, d_parameters, rows, features, strides, to,
    C: tl.constexpr, BINS: tl.constexpr, TAIL: tl.constexpr, STYLE: tl.constexpr, INVERTS: tl.constexpr,
    SUMS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """Gradients of x and the parameters, as far as wanted."""
    numbers = numbers_of(C)
    for start in range(0, features, BLOCK_FEATURES):
        at, row, column, mask = _place(rows, features, start, BLOCK_ROWS, BLOCK_FEATURES)
        where = row * strides.row + column * strides.feature
        g = load(grad, at, mask, DTYPE)
        log = load(grad_log, row + column * 0 if SUMS else at, mask, DTYPE)
        b = locate(
            load(x, at, mask, DTYPE), parameters, where, strides.parameter, mask, numbers,
            BINS, TAIL, STYLE, INVERTS, DTYPE,
        )  # fmt: skip
        by_x, by = pulled_back(b, g, log, TAIL, INVERSE if INVERTS else MAP)
        if d_x is not None:
            store(d_x, at, by_x, mask)
        if d_parameters is not None:
            store_gradients(
                d_parameters, row * to.row + column * to.feature, to.parameter, by, b, parameters, where,
                strides.parameter, mask, numbers, BINS, TAIL, STYLE, DTYPE,
            )  # fmt: skip


@triton.jit
def _tangents(h, at, stride, parameters, where, raw_stride, side, b, numbers, mask, A: tl.constexpr,
              BINS: tl.constexpr, STYLE: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """``(mean, below, share)``: the softmax' mean of the logits' tangents, the tangents of its sums."""
    scale, rate = numbers.scale.to(DTYPE), numbers.clip.to(DTYPE)
    total, low, own = tl.zeros_like(side.share), tl.zeros_like(side.share), tl.zeros_like(side.share)
    for k in range(BINS):
        raw = load(parameters, where + (A * BINS + k) * raw_stride, mask, DTYPE)
        e = exponential(logit_of(raw, scale, rate, STYLE) - side.most)
        t = load(h, at + (A * BINS + k) * stride, mask, DTYPE) * scale
        if STYLE == ZUKO:
            _, first, _ = clip(raw * scale, rate)
            t *= first
        total += e * t
        low += tl.where(b.index > k, e * t, 0.0)
        own = tl.where(b.index == k, t, own)
    mean = total * side.inverse_total
    return mean, low * side.inverse_total - side.below * mean, side.share * (own - mean)


@triton.jit
def double_backward_kernel(
    h_x, h_parameters, grad, grad_log, x, parameters, output, log_abs_det, d_x, d_parameters, rows, features,
    h_strides, strides, to,
    C: tl.constexpr, BINS: tl.constexpr, TAIL: tl.constexpr, STYLE: tl.constexpr, INVERTS: tl.constexpr,
    SUMS: tl.constexpr, DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    """The backward pass on dual numbers in the directions h, and the tangents of the results on the way."""
    SLOPES: tl.constexpr = BINS + MORE_SLOPES[TAIL]
    numbers = numbers_of(C)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_FEATURES), DTYPE)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    for start in range(0, features, BLOCK_FEATURES):
        at, row, column, mask = _place(rows, features, start, BLOCK_ROWS, BLOCK_FEATURES)
        where = row * strides.row + column * strides.feature
        h_at = row * h_strides.row + column * h_strides.feature
        hx, g = load(h_x, at, mask, DTYPE), load(grad, at, mask, DTYPE)
        log = load(grad_log, row + column * 0 if SUMS else at, mask, DTYPE)
        b = locate(
            load(x, at, mask, DTYPE), parameters, where, strides.parameter, mask, numbers,
            BINS, TAIL, STYLE, INVERTS, DTYPE,
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
        lower_at = b.index - 1 if TAIL == LINEAR else b.index
        upper_at = b.index if TAIL == LINEAR else b.index + 1
        if TAIL == CIRCULAR:
            upper_at = tl.where(upper_at == BINS, 0, upper_at)
        slopes_at = h_at + 2 * BINS * h_strides.parameter
        least, slope_rate = numbers.least.to(DTYPE), numbers.slope_clip.to(DTYPE)
        _, rate0, curve0 = slope_of(b.lower_raw, slope_rate, least, STYLE)
        _, rate1, curve1 = slope_of(b.upper_raw, slope_rate, least, STYLE)
        if TAIL == LINEAR:
            fixed0, fixed1 = lower_at < 0, upper_at >= SLOPES
            rate0, curve0 = tl.where(fixed0, 0.0, rate0), tl.where(fixed0, 0.0, curve0)
            rate1, curve1 = tl.where(fixed1, 0.0, rate1), tl.where(fixed1, 0.0, curve1)
        t0 = load(h_parameters, slopes_at + tl.maximum(lower_at, 0) * h_strides.parameter, mask, DTYPE)
        t1 = load(h_parameters, slopes_at + tl.minimum(upper_at, SLOPES - 1) * h_strides.parameter, mask, DTYPE)
        w, h = Dual(b.columns.length, across * share0), Dual(b.rows.length, along * share1)
        d0, d1 = Dual(b.lower, rate0 * t0), Dual(b.upper, rate1 * t1)
        plain = form_of(Plain(b.z), Plain(b.zc), Plain(w.value), Plain(h.value), Plain(b.lower), Plain(b.upper))
        p = partials_of(plain, Plain(h.value))
        by_bin = p.y_w.value * w.tangent + p.y_h.value * h.tangent + p.y_d0.value * d0.tangent
        by_bin += p.y_d1.value * d1.tangent + along * below1
        moved = (hx - by_bin) / p.y_x.value if INVERTS else hx - across * below0  # the tangent of x - x0
        t_log = p.l_x.value * moved + p.l_w.value * w.tangent + p.l_h.value * h.tangent
        t_log += p.l_d0.value * d0.tangent + p.l_d1.value * d1.tangent
        if INVERTS:
            t_log = -t_log
            t_y = moved + across * below0
        else:
            t_y = p.y_x.value * moved + by_bin
        if output is not None:
            store(output, at, tl.where(b.outside, 0.0 if TAIL == NONE else hx, t_y), mask)
        t_log = tl.where(b.outside, 0.0, t_log)
        if log_abs_det is not None:
            if SUMS:
                sums += tl.where(mask, t_log, 0.0)
            else:
                store(log_abs_det, at, t_log, mask)
        tz = (moved - b.z * w.tangent) / w.value
        form = form_of(Dual(b.z, tz), Dual(b.zc, -tz), w, h, d0, d1)
        by_x, x0, by_w, y0, by_h, by_d0, by_d1 = pulled(
            partials_of(form, h), constant(g, True), constant(log, True), INVERSE if INVERTS else MAP
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
                below, own, above = weights_of(
                    knot, length, Dual(side.share, share_t), Dual(side.below, below_t),
                    Dual(side.above, -(below_t + share_t)),
                )  # fmt: skip
                size = (across if A == 0 else along) * scale * side.inverse_total
                for k in range(BINS):
                    raw = load(parameters, where + (A * BINS + k) * strides.parameter, mask, DTYPE)
                    direction = load(h_parameters, h_at + (A * BINS + k) * h_strides.parameter, mask, DTYPE) * scale
                    e = exponential(logit_of(raw, scale, rate, STYLE) - side.most) * size
                    value = e * tl.where(b.index > k, below.value, tl.where(b.index == k, own.value, above.value))
                    bent = tl.where(b.index > k, below.tangent, tl.where(b.index == k, own.tangent, above.tangent))
                    if STYLE == ZUKO:
                        _, first, second = clip(raw * scale, rate)
                        d = (value * (direction * first - mean) + e * bent) * first + value * second * direction
                    else:
                        d = value * (direction - mean) + e * bent
                    store(d_parameters, target + (A * BINS + k) * to.parameter, tl.where(b.outside, 0.0, d), mask)
            store_slopes(
                d_parameters, target + 2 * BINS * to.parameter, to.parameter, b,
                by_d0.tangent * rate0 + by_d0.value * curve0 * t0, by_d1.tangent * rate1 + by_d1.value * curve1 * t1,
                mask, BINS, TAIL,
            )  # fmt: skip
    if SUMS and log_abs_det is not None:
        store(log_abs_det, first_row, tl.sum(sums.to(tl.float64), 1), first_row < rows)
