"""Schemas, fakes and the autograd Functions of ``leapfrog_update``.

``z`` only passes through (``dz'/dz = 1``), so the backward kernels never see it; the Functions add the identity.
The double backward with cotangent ``g`` in direction ``h`` returns ``J h`` and the Hessian-vector products of
``<g, f>``, so forward mode is the double backward too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels._triton.launch import lazy
from hvae_kernels.ops.leapfrog_update import reference

IMPLEMENTATIONS = ("cpp", "triton")

#: Bits of ``needs``: which groups of results a kernel must write; the others come back empty.
NEEDS_STATE, NEEDS_PARAMETERS, NEEDS_OUTPUTS = 1, 2, 4
#: Of each group of the backward's inputs (rho, grad, decay, kick, drift): how many there are.
N_STATE, N_PARAMETERS = 2, 3

_INPUTS = "Tensor rho, Tensor grad, Tensor decay, Tensor kick, Tensor drift"
_COTANGENTS = "Tensor? grad_z, Tensor? grad_rho"
_DIRECTIONS = "Tensor? h_rho, Tensor? h_grad, Tensor? h_decay, Tensor? h_kick, Tensor? h_drift"


def _returns(n: int) -> str:
    return "(" + ", ".join(["Tensor"] * n) + ")"


def _empty(x: Tensor, wanted: int = 1) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)


def _forward_fake(z, rho, grad, decay, kick, drift):
    return _empty(z), _empty(rho)


def _backward_fake(grad_z, grad_rho, rho, grad, decay, kick, drift, needs):
    state = [_empty(x, needs & NEEDS_STATE) for x in (rho, grad)]
    return (*state, *[_empty(x, needs & NEEDS_PARAMETERS) for x in (decay, kick, drift)])


def _double_backward_fake(
    h_rho, h_grad, h_decay, h_kick, h_drift, grad_z, grad_rho, rho, grad, decay, kick, drift, needs
):
    outputs = [_empty(rho, needs & NEEDS_OUTPUTS) for _ in range(2)]
    return (*outputs, *_backward_fake(grad_z, grad_rho, rho, grad, decay, kick, drift, needs))


RAW_FORWARD = _library.define(
    "leapfrog_update", f"(Tensor z, {_INPUTS}) -> {_returns(2)}", _forward_fake, IMPLEMENTATIONS
)
RAW_BACKWARD = _library.define(
    "leapfrog_update_backward",
    f"({_COTANGENTS}, {_INPUTS}, int needs) -> {_returns(5)}",
    _backward_fake,
    IMPLEMENTATIONS,
)
RAW_DOUBLE_BACKWARD = _library.define(
    "leapfrog_update_double_backward",
    f"({_DIRECTIONS}, {_COTANGENTS}, {_INPUTS}, int needs) -> {_returns(7)}",
    _double_backward_fake,
    IMPLEMENTATIONS,
)


for _name in ("leapfrog_update", "leapfrog_update_backward", "leapfrog_update_double_backward"):
    _library.implement(_name, "triton", lazy("hvae_kernels.ops.leapfrog_update.triton", _name))


def _needs(state: bool, parameters: bool, outputs: bool = False) -> int:
    return NEEDS_STATE * state | NEEDS_PARAMETERS * parameters | NEEDS_OUTPUTS * outputs


def _only(results: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(result if want else None for result, want in zip(results, wanted, strict=True))


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _of_written_groups(directions: tuple[Tensor | None, ...], needs: int) -> tuple[Tensor | None, ...]:
    """Drop cotangents of results that were never written (they came back empty)."""
    written = [needs & NEEDS_STATE] * N_STATE + [needs & NEEDS_PARAMETERS] * N_PARAMETERS
    return tuple(h if keep else None for h, keep in zip(directions, written, strict=True))


class LeapfrogUpdate(OpFunction):
    """``(z, rho, grad, decay, kick, drift) -> (z', rho')``; saves nothing but its inputs, and of those not ``z``."""

    @staticmethod
    def forward(implementation, *inputs):
        return RAW_FORWARD[implementation](*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation = inputs[0]
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_z, grad_rho):
        wanted = ctx.needs_input_grad[2:]
        needs = _needs(any(wanted[:N_STATE]), any(wanted[N_STATE:]))
        if not needs or (grad_z is None and grad_rho is None):
            return (None, grad_z, *[None] * len(wanted))
        implementation, inputs = ctx.implementation, ctx.saved_tensors
        if torch.is_grad_enabled():
            results = LeapfrogUpdateBackward.apply(implementation, needs, grad_z, grad_rho, *inputs)
        else:
            results = RAW_BACKWARD[implementation](grad_z, grad_rho, *inputs, needs)
        return (None, grad_z, *_only(results, wanted))

    @staticmethod
    def jvp(ctx, _, z_tangent, *tangents):
        args = (ctx.implementation, NEEDS_OUTPUTS, *tangents, None, None, *ctx.saved_tensors)
        shift, rho = LeapfrogUpdateDoubleBackward.apply(*args)[:2]
        return _add(z_tangent, shift), rho

    @staticmethod
    def vmap(info, in_dims, implementation, *inputs):
        if any(dim is not None for dim in in_dims[4:]):
            return _library.vmap_by_loop(LeapfrogUpdate.apply, info.batch_size, in_dims, (implementation, *inputs))
        state = _fold(info.batch_size, inputs[:3], in_dims[1:4])
        return LeapfrogUpdate.apply(implementation, *state, *inputs[3:]), (0, 0)


class LeapfrogUpdateBackward(OpFunction):
    """``(cotangents, rho, grad, decay, kick, drift) -> `` gradients of the last five."""

    @staticmethod
    def forward(implementation, needs, *tensors):
        return RAW_BACKWARD[implementation](*tensors, needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *directions):
        wanted = ctx.needs_input_grad[2:]
        if all(h is None for h in directions):
            return (None,) * (2 + len(wanted))
        directions = _of_written_groups(directions, ctx.needs)
        needs = _needs(any(wanted[2:4]), any(wanted[4:]), any(wanted[:2]))
        implementation, tensors = ctx.implementation, ctx.saved_tensors
        if torch.is_grad_enabled():
            results = LeapfrogUpdateDoubleBackward.apply(implementation, needs, *directions, *tensors)
        else:
            results = RAW_DOUBLE_BACKWARD[implementation](*directions, *tensors, needs)
        return (None, None, *_only(results, wanted))

    @staticmethod
    def jvp(ctx, _, __, grad_z_tangent, grad_rho_tangent, *tangents):
        implementation, needs, tensors = ctx.implementation, ctx.needs, ctx.saved_tensors
        results: tuple[Tensor | None, ...] = (None,) * (N_STATE + N_PARAMETERS)
        if grad_z_tangent is not None or grad_rho_tangent is not None:
            args = (implementation, needs, grad_z_tangent, grad_rho_tangent, *tensors[2:])
            results = LeapfrogUpdateBackward.apply(*args)
        if any(tangent is not None for tangent in tangents):
            second = LeapfrogUpdateDoubleBackward.apply(implementation, needs, *tangents, *tensors)[2:]
            results = tuple(_add(a, b) for a, b in zip(results, second, strict=True))
        return results

    @staticmethod
    def vmap(info, in_dims, implementation, needs, *tensors):
        if needs & NEEDS_PARAMETERS or any(dim is not None for dim in in_dims[6:]):
            args = (implementation, needs, *tensors)
            return _library.vmap_by_loop(LeapfrogUpdateBackward.apply, info.batch_size, in_dims, args)
        state = _fold(info.batch_size, tensors[:4], in_dims[2:6])
        results = LeapfrogUpdateBackward.apply(implementation, needs, *state, *tensors[4:])
        return _unwritten_batched(results, info.batch_size, needs), (0,) * len(results)


class LeapfrogUpdateDoubleBackward(OpFunction):
    """``(directions, cotangents, inputs) -> `` gradients of the cotangents, then of the inputs."""

    @staticmethod
    def forward(implementation, needs, *tensors):
        return RAW_DOUBLE_BACKWARD[implementation](*tensors, needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *upstream):
        tensors = ctx.saved_tensors
        outputs = upstream[:2] if ctx.needs & NEEDS_OUTPUTS else (None, None)
        results = _library.vjp_of_double_backward(
            reference.increment,
            directions=tensors[:5],
            cotangents=tensors[5:7],
            inputs=tensors[7:],
            upstream=(*outputs, *_of_written_groups(upstream[2:], ctx.needs)),
        )
        return (None, None, *_only(results, ctx.needs_input_grad[2:]))

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError("leapfrog_update: forward mode through its second derivatives is not provided")

    @staticmethod
    def vmap(info, in_dims, implementation, needs, *tensors):
        h_state, h_parameters, state, parameters = slice(0, 2), slice(2, 5), slice(5, 9), slice(9, 12)
        dims = in_dims[2:]
        if needs & NEEDS_PARAMETERS or any(dim is not None for dim in (*dims[h_parameters], *dims[parameters])):
            args = (implementation, needs, *tensors)
            return _library.vmap_by_loop(LeapfrogUpdateDoubleBackward.apply, info.batch_size, in_dims, args)
        results = LeapfrogUpdateDoubleBackward.apply(
            implementation,
            needs,
            *_fold(info.batch_size, tensors[h_state], dims[h_state]),
            *tensors[h_parameters],
            *_fold(info.batch_size, tensors[state], dims[state]),
            *tensors[parameters],
        )
        return _unwritten_batched(results, info.batch_size, needs), (0,) * len(results)


def _fold(size: int, tensors: tuple[Tensor | None, ...], dims: tuple[int | None, ...]) -> tuple[Tensor | None, ...]:
    """The vmapped dimension becomes the first of the leading ones; unbatched tensors are expanded, None stays None."""
    return tuple(
        x if x is None else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, dims, strict=True)
    )


def _unwritten_batched(results: tuple[Tensor, ...], size: int, needs: int) -> tuple[Tensor, ...]:
    """What vmap asks: every result has a batch dimension, those that were not written too."""
    written = [needs & NEEDS_STATE] * N_STATE + [needs & NEEDS_PARAMETERS] * N_PARAMETERS
    written = [needs & NEEDS_OUTPUTS] * (len(results) - len(written)) + written
    return tuple(x if keep else x.new_empty(size, 0) for x, keep in zip(results, written, strict=True))


@_library.in_graph
def call(implementation: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    if _library.nothing_differentiates():
        return RAW_FORWARD[implementation](*inputs)
    return LeapfrogUpdate.apply(implementation, *inputs)
