"""An auto-encoder's bound and two estimates of its log-likelihood."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvae.priors.models import VAE
from hvae_kernels.functional import gaussian_mixture_log_prob

SAMPLES_AT_A_TIME = 8


@torch.no_grad()
def by_importance_sampling(model: VAE, x: Tensor, n_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bound and log-likelihood of points ``(B, 2)`` from S samples of q for each, ``(B,)`` in float64.

    With weights ``w_s = p(x, z_s) / q(z_s | x)`` they are ``1/S sum_s log w_s`` and ``log 1/S sum_s w_s``, the second
    at most ``log p(x)`` in expectation. Samples come a few at a time.
    """
    bound = torch.zeros(len(x), dtype=torch.float64)
    total = torch.full_like(bound, -math.inf)
    for done in range(0, n_samples, SAMPLES_AT_A_TIME):
        noise = torch.randn(min(SAMPLES_AT_A_TIME, n_samples - done), *x.shape, generator=generator)
        log_weights = model.log_weights(x, noise).double()
        bound += log_weights.sum(0)
        total = torch.logaddexp(total, log_weights.logsumexp(0))
    return bound / n_samples, total - math.log(n_samples)


@torch.no_grad()
def by_prior_samples(model: VAE, x: Tensor, z: Tensor) -> Tensor:
    """``log 1/S sum_s p(x | z_s)`` for samples ``z (S, d)`` of the prior, ``(B,)``: no encoder in it.

    It is a mixture of S Gaussians around the decoded samples.
    """
    loc = model.decoder(z)
    return gaussian_mixture_log_prob(x, torch.zeros(len(z)), loc, torch.zeros_like(loc)).double()
