"""Schemas, fakes and the autograd Functions of ``affine_autoregressive``.

Where the shift's weight is 1 (every gate but ``sigmoid``) the shift only passes through: its gradient is the cotangent
itself, the kernels neither read nor write anything for it, and it is not saved. The double backward with cotangent
``g`` in direction ``h`` returns ``J h`` and the Hessian-vector products of ``<g, f>``, so forward mode is the double
backward too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels._triton.launch import lazy
from hvae_kernels.ops.affine_autoregressive import reference
from hvae_kernels.ops.affine_autoregressive.gates import CODES, Gate

IMPLEMENTATIONS = ("cpp", "triton")

#: Bits of ``needs``: which results a kernel must write; the others come back empty.
NEEDS_Z, NEEDS_SHIFT, NEEDS_LOG_SCALE, NEEDS_OUTPUT, NEEDS_LOG_ABS_DET = 1, 2, 4, 8, 16
INPUT_BITS = (NEEDS_Z, NEEDS_SHIFT, NEEDS_LOG_SCALE)
OUTPUT_BITS = (NEEDS_OUTPUT, NEEDS_LOG_ABS_DET)

_INPUTS = "Tensor z, Tensor? shift, Tensor log_scale"
_COTANGENTS = "Tensor? grad_output, Tensor? grad_log_abs_det"
_DIRECTIONS = "Tensor? h_z, Tensor? h_shift, Tensor? h_log_scale"
_GATE = "int gate, float first, float second"
_NAMES = tuple(CODES)


def blends(gate: int) -> bool:
    """Whether the gate weighs the shift: then, and only then, derivatives need it."""
    return gate == CODES["sigmoid"]


def _empty(x: Tensor, wanted: int = 1) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)


def _forward_fake(z, shift, log_scale, gate, first, second):
    return _empty(z), z.new_empty(z.shape[:-1])


def _backward_fake(grad_output, grad_log_abs_det, z, shift, log_scale, gate, first, second, needs):
    return tuple(_empty(z, needs & bit) for bit in INPUT_BITS)


def _double_backward_fake(
    h_z, h_shift, h_log_scale, grad_output, grad_log_abs_det, z, shift, log_scale, gate, first, second, needs
):
    log_abs_det = z.new_empty(z.shape[:-1] if needs & NEEDS_LOG_ABS_DET else 0)
    return (_empty(z, needs & NEEDS_OUTPUT), log_abs_det, *(_empty(z, needs & bit) for bit in INPUT_BITS))


RAW_FORWARD = _library.define(
    "affine_autoregressive",
    f"(Tensor z, Tensor shift, Tensor log_scale, {_GATE}) -> (Tensor, Tensor)",
    _forward_fake,
    IMPLEMENTATIONS,
)
RAW_BACKWARD = _library.define(
    "affine_autoregressive_backward",
    f"({_COTANGENTS}, {_INPUTS}, {_GATE}, int needs) -> (Tensor, Tensor, Tensor)",
    _backward_fake,
    IMPLEMENTATIONS,
)
RAW_DOUBLE_BACKWARD = _library.define(
    "affine_autoregressive_double_backward",
    f"({_DIRECTIONS}, {_COTANGENTS}, {_INPUTS}, {_GATE}, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _double_backward_fake,
    IMPLEMENTATIONS,
)


for _name in ("affine_autoregressive", "affine_autoregressive_backward", "affine_autoregressive_double_backward"):
    _library.implement(_name, "triton", lazy("hvae_kernels.ops.affine_autoregressive.triton", _name))


@dataclass(frozen=True)
class _Call:
    """What a call has besides tensors."""

    implementation: str
    numbers: tuple[int, float, float]  # the gate's code, and its own two

    @property
    def gate(self) -> int:
        return self.numbers[0]

    def reference(self, z: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        gate = Gate(_NAMES[self.gate], *self.numbers[1:])
        return reference.affine_autoregressive(z, shift, log_scale, gate)


def _needs(bits: tuple[int, ...], wanted: tuple[bool, ...]) -> int:
    return sum([bit for bit, want in zip(bits, wanted, strict=True) if want])


def _input_needs(call: _Call, wanted: tuple[bool, ...]) -> int:
    needs = _needs(INPUT_BITS, wanted)
    return needs if blends(call.gate) else needs & ~NEEDS_SHIFT


def _only(results: tuple[Tensor | None, ...], bits: tuple[int, ...], needs: int) -> tuple[Tensor | None, ...]:
    """Results, or their cotangents, that were written; None for those that were not (they are empty)."""
    return tuple([result if needs & bit else None for result, bit in zip(results, bits, strict=True)])


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


class AffineAutoregressive(OpFunction):
    """``(z, shift, log_scale) -> (z', log_abs_det)``; saves nothing but its inputs."""

    @staticmethod
    def forward(call, z, shift, log_scale):
        return RAW_FORWARD[call.implementation](z, shift, log_scale, *call.numbers)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, z, shift, log_scale = inputs
        saved = (z, shift if blends(ctx.call.gate) else None, log_scale)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_output, grad_log_abs_det):
        call, wanted, inputs = ctx.call, ctx.needs_input_grad[1:], ctx.saved_tensors
        needs = _input_needs(call, wanted)
        if grad_output is None:  # the log-determinant knows log_scale alone
            needs &= NEEDS_LOG_SCALE if grad_log_abs_det is not None else 0
        passed = None if blends(call.gate) else grad_output
        if not needs:
            return None, None, passed, None
        if torch.is_grad_enabled():
            results = AffineAutoregressiveBackward.apply(call, needs, grad_output, grad_log_abs_det, *inputs)
        else:
            results = RAW_BACKWARD[call.implementation](grad_output, grad_log_abs_det, *inputs, *call.numbers, needs)
        d_z, d_shift, d_log_scale = _only(results, INPUT_BITS, needs)
        return None, d_z, d_shift if passed is None else passed, d_log_scale

    @staticmethod
    def jvp(ctx, _, *tangents):
        args = (ctx.call, sum(OUTPUT_BITS), *tangents, None, None, *ctx.saved_tensors)
        return AffineAutoregressiveDoubleBackward.apply(*args)[:2]

    @staticmethod
    def vmap(info, in_dims, call, *inputs):
        return AffineAutoregressive.apply(call, *_fold(info.batch_size, inputs, in_dims[1:])), (0, 0)


class AffineAutoregressiveBackward(OpFunction):
    """``(cotangents, inputs) -> `` gradients of the inputs."""

    @staticmethod
    def forward(call, needs, *tensors):
        return RAW_BACKWARD[call.implementation](*tensors, *call.numbers, needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *directions):
        call, wanted = ctx.call, ctx.needs_input_grad[2:]
        directions = _only(directions, INPUT_BITS, ctx.needs)
        needs = _needs(OUTPUT_BITS, wanted[:2]) | _input_needs(call, wanted[2:])
        if not needs or all(h is None for h in directions):
            return (None,) * (2 + len(wanted))
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            results = AffineAutoregressiveDoubleBackward.apply(call, needs, *directions, *tensors)
        else:
            results = RAW_DOUBLE_BACKWARD[call.implementation](*directions, *tensors, *call.numbers, needs)
        return (None, None, *_only(results, OUTPUT_BITS + INPUT_BITS, needs))

    @staticmethod
    def jvp(ctx, _, __, grad_output_tangent, grad_log_abs_det_tangent, *tangents):
        call, needs, tensors = ctx.call, ctx.needs, ctx.saved_tensors
        results: tuple[Tensor | None, ...] = (None,) * len(INPUT_BITS)
        if grad_output_tangent is not None or grad_log_abs_det_tangent is not None:
            args = (call, needs, grad_output_tangent, grad_log_abs_det_tangent, *tensors[2:])
            results = AffineAutoregressiveBackward.apply(*args)
        if any(tangent is not None for tangent in tangents):
            second = AffineAutoregressiveDoubleBackward.apply(call, needs, *tangents, *tensors)[2:]
            results = tuple(_add(a, b) for a, b in zip(results, second, strict=True))
        return results

    @staticmethod
    def vmap(info, in_dims, call, needs, *tensors):
        results = AffineAutoregressiveBackward.apply(call, needs, *_fold(info.batch_size, tensors, in_dims[2:]))
        return _unwritten_batched(results, INPUT_BITS, info.batch_size, needs), (0,) * len(results)


class AffineAutoregressiveDoubleBackward(OpFunction):
    """``(directions, cotangents, inputs) -> `` gradients of the cotangents, then of the inputs."""

    @staticmethod
    def forward(call, needs, *tensors):
        return RAW_DOUBLE_BACKWARD[call.implementation](*tensors, *call.numbers, needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *upstream):
        tensors, call = ctx.saved_tensors, ctx.call
        z, shift, log_scale = tensors[5:]
        results = _library.vjp_of_double_backward(
            call.reference,
            directions=tensors[:3],
            cotangents=tensors[3:5],
            inputs=(z, z if shift is None else shift, log_scale),  # a shift of weight 1 has no part in derivatives
            upstream=_only(upstream, OUTPUT_BITS + INPUT_BITS, ctx.needs),
        )
        return (None, None, *(r if t is not None else None for r, t in zip(results, tensors, strict=True)))

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError("affine_autoregressive: forward mode through its second derivatives is not provided")

    @staticmethod
    def vmap(info, in_dims, call, needs, *tensors):
        folded = _fold(info.batch_size, tensors, in_dims[2:])
        results = AffineAutoregressiveDoubleBackward.apply(call, needs, *folded)
        bits = OUTPUT_BITS + INPUT_BITS
        return _unwritten_batched(results, bits, info.batch_size, needs), (0,) * len(results)


def _fold(size: int, tensors: tuple[Tensor | None, ...], dims: tuple[int | None, ...]) -> tuple[Tensor | None, ...]:
    """The vmapped dimension becomes the first of the leading ones; unbatched tensors are expanded, None stays None."""
    return tuple(
        x if x is None else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, dims, strict=True)
    )


def _unwritten_batched(results: tuple[Tensor, ...], bits: tuple[int, ...], size: int, needs: int) -> tuple[Tensor, ...]:
    """What vmap asks: every result has a batch dimension, those that were not written too."""
    return tuple(x if needs & bit else x.new_empty(size, 0) for x, bit in zip(results, bits, strict=True))


@_library.in_graph
def call(implementation: str, gate: int, first: float, second: float, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    if _library.nothing_differentiates():
        return RAW_FORWARD[implementation](*inputs, gate, first, second)
    return AffineAutoregressive.apply(_Call(implementation, (gate, first, second)), *inputs)
