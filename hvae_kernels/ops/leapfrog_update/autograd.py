"""Schemas, fakes and the autograd Function of ``leapfrog_update``.

``z`` only passes through (``dz'/dz = 1``), so the backward kernels never see it; the Function adds the identity. What
it moves by, and rho, are a :class:`~hvae_kernels._op.Smooth` op of the other inputs.
"""

from __future__ import annotations

from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels._op import Call, Smooth, add, by_loop, empty, folded, kernel, only, returns
from hvae_kernels.ops.leapfrog_update import reference

#: Bits of ``needs``: which groups of results a kernel must write; the others come back empty.
NEEDS_STATE, NEEDS_PARAMETERS, NEEDS_OUTPUTS = 1, 2, 4
_INPUT_BITS = (NEEDS_STATE,) * 2 + (NEEDS_PARAMETERS,) * 3
_OUTPUT_BITS = (NEEDS_OUTPUTS,) * 2

_INPUTS = "Tensor rho, Tensor grad, Tensor decay, Tensor kick, Tensor drift"
_COTANGENTS = "Tensor? grad_z, Tensor? grad_rho"
_DIRECTIONS = "Tensor? h_rho, Tensor? h_grad, Tensor? h_decay, Tensor? h_kick, Tensor? h_drift"


def _backward_fake(grad_z, grad_rho, *inputs):
    *inputs, needs = inputs
    return tuple(empty(x, needs & bit) for x, bit in zip(inputs, _INPUT_BITS, strict=True))


def _double_backward_fake(h_rho, h_grad, h_decay, h_kick, h_drift, *arguments):
    rho, needs = arguments[2], arguments[-1]
    return (*(empty(rho, needs & bit) for bit in _OUTPUT_BITS), *_backward_fake(*arguments))


RAW_FORWARD = kernel(
    __package__,
    "leapfrog_update",
    f"(Tensor z, {_INPUTS}) -> {returns(2)}",
    lambda z, rho, grad, decay, kick, drift: (empty(z), empty(rho)),
)
RAW_BACKWARD = kernel(
    __package__, "leapfrog_update_backward", f"({_COTANGENTS}, {_INPUTS}, int needs) -> {returns(5)}", _backward_fake
)
RAW_DOUBLE_BACKWARD = kernel(
    __package__,
    "leapfrog_update_double_backward",
    f"({_DIRECTIONS}, {_COTANGENTS}, {_INPUTS}, int needs) -> {returns(7)}",
    _double_backward_fake,
)


def _batching(apply, size, dims, tensors, written):
    """Rows like all others, as long as the numbers that all rows share are neither batched nor differentiated."""
    shared = {2, 3, 4, 9, 10, 11} if len(tensors) == 12 else {4, 5, 6}  # with directions in front, or without
    if any(written[-3:]) or any(dims[i] is not None for i in shared):
        return by_loop(apply, size, dims, tensors, written)
    rows = folded(size, tensors, dims)
    return apply(*(x if i in shared else rows[i] for i, x in enumerate(tensors)))


SCHEME = Smooth(
    name="leapfrog_update",
    forward=RAW_FORWARD,
    backward=RAW_BACKWARD,
    double=RAW_DOUBLE_BACKWARD,
    inputs=_INPUT_BITS,
    outputs=_OUTPUT_BITS,
    reference=lambda: reference.increment,
    batching=_batching,
)
_CALLS = {implementation: Call(SCHEME, implementation) for implementation in RAW_FORWARD}


class LeapfrogUpdate(OpFunction):
    """``(z, rho, grad, decay, kick, drift) -> (z', rho')``; saves nothing but its inputs, and of those not ``z``."""

    @staticmethod
    def forward(call, *inputs):
        return call.forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call = inputs[0]
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_z, grad_rho):
        wanted = ctx.needs_input_grad[2:]
        needs = SCHEME.needs(wanted)
        if not needs or (grad_z is None and grad_rho is None):
            return (None, grad_z, *[None] * len(wanted))
        return (None, grad_z, *only(ctx.call.gradients(needs, grad_z, grad_rho, *ctx.saved_tensors), wanted))

    @staticmethod
    def jvp(ctx, _, z_tangent, *tangents):
        shift, rho = ctx.call.jvp(tangents, ctx.saved_tensors)
        return add(z_tangent, shift), rho

    @staticmethod
    def vmap(info, in_dims, call, *inputs):
        if any(dim is not None for dim in in_dims[4:]):
            return _library.vmap_by_loop(LeapfrogUpdate.apply, info.batch_size, in_dims, (call, *inputs))
        state = folded(info.batch_size, inputs[:3], in_dims[1:4])
        return LeapfrogUpdate.apply(call, *state, *inputs[3:]), (0, 0)


@_library.opaque_to_dynamo
def call(implementation: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    if _library.nothing_differentiates(*inputs):
        return RAW_FORWARD[implementation](*inputs)
    return LeapfrogUpdate.apply(_CALLS[implementation], *inputs)
