"""Where users' calls enter: docstring, validation, dispatch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvae_kernels import _checks, _dispatch, _library
from hvae_kernels.ops.masked_linear import autograd, reference

NAME = "masked_linear"
_dispatch.register(_dispatch.Op(NAME, ("cpp", "triton", "reference")))

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degrees: Tensor | Sequence[int],
    out_degrees: Tensor | Sequence[int],
    *,
    strict: bool = False,
    implementation: str | None = None,
) -> Tensor:
    r"""A linear layer that connects input i to output o only where their degrees allow it.

    .. math::
        y_o = b_o + \sum_{i : m_o \ge m_i} W_{oi} x_i

    with :math:`m_i` the inputs' and :math:`m_o` the outputs' degrees, and :math:`m_o > m_i` if strict: the layers of an
    autoregressive network. The mask is never materialised; kernels compare degrees as they go, and blocks of the weight
    without a connection are neither read nor multiplied. With sorted degrees these are half of all; degrees in any
    other order give the same numbers, but may leave no block empty.

    Args:
        x: inputs ``(..., in)``.
        weight: W, ``(out, in)``. What stands where nothing is connected does not matter, not even NaN, and has a
            gradient of exactly zero.
        bias: b, ``(out,)``, or None.
        in_degrees: ``(in,)`` integers, any values in any order, on ``x``'s device; a list or tuple becomes a tensor at
            every call.
        out_degrees: ``(out,)``, likewise.
        strict: connect only where the output's degree exceeds the input's.
        implementation: for this call, as for :func:`hvae_kernels.use_impl`; None is what that says.

    Returns:
        y, ``(..., out)``, a new contiguous tensor. Where ``x`` is not finite, outputs that are not connected to it may
        or may not be NaN.

    ``x``, ``weight`` and ``bias`` have one dtype (float32, float64; also bfloat16, float16 on GPUs and in the
    reference, with sums in float32) and device. Differentiable, to any order, in all three; reverse and forward mode,
    ``torch.compile``, ``vmap``. Unlike ``torch.nn.functional.linear``, autocast does not make it a half-precision
    product: as everywhere in this library half-precision arguments are computed in float32, and so is the result.
    Pass half-precision arguments outside autocast for a half-precision product.

    Raises:
        TypeError: x, weight or bias is not a floating-point tensor or dtypes differ, or degrees are not integers.
        ValueError: shapes or devices do not fit.

    References:
        Germain, Gregor, Murray and Larochelle, MADE: masked autoencoder for distribution estimation, 2015: hidden
        layers connect degrees that are not smaller, the output layer (strict) degrees that are larger.

    Equivalent to:
        >>> import torch, hvae_kernels as hk
        >>> x, weight, bias = torch.randn(8, 3), torch.randn(5, 3), torch.randn(5)
        >>> in_degrees, out_degrees = torch.tensor([1, 2, 3]), torch.tensor([1, 1, 2, 2, 2])
        >>> y = hk.functional.masked_linear(x, weight, bias, in_degrees, out_degrees)
        >>> mask = out_degrees[:, None] >= in_degrees
        >>> torch.testing.assert_close(y, torch.nn.functional.linear(x, weight * mask, bias))
    """
    if _library.autocasts(x):
        return _library.in_float32(_masked_linear, x, weight, bias, in_degrees, out_degrees, strict, implementation)
    return _masked_linear(x, weight, bias, in_degrees, out_degrees, strict, implementation)


def _masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degrees: Tensor | Sequence[int],
    out_degrees: Tensor | Sequence[int],
    strict: bool,
    implementation: str | None,
) -> Tensor:
    _validate(x, weight, bias)
    _checks.flag(NAME, "strict", strict)
    in_degrees = _degrees("in_degrees", in_degrees, weight.shape[1], x)
    out_degrees = _degrees("out_degrees", out_degrees, weight.shape[0], x)
    implementation = _dispatch.resolve(NAME, x, implementation)
    if implementation == "reference":
        return reference.masked_linear(x, weight, bias, in_degrees, out_degrees, strict)
    if x.dim() == 2:
        return autograd.call(implementation, x, weight, bias, in_degrees, out_degrees, strict)
    rows = x[None] if x.dim() == 1 else x.flatten(0, -2)
    y = autograd.call(implementation, rows, weight, bias, in_degrees, out_degrees, strict)
    return y.view(*x.shape[:-1], weight.shape[0])


def _validate(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _checks.same_kind(NAME, x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    if not x.dim():
        raise _checks.value_error(NAME, "x", "of shape (..., in)", x)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise _checks.value_error(NAME, "weight", f"of shape (out, in) with in = {x.shape[-1]}", weight)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise _checks.value_error(NAME, "bias", f"of shape ({weight.shape[0]},) or None", bias)


def _degrees(argument: str, degrees: Tensor | Sequence[int], size: int, x: Tensor) -> Tensor:
    """The degrees as an int64 tensor of ``size`` on ``x``'s device."""
    if isinstance(degrees, Tensor):
        if degrees.layout is not torch.strided:
            raise _checks.type_error(NAME, argument, "a dense tensor", degrees)
        if degrees.dtype is torch.int64 and degrees.shape == (size,) and degrees.device == x.device:
            return degrees  # the usual case, checked quickly
    else:
        if not isinstance(degrees, (list, tuple)) or not all(type(degree) is int for degree in degrees):
            expected = "an integer tensor or a list or tuple of integers"
            raise TypeError(f"{NAME}: {argument} must be {expected}, got {_checks.describe(degrees)}")
        largest = max((abs(degree) for degree in degrees), default=0)
        if largest >= 2**63:
            raise _checks.value_error(NAME, argument, "of integers below 2^63", largest)
        degrees = torch.tensor(degrees, dtype=torch.int64, device=x.device)
    if degrees.dtype not in _INTEGERS:
        raise TypeError(f"{NAME}: {argument} must be an integer tensor, got {_checks.describe(degrees)}")
    if degrees.shape != (size,):
        raise _checks.value_error(NAME, argument, f"of shape ({size},)", degrees)
    if degrees.device != x.device:
        raise _checks.value_error(NAME, argument, f"on the device of x, {x.device}", degrees)
    return degrees.to(torch.int64)
