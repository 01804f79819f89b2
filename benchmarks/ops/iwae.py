"""``iwae_bound``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.ops._row import Case, Row
from hvae_kernels import functional


def iwae_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, samples: int, batch: int
) -> tuple[Tensor, ...]:
    """Random log-weights of ``iwae_bound``."""
    generator = torch.Generator().manual_seed(seed)
    return (5 * torch.randn(samples, batch, generator=generator, dtype=dtype).to(device),)


def iwae_bound(log_weights: Tensor) -> tuple[Tensor]:
    """The op."""
    return (functional.iwae_bound(log_weights),)


def printed_iwae(log_weights: Tensor) -> tuple[Tensor]:
    """As one writes it."""
    return (log_weights.logsumexp(0) - math.log(log_weights.shape[0]),)


def _iwae_case(samples: int, batch: int, **options) -> Case:
    return Case(f"({samples}, {batch})", {"samples": samples, "batch": batch}, **options)


ROWS = (
    Row(
        name="iwae_bound",
        op=iwae_bound,
        formula=printed_iwae,
        inputs=iwae_inputs,
        forward_bytes=lambda element_size, samples, batch: element_size * samples * batch,  # read the weights
        # read them again, write their gradient
        backward_bytes=lambda element_size, samples, batch: 2 * element_size * samples * batch,
        flops=lambda direction, samples, batch: {"forward": 20, "backward": 22}[direction] * samples * batch,
        cases=(_iwae_case(40, 256), _iwae_case(5000, 1000)),
    ),
)
