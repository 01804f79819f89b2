"""``bernoulli_log_prob``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.ops._row import Case, Row
from hvae_kernels import functional


def bernoulli_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, samples: int, batch: int, features: int
) -> tuple[Tensor, ...]:
    """Random logits of ``bernoulli_log_prob``, and pixels that all samples share."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, batch, features, generator=generator)
    pixels = torch.rand(batch, features, generator=generator) < 0.2
    return tuple(x.to(dtype).to(device) for x in (logits, pixels))


def bernoulli_log_prob(logits: Tensor, pixels: Tensor) -> tuple[Tensor]:
    """The op."""
    return (functional.bernoulli_log_prob(logits, pixels),)


def printed_bernoulli(logits: Tensor, pixels: Tensor) -> tuple[Tensor]:
    """As one writes it."""
    return ((pixels * logits - torch.nn.functional.softplus(logits)).sum(-1),)


def bernoulli_distribution(logits: Tensor, pixels: Tensor) -> tuple[Tensor]:
    """As ``torch.distributions`` has it."""
    distribution = torch.distributions.Bernoulli(logits=logits, validate_args=False)
    return (torch.distributions.Independent(distribution, 1, validate_args=False).log_prob(pixels),)


def _bernoulli_case(samples: int, batch: int, features: int, **options) -> Case:
    sizes = {"samples": samples, "batch": batch, "features": features}
    return Case(f"({samples}, {batch}, {features})", sizes, **options)


def _logits_bytes(times: int) -> Callable[..., int]:
    """The logits ``times`` over; the pixels, shared by all samples, once."""
    return lambda size, samples, batch, features: size * (times * samples + 1) * batch * features


ROWS = (
    Row(
        name="bernoulli_log_prob",
        op=bernoulli_log_prob,
        formula=printed_bernoulli,
        inputs=bernoulli_inputs,
        n_constants=1,
        forward_bytes=_logits_bytes(1),  # read the logits
        backward_bytes=_logits_bytes(2),  # read them again, write their gradient
        flops=lambda direction, samples, batch, features: (
            {"forward": 22, "backward": 24}[direction] * samples * batch * features
        ),
        cases=(_bernoulli_case(40, 256, 784), _bernoulli_case(1, 256, 784)),
        peers={"torch.distributions": bernoulli_distribution},
    ),
)
