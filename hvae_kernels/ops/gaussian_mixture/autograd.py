"""Schemas, fakes and the autograd Function of Gaussian mixtures, a :class:`~hvae_kernels._op.Smooth` op.

One op with two outputs to choose from: ``log_prob (...)`` or ``responsibilities (..., C)``. Their derivatives differ in
the weights that components get and share everything else. The mixture's weights come normalised: what ``log_softmax``
does to C numbers is left to PyTorch.
"""

from __future__ import annotations

from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels._op import Call, Smooth, SmoothDoubleBackward, by_loop, empty, kernel, returns
from hvae_kernels.ops.gaussian_mixture import reference

_INPUTS = "Tensor value, Tensor log_weight, Tensor loc, Tensor log_scale, bool responsibilities"
_DIRECTIONS = "Tensor? h_value, Tensor? h_log_weight, Tensor? h_loc, Tensor? h_log_scale"
_N_INPUTS = 4


def _forward_fake(value, log_weight, loc, log_scale, responsibilities):
    return value.new_empty((*value.shape[:-1], *(log_weight.shape if responsibilities else ())))


def _backward_fake(grad, *inputs):
    return tuple(map(empty, inputs[:_N_INPUTS]))


def _double_backward_fake(h_value, h_log_weight, h_loc, h_log_scale, grad, *inputs):
    return (empty(grad), *_backward_fake(grad, *inputs))


RAW_FORWARD = kernel(__package__, "gaussian_mixture", f"({_INPUTS}) -> Tensor", _forward_fake)
RAW_BACKWARD = kernel(
    __package__, "gaussian_mixture_backward", f"(Tensor grad, {_INPUTS}) -> {returns(4)}", _backward_fake
)
RAW_DOUBLE_BACKWARD = kernel(
    __package__,
    "gaussian_mixture_double_backward",
    f"({_DIRECTIONS}, Tensor grad, {_INPUTS}) -> {returns(5)}",
    _double_backward_fake,
)


def _reference(responsibilities: bool):
    def plain(*inputs: Tensor) -> tuple[Tensor]:
        log_joint = reference.log_joint(*inputs)
        return (log_joint.softmax(-1) if responsibilities else log_joint.logsumexp(-1),)

    return plain


SCHEME = Smooth(
    name="gaussian_mixture",
    forward=RAW_FORWARD,
    backward=RAW_BACKWARD,
    double=RAW_DOUBLE_BACKWARD,
    inputs=(0,) * _N_INPUTS,
    outputs=(0,),
    reference=_reference,
    batching=by_loop,
)


class GaussianMixture(OpFunction):
    """``(value, log_weight, loc, log_scale) -> log_prob`` or responsibilities; saves nothing but its inputs."""

    @staticmethod
    def forward(call, *inputs):
        return call.forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        return (None, *ctx.call.gradients(True, grad, *ctx.saved_tensors))

    @staticmethod
    def jvp(ctx, _, *tangents):
        call, inputs = ctx.call, ctx.saved_tensors
        no_cotangent = inputs[0].new_zeros(()).expand(_forward_fake(*inputs, *call.options).shape)
        return SmoothDoubleBackward.apply(call, True, *tangents, no_cotangent, *inputs)[0]

    @staticmethod
    def vmap(info, in_dims, call, *inputs):
        if in_dims[2:] == (None, None, None):  # rows like all others
            return GaussianMixture.apply(call, inputs[0].movedim(in_dims[1], 0), *inputs[1:]), 0

        def single(*sample):
            return (GaussianMixture.apply(*sample),)

        (output,), (dim,) = _library.vmap_by_loop(single, info.batch_size, in_dims, (call, *inputs))
        return output, dim


@_library.opaque_to_dynamo
def call(implementation: str, responsibilities: bool, *inputs: Tensor) -> Tensor:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    if _library.nothing_differentiates(*inputs):
        return RAW_FORWARD[implementation](*inputs, responsibilities)
    return GaussianMixture.apply(Call(SCHEME, implementation, (responsibilities,)), *inputs)
