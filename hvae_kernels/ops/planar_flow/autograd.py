"""Schemas, fakes and the autograd Functions of stacked planar layers.

The layers are products with ``u`` and ``w`` around a recursion on K numbers a row, which leaves ``H``, the tanh of each
layer, and the slopes there. Both are outputs of the Function too, saved for the backward pass: its derivatives in terms
of them are plain PyTorch and a linear recursion, ``planar_recursion_solve``, whose derivatives are it again; so the op
is differentiable to any order. The backward pass without a graph is one fused kernel. All kernels take replicas,
``(R, B, d)``: the dimensions of ``vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels._op import empty, kernel
from hvae_kernels.ops.planar_flow import algebra, constraint

#: Bits of ``needs``: which groups of gradients the raw backward pass computes.
NEEDS_STATE, NEEDS_PARAMETERS = 1, 2


def _forward_fake(z, u, w, b, constrain, keep):
    state = (*u.shape[:-1], z.shape[-2]) if keep else (0,)
    return empty(z), z.new_empty(z.shape[:-1]), z.new_empty(state), z.new_empty(state)


def _backward_fake(grad_output, grad_log_abs_det, grad_h, z, u, w, h, slope, constrain, needs):
    shapes = (u.shape, u.shape, u.shape[:-1]) if needs & NEEDS_PARAMETERS else ((0,),) * 3
    return empty(z) if needs & NEEDS_STATE else z.new_empty(0), *(u.new_empty(shape) for shape in shapes)


RAW_FORWARD = kernel(
    __package__,
    "planar_flow",
    "(Tensor z, Tensor u, Tensor w, Tensor b, bool constrain, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
)
RAW_BACKWARD = kernel(
    __package__,
    "planar_flow_backward",
    "(Tensor? grad_output, Tensor? grad_log_abs_det, Tensor? grad_h, Tensor z, Tensor u, Tensor w, Tensor h,"
    " Tensor slope, bool constrain, int needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
RAW_SOLVE = kernel(
    __package__,
    "planar_recursion_solve",
    "(Tensor constant, Tensor slope, Tensor table, bool transposed) -> Tensor",
    lambda constant, slope, table, transposed: empty(constant),
)


@dataclass(frozen=True)
class _Call:
    """What a call has besides tensors."""

    implementation: str
    constrain: bool

    def forward(self, inputs: tuple[Tensor, ...], keep: bool = True) -> tuple[Tensor, ...]:
        """``(z_K, log_abs_det, H, slope)``, nothing recorded; the last two empty unless kept."""
        return RAW_FORWARD[self.implementation](*inputs, self.constrain, keep)

    def gradients(
        self, wanted: Sequence[bool], cotangents: tuple[Tensor | None, ...], saved: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """For z, u, w and b, from cotangents of ``z_K``, ``log_abs_det`` and ``H``."""
        if torch.is_grad_enabled():
            return algebra.gradients(self.pull_back, wanted, cotangents, saved, self.constrain)
        needs = NEEDS_STATE * wanted[0] + NEEDS_PARAMETERS * any(wanted[1:])
        results = RAW_BACKWARD[self.implementation](*cotangents, *saved, self.constrain, needs)
        return tuple(x if wants else None for x, wants in zip(results, wanted, strict=True))

    def pull_back(
        self, grad_h: Tensor | None, grad_log_abs_det: Tensor | None, h: Tensor, slope: Tensor, table: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cotangents of the projections, of the table and of s, as a differentiable function of all tensors.

        In double: rounding K numbers a row at every operation would cost second derivatives a digit.
        """
        dtype = h.dtype
        grad_h, grad_log_abs_det = (x if x is None else x.double() for x in (grad_h, grad_log_abs_det))
        h, slope, table, s = (x.double() for x in (h, slope, table, s))
        cotangent = torch.zeros_like(h) if grad_h is None else grad_h
        d_s = torch.zeros_like(s)
        if grad_log_abs_det is not None:
            weight = grad_log_abs_det.unsqueeze(-2) / algebra.determinants(h, slope, s)
            cotangent = cotangent + 2 * h * (1 - s.unsqueeze(-1)) * weight
            d_s = (slope * weight).sum(-1)
        y = Solve.apply(self.implementation, True, slope * cotangent, slope, table)
        d_table = algebra.sum_products(y, h.mT).tril(-1)
        return y.to(dtype), d_table.to(dtype), d_s.to(dtype)


class PlanarFlow(OpFunction):
    """``(z, u, w, b) -> (z_K, log_abs_det, H, slope)``."""

    @staticmethod
    def forward(call, *inputs):
        return call.forward(inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, z, u, w, _ = inputs
        saved = (z, u, w, *output[2:])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_output, grad_log_abs_det, grad_h, grad_slope):
        if grad_output is None and grad_log_abs_det is None and grad_h is None and grad_slope is None:
            return (None,) * 5
        saved = ctx.saved_tensors
        grad_h = algebra.add(grad_h, None if grad_slope is None else -2 * saved[3] * grad_slope)
        cotangents = (grad_output, grad_log_abs_det, grad_h)
        return None, *ctx.call.gradients(ctx.needs_input_grad[1:], cotangents, saved)

    @staticmethod
    def jvp(ctx, _, z_tangent, u_tangent, w_tangent, b_tangent):
        call = ctx.call
        z, u, w, h, slope = ctx.saved_tensors
        layers, table, s = algebra.effective(u, w, call.constrain)
        d_s = torch.zeros_like(s)
        if call.constrain and (u_tangent is not None or w_tangent is not None):
            u_tangent, d_s = constraint.constrained_jvp(u, w, u_tangent, w_tangent)
        constant, d_table = torch.zeros_like(h), torch.zeros_like(table)
        if z_tangent is not None:
            constant = constant + w @ z_tangent.mT
        if w_tangent is not None:
            constant = constant + w_tangent @ z.mT
            d_table = d_table + w_tangent @ layers.mT
        if b_tangent is not None:
            constant = constant + b_tangent.unsqueeze(-1)
        if u_tangent is not None:
            d_table = d_table + w @ u_tangent.mT
        if not call.constrain:
            d_s = d_table.diagonal(dim1=-2, dim2=-1)
        constant = slope * (constant + d_table.tril(-1) @ h)
        d_h = Solve.apply(call.implementation, False, constant, slope, table)
        d_det = 2 * h * (1 - s.unsqueeze(-1)) * d_h + slope * d_s.unsqueeze(-1)
        det = algebra.determinants(h, slope, s)
        d_output = algebra.add(d_h.mT @ layers, z_tangent)
        d_output = algebra.add(d_output, None if u_tangent is None else h.mT @ u_tangent)
        return d_output, (d_det / det).sum(-2), d_h, -2 * h * d_h

    @staticmethod
    def vmap(info, in_dims, call, *tensors):
        leading, folded = _fold(info.batch_size, tensors, in_dims[1:])
        results = PlanarFlow.apply(call, *folded)
        return tuple(x.unflatten(0, leading) for x in results), (0,) * len(results)


class Solve(OpFunction):
    """``x_i = constant_i + slope_i sum_{j<i} table_ij x_j``; transposed, ``sum_{j>i} table_ji x_j``."""

    @staticmethod
    def forward(implementation, transposed, constant, slope, table):
        return RAW_SOLVE[implementation](constant, slope, table, transposed)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, ctx.transposed, _, slope, table = inputs
        ctx.save_for_backward(slope, table, output)
        ctx.save_for_forward(slope, table, output)

    @staticmethod
    def backward(ctx, grad):
        slope, table, x = ctx.saved_tensors
        below = table.tril(-1)
        forth, back = (below.mT, below) if ctx.transposed else (below, below.mT)
        y = Solve.apply(ctx.implementation, not ctx.transposed, slope * grad, slope, table)
        d_constant = grad + back @ y
        products = algebra.sum_products(x, y.mT) if ctx.transposed else algebra.sum_products(y, x.mT)
        return None, None, d_constant, d_constant * (forth @ x), products.tril(-1)

    @staticmethod
    def jvp(ctx, _, __, constant_tangent, slope_tangent, table_tangent):
        slope, table, x = ctx.saved_tensors
        constant = torch.zeros_like(x) if constant_tangent is None else constant_tangent
        for weight, couplings in ((slope_tangent, table), (slope, table_tangent)):
            if weight is not None and couplings is not None:
                below = couplings.tril(-1)
                constant = constant + weight * ((below.mT if ctx.transposed else below) @ x)
        return Solve.apply(ctx.implementation, ctx.transposed, constant, slope, table)

    @staticmethod
    def vmap(info, in_dims, implementation, transposed, *tensors):
        leading, folded = _fold(info.batch_size, tensors, in_dims[2:])
        return Solve.apply(implementation, transposed, *folded).unflatten(0, leading), 0


def _fold(size: int, tensors: tuple[Tensor, ...], dims: tuple[int | None, ...]) -> tuple[tuple[int, ...], list[Tensor]]:
    """The vmapped dimension joins the replicas; returns the leading dimensions to undo that, and the tensors."""
    batched = [
        x if x is None else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, dims, strict=True)
    ]
    leading = tuple(batched[0].shape[:-2])
    return leading, [x if x is None else x.flatten(0, len(leading) - 1) for x in batched]


@_library.opaque_to_dynamo
def call(implementation: str, constrain: bool, z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    call, inputs = _Call(implementation, constrain), (z, u, w, b)
    results: Any = call.forward(inputs, keep=False) if _library.nothing_differentiates(*inputs) else None
    return (results or PlanarFlow.apply(call, *inputs))[:2]


def call_with_vjp(
    implementation: str, constrain: bool, z: Tensor, u: Tensor, w: Tensor, b: Tensor
) -> tuple[tuple[Tensor, Tensor], Callable[[Tensor, Tensor], tuple[Any, ...]]]:
    """The op, and the gradients of all four tensors from its results', without the autograd engine."""
    call = _Call(implementation, constrain)
    output, log_abs_det, h, slope = call.forward((z, u, w, b))

    def gradients(grad_output: Tensor, grad_log_abs_det: Tensor) -> tuple[Any, ...]:
        return call.gradients((True,) * 4, (grad_output, grad_log_abs_det, None), (z, u, w, h, slope))

    return (output, log_abs_det), gradients
