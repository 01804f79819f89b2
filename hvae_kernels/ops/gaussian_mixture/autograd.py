"""Schemas, fakes and the autograd Functions of Gaussian mixtures.

One op with two outputs to choose from: ``log_prob (...)`` or ``responsibilities (..., C)``. Their derivatives differ in
the weights that components get and share everything else. The mixture's weights come normalised: what ``log_softmax``
does to C numbers is left to PyTorch. The double backward along a direction also returns the output's derivative along
it, so forward mode is the double backward too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels._triton.launch import lazy
from hvae_kernels.ops.gaussian_mixture import reference

IMPLEMENTATIONS = ("cpp", "triton")
_INPUTS = "Tensor value, Tensor log_weight, Tensor loc, Tensor log_scale, bool responsibilities"
_DIRECTIONS = "Tensor? h_value, Tensor? h_log_weight, Tensor? h_loc, Tensor? h_log_scale"
_N_INPUTS = 4


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _forward_fake(value, log_weight, loc, log_scale, responsibilities):
    return value.new_empty((*value.shape[:-1], *(log_weight.shape if responsibilities else ())))


def _backward_fake(grad, *inputs):
    return tuple(_empty(x) for x in inputs[:_N_INPUTS])


def _double_backward_fake(h_value, h_log_weight, h_loc, h_log_scale, grad, *inputs):
    return (_empty(grad), *_backward_fake(grad, *inputs))


RAW_FORWARD = _library.define("gaussian_mixture", f"({_INPUTS}) -> Tensor", _forward_fake, IMPLEMENTATIONS)
RAW_BACKWARD = _library.define(
    "gaussian_mixture_backward",
    f"(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    IMPLEMENTATIONS,
)
RAW_DOUBLE_BACKWARD = _library.define(
    "gaussian_mixture_double_backward",
    f"({_DIRECTIONS}, Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _double_backward_fake,
    IMPLEMENTATIONS,
)

for _name in ("gaussian_mixture", "gaussian_mixture_backward", "gaussian_mixture_double_backward"):
    _library.implement(_name, "triton", lazy("hvae_kernels.ops.gaussian_mixture.triton", _name))


class GaussianMixture(OpFunction):
    """``(value, log_weight, loc, log_scale) -> log_prob`` or responsibilities; saves nothing but its inputs."""

    @staticmethod
    def forward(implementation, responsibilities, *inputs):
        return RAW_FORWARD[implementation](*inputs, responsibilities)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.choice, tensors = inputs[:2], inputs[2:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        implementation, responsibilities = ctx.choice
        if torch.is_grad_enabled():
            results = GaussianMixtureBackward.apply(*ctx.choice, grad, *ctx.saved_tensors)
        else:
            results = RAW_BACKWARD[implementation](grad, *ctx.saved_tensors, responsibilities)
        return (None, None, *results)

    @staticmethod
    def jvp(ctx, _, __, *tangents):
        inputs = ctx.saved_tensors
        no_cotangent = inputs[0].new_zeros(()).expand(_forward_fake(*inputs, ctx.choice[1]).shape)
        return GaussianMixtureDoubleBackward.apply(*ctx.choice, *tangents, no_cotangent, *inputs)[0]

    @staticmethod
    def vmap(info, in_dims, *arguments):
        if in_dims[3:] == (None, None, None):  # rows like all others
            value = arguments[2].movedim(in_dims[2], 0)
            return GaussianMixture.apply(*arguments[:2], value, *arguments[3:]), 0

        def single(*sample):
            return (GaussianMixture.apply(*sample),)

        (output,), (dim,) = _library.vmap_by_loop(single, info.batch_size, in_dims, arguments)
        return output, dim


class GaussianMixtureBackward(OpFunction):
    """``(grad, inputs) -> `` gradients of the inputs."""

    @staticmethod
    def forward(implementation, responsibilities, grad, *inputs):
        return RAW_BACKWARD[implementation](grad, *inputs, responsibilities)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.choice, tensors = inputs[:2], inputs[2:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *directions):
        implementation, responsibilities = ctx.choice
        if all(h is None for h in directions):
            return (None,) * (3 + _N_INPUTS)
        if torch.is_grad_enabled():
            results = GaussianMixtureDoubleBackward.apply(*ctx.choice, *directions, *ctx.saved_tensors)
        else:
            results = RAW_DOUBLE_BACKWARD[implementation](*directions, *ctx.saved_tensors, responsibilities)
        return (None, None, *results)

    @staticmethod
    def jvp(ctx, _, __, grad_tangent, *tangents):
        results = GaussianMixtureDoubleBackward.apply(*ctx.choice, *tangents, *ctx.saved_tensors)[1:]
        if grad_tangent is None:
            return results
        moved = GaussianMixtureBackward.apply(*ctx.choice, grad_tangent, *ctx.saved_tensors[1:])
        return tuple(a + b for a, b in zip(results, moved, strict=True))

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _library.vmap_by_loop(GaussianMixtureBackward.apply, info.batch_size, in_dims, arguments)


class GaussianMixtureDoubleBackward(OpFunction):
    """``(directions, grad, inputs) -> `` the output's derivative along the directions, and that of the gradients."""

    @staticmethod
    def forward(implementation, responsibilities, *tensors):
        return RAW_DOUBLE_BACKWARD[implementation](*tensors, responsibilities)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.responsibilities, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *upstream):
        tensors, responsibilities = ctx.saved_tensors, ctx.responsibilities

        def plain(*inputs):
            log_joint = reference.log_joint(*inputs)
            return (log_joint.softmax(-1) if responsibilities else log_joint.logsumexp(-1),)

        results = _library.vjp_of_double_backward(
            plain,
            directions=tensors[:_N_INPUTS],
            cotangents=tensors[_N_INPUTS : _N_INPUTS + 1],
            inputs=tensors[_N_INPUTS + 1 :],
            upstream=upstream,
        )
        return (None, None, *(r if t is not None else None for r, t in zip(results, tensors, strict=True)))

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError("gaussian_mixture: forward mode through its second derivatives is not provided")

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _library.vmap_by_loop(GaussianMixtureDoubleBackward.apply, info.batch_size, in_dims, arguments)


@_library.in_graph
def call(implementation: str, responsibilities: bool, *inputs: Tensor) -> Tensor:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    if _library.nothing_differentiates():
        return RAW_FORWARD[implementation](*inputs, responsibilities)
    return GaussianMixture.apply(implementation, responsibilities, *inputs)
