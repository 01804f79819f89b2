"""Schemas, fakes and the autograd Function of ``radial_flow``.

The first backward is a kernel. A backward pass that is itself differentiated, and forward mode, are those of the
reference: rarely asked for, so plain PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels._triton.launch import lazy
from hvae_kernels.ops.radial_flow import reference

IMPLEMENTATIONS = ("cpp", "triton")
_INPUTS = "Tensor z, Tensor center, Tensor alpha, Tensor beta"


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


RAW_FORWARD = _library.define(
    "radial_flow",
    f"({_INPUTS}) -> (Tensor, Tensor)",
    lambda z, center, alpha, beta: (_empty(z), z.new_empty(z.shape[:-1])),
    IMPLEMENTATIONS,
)
RAW_BACKWARD = _library.define(
    "radial_flow_backward",
    f"(Tensor? grad_output, Tensor? grad_log_abs_det, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad_output, grad_log_abs_det, *inputs: tuple(_empty(x) for x in inputs),
    IMPLEMENTATIONS,
)

for _name in ("radial_flow", "radial_flow_backward"):
    _library.implement(_name, "triton", lazy("hvae_kernels.ops.radial_flow.triton", _name))


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
            return (None,) * 5
        if torch.is_grad_enabled():
            outputs, pull_back = torch.func.vjp(reference.radial_flow, *inputs)
            cotangents = (torch.zeros_like(y) if g is None else g for g, y in zip(cotangents, outputs, strict=True))
            results = pull_back(tuple(cotangents))
        else:
            results = RAW_BACKWARD[ctx.implementation](*cotangents, *inputs)
        return (None, *results)

    @staticmethod
    def jvp(ctx, _, *tangents):
        inputs = ctx.saved_tensors
        tangents = tuple(torch.zeros_like(x) if t is None else t for t, x in zip(tangents, inputs, strict=True))
        return torch.func.jvp(reference.radial_flow, inputs, tangents)[1]

    @staticmethod
    def vmap(info, in_dims, implementation, *inputs):
        if in_dims[2:] == (None, None, None):  # rows like all others
            return RadialFlow.apply(implementation, inputs[0].movedim(in_dims[1], 0), *inputs[1:]), (0, 0)
        return _library.vmap_by_loop(RadialFlow.apply, info.batch_size, in_dims, (implementation, *inputs))


@_library.in_graph
def call(implementation: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    if _library.nothing_differentiates():
        return RAW_FORWARD[implementation](*inputs)
    return RadialFlow.apply(implementation, *inputs)
