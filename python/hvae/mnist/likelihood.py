"""Log-likelihoods by importance sampling, samples spread over all processes, and between two bounds."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from hvae.autoencoder import AutoEncoder
from hvae.densities import normal_log_prob
from hvae.mnist import distributed
from hvae.mnist.models import Model
from hvae_kernels.functional import iwae_bound
from hvae_kernels.nn import AnnealedImportanceSampling

#: Of a sandwich: chains an image, and leapfrog steps of a transition.
CHAINS, TRANSITION = 8, 5


class LogMeanExp:
    """``log 1/N sum exp`` of each of B columns, from rows that come a few at a time, in float64."""

    def __init__(self, columns: int):
        self.count = torch.zeros((), dtype=torch.float64)
        self.maximum = torch.full((columns,), -math.inf, dtype=torch.float64)
        self.sum = torch.zeros(columns, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take in rows ``(N, B)``."""
        rows = rows.double().cpu()
        self._rescale(torch.maximum(self.maximum, rows.amax(0)))
        self.sum += torch.exp(rows - self.maximum).sum(0)
        self.count += len(rows)

    def all_reduce(self) -> None:
        """Join what all processes have taken in."""
        self._rescale(distributed.all_reduce(self.maximum.clone(), dist.ReduceOp.MAX))
        distributed.all_reduce(self.sum)
        distributed.all_reduce(self.count)

    def _rescale(self, maximum: Tensor) -> None:
        self.sum *= torch.exp(self.maximum - maximum)
        self.maximum = maximum

    def value(self) -> Tensor:
        """The result ``(B,)``."""
        return self.maximum + torch.log(self.sum) - torch.log(self.count)


@torch.no_grad()
def log_likelihood(
    model: AutoEncoder, pixels: Tensor, n_samples: int, noise: Callable[[int, int], Tensor], sample_batch: int
) -> Tensor:
    """``log p(x)`` of images ``(B, 784)``, estimated from ``n_samples`` samples each, ``(B,)`` in float64.

    Args:
        model: in evaluation; its encoder runs once.
        pixels: the images.
        n_samples: how many samples an image.
        noise: standard normals ``(S, B, noise_features)`` for the number of a batch of samples and its size S.
        sample_batch: how many samples of an image at a time.
    """
    posterior = model.encode(pixels)
    result = LogMeanExp(len(pixels))
    for number in range(distributed.rank(), -(-n_samples // sample_batch), distributed.size()):
        rows = min(sample_batch, n_samples - number * sample_batch)
        result.add(model.log_weights(pixels, posterior, noise(number, rows)))
    result.all_reduce()
    return result.value()


@torch.no_grad()
def sandwich(model: Model, n_images: int, n_bridges: int, generator: torch.Generator) -> Tensor:
    """Lower and upper bounds of ``log p(x)`` of images that the model draws, ``(2, n_images)`` in float64.

    The latents that images are drawn from are exact samples of their posteriors, from where annealed importance
    sampling goes back; forward it begins at the encoder's Gaussian. Bridges lie between that and the model. In
    expectation the bounds are on their sides; single ones need not be.

    Args:
        model: in evaluation, with a normal prior.
        n_images: how many.
        n_bridges: more make the bounds tighter.
        generator: of latents, pixels and chains, on the CPU.
    """
    device = next(model.parameters()).device
    seeds = torch.randint(2**62, (2,), generator=generator)
    latents = model.sample_prior(n_images, generator).to(device)
    rates = torch.sigmoid(model.decoder(latents)).cpu()
    pixels = torch.bernoulli(rates, generator=generator).to(device)
    code = model.encode(pixels)
    potential = model.potential(pixels, model.decoder)

    def base(z: Tensor) -> Tensor:
        return -normal_log_prob(z, code.loc.expand_as(z), code.log_scale.expand_as(z))

    def begun() -> Tensor:
        noise = torch.randn(CHAINS, n_images, model.latent, generator=generator).to(device)
        return code.loc + code.log_scale.exp() * noise

    sampler = AnnealedImportanceSampling(model.latent, n_bridges, TRANSITION, device=device)
    generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]
    sampler.tune(begun(), potential, base, generator=generators[0])
    _, forward = sampler(begun(), potential, base, generator=generators[1])
    _, backward = sampler.reverse(latents.expand(CHAINS, -1, -1), potential, base, generator=generators[1])
    return torch.stack([iwae_bound(forward), -iwae_bound(-backward)]).cpu()
