"""An op's raw kernels, declared, and the derivatives that several ops share.

What an op shares with no other, it does by hand in its own ``autograd.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels._triton.launch import lazy

Tensors = tuple[Tensor, ...]
#: Where None stands for zeros, or for a result that is not wanted.
Maybe = tuple[Tensor | None, ...]


def kernel(
    package: str,
    name: str,
    signature: str,
    fake: Callable,
    implementations: tuple[str, ...] = ("cpp", "triton"),
) -> dict[str, Callable]:
    """Define a raw op; returns its overloads by implementation. Triton's is ``name`` in ``package.triton``."""
    overloads = _library.define(name, signature, fake, implementations)
    if "triton" in implementations:
        _library.implement(name, "triton", lazy(f"{package}.triton", name))
    return overloads


def returns(n: int) -> str:
    """A signature's end: ``n`` tensors."""
    return "(" + ", ".join(["Tensor"] * n) + ")"


def empty(x: Tensor, wanted: int = 1) -> Tensor:
    """For fakes: a result of x's shape, contiguous; of no elements where a kernel does not write it."""
    return torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum, of which either part may be missing."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def only(results: Sequence[Tensor | None], keep: Sequence[Any]) -> Maybe:
    """None in place of those that are not kept."""
    return tuple([x if k else None for x, k in zip(results, keep, strict=True)])


# ---- vmap ----

#: ``batching(apply, size, dims, tensors, written)``: the results of ``apply(*tensors)``, a Function's, with the vmapped
#: dimension in front; those that are not ``written`` are empty, and stay so.
Batching = Callable[[Callable[..., Tensors], int, Sequence["int | None"], Maybe, Sequence[Any]], Tensors]


def folded(size: int, tensors: Maybe, dims: Sequence[int | None]) -> Maybe:
    """The vmapped dimension becomes the first of the leading ones; unbatched tensors are expanded, None stays None."""
    return tuple(
        x if x is None else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, dims, strict=True)
    )


def by_folding(
    apply: Callable[..., Tensors], size: int, dims: Sequence[int | None], tensors: Maybe, written: Sequence[Any]
) -> Tensors:
    """:data:`Batching` where rows are rows, batched or not."""
    return apply(*folded(size, tensors, dims))


def by_loop(
    apply: Callable[..., Tensors], size: int, dims: Sequence[int | None], tensors: Maybe, written: Sequence[Any]
) -> Tensors:
    """:data:`Batching` where no kernel takes the batch: a call for each sample."""
    return _library.vmap_by_loop(apply, size, tuple(dims), tensors)[0]


# ---- Smooth: forward, backward and double backward kernels ----


@dataclass(frozen=True, eq=False)
class Smooth:
    """An op whose double backward kernel, with cotangents g in directions h, returns ``J h`` and ``d<g, J h>``.

    So forward mode is the double backward too, and of derivatives only the third come from the reference.

    Raw kernels are called with ``(*cotangents, *inputs, *options, needs)`` and ``(*directions, *cotangents, *inputs,
    *options, needs)``; ``needs`` has the bits of the results that they must write, the others come back empty.

    Args:
        name: for messages.
        forward, backward, double: the overloads by implementation.
        inputs: a bit for each input that derivatives are about; inputs of one bit are written together. All 0 where the
            kernels write everything and take no ``needs``.
        outputs: the same for ``J h``, which only the double backward returns.
        reference: ``reference(*options)`` is the function of ``inputs``, plain.
        batching: its rule for vmap.
    """

    name: str
    forward: dict[str, Callable]
    backward: dict[str, Callable]
    double: dict[str, Callable]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    reference: Callable[..., Callable[..., Tensors]]
    batching: Batching

    def needs(self, wanted_inputs: Sequence[bool], wanted_outputs: Sequence[bool] = ()) -> int:
        """The bits; without any, whether there is something to do."""
        if not self.inputs[0]:
            return any(wanted_inputs) or any(wanted_outputs)
        needs = 0
        for bits, wanted in ((self.inputs, wanted_inputs), (self.outputs, wanted_outputs)):
            for bit, want in zip(bits, wanted, strict=False):
                needs |= bit if want else 0
        return needs

    def written(self, bits: tuple[int, ...], needs: int) -> tuple[int, ...]:
        """Which results of these bits a kernel writes."""
        return tuple([needs & bit for bit in bits]) if bits[0] else (1,) * len(bits)

    def last(self, options: tuple, needs: int) -> tuple:
        """The raw kernels' last arguments."""
        return (*options, needs) if self.inputs[0] else options


@dataclass(frozen=True)
class Call:
    """What a Function gets besides tensors: which op, by which implementation, and its numbers."""

    scheme: Smooth
    implementation: str
    options: tuple = ()

    def forward(self, *inputs: Tensor) -> Any:
        """The raw forward kernel."""
        return self.scheme.forward[self.implementation](*inputs, *self.options)

    def backward(self, needs: int, *tensors: Tensor | None) -> Tensors:
        """The raw backward kernel, on ``(*cotangents, *inputs)``."""
        scheme = self.scheme
        return scheme.backward[self.implementation](*tensors, *scheme.last(self.options, needs))

    def double(self, needs: int, *tensors: Tensor | None) -> Tensors:
        """The raw double backward kernel, on ``(*directions, *cotangents, *inputs)``."""
        scheme = self.scheme
        return scheme.double[self.implementation](*tensors, *scheme.last(self.options, needs))

    def gradients(self, needs: int, *tensors: Tensor | None) -> Tensors:
        """:meth:`backward`, differentiable where gradients are recorded."""
        return (
            SmoothBackward.apply(self, needs, *tensors) if torch.is_grad_enabled() else self.backward(needs, *tensors)
        )

    def jvp(self, tangents: Maybe, inputs: Maybe) -> Tensors:
        """Tangents of the results."""
        n, every = len(self.scheme.outputs), self.scheme.needs((), (True,) * len(self.scheme.outputs))
        none = (None,) * n
        return SmoothDoubleBackward.apply(self, every, *tangents, *none, *inputs)[:n]


class SmoothForward(OpFunction):
    """``inputs -> outputs``, for ops that save their inputs and nothing else."""

    @staticmethod
    def forward(call, *inputs):
        return call.forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        wanted = ctx.needs_input_grad[1:]
        needs = ctx.call.scheme.needs(wanted)
        if not needs or all(g is None for g in cotangents):
            return (None,) * (1 + len(wanted))
        return (None, *only(ctx.call.gradients(needs, *cotangents, *ctx.saved_tensors), wanted))

    @staticmethod
    def jvp(ctx, _, *tangents):
        return ctx.call.jvp(tangents, ctx.saved_tensors)


class _Derivative(OpFunction):
    """What the two derivatives keep: all that they are given.

    Results that are not written get no cotangents, as every caller keeps what it wants alone.
    """

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)


class SmoothBackward(_Derivative):
    """``(cotangents, inputs) -> `` gradients of the inputs."""

    @staticmethod
    def forward(call, needs, *tensors):
        return call.backward(needs, *tensors)

    @staticmethod
    def backward(ctx, *directions):
        call, scheme, wanted = ctx.call, ctx.call.scheme, ctx.needs_input_grad[2:]
        n = len(scheme.outputs)
        needs = scheme.needs(wanted[n:], wanted[:n])
        if not needs or all(h is None for h in directions):
            return (None,) * (2 + len(wanted))
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            results = SmoothDoubleBackward.apply(call, needs, *directions, *tensors)
        else:
            results = call.double(needs, *directions, *tensors)
        return (None, None, *only(results, wanted))

    @staticmethod
    def jvp(ctx, _, __, *tangents):
        call, needs, tensors = ctx.call, ctx.needs, ctx.saved_tensors
        n = len(call.scheme.outputs)
        results = (None,) * len(call.scheme.inputs)
        if any(t is not None for t in tangents[:n]):
            results = SmoothBackward.apply(call, needs, *tangents[:n], *tensors[n:])
        if any(t is not None for t in tangents[n:]):
            second = SmoothDoubleBackward.apply(call, needs, *tangents[n:], *tensors)[n:]
            results = tuple([add(a, b) for a, b in zip(results, second, strict=True)])
        return results

    @staticmethod
    def vmap(info, in_dims, call, needs, *tensors):
        written = call.scheme.written(call.scheme.inputs, needs)
        return _batched(functools.partial(SmoothBackward.apply, call, needs), info, in_dims, call, tensors, written)


class SmoothDoubleBackward(_Derivative):
    """``(directions, cotangents, inputs) -> `` gradients of the cotangents, then of the inputs."""

    @staticmethod
    def forward(call, needs, *tensors):
        return call.double(needs, *tensors)

    @staticmethod
    def backward(ctx, *upstream):
        results = SmoothDoubleBackward._plain(ctx, _library.vjp_of_double_backward, upstream)
        return (None, None, *only(results, ctx.needs_input_grad[2:]))

    @staticmethod
    def jvp(ctx, _, __, *tangents):
        scheme = ctx.call.scheme
        results = SmoothDoubleBackward._plain(ctx, _library.jvp_of_double_backward, tangents)
        written = scheme.written(scheme.outputs + scheme.inputs, ctx.needs)
        return tuple([x if w else x.new_empty(0) for x, w in zip(results, written, strict=True)])

    @staticmethod
    def _plain(ctx, derivative, vectors):
        """``derivative`` of the plain formula, for or in the direction of ``vectors``."""
        scheme, tensors = ctx.call.scheme, ctx.saved_tensors
        n, m = len(scheme.inputs), len(scheme.outputs)
        inputs = [tensors[n + m] if x is None else x for x in tensors[n + m :]]  # what only passes through is not kept
        reference = scheme.reference(*ctx.call.options)
        return derivative(reference, tensors[:n], tensors[n : n + m], tuple(inputs), vectors)

    @staticmethod
    def vmap(info, in_dims, call, needs, *tensors):
        written = call.scheme.written(call.scheme.outputs + call.scheme.inputs, needs)
        apply = functools.partial(SmoothDoubleBackward.apply, call, needs)
        return _batched(apply, info, in_dims, call, tensors, written)


def _batched(apply, info, in_dims, call: Call, tensors: Maybe, written: Sequence[Any]) -> tuple[Tensors, tuple]:
    """By the op's rule; vmap wants a batch dimension of every result, of those that were not written too."""
    size = info.batch_size
    results = call.scheme.batching(apply, size, in_dims[2:], tensors, written)
    results = tuple([x if w else x.new_empty(size, 0) for x, w in zip(results, written, strict=True)])
    return results, (0,) * len(results)
