"""Schemas, fakes and the autograd Functions of ``draw_read`` and ``draw_write``.

The first backward is a kernel. A backward pass that is itself differentiated, and forward mode, are those of the
reference: rarely asked for, so plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels._op import empty, folded, kernel, only, returns
from hvae_kernels.ops.draw import reference

#: Bits of ``needs``.
SOURCE, ATTENTION = 1, 2

READ = kernel(
    __package__,
    "draw_read",
    f"(Tensor images, Tensor attention, int size) -> {returns(1)}",
    lambda images, attention, size: images.new_empty((*images.shape[:2], size, size)),
)
WRITE = kernel(
    __package__,
    "draw_write",
    f"(Tensor patch, Tensor attention, int height, int width) -> {returns(1)}",
    lambda patch, attention, height, width: patch.new_empty((*patch.shape[:2], height, width)),
)


def _gradients(grad: Tensor, source: Tensor, attention: Tensor, needs: int) -> tuple[Tensor, Tensor]:
    return empty(source, needs & SOURCE), empty(attention, needs & ATTENTION)


READ_BACKWARD = kernel(
    __package__,
    "draw_read_backward",
    f"(Tensor grad, Tensor images, Tensor attention, int needs) -> {returns(2)}",
    _gradients,
)
WRITE_BACKWARD = kernel(
    __package__,
    "draw_write_backward",
    f"(Tensor grad, Tensor patch, Tensor attention, int needs) -> {returns(2)}",
    _gradients,
)


@dataclass(frozen=True)
class Call:
    """Which way, by which implementation, and the size of the result."""

    implementation: str
    writes: bool
    sizes: tuple[int, ...]

    def forward(self, source: Tensor, attention: Tensor) -> Tensor:
        """The raw forward kernel."""
        return (WRITE if self.writes else READ)[self.implementation](source, attention, *self.sizes)

    def backward(self, grad: Tensor, source: Tensor, attention: Tensor, needs: int) -> tuple[Tensor, Tensor]:
        """The raw backward kernel."""
        return (WRITE_BACKWARD if self.writes else READ_BACKWARD)[self.implementation](grad, source, attention, needs)

    @property
    def reference(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The plain form."""
        if self.writes:
            return lambda patch, attention: reference.draw_write(patch, attention, (self.sizes[0], self.sizes[1]))
        return lambda images, attention: reference.draw_read(images, attention, self.sizes[0])


class Draw(OpFunction):
    """``(images or patch, attention) -> patch or images``; saves nothing but its inputs."""

    @staticmethod
    def forward(call, source, attention):
        return call.forward(source, attention)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, grad):
        tensors, wanted = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            views = (x.view_as(x) for x in tensors)  # with the saved tensors themselves torch 2.13 fails under vmap
            return (None, *torch.func.vjp(ctx.call.reference, *views)[1](grad))
        needs = SOURCE * wanted[0] | ATTENTION * wanted[1]
        return (None, *only(ctx.call.backward(grad, *tensors, needs), wanted))

    @staticmethod
    def jvp(ctx, _, *tangents):
        tensors = ctx.saved_tensors
        given = tuple(torch.zeros_like(x) if t is None else t for t, x in zip(tangents, tensors, strict=True))
        return torch.func.jvp(ctx.call.reference, tensors, given)[1]

    @staticmethod
    def vmap(info, in_dims, call, *tensors):
        source, attention = folded(info.batch_size, tensors, in_dims[1:])
        result = Draw.apply(call, source.flatten(0, 1), attention.flatten(0, 1))
        return result.unflatten(0, source.shape[:2]), 0


@_library.opaque_to_dynamo
def call(implementation: str, writes: bool, sizes: tuple[int, ...], source: Tensor, attention: Tensor) -> Tensor:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    how = Call(implementation, writes, sizes)
    if _library.nothing_differentiates(source, attention):
        return how.forward(source, attention)
    return Draw.apply(how, source, attention)
