"""An auto-encoder's bound, two estimates of its log-likelihood, two bounds around it, and the integral itself."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from hvae import annealed, importance
from hvae.densities import Mixture, standard_normal_log_prob
from hvae.priors.models import LATENT, VAE
from hvae_kernels.functional import gaussian_mixture_log_prob

SAMPLES_AT_A_TIME = 8
#: Of a grid in each Gaussian of the prior: standard deviations to each side, nodes of all, and of an axis at least.
REACH, NODES, AXIS_NODES = 8.0, 400_000, 101


@torch.no_grad()
def by_importance_sampling(model: VAE, x: Tensor, n_samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bound and log-likelihood of points ``(B, 2)`` from S samples of q for each, ``(B,)`` in float64.

    With weights ``w_s = p(x, z_s) / q(z_s | x)`` they are ``1/S sum_s log w_s`` and ``log 1/S sum_s w_s``, the second
    at most ``log p(x)`` in expectation. Samples come a few at a time.
    """
    bound = torch.zeros(len(x), dtype=torch.float64)

    def log_weights(_: int, samples: int) -> Tensor:
        weights = model.log_weights(x, torch.randn(samples, *x.shape, generator=generator)).double()
        bound.add_(weights.sum(0))
        return weights

    total = importance.log_mean_weight(log_weights, n_samples, SAMPLES_AT_A_TIME)
    return bound / n_samples, total


@torch.no_grad()
def by_prior_samples(model: VAE, x: Tensor, z: Tensor) -> Tensor:
    """``log 1/S sum_s p(x | z_s)`` for samples ``z (S, d)`` of the prior, ``(B,)``: no encoder in it.

    It is a mixture of S Gaussians around the decoded samples.
    """
    loc = model.decoder(z)
    return gaussian_mixture_log_prob(x, torch.zeros(len(z)), loc, torch.zeros_like(loc)).double()


@torch.no_grad()
def by_quadrature(model: VAE, x: Tensor) -> Tensor:
    """``log p(x)`` of points ``(B, 2)`` by the trapezoidal rule in the latent plane, ``(B,)``, in float64.

    Each Gaussian of the prior has a grid of its own, in its standard deviations, so that narrow ones are not missed.
    """
    model, x = copy.deepcopy(model).double(), x.double()
    prior = _prior(model)
    count = max(AXIS_NODES, math.isqrt(NODES // len(prior.logits)))
    axis = torch.linspace(-REACH, REACH, count, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * LATENT)
    logits = standard_normal_log_prob(grid)
    total = torch.full((len(x),), -math.inf, dtype=torch.float64)
    for log_weight, loc, log_scale in zip(*prior, strict=True):
        decoded = model.decoder(loc + log_scale.exp() * grid)
        density = gaussian_mixture_log_prob(x, logits, decoded, torch.zeros_like(decoded))
        total = torch.logaddexp(total, log_weight + density)
    return total


@torch.no_grad()
def sandwich(model: VAE, n_points: int, n_bridges: int, generator: torch.Generator) -> Tensor:
    """Of points that the model draws: lower bound, upper bound and exact ``log p(x)``, ``(3, n_points)`` in float64.

    The bounds are those of :func:`hvae.annealed.sandwich`, from the encoder's Gaussian.
    """
    model = copy.deepcopy(model).double()
    mixture = _prior(model)
    z = mixture.sample(n_points, generator).double()
    x = model.decoder(z) + torch.randn(n_points, 2, generator=generator, dtype=torch.float64)

    def potential(z: Tensor) -> Tensor:
        return -model.log_likelihood(x, z) - mixture.log_prob(z)

    bounds = annealed.sandwich(z, model.encode(x), potential, n_bridges, (generator,) * 3)
    return torch.cat([bounds, by_quadrature(model, x)[None]])


def _prior(model: VAE) -> Mixture:
    """In float64, its logits the logarithms of the weights."""
    logits, loc, log_scale = (parameter.double() for parameter in model.mixture())
    return Mixture(logits.log_softmax(-1), loc, log_scale)
