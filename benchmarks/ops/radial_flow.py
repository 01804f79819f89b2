"""``radial_flow``."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops._row import Row
from benchmarks.ops.planar_flow import CASES
from hvae_kernels import functional
from hvae_kernels.ops.radial_flow import reference


def radial_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, features: int, steps: int
) -> tuple[Tensor, ...]:
    """Random arguments of ``radial_flow``, K invertible layers of order 1."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, features, generator=generator, dtype=torch.float64)
    center = torch.randn(steps, features, generator=generator, dtype=torch.float64)
    alpha, share = torch.rand(2, steps, generator=generator, dtype=torch.float64) + 0.5
    return tuple(x.to(dtype).to(device).contiguous() for x in (z, center, alpha, alpha * (share - 0.75)))


ROWS = (
    Row(
        name="radial_flow",
        op=functional.radial_flow,
        formula=reference.radial_flow,
        inputs=radial_inputs,
        # read z; write z_K
        forward_bytes=lambda element_size, batch, features, steps: 2 * element_size * batch * features,
        # read the cotangent and z; write one gradient
        backward_bytes=lambda element_size, batch, features, steps: 3 * element_size * batch * features,
        flops=lambda direction, batch, features, steps: (
            {"forward": 6, "backward": 14}[direction] * batch * features * steps
        ),
        cases=CASES,
    ),
)
