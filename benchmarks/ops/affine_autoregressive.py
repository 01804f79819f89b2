"""``affine_autoregressive``."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops._row import Case, Row
from hvae_kernels import functional


def tail_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, features: int
) -> tuple[Tensor, ...]:
    """Random arguments of ``affine_autoregressive``."""
    generator = torch.Generator().manual_seed(seed)
    tensors = torch.randn(3, batch, features, generator=generator, dtype=torch.float64)
    return tuple(x.to(dtype).to(device).contiguous() for x in tensors)


def printed_tail(z: Tensor, shift: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """As one writes it."""
    return z * log_scale.exp() + shift, log_scale.sum(-1)


def _tail_case(batch: int, features: int, **options) -> Case:
    return Case(f"({batch}, {features})", {"batch": batch, "features": features}, **options)


ROWS = (
    Row(
        name="affine_autoregressive",
        op=functional.affine_autoregressive,
        formula=printed_tail,
        inputs=tail_inputs,
        # read z, shift, log_scale; write z'
        forward_bytes=lambda element_size, batch, features: 4 * element_size * batch * features,
        # read the cotangent, z, log_scale; write two gradients: that of shift is the cotangent itself
        backward_bytes=lambda element_size, batch, features: 5 * element_size * batch * features,
        flops=lambda direction, batch, features: {"forward": 14, "backward": 15}[direction] * batch * features,
        cases=(_tail_case(4096, 400), _tail_case(10, 25), _tail_case(65536, 400, devices=("cuda",))),
    ),
)
