"""``planar_flow``."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops._row import Row, steps_case
from hvae_kernels import functional
from hvae_kernels.ops.planar_flow import reference


def planar_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, features: int, steps: int
) -> tuple[Tensor, ...]:
    """Random arguments of ``planar_flow``, K invertible layers of order 1."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, features, generator=generator, dtype=torch.float64)
    u, w = torch.randn(2, steps, features, generator=generator, dtype=torch.float64) / features**0.5
    product, square = (u * w).sum(-1, keepdim=True), w.square().sum(-1, keepdim=True)
    u = u + (product.abs() - product) / square * w
    return tuple(x.to(dtype).to(device).contiguous() for x in (z, u, w, 0.1 * torch.ones(steps)))


CASES = (
    steps_case(4096, 400, 30, gate={"batch": 257}),
    steps_case(10, 25, 30),
    steps_case(10, 25, 1),
)

ROWS = (
    Row(
        name="planar_flow",
        op=functional.planar_flow,
        formula=reference.planar_flow,
        inputs=planar_inputs,
        # read z for the projections and for the sum; write z_K
        forward_bytes=lambda element_size, batch, features, steps: 3 * element_size * batch * features,
        # read the cotangent twice and z; write one gradient
        backward_bytes=lambda element_size, batch, features, steps: 4 * element_size * batch * features,
        flops=lambda direction, batch, features, steps: (
            {"forward": 4, "backward": 8}[direction] * batch * features * steps
        ),
        cases=CASES,
    ),
)
