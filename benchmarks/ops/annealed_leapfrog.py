"""``annealed_leapfrog_update``: what an annealed trajectory does between two pairs of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops.leapfrog_update import rows, update_row
from hvae_kernels.ops.annealed_leapfrog import annealed_leapfrog_update


def _formula(
    z: Tensor, rho: Tensor, base_grad: Tensor, grad: Tensor, noise: Tensor, kicks: Tensor, mixing: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    ended = rho - kicks[0] * base_grad - kicks[1] * grad
    refreshed = mixing[0] * ended + mixing[1] * noise
    rho = refreshed - kicks[2] * base_grad - kicks[3] * grad
    return z + kicks[4] * rho, rho, (refreshed.square() - ended.square()).sum(-1) / 2


def _inputs(dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, features: int) -> tuple[Tensor, ...]:
    *states, kicks = rows(5, dtype, device, seed, batch, features, 5, features)
    return *states, kicks, torch.tensor([0.6, 0.8], dtype=dtype, device=device)


ROWS = (update_row(annealed_leapfrog_update, _formula, _inputs, 5, 16),)
