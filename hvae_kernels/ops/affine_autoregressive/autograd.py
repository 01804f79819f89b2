"""Schemas, fakes and the autograd Function of ``affine_autoregressive``, a :class:`~hvae_kernels._op.Smooth` op.

Where the shift's weight is 1 (every gate but ``sigmoid``) the shift only passes through: its gradient is the cotangent
itself, the kernels neither read nor write anything for it, and it is not saved.
"""

from __future__ import annotations

from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels._op import Call, Smooth, by_folding, empty, folded, kernel, only, returns
from hvae_kernels.ops.affine_autoregressive import reference
from hvae_kernels.ops.affine_autoregressive.gates import CODES, decoded

#: Bits of ``needs``: which results a kernel must write; the others come back empty.
NEEDS_Z, NEEDS_SHIFT, NEEDS_LOG_SCALE, NEEDS_OUTPUT, NEEDS_LOG_ABS_DET = 1, 2, 4, 8, 16
INPUT_BITS = (NEEDS_Z, NEEDS_SHIFT, NEEDS_LOG_SCALE)
OUTPUT_BITS = (NEEDS_OUTPUT, NEEDS_LOG_ABS_DET)

_INPUTS = "Tensor z, Tensor? shift, Tensor log_scale"
_COTANGENTS = "Tensor? grad_output, Tensor? grad_log_abs_det"
_DIRECTIONS = "Tensor? h_z, Tensor? h_shift, Tensor? h_log_scale"
_GATE = "int gate, float first, float second"


def blends(gate: int) -> bool:
    """Whether the gate weighs the shift: then, and only then, derivatives need it."""
    return gate == CODES["sigmoid"]


def _forward_fake(z, shift, log_scale, gate, first, second):
    return empty(z), z.new_empty(z.shape[:-1])


def _backward_fake(grad_output, grad_log_abs_det, z, shift, log_scale, gate, first, second, needs):
    return tuple(empty(z, needs & bit) for bit in INPUT_BITS)


def _double_backward_fake(
    h_z, h_shift, h_log_scale, grad_output, grad_log_abs_det, z, shift, log_scale, gate, first, second, needs
):
    log_abs_det = z.new_empty(z.shape[:-1] if needs & NEEDS_LOG_ABS_DET else 0)
    return (empty(z, needs & NEEDS_OUTPUT), log_abs_det, *(empty(z, needs & bit) for bit in INPUT_BITS))


RAW_FORWARD = kernel(
    __package__,
    "affine_autoregressive",
    f"(Tensor z, Tensor shift, Tensor log_scale, {_GATE}) -> {returns(2)}",
    _forward_fake,
)
RAW_BACKWARD = kernel(
    __package__,
    "affine_autoregressive_backward",
    f"({_COTANGENTS}, {_INPUTS}, {_GATE}, int needs) -> {returns(3)}",
    _backward_fake,
)
RAW_DOUBLE_BACKWARD = kernel(
    __package__,
    "affine_autoregressive_double_backward",
    f"({_DIRECTIONS}, {_COTANGENTS}, {_INPUTS}, {_GATE}, int needs) -> {returns(5)}",
    _double_backward_fake,
)


def _reference(gate: int, first: float, second: float):
    made = decoded(gate, first, second)
    return lambda z, shift, log_scale: reference.affine_autoregressive(z, shift, log_scale, made)


SCHEME = Smooth(
    name="affine_autoregressive",
    forward=RAW_FORWARD,
    backward=RAW_BACKWARD,
    double=RAW_DOUBLE_BACKWARD,
    inputs=INPUT_BITS,
    outputs=OUTPUT_BITS,
    reference=_reference,
    batching=by_folding,
)


class AffineAutoregressive(OpFunction):
    """``(z, shift, log_scale) -> (z', log_abs_det)``; saves nothing but its inputs."""

    @staticmethod
    def forward(call, z, shift, log_scale):
        return call.forward(z, shift, log_scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, z, shift, log_scale = inputs
        saved = (z, shift if blends(ctx.call.options[0]) else None, log_scale)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_output, grad_log_abs_det):
        blended, needs = blends(ctx.call.options[0]), SCHEME.needs(ctx.needs_input_grad[1:])
        passed = None if blended else grad_output
        if not blended:
            needs &= ~NEEDS_SHIFT
        if grad_output is None:  # the log-determinant knows log_scale alone
            needs &= NEEDS_LOG_SCALE if grad_log_abs_det is not None else 0
        if not needs:
            return None, None, passed, None
        results = ctx.call.gradients(needs, grad_output, grad_log_abs_det, *ctx.saved_tensors)
        d_z, d_shift, d_log_scale = only(results, SCHEME.written(INPUT_BITS, needs))
        return None, d_z, d_shift if passed is None else passed, d_log_scale

    @staticmethod
    def jvp(ctx, _, *tangents):
        return ctx.call.jvp(tangents, ctx.saved_tensors)

    @staticmethod
    def vmap(info, in_dims, call, *inputs):
        return AffineAutoregressive.apply(call, *folded(info.batch_size, inputs, in_dims[1:])), (0, 0)


@_library.opaque_to_dynamo
def call(implementation: str, gate: int, first: float, second: float, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    if _library.nothing_differentiates(*inputs):
        return RAW_FORWARD[implementation](*inputs, gate, first, second)
    return AffineAutoregressive.apply(Call(SCHEME, implementation, (gate, first, second)), *inputs)
