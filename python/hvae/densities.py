"""Densities that the experiments share."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hvae_kernels.functional import gaussian_mixture_log_prob


def standard_normal_log_prob(x: Tensor) -> Tensor:
    """``log N(x; 0, I)`` over the last dimension: ``(..., d)`` to ``(...)``."""
    return -(x.square().sum(-1) + x.shape[-1] * math.log(2 * math.pi)) / 2


def normal_log_prob(x: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """``log N(x; loc, exp(log_scale)^2)`` over the last dimension, in which no argument may be broadcast."""
    return standard_normal_log_prob((x - loc) * torch.exp(-log_scale)) - log_scale.sum(-1)


def normal_divergence(loc: Tensor, log_scale: Tensor, other_loc: Tensor, other_log_scale: Tensor) -> Tensor:
    """``KL(N(loc, scale^2) | N(other_loc, other_scale^2))`` over the last dimension."""
    log_ratio = log_scale - other_log_scale
    distance = (loc - other_loc) * torch.exp(-other_log_scale)
    return ((torch.expm1(2 * log_ratio) + distance.square()) / 2 - log_ratio).sum(-1)


def standard_normal_divergence(loc: Tensor, log_scale: Tensor) -> Tensor:
    """``KL(N(loc, scale^2) | N(0, I))`` over the last dimension."""
    return ((torch.expm1(2 * log_scale) + loc.square()) / 2 - log_scale).sum(-1)


class Mixture(NamedTuple):
    """C diagonal Gaussians: ``logits (C,)``, ``loc`` and ``log_scale (C, d)``."""

    logits: Tensor
    loc: Tensor
    log_scale: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        """The log density of ``z (..., d)``, ``(...)``."""
        return gaussian_mixture_log_prob(z, *self)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Samples ``(count, d)``."""
        component = torch.multinomial(self.logits.softmax(-1), count, replacement=True, generator=generator)
        noise = torch.randn(count, self.loc.shape[-1], generator=generator)
        return self.loc[component] + self.log_scale[component].exp() * noise
