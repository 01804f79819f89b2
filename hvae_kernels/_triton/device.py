"""Device functions that the ops' kernels share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load(pointer, offsets, mask, dtype: tl.constexpr):
    """A block as ``dtype``, zero where masked; all zeros if the tensor is absent (None)."""
    if pointer is None:
        return tl.zeros(offsets.shape, dtype)
    else:
        return tl.load(pointer + offsets, mask=mask, other=0.0).to(dtype)


@triton.jit
def load_scalar(pointer, offset, dtype: tl.constexpr):
    """One value as ``dtype``; zero if the tensor is absent (None)."""
    if pointer is None:
        return tl.full([], 0.0, dtype)
    else:
        return tl.load(pointer + offset).to(dtype)


@triton.jit
def store(pointer, offsets, value, mask):
    """Store float64 or float32; half precision by way of float32, as few targets convert float64 to bfloat16."""
    if pointer.dtype.element_ty.primitive_bitwidth == 16:
        tl.store(pointer + offsets, value.to(tl.float32), mask=mask)
    else:
        tl.store(pointer + offsets, value, mask=mask)


@triton.jit
def exponential(x):
    """``exp``, reduced first: the GPU's own float32 rounds ``x log2(e)``, an error that grows with ``x``."""
    if x.dtype.primitive_bitwidth == 64:
        return tl.exp(x)
    else:
        x = tl.where(x < -104.0, -104.0, x)
        x = tl.where(x > 88.8, 88.8, x)
        k = tl.floor(x * 1.4426950408889634 + 0.5)
        r = (x - k * 0.693359375) + k * 2.12194440e-4  # ln 2 in two parts, the first of which times k is exact
        n = tl.where(x == x, k, 0.0).to(tl.int32)
        half = n >> 1  # two halves, so that denormal results come out right
        low = ((half + 127) << 23).to(tl.float32, bitcast=True)
        high = ((n - half + 127) << 23).to(tl.float32, bitcast=True)
        return tl.exp(r) * low * high


@triton.jit
def square_root(x):
    """Correctly rounded, of denormal numbers too: the GPU's own float32 takes those for zero."""
    if x.dtype.primitive_bitwidth == 64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def decay(x):
    """``exp(-|x|)``."""
    return exponential(-tl.abs(x))


@triton.jit
def logistic(x):
    """``(e, value, rest)``: ``exp(-|x|)``, the logistic function and what it lacks to 1."""
    e = decay(x)
    large = 1.0 / (1.0 + e)
    return e, tl.where(x < 0, e * large, large), tl.where(x < 0, large, e * large)


@triton.jit
def log1p_unit(x):
    """``log(1 + x)`` for ``0 <= x <= 1``, with what rounding the sum has lost."""
    total = 1.0 + x
    return tl.log(total) + (x - (total - 1.0)) / total


@triton.jit
def expm1_nonpositive(x):
    """``exp(x) - 1`` for ``x <= 0``, relative to the result near 0 too."""
    near = tl.where(x < -0.5, -0.5, x)
    p = tl.full(x.shape, 1.0 / 16.0, x.dtype)
    for n in tl.static_range(15, 1, -1):  # the series 1 + x/2 (1 + x/3 (1 + ...)): 2e-18 at -1/2
        p = (1.0 + near * p) * (1.0 / n)
    return tl.where(x < -0.5, exponential(x) - 1.0, near + near * near * p)


@triton.jit
def hyperbolic_tangent(x):
    """``tanh``, relative to the result near 0 too."""
    e = expm1_nonpositive(-2.0 * tl.abs(x))
    t = e / (2.0 + e)
    return tl.where(x < 0, t, -t)
