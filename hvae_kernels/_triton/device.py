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
def mul_dual(a, ta, b, tb):
    """The product of two dual numbers ``a + t ta`` and ``b + t tb``: value and tangent."""
    return a * b, a * tb + ta * b


@triton.jit
def dot_dual(a, ta, b, tb, c, tc, d, td):
    """``a b + c d`` on dual numbers: value and tangent."""
    return a * b + c * d, a * tb + ta * b + c * td + tc * d
