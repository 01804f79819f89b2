"""Schemas and fakes of ``gaussian_leapfrog``, a :class:`~hvae_kernels._op.Smooth` op, and its rule for vmap.

Three linear-algebra facts make the three kernels enough for every derivative: they are derived in README.md.
"""

from __future__ import annotations

import math

from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._op import Call, Smooth, SmoothBackward, SmoothForward, empty, kernel, returns
from hvae_kernels.ops.gaussian_leapfrog import reference

#: Bits of ``needs``: which groups of results a kernel must write; the others come back empty.
NEEDS_STATE, NEEDS_PARAMETERS, NEEDS_OUTPUTS = 1, 2, 4
_INPUT_BITS = (NEEDS_STATE,) * 2 + (NEEDS_PARAMETERS,) * 4
_OUTPUT_BITS = (NEEDS_OUTPUTS,) * 2
_N_INPUTS, _N_COTANGENTS = 6, 2
#: One an input.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_INPUTS = "Tensor z, Tensor rho, Tensor precision, Tensor loc, Tensor step_size, Tensor tempering"
_COTANGENTS = "Tensor? grad_z, Tensor? grad_rho"
_DIRECTIONS = "Tensor? h_z, Tensor? h_rho, Tensor? h_precision, Tensor? h_loc, Tensor? h_step_size, Tensor? h_tempering"


def _backward_fake(grad_z, grad_rho, *inputs):
    *inputs, needs = inputs
    return tuple(empty(x, needs & bit) for x, bit in zip(inputs, _INPUT_BITS, strict=True))


def _double_backward_fake(h_z, h_rho, h_precision, h_loc, h_step_size, h_tempering, *arguments):
    state, needs = arguments[_N_COTANGENTS : _N_COTANGENTS + 2], arguments[-1]
    outputs = [empty(x, needs & bit) for x, bit in zip(state, _OUTPUT_BITS, strict=True)]
    return (*outputs, *_backward_fake(*arguments))


RAW_FORWARD = kernel(
    __package__, "gaussian_leapfrog", f"({_INPUTS}) -> {returns(2)}", lambda z, rho, *_: (empty(z), empty(rho))
)
RAW_BACKWARD = kernel(
    __package__, "gaussian_leapfrog_backward", f"({_COTANGENTS}, {_INPUTS}, int needs) -> {returns(6)}", _backward_fake
)
RAW_DOUBLE_BACKWARD = kernel(
    __package__,
    "gaussian_leapfrog_double_backward",
    f"({_DIRECTIONS}, {_COTANGENTS}, {_INPUTS}, int needs) -> {returns(8)}",
    _double_backward_fake,
)


def _batching(apply, size, dims, tensors, written):
    """As replicas; arguments and results stand as in the kernels' signatures."""
    batch = _Batch(size, tensors[-_N_INPUTS:], dims[-_N_INPUTS:])
    before, their_dims = tensors[:-_N_INPUTS], dims[:-_N_INPUTS]
    directions = batch.directions(before[:-_N_COTANGENTS], their_dims[:-_N_COTANGENTS])
    cotangents = batch.directions(before[-_N_COTANGENTS:], their_dims[-_N_COTANGENTS:])
    results = apply(*directions, *cotangents, *batch.inputs)
    slots = (*range(len(results) - _N_INPUTS), *range(_N_INPUTS))[-len(results) :]
    return tuple(batch.restore(x, slot) if w else x for x, slot, w in zip(results, slots, written, strict=True))


class _Batch:
    """vmap as replicas: the batch dimension becomes (part of) the replica dimension of every argument."""

    def __init__(self, size: int, inputs: tuple[Tensor, ...], dims: tuple[int | None, ...]) -> None:
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


SCHEME = Smooth(
    name="gaussian_leapfrog",
    forward=RAW_FORWARD,
    backward=RAW_BACKWARD,
    double=RAW_DOUBLE_BACKWARD,
    inputs=_INPUT_BITS,
    outputs=_OUTPUT_BITS,
    reference=lambda: reference.gaussian_leapfrog,
    batching=_batching,
)
_CALLS = {implementation: Call(SCHEME, implementation) for implementation in RAW_FORWARD}


class GaussianLeapfrog(SmoothForward):
    """``(z, rho, precision, loc, step_size, tempering) -> (z_K, rho_K)``."""

    @staticmethod
    def vmap(info, in_dims, call, *inputs):
        batch = _Batch(info.batch_size, inputs, in_dims[1:])
        z, rho = GaussianLeapfrog.apply(call, *batch.inputs)
        return (batch.restore(z, 0), batch.restore(rho, 1)), (0, 0)


@_library.opaque_to_dynamo
def call(implementation: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    if _library.nothing_differentiates(*inputs):
        return RAW_FORWARD[implementation](*inputs)
    return GaussianLeapfrog.apply(_CALLS[implementation], *inputs)


@_library.opaque_to_dynamo
def call_vjp(implementation: str, *tensors: Tensor) -> Gradients:
    """The backward pass, differentiable, on ``(grad_z, grad_rho, *inputs)``."""
    needs = NEEDS_STATE | NEEDS_PARAMETERS
    if _library.nothing_differentiates(*tensors):
        return RAW_BACKWARD[implementation](*tensors, needs)
    return SmoothBackward.apply(_CALLS[implementation], needs, *tensors)
