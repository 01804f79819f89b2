"""Reference: the layers one after the other, as the literature writes them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hvae_kernels.ops.planar_flow.constraint import constrained


def planar_flow(z: Tensor, u: Tensor, w: Tensor, b: Tensor, constrain: bool = False) -> tuple[Tensor, Tensor]:
    """K planar layers; arguments as for the public function."""
    if u.dim() == 3 and len(u):
        return torch.func.vmap(functools.partial(planar_flow, constrain=constrain))(z, u, w, b)
    target = None
    if constrain:
        u, target = constrained(u, w)
    log_abs_det = z.new_zeros(z.shape[:-1])
    for k in range(len(b)):
        t = torch.tanh(z @ w[k] + b[k])
        slope = 1 - t * t
        det = 1 + slope * (u[k] * w[k]).sum(-1) if target is None else t * t + slope * target[k]
        log_abs_det = log_abs_det + det.abs().log()
        z = z + t.unsqueeze(-1) * u[k]
    return z + 0, log_abs_det  # without layers a new tensor all the same
