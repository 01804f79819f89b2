"""Schemas, fakes and the autograd Function of ``iwae_bound`` and its surrogates.

Kernels take log-weights ``(K, ...)``, and ``power``: 0 is the bound, 1 and 2 are the surrogates with that power of the
normalised weights. Where the result may be differentiated they keep two numbers a column for the backward pass, the
largest log-weight and the inverse sum of the weights relative to it. The gradient is ``grad w~^max(1, power)`` for all
three; where it is itself differentiated it is plain PyTorch, of which the surrogates hold the weights constant.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels._op import kernel
from hvae_kernels.ops.iwae import reference


def _forward_fake(log_weights, power, keeps):
    rest = log_weights.shape[1:]
    return log_weights.new_empty(rest), kept_for(log_weights, keeps)


def kept_for(log_weights: Tensor, keeps: bool = True) -> Tensor:
    """Room for what the backward pass is told of each column, in the precision of the sums."""
    dtype = torch.float64 if log_weights.dtype is torch.float64 else torch.float32
    return log_weights.new_empty((2, *log_weights.shape[1:]) if keeps else 0, dtype=dtype)


RAW_FORWARD = kernel(
    __package__, "iwae", "(Tensor log_weights, int power, bool keeps) -> (Tensor, Tensor)", _forward_fake
)
RAW_BACKWARD = kernel(
    __package__,
    "iwae_backward",
    "(Tensor grad, Tensor log_weights, Tensor kept, int power) -> Tensor",
    lambda grad, log_weights, kept, power: torch.empty_like(log_weights, memory_format=torch.contiguous_format),
)


def _weights(log_weights: Tensor, power: int) -> Tensor:
    """The derivative, differentiable as far as it is meant to be."""
    if power == 0:
        return reference.normalized(log_weights, 0)
    return reference.normalized(log_weights.detach(), 0) ** power


class Iwae(OpFunction):
    """``log_weights (K, ...) -> (...)``, and what is kept; saves that and its input."""

    @staticmethod
    def forward(implementation, power, log_weights):
        return RAW_FORWARD[implementation](log_weights, power, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, ctx.power, log_weights = inputs
        kept = output[1]
        ctx.mark_non_differentiable(kept)
        ctx.save_for_backward(log_weights, kept)
        ctx.save_for_forward(log_weights, kept)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return None, None, None
        log_weights, kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, None, grad * _weights(log_weights, ctx.power)
        return None, None, RAW_BACKWARD[ctx.implementation](grad, log_weights, kept, max(1, ctx.power))

    @staticmethod
    def jvp(ctx, _, __, tangent):
        log_weights, _ = ctx.saved_tensors
        return (_weights(log_weights, ctx.power) * tangent).sum(0), None

    @staticmethod
    def vmap(info, in_dims, implementation, power, log_weights):
        return Iwae.apply(implementation, power, log_weights.movedim(in_dims[2], 1)), (0, 1)


@_library.opaque_to_dynamo
def call(implementation: str, power: int, log_weights: Tensor) -> Tensor:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    if _library.nothing_differentiates(log_weights):
        return RAW_FORWARD[implementation](log_weights, power, False)[0]
    return Iwae.apply(implementation, power, log_weights)[0]
