"""The layers as products around a recursion, in plain PyTorch: what derivatives of any order and Triton are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hvae_kernels.ops.planar_flow import constraint

#: BLAS adds over the batch in one long float32 chain: beyond this many rows, products of runs of rows are added.
RUN = 128

#: Of ``(grad_h, grad_log_abs_det, h, slope, table, s)``: cotangents of the projections, of the table and of s.
PullBack = Callable[..., tuple[Tensor, Tensor, Tensor]]


def effective(u: Tensor, w: Tensor, constrain: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``(u, table, s)`` of the layers: the table ``w_i . u_j``, read below its diagonal, and ``s = 1 + u.w``."""
    if constrain:
        u, s = constraint.constrained(u, w)
    else:
        # not the table's diagonal: Inductor writes over a table of which its backward pass holds a view too
        s = 1 + (u * w).sum(-1)
    return u, w @ u.mT, s


def determinants(h: Tensor, slope: Tensor, s: Tensor) -> Tensor:
    """That of each layer and row, differentiable."""
    s = s.unsqueeze(-1)
    return torch.where(s < 0.5, h * h + slope * s, 1 + slope * (s - 1))


def gradients(
    pull_back: PullBack,
    wanted: Sequence[bool],
    cotangents: tuple[Tensor | None, ...],
    saved: tuple[Tensor, ...],
    constrain: bool,
) -> tuple[Tensor | None, ...]:
    """For z, u, w and b, from cotangents of ``z_K``, ``log_abs_det`` and ``H``; all of the layers' if any is wanted."""
    grad_output, grad_log_abs_det, grad_h = cotangents
    z, u, w, h, slope = saved
    layers, table, s = effective(u, w, constrain)
    grad_h = add(grad_h, None if grad_output is None else layers @ grad_output.mT)
    y, d_table, d_s = pull_back(grad_h, grad_log_abs_det, h, slope, table, s)
    d_z = None
    if wanted[0]:
        d_z = y.mT @ w if grad_output is None else add_product(grad_output, y.mT, w)
    if not any(wanted[1:]):
        return d_z, None, None, None
    d_u = d_table.mT @ w
    if grad_output is not None:
        d_u = d_u + sum_products(h, grad_output)
    d_w = add_product(sum_products(y, z), d_table, layers)
    if constrain:
        d_u, more = constraint.constrained_vjp(d_u, d_s, u, w)
    else:
        d_u, more = d_u + d_s.unsqueeze(-1) * w, d_s.unsqueeze(-1) * u
    return d_z, d_u, d_w + more, y.sum(-1)


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum, where None is zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def add_product(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a + b @ c`` for matrices or stacks of them."""
    return torch.addmm(a, b, c) if b.dim() == 2 else torch.baddbmm(a, b, c)


def sum_products(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` over a long inner dimension, in runs."""
    runs = x.shape[-1] // RUN
    if runs < 2:
        return x @ y
    whole = runs * RUN
    first = x[..., :whole].unflatten(-1, (runs, RUN)).transpose(-2, -3)
    product = (first @ y[..., :whole, :].unflatten(-2, (runs, RUN))).sum(-3)
    return product + x[..., whole:] @ y[..., whole:, :]
