"""Schemas, fakes and the autograd Function of ``radial_flow``.

The first backward is a kernel. A backward pass that is itself differentiated, and forward mode, are those of the
reference: rarely asked for, so plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels._op import empty, kernel, returns
from hvae_kernels.ops.radial_flow import reference

_INPUTS = "Tensor z, Tensor center, Tensor alpha, Tensor beta"

RAW_FORWARD = kernel(
    __package__,
    "radial_flow",
    f"({_INPUTS}) -> {returns(2)}",
    lambda z, center, alpha, beta: (empty(z), z.new_empty(z.shape[:-1])),
)
RAW_BACKWARD = kernel(
    __package__,
    "radial_flow_backward",
    f"(Tensor? grad_output, Tensor? grad_log_abs_det, {_INPUTS}) -> {returns(4)}",
    lambda grad_output, grad_log_abs_det, *inputs: tuple(map(empty, inputs)),
)


class RadialFlow(OpFunction):
    """``(z, center, alpha, beta) -> (z_K, log_abs_det)``; saves nothing but its inputs."""

    @staticmethod
    def forward(implementation, *inputs):
        return RAW_FORWARD[implementation](*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, *inputs = inputs
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        inputs = ctx.saved_tensors
        if all(g is None for g in cotangents):
            return (None,) * (1 + len(inputs))
        if not torch.is_grad_enabled():
            return (None, *RAW_BACKWARD[ctx.implementation](*cotangents, *inputs))
        outputs, pull_back = torch.func.vjp(reference.radial_flow, *inputs)
        given = [torch.zeros_like(y) if g is None else g for g, y in zip(cotangents, outputs, strict=True)]
        return (None, *pull_back(tuple(given)))

    @staticmethod
    def jvp(ctx, _, *tangents):
        inputs = ctx.saved_tensors
        given = tuple(torch.zeros_like(x) if t is None else t for t, x in zip(tangents, inputs, strict=True))
        return torch.func.jvp(reference.radial_flow, inputs, given)[1]

    @staticmethod
    def vmap(info, in_dims, implementation, *inputs):
        if in_dims[2:] == (None, None, None):  # rows like all others
            return RadialFlow.apply(implementation, inputs[0].movedim(in_dims[1], 0), *inputs[1:]), (0, 0)
        return _library.vmap_by_loop(RadialFlow.apply, info.batch_size, in_dims, (implementation, *inputs))


@_library.opaque_to_dynamo
def call(implementation: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    if _library.nothing_differentiates(*inputs):
        return RAW_FORWARD[implementation](*inputs)
    return RadialFlow.apply(implementation, *inputs)
