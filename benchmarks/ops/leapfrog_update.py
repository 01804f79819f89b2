"""``leapfrog_update``: what a trajectory does between two gradients of its potential."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops._row import Case, Row
from hvae_kernels.ops.leapfrog_update import leapfrog_update

CASES = tuple(
    Case(f"({batch}, {features})", {"batch": batch, "features": features})
    for batch, features in ((4096, 400), (10, 25))
)


def rows(n: int, dtype: torch.dtype, device: torch.device | str, seed: int, *shape: int) -> tuple[Tensor, ...]:
    """So many of ``(batch, features)``, then uniform numbers of ``shape``."""
    generator = torch.Generator().manual_seed(seed)
    normal = (torch.randn(shape[:2], generator=generator) for _ in range(n))
    return tuple(x.to(dtype).to(device) for x in (*normal, torch.rand(shape[2:], generator=generator) / 2 + 0.1))


def _formula(z: Tensor, rho: Tensor, grad: Tensor, decay: Tensor, kick: Tensor, drift: Tensor) -> tuple[Tensor, Tensor]:
    rho = decay * rho - kick * grad
    return z + drift * rho, rho


def _inputs(dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, features: int) -> tuple[Tensor, ...]:
    *states, scales = rows(3, dtype, device, seed, batch, features, 2, features)
    return *states, scales[0, 0].clone(), scales[0].clone(), scales[1].clone()


def update_row(op, formula, inputs, read: int, operations: int) -> Row:
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


ROWS = (update_row(leapfrog_update, _formula, _inputs, 3, 5),)
