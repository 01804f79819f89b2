"""Log-likelihoods by importance sampling, samples spread over all processes, and between two bounds."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from hvae import annealed
from hvae.autoencoder import AutoEncoder
from hvae.mnist import distributed
from hvae.mnist.models import Model


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

    By :func:`hvae.annealed.sandwich`, from the encoder's Gaussian.

    Args:
        model: in evaluation, with a normal prior.
        n_images: how many.
        n_bridges: more make the bounds tighter.
        generator: of latents, pixels and chains, on the CPU.
    """
    device = next(model.parameters()).device
    seeds = torch.randint(2**62, (2,), generator=generator).tolist()
    latents = model.sample_prior(n_images, generator).to(device)
    rates = torch.sigmoid(model.decoder(latents)).cpu()
    pixels = torch.bernoulli(rates, generator=generator).to(device)
    code = model.encode(pixels)
    potential = model.potential(pixels, model.decoder)
    tuning, chains = (torch.Generator(device).manual_seed(seed) for seed in seeds)
    gaussian = code.loc, code.log_scale
    return annealed.sandwich(latents, gaussian, potential, n_bridges, (generator, tuning, chains))
