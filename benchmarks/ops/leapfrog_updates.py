"""``leapfrog_update``, ``annealed_leapfrog_update``: what trajectories do between a potential's gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops._row import Case, Row
from hvae_kernels.ops.annealed_leapfrog import annealed_leapfrog_update
from hvae_kernels.ops.leapfrog_update import leapfrog_update

CASES = tuple(
    Case(f"({batch}, {features})", {"batch": batch, "features": features})
    for batch, features in ((4096, 400), (10, 25))
)


def _rows(n: int, dtype: torch.dtype, device: torch.device | str, seed: int, *shape: int) -> tuple[Tensor, ...]:
    """So many of ``(batch, features)``, then uniform numbers of ``shape``."""
    generator = torch.Generator().manual_seed(seed)
    rows = (torch.randn(shape[:2], generator=generator) for _ in range(n))
    return tuple(x.to(dtype).to(device) for x in (*rows, torch.rand(shape[2:], generator=generator) / 2 + 0.1))


def _formula(z: Tensor, rho: Tensor, grad: Tensor, decay: Tensor, kick: Tensor, drift: Tensor) -> tuple[Tensor, Tensor]:
    rho = decay * rho - kick * grad
    return z + drift * rho, rho


def _inputs(dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, features: int) -> tuple[Tensor, ...]:
    *rows, scales = _rows(3, dtype, device, seed, batch, features, 2, features)
    return *rows, scales[0, 0].clone(), scales[0].clone(), scales[1].clone()


def _annealed_formula(
    z: Tensor, rho: Tensor, base_grad: Tensor, grad: Tensor, noise: Tensor, kicks: Tensor, mixing: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    ended = rho - kicks[0] * base_grad - kicks[1] * grad
    refreshed = mixing[0] * ended + mixing[1] * noise
    rho = refreshed - kicks[2] * base_grad - kicks[3] * grad
    return z + kicks[4] * rho, rho, (refreshed.square() - ended.square()).sum(-1) / 2


def _annealed_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, features: int
) -> tuple[Tensor, ...]:
    *rows, kicks = _rows(5, dtype, device, seed, batch, features, 5, features)
    return *rows, kicks, torch.tensor([0.6, 0.8], dtype=dtype, device=device)


def _row(op, formula, inputs, read: int, operations: int) -> Row:
    """Of an op that reads ``read`` tensors of ``z``'s shape: its gradient reads one fewer, as ``z`` passes through."""
    return Row(
        name=op.__name__,
        op=op,
        formula=formula,
        inputs=inputs,
        forward_bytes=lambda element_size, batch, features: (read + 2) * element_size * batch * features,
        # and both cotangents; writes a gradient of each but z's, which is a cotangent as it stands
        backward_bytes=lambda element_size, batch, features: 2 * read * element_size * batch * features,
        flops=lambda direction, batch, features: (
            {"forward": operations, "backward": 2 * operations}[direction] * batch * features
        ),
        cases=CASES,
    )


ROWS = (
    _row(leapfrog_update, _formula, _inputs, 3, 5),
    _row(annealed_leapfrog_update, _annealed_formula, _annealed_inputs, 5, 16),
)
