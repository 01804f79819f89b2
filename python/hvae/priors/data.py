"""The study's problem: two Gaussians in the plane, with identity covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from hvae_kernels.functional import gaussian_mixture_log_prob

WEIGHT = 0.3
MEANS = torch.tensor([[2.0, 2.0], [-2.0, -2.0]])


def sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points ``(count, 2)``, and the Gaussian each came from, ``(count,)``: 0 with probability ``WEIGHT``, or 1."""
    component = (torch.rand(count, generator=generator) >= WEIGHT).long()
    return MEANS[component] + torch.randn(count, 2, generator=generator), component


def log_prob(x: Tensor) -> Tensor:
    """The true log density of ``x (..., 2)``, ``(...)``."""
    logits = torch.tensor([WEIGHT, 1 - WEIGHT], dtype=x.dtype).log()
    return gaussian_mixture_log_prob(x, logits, MEANS.to(x.dtype), torch.zeros(2, 2, dtype=x.dtype))
