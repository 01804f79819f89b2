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


def amortised_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, features: int, steps: int
) -> tuple[Tensor, ...]:
    """The same with K layers for every row."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, features, generator=generator, dtype=torch.float64)
    u, w = torch.randn(2, batch, steps, features, generator=generator, dtype=torch.float64) / features**0.5
    product, square = (u * w).sum(-1, keepdim=True), w.square().sum(-1, keepdim=True)
    u = u + (product.abs() - product) / square * w
    return tuple(x.to(dtype).to(device).contiguous() for x in (z, u, w, 0.1 * torch.ones(batch, steps)))


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
    Row(
        name="planar_flow_amortised",
        op=functional.planar_flow,
        formula=reference.planar_flow,
        inputs=amortised_inputs,
        # read u, w, b and z; write z_K
        forward_bytes=lambda element_size, batch, features, steps: (
            element_size * batch * (2 * steps * features + steps + 2 * features)
        ),
        # read u, w, the projections, z and the cotangent; write all gradients
        backward_bytes=lambda element_size, batch, features, steps: (
            element_size * batch * (4 * steps * features + 2 * steps + 3 * features)
        ),
        flops=lambda direction, batch, features, steps: (
            {"forward": 6, "backward": 20}[direction] * batch * features * steps
        ),
        cases=(steps_case(1000, 40, 80, gate={"batch": 33}), steps_case(1000, 40, 10)),
    ),
)
