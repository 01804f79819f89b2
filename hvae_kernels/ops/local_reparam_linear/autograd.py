"""Schema, fake and the autograd Function of ``local_reparam_linear``.

The kernels make the sample and its standard deviation, which is an output of the Function too and saved for the
backward pass. In terms of it all derivatives are matrix products and a few factors: plain PyTorch, hence differentiable
to any order. On the CPU the backward pass without a graph is one kernel, which makes fewer passes between the products.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels._op import kernel


def _forward_fake(x, weight_loc, weight_log_scale, bias_loc, bias_log_scale, noise):
    return x.new_empty(noise.shape), x.new_empty(noise.shape)


def _backward_fake(grad, x, weight_loc, weight_log_scale, noise, std, needs_x, needs_log_scale):
    d_x = x.new_empty(x.shape if needs_x else 0)
    return x.new_empty(grad.shape), d_x, x.new_empty(weight_loc.shape if needs_log_scale else 0)


RAW_FORWARD = kernel(
    __package__,
    "local_reparam_linear",
    "(Tensor x, Tensor weight_loc, Tensor weight_log_scale, Tensor? bias_loc, Tensor? bias_log_scale, Tensor noise)"
    " -> (Tensor, Tensor)",
    _forward_fake,
)
RAW_BACKWARD = kernel(
    __package__,
    "local_reparam_linear_backward",
    "(Tensor grad, Tensor x, Tensor weight_loc, Tensor weight_log_scale, Tensor noise, Tensor std, bool needs_x,"
    " bool needs_log_scale) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
    ("cpp",),
)


def _variance(log_scale: Tensor) -> Tensor:
    return (2 * log_scale).exp_()


def _over(numerator: Tensor, std: Tensor) -> Tensor:
    """``numerator / std``, zero where nothing varies."""
    return numerator / std.masked_fill(std == 0, math.inf)


def _backward(grad, grad_std, x, weight_loc, weight_log_scale, noise, std, needs_x, needs_log_scale):
    """What :data:`RAW_BACKWARD` returns, differentiable, and for a cotangent of ``std`` too."""
    if grad is not None:
        grad_std = grad * noise if grad_std is None else torch.addcmul(grad_std, grad, noise)
    twice, variance = _over(grad_std, std), _variance(weight_log_scale)
    d_x = d_log_scale = None
    if needs_x:
        d_x = x * (twice @ variance)
        d_x = d_x if grad is None else d_x + grad @ weight_loc
    if needs_log_scale:
        d_log_scale = variance * (twice.mT @ x.square())
    return twice, d_x, d_log_scale


class LocalReparamLinear(OpFunction):
    """``(x, weight_loc, weight_log_scale, bias_loc, bias_log_scale, noise) -> (y, std)``."""

    @staticmethod
    def forward(implementation, *tensors):
        return RAW_FORWARD[implementation](*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, x, weight_loc, weight_log_scale, _, bias_log_scale, noise = inputs
        saved = (x, weight_loc, weight_log_scale, bias_log_scale, noise, output[1])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, grad_std):
        if grad is None and grad_std is None:
            return (None,) * 7
        x, weight_loc, weight_log_scale, bias_log_scale, noise, std = ctx.saved_tensors
        _, wants_x, wants_loc, wants_log_scale, wants_bias, wants_bias_log_scale, wants_noise = ctx.needs_input_grad
        tensors = (x, weight_loc, weight_log_scale, noise, std)
        fused = RAW_BACKWARD.get(ctx.implementation)
        if fused and grad_std is None and not torch.is_grad_enabled():
            twice, d_x, d_log_scale = fused(grad, *tensors, wants_x, wants_log_scale)
        else:
            twice, d_x, d_log_scale = _backward(grad, grad_std, *tensors, wants_x, wants_log_scale)
        return (
            None,
            d_x if wants_x else None,
            grad.mT @ x if wants_loc and grad is not None else None,
            d_log_scale if wants_log_scale else None,
            grad.sum(0) if wants_bias and grad is not None else None,
            _variance(bias_log_scale) * twice.sum(0) if wants_bias_log_scale else None,
            grad * std if wants_noise and grad is not None else None,
        )

    @staticmethod
    def jvp(ctx, _, d_x, d_loc, d_log_scale, d_bias, d_bias_log_scale, d_noise):
        x, weight_loc, weight_log_scale, bias_log_scale, noise, std = ctx.saved_tensors
        d_mean = half = torch.zeros_like(std)  # `half` the variance's tangent
        if d_x is not None:
            d_mean = d_mean + d_x @ weight_loc.mT
            half = half + (x * d_x) @ _variance(weight_log_scale).mT
        if d_loc is not None:
            d_mean = d_mean + x @ d_loc.mT
        if d_log_scale is not None:
            half = half + x.square() @ (_variance(weight_log_scale) * d_log_scale).mT
        if d_bias is not None:
            d_mean = d_mean + d_bias
        if d_bias_log_scale is not None:
            half = half + _variance(bias_log_scale) * d_bias_log_scale
        d_std = _over(half, std)
        d_y = d_mean + d_std * noise
        return d_y if d_noise is None else d_y + std * d_noise, d_std

    @staticmethod
    def vmap(info, in_dims, implementation, x, *parameters_and_noise):
        *parameters, noise = parameters_and_noise
        args = (implementation, x, *parameters, noise)
        if any(dim is not None for dim in in_dims[2:-1]):
            return _library.vmap_by_loop(LocalReparamLinear.apply, info.batch_size, in_dims, args)
        rows = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in ((x, in_dims[1]), (noise, in_dims[-1]))
        ]
        x, noise = (t.flatten(0, 1) for t in rows)
        results = LocalReparamLinear.apply(implementation, x, *parameters, noise)
        return tuple(t.unflatten(0, rows[1].shape[:2]) for t in results), (0, 0)


@_library.opaque_to_dynamo
def call(implementation: str, *tensors: Tensor | None) -> Tensor:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    if _library.nothing_differentiates(*tensors):
        return RAW_FORWARD[implementation](*tensors)[0]
    return LocalReparamLinear.apply(implementation, *tensors)[0]
