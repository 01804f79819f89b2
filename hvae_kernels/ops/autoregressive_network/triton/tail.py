"""What the sweep does to one feature in a tile of samples, with the parameters that its units have come to.

A feature's parameters lie in ``work`` from ``at (lanes)`` on, ``stride`` apart. The tail is known when a kernel is
compiled: ``TAIL`` is a gate's code alone, or the bins, tails and style of a spline, ``NUMBERS`` the numbers of either.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from hvae_kernels._triton.gates import SIGMOID, gate
from hvae_kernels.ops.rational_quadratic_spline.triton.bins import (
    MORE_SLOPES,
    SOLVE,
    constants,
    locate,
    numbers_of,
    pulled_back,
    store_gradients,
    transformed,
)


def compiled_in(codes: Sequence[int], numbers: Sequence[float]) -> tuple[int, tuple[int, ...], tuple[float, ...]]:
    """``(parameters of a feature, TAIL, NUMBERS)`` of a tail as the raw ops take it."""
    if len(codes) == 1:
        return 2, tuple(codes), tuple(numbers)
    _, bins, tails, style = codes
    return 3 * bins + MORE_SLOPES.value[tails], (bins, tails, style), constants(bins, style, *numbers)


@triton.jit
def _gate_of(raw, TAIL: tl.constexpr, NUMBERS: tl.constexpr):
    first, second = tl.full([1], NUMBERS[0], raw.dtype), tl.full([1], NUMBERS[1], raw.dtype)
    return gate(raw, first, second, TAIL[0])


@triton.jit
def inverted(y, work, at, stride, TAIL: tl.constexpr, NUMBERS: tl.constexpr):
    """``(x, log)``: the feature whose image is y, and the logarithm of the map's derivative there."""
    DTYPE: tl.constexpr = y.dtype
    if len(TAIL) == 1:
        shift, raw = tl.load(work + at), tl.load(work + at + stride)
        scale, rest, log, _, _, _, _ = _gate_of(raw, TAIL, NUMBERS)
        return (y - rest * shift) / scale, log
    else:
        here = at[None, :]
        x, log = transformed(
            y[None, :], work, here, stride, here >= 0, numbers_of(NUMBERS), TAIL[0], TAIL[1], TAIL[2], True, DTYPE
        )
        return tl.reshape(x, y.shape), -tl.reshape(log, y.shape)


@triton.jit
def solved(grad, grad_log, x, work, at, stride, to, TAIL: tl.constexpr, NUMBERS: tl.constexpr):
    """``(grad - grad_log dL/dx) / (dy/dx)`` at x; the cotangents that it gives the parameters are put at ``to``."""
    DTYPE: tl.constexpr = x.dtype
    if len(TAIL) == 1:
        raw = tl.load(work + at + stride)
        scale, rest, _, d_scale, d_log, _, _ = _gate_of(raw, TAIL, NUMBERS)
        value, slope = grad / scale, x
        if TAIL[0] == SIGMOID:
            slope -= tl.load(work + at)
        tl.store(work + to, value * rest)
        tl.store(work + to + stride, value * d_scale * slope + grad_log * d_log)
        return value
    else:
        here, there, numbers = at[None, :], to[None, :], numbers_of(NUMBERS)
        b = locate(x[None, :], work, here, stride, here >= 0, numbers, TAIL[0], TAIL[1], TAIL[2], False, DTYPE)
        value, by = pulled_back(b, grad[None, :], grad_log[None, :], TAIL[1], SOLVE)
        store_gradients(
            work, there, stride, by, b, work, here, stride, here >= 0, numbers, TAIL[0], TAIL[1], TAIL[2], DTYPE
        )  # fmt: skip
        return tl.reshape(value, x.shape)
