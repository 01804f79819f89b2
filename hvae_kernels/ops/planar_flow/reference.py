"""Reference: the layers one after the other, as the literature writes them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from hvae_kernels.ops.planar_flow.constraint import constrained


def planar_flow(z: Tensor, u: Tensor, w: Tensor, b: Tensor, constrain: bool = False) -> tuple[Tensor, Tensor]:
    """K planar layers; arguments as for the public function."""
    amortised = u.dim() > z.dim() > 1
    if u.dim() == 3 and not amortised:
        if not len(u):
            return z + 0, z.new_zeros(z.shape[:-1])
        return torch.func.vmap(functools.partial(planar_flow, constrain=constrain))(z, u, w, b)
    targets: Iterable[Tensor | None] = itertools.repeat(None)
    if constrain:
        u, s = constrained(u, w)
        targets = s.unbind(-1)
    log_abs_det = z.new_zeros(z.shape[:-1])
    for u_k, w_k, b_k, target in zip(u.unbind(-2), w.unbind(-2), b.unbind(-1), targets, strict=False):
        t = torch.tanh(((z * w_k).sum(-1) if amortised else z @ w_k) + b_k)
        slope = 1 - t * t
        det = 1 + slope * (u_k * w_k).sum(-1) if target is None else t * t + slope * target
        log_abs_det = log_abs_det + det.abs().log()
        z = z + t.unsqueeze(-1) * u_k
    return z + 0, log_abs_det  # without layers a new tensor all the same
