"""Schemas, fakes and the autograd Functions of stacked planar layers.

The layers are products with ``u`` and ``w``, left to BLAS, around a recursion on K numbers a row, ``planar_recursion``:
from the projections ``P (K, N)`` and the table of couplings ``(K, K)`` to ``H``, the layers' tanh, their slopes and
``log_abs_det``. ``H`` and the slopes are outputs of the Function too, saved for the backward pass: its derivatives in
terms of them are plain PyTorch and a linear recursion, ``planar_recursion_solve``, whose derivatives are that recursion
again; so the op is differentiable for ever. The backward pass without a graph is one fused kernel. All kernels take
replicas, ``(R, K, N)``: the dimensions of ``vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction
from hvae_kernels._triton.launch import lazy

IMPLEMENTATIONS = ("cpp", "triton")

#: BLAS adds over the batch in one long float32 chain: beyond this many rows, products of runs of rows are added.
RUN = 128


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _forward_fake(projections, table, offset):
    rows = (*projections.shape[:-2], projections.shape[-1])
    return _empty(projections), _empty(projections), projections.new_empty(rows)


def _backward_fake(grad_h, grad_log_abs_det, h, slope, table, offset, needs_table):
    return _empty(h), _empty(table) if needs_table else table.new_empty(0)


RAW_FORWARD = _library.define(
    "planar_recursion",
    "(Tensor projections, Tensor table, float offset) -> (Tensor, Tensor, Tensor)",
    _forward_fake,
    IMPLEMENTATIONS,
)
RAW_BACKWARD = _library.define(
    "planar_recursion_backward",
    "(Tensor? grad_h, Tensor? grad_log_abs_det, Tensor h, Tensor slope, Tensor table, float offset, bool needs_table)"
    " -> (Tensor, Tensor)",
    _backward_fake,
    IMPLEMENTATIONS,
)
RAW_SOLVE = _library.define(
    "planar_recursion_solve",
    "(Tensor constant, Tensor slope, Tensor table, bool transposed) -> Tensor",
    lambda constant, slope, table, transposed: _empty(constant),
    IMPLEMENTATIONS,
)

for _name in ("planar_recursion", "planar_recursion_backward", "planar_recursion_solve"):
    _library.implement(_name, "triton", lazy("hvae_kernels.ops.planar_flow.triton", _name))


@dataclass(frozen=True)
class _Call:
    """What a call has besides tensors; ``constrained`` layers bring ``1 + u.w`` as a tensor of their own."""

    implementation: str
    constrained: bool

    @property
    def offset(self) -> float:
        """What the table's diagonal lacks to ``1 + u.w``."""
        return 0.0 if self.constrained else 1.0

    def table(self, u: Tensor, w: Tensor, target: Tensor | None) -> Tensor:
        """``w_i . u_j`` below the diagonal, which with :attr:`offset` is ``1 + u.w``."""
        table = w @ u.mT
        return table if target is None else torch.diagonal_scatter(table, target, dim1=-2, dim2=-1)

    def forward(self, z: Tensor, u: Tensor, w: Tensor, b: Tensor, target: Tensor | None) -> tuple[Tensor, ...]:
        """``(z_K, log_abs_det, H, slope)``, nothing recorded."""
        projections = _add_product(b.unsqueeze(-1), w, z.mT)
        forward = RAW_FORWARD[self.implementation]
        h, slope, log_abs_det = forward(projections, self.table(u, w, target), self.offset)
        return _add_product(z, h.mT, u), log_abs_det, h, slope

    def gradients(
        self, wanted: Sequence[bool], cotangents: tuple[Tensor | None, ...], saved: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """For z, u, w, b and the target, from cotangents of ``z_K``, ``log_abs_det`` and ``H``."""
        grad_output, grad_log_abs_det, grad_h = cotangents
        z, u, w, target, h, slope = saved
        grad_h = _add(grad_h, None if grad_output is None else u @ grad_output.mT)
        table, wants_table = self.table(u, w, target), wanted[1] or wanted[2] or wanted[4]
        if torch.is_grad_enabled():
            y, d_table = self.pull_back(grad_h, grad_log_abs_det, h, slope, table)
        else:
            tensors = (grad_h, grad_log_abs_det, h, slope, table)
            y, d_table = RAW_BACKWARD[self.implementation](*tensors, self.offset, wants_table)
        d_z = d_u = None
        if wanted[0]:
            d_z = y.mT @ w if grad_output is None else _add_product(grad_output, y.mT, w)
        below = d_table if target is None or not wants_table else d_table.tril(-1)
        if wanted[1]:
            d_u = below.mT @ w
            if grad_output is not None:
                d_u = d_u + _sum_products(h, grad_output)
        d_w = _add_product(_sum_products(y, z), below, u) if wanted[2] else None
        d_target = d_table.diagonal(dim1=-2, dim2=-1) if wanted[4] else None
        return d_z, d_u, d_w, y.sum(-1) if wanted[3] else None, d_target

    def determinants(self, h: Tensor, slope: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """``(1 + u.w, det)`` of each layer and row, differentiable."""
        s = table.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) + self.offset
        return s, torch.where(s < 0.5, h * h + slope * s, 1 + slope * (s - 1))

    def pull_back(
        self, grad_h: Tensor | None, grad_log_abs_det: Tensor | None, h: Tensor, slope: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cotangents of the projections and of the table, as a differentiable function of all tensors.

        In double: rounding K numbers a row at every operation would cost second derivatives a digit.
        """
        dtype = h.dtype
        grad_h, grad_log_abs_det, h, slope, table = (
            x if x is None else x.double() for x in (grad_h, grad_log_abs_det, h, slope, table)
        )
        s, det = self.determinants(h, slope, table)
        cotangent = torch.zeros_like(h) if grad_h is None else grad_h
        d_s = torch.zeros_like(s).squeeze(-1)
        if grad_log_abs_det is not None:
            weight = grad_log_abs_det.unsqueeze(-2) / det
            cotangent = cotangent + 2 * h * (1 - s) * weight
            d_s = (slope * weight).sum(-1)
        y = Solve.apply(self.implementation, True, slope * cotangent, slope, table)
        d_table = _sum_products(y, h.mT).tril(-1) + torch.diag_embed(d_s)
        return y.to(dtype), d_table.to(dtype)


def _add_product(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a + b @ c`` for matrices or stacks of them."""
    return torch.addmm(a, b, c) if b.dim() == 2 else torch.baddbmm(a, b, c)


def _sum_products(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` over a long inner dimension, in runs."""
    runs = x.shape[-1] // RUN
    if runs < 2:
        return x @ y
    whole = runs * RUN
    first = x[..., :whole].unflatten(-1, (runs, RUN)).transpose(-2, -3)
    product = (first @ y[..., :whole, :].unflatten(-2, (runs, RUN))).sum(-3)
    return product + x[..., whole:] @ y[..., whole:, :]


class PlanarFlow(OpFunction):
    """``(z, u, w, b, 1 + u.w or None) -> (z_K, log_abs_det, H, slope)``."""

    @staticmethod
    def forward(call, *inputs):
        return call.forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, z, u, w, _, target = inputs
        saved = (z, u, w, target, *output[2:])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_output, grad_log_abs_det, grad_h, grad_slope):
        if grad_output is None and grad_log_abs_det is None and grad_h is None and grad_slope is None:
            return (None,) * 6
        z, u, w, target, h, slope = ctx.saved_tensors
        grad_h = _add(grad_h, None if grad_slope is None else -2 * h * grad_slope)
        cotangents, saved = (grad_output, grad_log_abs_det, grad_h), (z, u, w, target, h, slope)
        return None, *ctx.call.gradients(ctx.needs_input_grad[1:], cotangents, saved)

    @staticmethod
    def jvp(ctx, _, z_tangent, u_tangent, w_tangent, b_tangent, target_tangent):
        call = ctx.call
        z, u, w, target, h, slope = ctx.saved_tensors
        table = call.table(u, w, target)
        s, det = call.determinants(h, slope, table)
        constant, d_table = torch.zeros_like(h), torch.zeros_like(table)
        if z_tangent is not None:
            constant = constant + w @ z_tangent.mT
        if w_tangent is not None:
            constant = constant + w_tangent @ z.mT
            d_table = d_table + w_tangent @ u.mT
        if b_tangent is not None:
            constant = constant + b_tangent.unsqueeze(-1)
        if u_tangent is not None:
            d_table = d_table + w @ u_tangent.mT
        d_s = d_table.diagonal(dim1=-2, dim2=-1) if target is None else target_tangent
        constant = slope * (constant + d_table.tril(-1) @ h)
        d_h = Solve.apply(call.implementation, False, constant, slope, table)
        d_det = 2 * h * (1 - s) * d_h
        if d_s is not None:
            d_det = d_det + slope * d_s.unsqueeze(-1)
        d_output = _add(d_h.mT @ u, z_tangent)
        d_output = _add(d_output, None if u_tangent is None else h.mT @ u_tangent)
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
        products = _sum_products(x, y.mT) if ctx.transposed else _sum_products(y, x.mT)
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


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _fold(
    size: int, tensors: tuple[Tensor | None, ...], dims: tuple[int | None, ...]
) -> tuple[tuple[int, ...], list[Tensor | None]]:
    """The vmapped dimension joins the replicas; returns the leading dimensions to undo that, and the tensors."""
    batched = [
        x if x is None else x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, dims, strict=True)
    ]
    leading = tuple(batched[0].shape[:-2])
    return leading, [x if x is None else x.flatten(0, len(leading) - 1) for x in batched]


@_library.in_graph
def call(
    implementation: str, z: Tensor, u: Tensor, w: Tensor, b: Tensor, target: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The differentiable op. Dynamo must not look inside: it loses the second order of Functions it traces itself."""
    call = _Call(implementation, target is not None)
    results = call.forward(z, u, w, b, target) if _library.nothing_differentiates() else None
    return (results or PlanarFlow.apply(call, z, u, w, b, target))[:2]


def call_with_vjp(
    implementation: str, z: Tensor, u: Tensor, w: Tensor, b: Tensor, target: Tensor | None
) -> tuple[tuple[Tensor, Tensor], Callable[[Tensor, Tensor], tuple[Tensor | None, ...]]]:
    """The op, and the gradients of all five tensors from its results', without the autograd engine."""
    call = _Call(implementation, target is not None)
    output, log_abs_det, h, slope = call.forward(z, u, w, b, target)
    wanted = (True,) * 4 + (target is not None,)

    def gradients(grad_output: Tensor, grad_log_abs_det: Tensor) -> tuple[Tensor | None, ...]:
        return call.gradients(wanted, (grad_output, grad_log_abs_det, None), (z, u, w, target, h, slope))

    return (output, log_abs_det), gradients
