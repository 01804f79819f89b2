"""Schemas, fakes and the autograd Function of ``annealed_leapfrog_update``.

``z`` only passes through (``dz'/dz = 1``), so the backward kernel never sees it. The first backward is a kernel; a
backward pass that is itself differentiated, and forward mode, are those of the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels._op import add, empty, kernel, only, returns
from hvae_kernels.ops.annealed_leapfrog import reference

#: Bits of ``needs``: which groups of results a kernel must write; the others come back empty.
NEEDS_STATE, NEEDS_PARAMETERS = 1, 2
INPUT_BITS = (NEEDS_STATE,) * 4 + (NEEDS_PARAMETERS,) * 2

_INPUTS = "Tensor rho, Tensor base_grad, Tensor grad, Tensor noise, Tensor kicks, Tensor mixing"


def _backward_fake(grad_z, grad_rho, grad_log_weight, *inputs):
    *inputs, needs = inputs
    return tuple(empty(x, needs & bit) for x, bit in zip(inputs, INPUT_BITS, strict=True))


RAW_FORWARD = kernel(
    __package__,
    "annealed_leapfrog_update",
    f"(Tensor z, {_INPUTS}) -> {returns(3)}",
    lambda z, rho, *_: (empty(z), empty(rho), z.new_empty(z.shape[:-1])),
)
RAW_BACKWARD = kernel(
    __package__,
    "annealed_leapfrog_update_backward",
    f"(Tensor? grad_z, Tensor? grad_rho, Tensor? grad_log_weight, {_INPUTS}, int needs) -> {returns(6)}",
    _backward_fake,
)


class AnnealedLeapfrogUpdate(OpFunction):
    """``(z, rho, base_grad, grad, noise, kicks, mixing) -> (z', rho', log_weight)``; keeps all but ``z``."""

    @staticmethod
    def forward(implementation, *inputs):
        return RAW_FORWARD[implementation](*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, _, *kept = inputs
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        inputs, wanted = ctx.saved_tensors, ctx.needs_input_grad[2:]
        needs = NEEDS_STATE * any(wanted[:4]) | NEEDS_PARAMETERS * any(wanted[4:])
        if not needs or all(g is None for g in cotangents):
            return (None, cotangents[0], *[None] * len(inputs))
        if not torch.is_grad_enabled():
            results = RAW_BACKWARD[ctx.implementation](*cotangents, *inputs, needs)
        else:
            outputs, pull_back = torch.func.vjp(reference.increment, *(x.view_as(x) for x in inputs))
            given = [torch.zeros_like(y) if g is None else g for g, y in zip(cotangents, outputs, strict=True)]
            results = pull_back(tuple(given))
        return (None, cotangents[0], *only(results, wanted))

    @staticmethod
    def jvp(ctx, _, z_tangent, *tangents):
        inputs = ctx.saved_tensors
        given = tuple(torch.zeros_like(x) if t is None else t for t, x in zip(tangents, inputs, strict=True))
        shift, *rest = torch.func.jvp(reference.increment, inputs, given)[1]
        return (add(z_tangent, shift), *rest)

    @staticmethod
    def vmap(info, in_dims, implementation, *inputs):
        apply = AnnealedLeapfrogUpdate.apply
        if in_dims[6:] != (None, None):
            return _library.vmap_by_loop(apply, info.batch_size, in_dims, (implementation, *inputs))
        state = (
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(inputs[:5], in_dims[1:6], strict=True)
        )
        return apply(implementation, *state, *inputs[5:]), (0, 0, 0)


@_library.opaque_to_dynamo
def call(implementation: str, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    if _library.nothing_differentiates(*inputs):
        return RAW_FORWARD[implementation](*inputs)
    return AnnealedLeapfrogUpdate.apply(implementation, *inputs)
