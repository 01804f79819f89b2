"""Schemas, fakes and the autograd Functions of ``gaussian_leapfrog``.

Three linear-algebra facts make the three kernels enough for every derivative (derived in the room's README.md):
the double backward with cotangent ``g`` in direction ``h`` returns ``J h`` and the Hessian-vector products of
``<g, f>``, so forward mode is the double backward too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels._triton.launch import lazy
from hvae_kernels.ops.gaussian_leapfrog import reference

IMPLEMENTATIONS = ("cpp", "triton")

#: Bits of ``needs``: which groups of results a kernel must write; the others come back empty.
NEEDS_STATE, NEEDS_PARAMETERS, NEEDS_OUTPUTS = 1, 2, 4
N_INPUTS = 6

_INPUTS = "Tensor z, Tensor rho, Tensor precision, Tensor loc, Tensor step_size, Tensor tempering"
_COTANGENTS = "Tensor? grad_z, Tensor? grad_rho"
_DIRECTIONS = "Tensor? h_z, Tensor? h_rho, Tensor? h_precision, Tensor? h_loc, Tensor? h_step_size, Tensor? h_tempering"


def _empty(x: Tensor, wanted: int = 1) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)


def _forward_fake(z, rho, precision, loc, step_size, tempering):
    return _empty(z), _empty(rho)


def _backward_fake(grad_z, grad_rho, z, rho, precision, loc, step_size, tempering, needs):
    state = [_empty(x, needs & NEEDS_STATE) for x in (z, rho)]
    return (*state, *[_empty(x, needs & NEEDS_PARAMETERS) for x in (precision, loc, step_size, tempering)])


def _double_backward_fake(
    h_z, h_rho, h_precision, h_loc, h_step_size, h_tempering,
    grad_z, grad_rho, z, rho, precision, loc, step_size, tempering, needs,
):  # fmt: skip
    outputs = [_empty(x, needs & NEEDS_OUTPUTS) for x in (z, rho)]
    return (*outputs, *_backward_fake(grad_z, grad_rho, z, rho, precision, loc, step_size, tempering, needs))


RAW_FORWARD = _library.define("gaussian_leapfrog", f"({_INPUTS}) -> (Tensor, Tensor)", _forward_fake, IMPLEMENTATIONS)
RAW_BACKWARD = _library.define(
    "gaussian_leapfrog_backward",
    f"({_COTANGENTS}, {_INPUTS}, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    IMPLEMENTATIONS,
)
RAW_DOUBLE_BACKWARD = _library.define(
    "gaussian_leapfrog_double_backward",
    f"({_DIRECTIONS}, {_COTANGENTS}, {_INPUTS}, int needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _double_backward_fake,
    IMPLEMENTATIONS,
)

for _name in ("gaussian_leapfrog", "gaussian_leapfrog_backward", "gaussian_leapfrog_double_backward"):
    _library.implement(_name, "triton", lazy("hvae_kernels.ops.gaussian_leapfrog.triton", _name))


def _needs(state: bool, parameters: bool, outputs: bool = False) -> int:
    return NEEDS_STATE * state | NEEDS_PARAMETERS * parameters | NEEDS_OUTPUTS * outputs


def _only(results: tuple[Tensor, ...], wanted: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    if all(wanted):
        return results
    return tuple(result if want else None for result, want in zip(results, wanted, strict=True))


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


class GaussianLeapfrog(OpFunction):
    """``(z, rho, parameters) -> (z_K, rho_K)``; saves nothing but its inputs."""

    @staticmethod
    def forward(implementation, *inputs):
        return RAW_FORWARD[implementation](*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_z, grad_rho):
        wanted = ctx.needs_input_grad[1:]
        if grad_z is None and grad_rho is None:
            return (None,) * (1 + N_INPUTS)
        needs = _needs(any(wanted[:2]), any(wanted[2:]))
        implementation, inputs = ctx.implementation, ctx.saved_tensors
        if torch.is_grad_enabled():
            results = GaussianLeapfrogBackward.apply(implementation, needs, grad_z, grad_rho, *inputs)
        else:
            results = RAW_BACKWARD[implementation](grad_z, grad_rho, *inputs, needs)
        return (None, *_only(results, wanted))

    @staticmethod
    def jvp(ctx, _, *tangents):
        inputs = ctx.saved_tensors
        zero = torch.zeros_like(inputs[0])
        args = (ctx.implementation, NEEDS_OUTPUTS, *tangents, zero, zero, *inputs)
        return GaussianLeapfrogDoubleBackward.apply(*args)[:2]

    @staticmethod
    def vmap(info, in_dims, implementation, *inputs):
        batch = _Batch(info.batch_size, inputs, in_dims[1:])
        z, rho = GaussianLeapfrog.apply(implementation, *batch.inputs)
        return (batch.restore(z, 0), batch.restore(rho, 1)), (0, 0)


class GaussianLeapfrogBackward(OpFunction):
    """``(cotangents, inputs) -> `` gradients of the inputs."""

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
            results = GaussianLeapfrogDoubleBackward.apply(implementation, needs, *directions, *tensors)
        else:
            results = RAW_DOUBLE_BACKWARD[implementation](*directions, *tensors, needs)
        return (None, None, *_only(results, wanted))

    @staticmethod
    def jvp(ctx, _, __, grad_z_tangent, grad_rho_tangent, *tangents):
        implementation, needs = ctx.implementation, ctx.needs
        tensors = ctx.saved_tensors
        results: tuple[Tensor | None, ...] = (None,) * N_INPUTS
        if grad_z_tangent is not None or grad_rho_tangent is not None:
            args = (implementation, needs, grad_z_tangent, grad_rho_tangent, *tensors[2:])
            results = GaussianLeapfrogBackward.apply(*args)
        if any(tangent is not None for tangent in tangents):
            second = GaussianLeapfrogDoubleBackward.apply(implementation, needs, *tangents, *tensors)[2:]
            results = tuple(_add(a, b) for a, b in zip(results, second, strict=True))
        return results

    @staticmethod
    def vmap(info, in_dims, implementation, needs, grad_z, grad_rho, *inputs):
        batch = _Batch(info.batch_size, inputs, in_dims[4:])
        cotangents = batch.directions((grad_z, grad_rho), in_dims[2:4])
        results = GaussianLeapfrogBackward.apply(implementation, needs, *cotangents, *batch.inputs)
        return batch.restore_all(results, needs), (0,) * N_INPUTS


class GaussianLeapfrogDoubleBackward(OpFunction):
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
        directions, cotangents, inputs = tensors[:6], tensors[6:8], tensors[8:]
        upstream = (
            *_of_written_groups(upstream[:2], NEEDS_STATE if ctx.needs & NEEDS_OUTPUTS else 0),
            *_of_written_groups(upstream[2:], ctx.needs),
        )
        results = _library.vjp_of_double_backward(reference.gaussian_leapfrog, directions, cotangents, inputs, upstream)
        return (None, None, *_only(results, ctx.needs_input_grad[2:]))

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError("gaussian_leapfrog: forward mode through its second derivatives is not provided")

    @staticmethod
    def vmap(info, in_dims, implementation, needs, *tensors):
        batch = _Batch(info.batch_size, tensors[8:], in_dims[10:])
        directions = batch.directions(tensors[:6], in_dims[2:8])
        cotangents = batch.directions(tensors[6:8], in_dims[8:10])
        results = GaussianLeapfrogDoubleBackward.apply(implementation, needs, *directions, *cotangents, *batch.inputs)
        outputs = batch.restore_all(results[:2], NEEDS_STATE if needs & NEEDS_OUTPUTS else 0)
        return (*outputs, *batch.restore_all(results[2:], needs)), (0,) * (2 + N_INPUTS)


def _of_written_groups(directions: tuple[Tensor | None, ...], needs: int) -> tuple[Tensor | None, ...]:
    """Drop cotangents of results that were never written (they came back empty)."""
    written = [bool(needs & NEEDS_STATE)] * 2 + [bool(needs & NEEDS_PARAMETERS)] * 4
    return tuple(h if keep else None for h, keep in zip(directions, written, strict=False))


class _Batch:
    """vmap as replicas: the batch dimension becomes (part of) the replica dimension of every argument."""

    def __init__(self, size: int, inputs: tuple[Tensor, ...], dims: tuple[int | None, ...]):
        self.size = size
        inputs = tuple(self._front(x, dim) for x, dim in zip(inputs, dims, strict=True))
        self.shapes = [x.shape[1:] for x in inputs]
        self.replicated = len(self.shapes[5]) == 2
        self.scalar_step = len(self.shapes[4]) == 0
        self.inputs = tuple(self._replicate(x, slot) for slot, x in enumerate(inputs))

    def _front(self, x: Tensor, dim: int | None) -> Tensor:
        return x.expand(self.size, *x.shape) if dim is None else x.movedim(dim, 0)

    def _replicate(self, x: Tensor, slot: int) -> Tensor:
        """``(V, *shape)`` of argument ``slot`` to the replica form with V (times R) replicas."""
        if self.replicated:
            return x.flatten(0, 1)
        features = self.shapes[0][-1]
        if slot == 5:
            return x
        if slot == 4 and self.scalar_step:
            return x.view(-1, 1, 1).expand(self.size, 1, features)
        return x.reshape(self.size, math.prod(self.shapes[slot][:-1]), features)

    def directions(self, tensors: tuple[Tensor | None, ...], dims: tuple[int | None, ...]) -> tuple[Tensor | None, ...]:
        """Bring cotangents or tangents (None stays None) into the replica form of the inputs they belong to."""
        return tuple(
            None if x is None else self._replicate(self._front(x, dim), slot)
            for slot, (x, dim) in enumerate(zip(tensors, dims, strict=True))
        )

    def restore(self, x: Tensor, slot: int) -> Tensor:
        """The inverse of the replica form, for a result that has argument ``slot``'s shape."""
        if slot == 4 and self.scalar_step:
            return x.sum((-2, -1))
        return x.reshape(self.size, *self.shapes[slot])

    def restore_all(self, results: tuple[Tensor, ...], needs: int) -> tuple[Tensor, ...]:
        written = [bool(needs & NEEDS_STATE)] * 2 + [bool(needs & NEEDS_PARAMETERS)] * 4
        return tuple(
            self.restore(x, slot) if written[slot] else x.new_empty(self.size, 0) for slot, x in enumerate(results)
        )


@_library.in_graph
def call(implementation: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    if _library.nothing_differentiates():
        return RAW_FORWARD[implementation](*inputs)
    return GaussianLeapfrog.apply(implementation, *inputs)


@_library.in_graph
def call_vjp(implementation: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The backward pass, differentiable, on ``(grad_z, grad_rho, *inputs)``."""
    needs = NEEDS_STATE | NEEDS_PARAMETERS
    if _library.nothing_differentiates():
        return RAW_BACKWARD[implementation](*tensors, needs)
    return GaussianLeapfrogBackward.apply(implementation, needs, *tensors)
