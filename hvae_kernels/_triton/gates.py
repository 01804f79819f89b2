"""The gates of autoregressive networks on the device: how a raw output becomes a scale, and its derivatives."""

from __future__ import annotations

import triton
import triton.language as tl

from hvae_kernels._triton.device import exponential, log1p_unit, logistic
from hvae_kernels.ops.affine_autoregressive.gates import CODES

_CLIPPED = tl.constexpr(CODES["clipped"])
_SOFT_CLIPPED = tl.constexpr(CODES["soft-clipped"])
_SOFTPLUS = tl.constexpr(CODES["softplus"])
_SHIFTED_SIGMOID = tl.constexpr(CODES["shifted-sigmoid"])
SIGMOID = tl.constexpr(CODES["sigmoid"])


@triton.jit
def _log_scale(s, first, second, GATE: tl.constexpr):
    """``(log sigma, its first and second derivative)`` of the gates that are an exponential."""
    one = tl.full(s.shape, 1.0, s.dtype)
    zero = tl.zeros_like(s)
    if GATE == _CLIPPED:
        low = tl.where(s < first, first, s)
        return tl.where(low > second, second, low), one, zero
    elif GATE == _SOFT_CLIPPED:
        sign = tl.where(s > 0, one, tl.where(s < 0, -one, zero))
        q = 1.0 / (1.0 + tl.abs(s) / first)
        return s * q, q * q, -2.0 * sign / first * q * q * q
    else:
        return s, one, zero


@triton.jit
def _log_of_sum(a, b):
    """``log(a + b)`` for ``0 <= |b| <= a``, without the error of rounding the sum."""
    total = a + b
    return tl.log(total) + (b - (total - a)) / total


@triton.jit
def gate(s, first, second, GATE: tl.constexpr):
    """``(sigma, tau, log sigma, sigma', (log sigma)', sigma'', (log sigma)'')``."""
    one = tl.full(s.shape, 1.0, s.dtype)
    if GATE == _SOFTPLUS:
        e, p, rest = logistic(s)
        scale = tl.where(s < 0, tl.zeros_like(s), s) + log1p_unit(e) + first
        curve = p * rest
        d_log = p / scale
        return scale, one, tl.log(scale), p, d_log, curve, curve / scale - d_log * d_log
    elif GATE == _SHIFTED_SIGMOID:
        x = s + first
        _, p, rest = logistic(x)
        scale = p + second
        slope = p * rest
        curve = slope * (rest - p)
        d_log = slope / scale
        # Near 1 the logarithm is taken of what the scale lacks to 1: the sum would have lost it.
        log = _log_of_sum(tl.where(x > 0, one, p), tl.where(x > 0, second - rest, second))
        return scale, one, log, slope, d_log, curve, curve / scale - d_log * d_log
    elif GATE == SIGMOID:
        x = s + first
        e, p, rest = logistic(x)
        slope = p * rest
        log = tl.where(x > 0, tl.zeros_like(x), x) - log1p_unit(e)
        return p, rest, log, slope, rest, slope * (rest - p), -slope
    else:
        log, d_log, dd_log = _log_scale(s, first, second, GATE)
        scale = exponential(log)
        return scale, one, log, scale * d_log, d_log, scale * (d_log * d_log + dd_log), dd_log
