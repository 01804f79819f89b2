"""Dual numbers ``value + t tangent``, ``t^2 = 0``, of which the tangent may be absent: one text for both kinds."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hvae_kernels._triton.device import load, load_scalar


class Plain(NamedTuple):
    """A number of a kernel that needs no derivative, or where to read it."""

    value: Any


class Dual(NamedTuple):
    """A number with its tangent, or where to read the two."""

    value: Any
    tangent: Any


@triton.jit
def load_number(pointer, offsets, mask, DTYPE: tl.constexpr):
    """A block, with its tangent if the pointer has one; zeros where a tensor is absent (None)."""
    if len(pointer) == 1:
        return Plain(load(pointer.value, offsets, mask, DTYPE))
    else:
        return Dual(load(pointer.value, offsets, mask, DTYPE), load(pointer.tangent, offsets, mask, DTYPE))


@triton.jit
def load_one(pointer, offset, DTYPE: tl.constexpr):
    """As ``load_number``, a single number."""
    if len(pointer) == 1:
        return Plain(load_scalar(pointer.value, offset, DTYPE))
    else:
        return Dual(load_scalar(pointer.value, offset, DTYPE), load_scalar(pointer.tangent, offset, DTYPE))


@triton.jit
def constant(x, DUAL: tl.constexpr):
    """A block that depends on nothing."""
    if DUAL:
        return Dual(x, tl.zeros_like(x))
    else:
        return Plain(x)


@triton.jit
def derivative_part(a):
    """What of a gradient's number is the kernel's result: the tangent where there is one."""
    if len(a) == 1:
        return a.value
    else:
        return a.tangent


@triton.jit
def as_row(a, DTYPE: tl.constexpr):
    """``(features)`` in another precision, to broadcast over rows."""
    if len(a) == 1:
        return Plain(a.value.to(DTYPE)[None, :])
    else:
        return Dual(a.value.to(DTYPE)[None, :], a.tangent.to(DTYPE)[None, :])


@triton.jit
def scaled(FACTOR: tl.constexpr, a):
    """``FACTOR a``."""
    if len(a) == 1:
        return Plain(FACTOR * a.value)
    else:
        return Dual(FACTOR * a.value, FACTOR * a.tangent)


@triton.jit
def affine(FACTOR: tl.constexpr, a, OFFSET: tl.constexpr):
    """``FACTOR a + OFFSET``."""
    if len(a) == 1:
        return Plain(FACTOR * a.value + OFFSET)
    else:
        return Dual(FACTOR * a.value + OFFSET, FACTOR * a.tangent)


@triton.jit
def sub(a, b):
    """``a - b``."""
    if len(a) == 1:
        return Plain(a.value - b.value)
    else:
        return Dual(a.value - b.value, a.tangent - b.tangent)


@triton.jit
def mul(a, b):
    """``a b``."""
    if len(a) == 1:
        return Plain(a.value * b.value)
    else:
        return Dual(a.value * b.value, a.value * b.tangent + a.tangent * b.value)


@triton.jit
def add_product(a, b, c):
    """``a + b c``."""
    if len(a) == 1:
        return Plain(a.value + b.value * c.value)
    else:
        return Dual(a.value + b.value * c.value, a.tangent + b.value * c.tangent + b.tangent * c.value)


@triton.jit
def dot(a, b, c, d):
    """``a b + c d``."""
    return add_product(mul(a, b), c, d)
