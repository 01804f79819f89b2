"""Schemas, fakes and the autograd Functions of ``bernoulli_log_prob``.

Kernels take logits ``(A, O, N, E)`` and a value ``(A, N, E)`` that is shared by the O samples: rows of E elements.
Forward, backward and double backward by the logits are kernels; what a floating value's gradient and higher
derivatives need beyond them is plain PyTorch, differentiable to any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels._op import empty, kernel
from hvae_kernels.ops.bernoulli_log_prob import reference


def _row_values(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1])


RAW_FORWARD = kernel(
    __package__,
    "bernoulli_log_prob",
    "(Tensor logits, Tensor value) -> Tensor",
    lambda logits, value: _row_values(logits),
)
RAW_BACKWARD = kernel(
    __package__,
    "bernoulli_log_prob_backward",
    "(Tensor grad, Tensor logits, Tensor value) -> Tensor",
    lambda grad, logits, value: empty(logits),
)
RAW_DOUBLE_BACKWARD = kernel(
    __package__,
    "bernoulli_log_prob_double_backward",
    "(Tensor h, Tensor grad, Tensor logits, Tensor value) -> (Tensor, Tensor)",
    lambda h, grad, logits, value: (_row_values(logits), empty(logits)),
)


def _sum_samples(grad: Tensor, x: Tensor) -> Tensor:
    """What the samples that share a value pull back to it."""
    return (grad.unsqueeze(-1) * x).sum(1)


class BernoulliLogProb(OpFunction):
    """``(logits, value) -> log_prob``; saves nothing but its inputs."""

    @staticmethod
    def forward(implementation, logits, value):
        return RAW_FORWARD[implementation](logits, value)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        logits, value = ctx.saved_tensors
        _, wants_logits, wants_value = ctx.needs_input_grad
        d_logits = d_value = None
        if wants_logits:
            gradient = LogitsGradient.apply if torch.is_grad_enabled() else _raw_gradient
            d_logits = gradient(ctx.implementation, grad, logits, value)
        if wants_value:
            d_value = _sum_samples(grad, logits)
        return None, d_logits, d_value

    @staticmethod
    def jvp(ctx, _, logits_tangent, value_tangent):
        logits, value = ctx.saved_tensors
        result = torch.zeros_like(logits)
        if logits_tangent is not None:
            result = result + reference.residual(logits, value.unsqueeze(1)) * logits_tangent
        if value_tangent is not None:
            result = result + logits * value_tangent.unsqueeze(1)
        return result.sum(-1)

    @staticmethod
    def vmap(info, in_dims, implementation, *tensors):
        return _vmap(BernoulliLogProb, info.batch_size, in_dims[1:], implementation, *tensors)


def _raw_gradient(implementation: str, grad: Tensor, logits: Tensor, value: Tensor) -> Tensor:
    return RAW_BACKWARD[implementation](grad, logits, value)


class LogitsGradient(OpFunction):
    """``(cotangent, logits, value) -> `` gradient of the logits, ``grad (value - sigmoid(logits))``."""

    @staticmethod
    def forward(implementation, grad, logits, value):
        return RAW_BACKWARD[implementation](grad, logits, value)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, h):
        grad, logits, value = ctx.saved_tensors
        if torch.is_grad_enabled():
            d_grad = (h * reference.residual(logits, value.unsqueeze(1))).sum(-1)
            d_logits = -grad.unsqueeze(-1) * h * reference.variance(logits)
        else:
            d_grad, d_logits = RAW_DOUBLE_BACKWARD[ctx.implementation](h, grad, logits, value)
        return None, d_grad, d_logits, _sum_samples(grad, h) if ctx.needs_input_grad[3] else None

    @staticmethod
    def jvp(ctx, _, grad_tangent, logits_tangent, value_tangent):
        grad, logits, value = ctx.saved_tensors
        result = torch.zeros_like(logits)
        if grad_tangent is not None:
            result = result + grad_tangent.unsqueeze(-1) * reference.residual(logits, value.unsqueeze(1))
        if logits_tangent is not None:
            result = result - grad.unsqueeze(-1) * reference.variance(logits) * logits_tangent
        if value_tangent is not None:
            result = result + grad.unsqueeze(-1) * value_tangent.unsqueeze(1)
        return result

    @staticmethod
    def vmap(info, in_dims, implementation, *tensors):
        return _vmap(LogitsGradient, info.batch_size, in_dims[1:], implementation, *tensors)


def _vmap(
    function: type[OpFunction], size: int, in_dims: tuple[int | None, ...], implementation: str, *tensors: Tensor
) -> tuple[Tensor, int]:
    """The vmapped dimension joins the samples where these share a value, and the groups otherwise."""
    shared = in_dims[-1] is None
    *rows, value = (
        x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, in_dims, strict=True)
    )
    at = 1 if shared else 0
    groups = rows[0].shape[1 + at]
    rows = [x.movedim(0, at).flatten(at, at + 1) for x in rows]
    result = function.apply(implementation, *rows, tensors[-1] if shared else value.flatten(0, 1))
    return result.unflatten(at, (size, groups)), at


@_library.opaque_to_dynamo
def call(implementation: str, logits: Tensor, value: Tensor) -> Tensor:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    if _library.nothing_differentiates(logits, value):
        return RAW_FORWARD[implementation](logits, value)
    return BernoulliLogProb.apply(implementation, logits, value)
