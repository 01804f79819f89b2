"""Schemas, fakes and the autograd Functions of ``masked_linear``.

The op is bilinear, and so are its two gradients: each of the three is differentiated by the other two, to any order,
and its forward mode is two calls of itself.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels._op import kernel

_DEGREES = "Tensor in_degrees, Tensor out_degrees, bool strict"


def _forward_fake(x, weight, bias, in_degrees, out_degrees, strict):
    return x.new_empty(x.shape[0], weight.shape[0])


def _input_grad_fake(grad, weight, in_degrees, out_degrees, strict):
    return grad.new_empty(grad.shape[0], weight.shape[1])


def _weight_grad_fake(grad, x, in_degrees, out_degrees, strict):
    return grad.new_empty(grad.shape[1], x.shape[1])


RAW_FORWARD = kernel(
    __package__, "masked_linear", f"(Tensor x, Tensor weight, Tensor? bias, {_DEGREES}) -> Tensor", _forward_fake
)
RAW_INPUT_GRAD = kernel(
    __package__, "masked_linear_input_grad", f"(Tensor grad, Tensor weight, {_DEGREES}) -> Tensor", _input_grad_fake
)
RAW_WEIGHT_GRAD = kernel(
    __package__, "masked_linear_weight_grad", f"(Tensor grad, Tensor x, {_DEGREES}) -> Tensor", _weight_grad_fake
)


class _Bilinear(OpFunction):
    """``(implementation, a, b, [bias], in_degrees, out_degrees, strict) -> Tensor``, bilinear in ``a`` and ``b``."""

    RAW: dict[str, Callable[..., Tensor]]

    @classmethod
    def run(cls, implementation: str, *args) -> Tensor:
        """The raw op where nobody will differentiate the result."""
        if _library.nothing_differentiates(*args[:-1]):
            return cls.RAW[implementation](*args)
        return cls.apply(implementation, *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        (ctx.implementation, a, b), ctx.strict, degrees = inputs[:3], inputs[-1], inputs[-3:-1]
        wants_a, wants_b = ctx.needs_input_grad[1:3]
        ctx.save_for_backward(a if wants_b else None, b if wants_a else None, *degrees)
        ctx.save_for_forward(a, b, *degrees)
        ctx.set_materialize_grads(False)

    @classmethod
    def tangent(cls, ctx, a_tangent: Tensor | None, b_tangent: Tensor | None) -> Tensor:
        """Forward mode by the product rule."""
        a, b, *degrees = ctx.saved_tensors
        results = [
            cls.apply(ctx.implementation, *factors, *degrees, ctx.strict)
            for factors in ((a_tangent, b), (a, b_tangent))
            if factors[0] is not None and factors[1] is not None
        ]
        return sum(results[1:], results[0])

    @classmethod
    def loop(cls, info, in_dims, *args) -> tuple[Tensor, int]:
        """``vmap`` where no kernel takes the batch."""
        results, dims = _library.vmap_by_loop(lambda *sample: (cls.apply(*sample),), info.batch_size, in_dims, args)
        return results[0], dims[0]

    @classmethod
    def fold(cls, info, in_dims, implementation, rows, *args) -> tuple[Tensor, int]:
        """``vmap`` over ``a`` alone: its samples are more rows."""
        rows = rows.movedim(in_dims[1], 0)
        result = cls.apply(implementation, rows.flatten(0, 1), *args)
        return result.unflatten(0, rows.shape[:2]), 0


def _batched(in_dims: tuple[int | None, ...]) -> bool:
    return any(dim is not None for dim in in_dims)


class MaskedLinear(_Bilinear):
    """``(x, weight, bias) -> x (mask * weight)^T + bias``."""

    RAW = RAW_FORWARD

    @staticmethod
    def forward(implementation, *args):
        return RAW_FORWARD[implementation](*args)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 7
        implementation, strict = ctx.implementation, ctx.strict
        x, weight, *degrees = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[1:4]
        grad_x = InputGrad.run(implementation, grad, weight, *degrees, strict) if wants_x else None
        grad_weight = WeightGrad.run(implementation, grad, x, *degrees, strict) if wants_weight else None
        return None, grad_x, grad_weight, grad.sum(0) if wants_bias else None, None, None, None

    @staticmethod
    def jvp(ctx, _, x_tangent, weight_tangent, bias_tangent, *__):
        x, weight, *degrees = ctx.saved_tensors
        args = (*degrees, ctx.strict)
        if x_tangent is None and weight_tangent is None:
            return bias_tangent.expand(x.shape[0], -1)
        if x_tangent is None:
            return MaskedLinear.apply(ctx.implementation, x, weight_tangent, bias_tangent, *args)
        result = MaskedLinear.apply(ctx.implementation, x_tangent, weight, bias_tangent, *args)
        if weight_tangent is None:
            return result
        return result + MaskedLinear.apply(ctx.implementation, x, weight_tangent, None, *args)

    @staticmethod
    def vmap(info, in_dims, implementation, x, weight, bias, *args):
        if _batched(in_dims[2:3] + in_dims[4:]):
            return MaskedLinear.loop(info, in_dims, implementation, x, weight, bias, *args)
        if in_dims[3] is None:
            return MaskedLinear.fold(info, in_dims, implementation, x, weight, bias, *args)
        bias = bias.movedim(in_dims[3], 0).unsqueeze(1)
        if in_dims[1] is None:
            return MaskedLinear.apply(implementation, x, weight, None, *args) + bias, 0
        return MaskedLinear.fold(info, in_dims, implementation, x, weight, None, *args)[0] + bias, 0


class InputGrad(_Bilinear):
    """``(grad, weight) -> grad (mask * weight)``."""

    RAW = RAW_INPUT_GRAD

    @staticmethod
    def forward(implementation, *args):
        return RAW_INPUT_GRAD[implementation](*args)

    @staticmethod
    def backward(ctx, direction):
        if direction is None:
            return (None,) * 6
        implementation, strict = ctx.implementation, ctx.strict
        grad, weight, *degrees = ctx.saved_tensors
        wants_grad, wants_weight = ctx.needs_input_grad[1:3]
        d_grad = MaskedLinear.run(implementation, direction, weight, None, *degrees, strict) if wants_grad else None
        d_weight = WeightGrad.run(implementation, grad, direction, *degrees, strict) if wants_weight else None
        return None, d_grad, d_weight, None, None, None

    @staticmethod
    def jvp(ctx, _, grad_tangent, weight_tangent, *__):
        return InputGrad.tangent(ctx, grad_tangent, weight_tangent)

    @staticmethod
    def vmap(info, in_dims, *args):
        function = InputGrad.loop if _batched(in_dims[2:]) else InputGrad.fold
        return function(info, in_dims, *args)


class WeightGrad(_Bilinear):
    """``(grad, x) -> mask * grad^T x``."""

    RAW = RAW_WEIGHT_GRAD

    @staticmethod
    def forward(implementation, *args):
        return RAW_WEIGHT_GRAD[implementation](*args)

    @staticmethod
    def backward(ctx, direction):
        if direction is None:
            return (None,) * 6
        implementation, strict = ctx.implementation, ctx.strict
        grad, x, *degrees = ctx.saved_tensors
        wants_grad, wants_x = ctx.needs_input_grad[1:3]
        d_grad = MaskedLinear.run(implementation, x, direction, None, *degrees, strict) if wants_grad else None
        d_x = InputGrad.run(implementation, grad, direction, *degrees, strict) if wants_x else None
        return None, d_grad, d_x, None, None, None

    @staticmethod
    def jvp(ctx, _, grad_tangent, x_tangent, *__):
        return WeightGrad.tangent(ctx, grad_tangent, x_tangent)

    @staticmethod
    def vmap(info, in_dims, *args):
        return WeightGrad.loop(info, in_dims, *args)


@_library.opaque_to_dynamo
def call(
    implementation: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_degrees: Tensor,
    out_degrees: Tensor,
    strict: bool,
) -> Tensor:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    return MaskedLinear.run(implementation, x, weight, bias, in_degrees, out_degrees, strict)
