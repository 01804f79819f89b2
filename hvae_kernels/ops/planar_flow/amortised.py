"""Schemas, fakes and the autograd Function of layers that every row of the batch has for itself.

The first backward is a kernel. A backward pass that is itself differentiated, and forward mode, are those of the
reference: rarely asked for, so plain PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels._op import empty, folded, kernel, returns
from hvae_kernels.ops.planar_flow import reference

NAME = "planar_flow_amortised"

RAW_FORWARD = kernel(
    __package__,
    NAME,
    f"(Tensor z, Tensor u, Tensor w, Tensor b, bool constrain, bool keep) -> {returns(3)}",
    lambda z, u, w, b, constrain, keep: (empty(z), z.new_empty(z.shape[:-1]), empty(b, keep)),
)
RAW_BACKWARD = kernel(
    __package__,
    f"{NAME}_backward",
    "(Tensor? grad_output, Tensor? grad_log_abs_det, Tensor z, Tensor u, Tensor w, Tensor projections, bool constrain)"
    f" -> {returns(4)}",
    lambda grad_output, grad_log_abs_det, z, u, w, projections, constrain: tuple(map(empty, (z, u, w, projections))),
)


class AmortisedPlanarFlow(OpFunction):
    """``(z, u, w, b) -> (z_K, log_abs_det, projections)``, the last of which the backward kernel needs.

    It is saved, and of no use to anybody else: it has no derivative.
    """

    @staticmethod
    def forward(implementation, constrain, *inputs):
        return RAW_FORWARD[implementation](*inputs, constrain, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, ctx.constrain, *inputs = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*inputs, output[2])
        ctx.save_for_forward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        *inputs, projections = ctx.saved_tensors
        cotangents = cotangents[:2]
        if all(g is None for g in cotangents):
            return (None,) * 6
        if not torch.is_grad_enabled():
            z, u, w, _ = inputs
            raw = RAW_BACKWARD[ctx.implementation]
            return (None, None, *raw(*cotangents, z, u, w, projections, ctx.constrain))
        outputs, pull_back = torch.func.vjp(_formula(ctx.constrain), *(x.view_as(x) for x in inputs))
        given = [torch.zeros_like(y) if g is None else g for g, y in zip(cotangents, outputs, strict=True)]
        return (None, None, *pull_back(tuple(given)))

    @staticmethod
    def jvp(ctx, _, __, *tangents):
        inputs = ctx.saved_tensors
        given = tuple(torch.zeros_like(x) if t is None else t for t, x in zip(tangents, inputs, strict=True))
        return *torch.func.jvp(_formula(ctx.constrain), inputs, given)[1], None

    @staticmethod
    def vmap(info, in_dims, implementation, constrain, *inputs):
        rows: Any = folded(info.batch_size, inputs, in_dims[2:])
        leading = rows[0].shape[:2]
        results = AmortisedPlanarFlow.apply(implementation, constrain, *(x.flatten(0, 1) for x in rows))
        return tuple(x.unflatten(0, leading) for x in results), (0, 0, 0)


def _formula(constrain: bool) -> Callable[..., tuple[Tensor, ...]]:
    return functools.partial(reference.planar_flow, constrain=constrain)


@_library.opaque_to_dynamo
def call(implementation: str, constrain: bool, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    if _library.nothing_differentiates(*inputs):
        return RAW_FORWARD[implementation](*inputs, constrain, False)[:2]
    results: Any = AmortisedPlanarFlow.apply(implementation, constrain, *inputs)
    return results[:2]


def call_with_vjp(
    implementation: str, constrain: bool, z: Tensor, u: Tensor, w: Tensor, b: Tensor
) -> tuple[tuple[Tensor, Tensor], Callable[[Tensor, Tensor], tuple[Tensor, ...]]]:
    """The op, and the gradients of all four tensors from its results', without the autograd engine."""
    output, log_abs_det, projections = RAW_FORWARD[implementation](z, u, w, b, constrain, True)

    def gradients(grad_output: Tensor, grad_log_abs_det: Tensor) -> tuple[Tensor, ...]:
        return RAW_BACKWARD[implementation](grad_output, grad_log_abs_det, z, u, w, projections, constrain)

    return (output, log_abs_det), gradients
