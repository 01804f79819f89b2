"""The constraint that makes planar layers invertible, and its derivatives."""

from __future__ import annotations

import torch
from torch import Tensor


def constrained(u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """``(u_hat, softplus(u.w))`` from the free ``u``; ``u_hat.w = softplus(u.w) - 1``."""
    product = (u * w).sum(-1)
    target = torch.nn.functional.softplus(product)
    return u + ((target - 1 - product) / w.square().sum(-1)).unsqueeze(-1) * w, target


def constrained_vjp(grad_u: Tensor, grad_target: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``u`` and ``w`` from cotangents of :func:`constrained`'s results."""
    product, square = (u * w).sum(-1, keepdim=True), w.square().sum(-1, keepdim=True)
    lack = torch.nn.functional.softplus(product) - 1 - product
    slope = torch.sigmoid(product)
    along = (grad_u * w).sum(-1, keepdim=True) / square
    by_product = grad_target.unsqueeze(-1) * slope + along * (slope - 1)
    ratio = lack / square
    return torch.addcmul(grad_u, by_product, w), by_product * u + ratio * (grad_u - 2 * along * w)


def constrained_jvp(u: Tensor, w: Tensor, u_tangent: Tensor | None, w_tangent: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tangents of :func:`constrained`'s results; None is zero."""
    u_tangent, w_tangent = (torch.zeros_like(u) if x is None else x for x in (u_tangent, w_tangent))
    product, square = (u * w).sum(-1, keepdim=True), w.square().sum(-1, keepdim=True)
    slope = torch.sigmoid(product)
    ratio = (torch.nn.functional.softplus(product) - 1 - product) / square
    by_product = (u_tangent * w + u * w_tangent).sum(-1, keepdim=True)
    d_ratio = ((slope - 1) * by_product - 2 * ratio * (w * w_tangent).sum(-1, keepdim=True)) / square
    return u_tangent + d_ratio * w + ratio * w_tangent, (slope * by_product).squeeze(-1)
