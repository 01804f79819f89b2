"""What a variational auto-encoder of binary images is to its training loop, whatever its latent variables are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvae.densities import Mixture
from hvae_kernels.functional import bernoulli_log_prob


class Code(NamedTuple):
    """What the encoder says of B images, and a prior that it has a part in, or None.

    ``loc`` and ``log_scale (B, d)`` of a Gaussian, and ``context (B, c)``, which may be of no width.
    """

    loc: Tensor
    log_scale: Tensor
    context: Tensor
    prior: Mixture | None = None


class AutoEncoder(nn.Module):
    """A model of pixels, Bernoulli given what the decoder makes of a latent ``z (..., d)``.

    ``log_weights`` is all there is to know of it: its mean is the evidence bound, ``iwae_bound`` of several samples the
    tighter one, of thousands the log-likelihood. Every constant is in it, and noise is an argument.

    Attributes:
        encoder, decoder: networks.
        latent: d.
        noise_features: how many standard normals a sample takes.
        annealing: the weight of ``log p(x, z)`` in training, which a model may heed.
    """

    encoder: nn.Module
    decoder: nn.Module
    latent: int
    noise_features: int
    annealing: float = 1.0

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """The log weights of images ``(B, 784)``, one for each row of standard normals ``(S, B, noise_features)``."""
        return self.log_weights(pixels, self.encode(pixels), noise)

    def encode(self, pixels: Tensor) -> Code:
        """The posterior's parameters."""
        raise NotImplementedError

    def log_weights(self, pixels: Tensor, code: Code, noise: Tensor) -> Tensor:
        """``log p(x, z) - log q(z | x)``, ``(S, B)``."""
        raise NotImplementedError

    def log_likelihood(self, logits: Tensor, pixels: Tensor) -> Tensor:
        """``log p(x | z)``, ``(..., B)``, of logits ``(..., B, 784)`` and pixels ``(B, 784)``."""
        return bernoulli_log_prob(logits, pixels)

    def reconstruct(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Logits ``(B, 784)`` from one sample of the posterior, ``noise (1, B, noise_features)``."""
        raise NotImplementedError

    def sample_prior(self, count: int, generator: torch.Generator) -> Tensor:
        """Latents ``(count, d)``."""
        raise NotImplementedError

    def begin_epoch(self, epoch: int) -> None:
        """Told which epoch comes, from 0 on: before each of training, and after the last."""

    def penalty(self) -> Tensor | float:
        """What training adds to the negative bound of an image."""
        return 0.0

    def pictures(self, pixels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """More grids ``(rows, columns, 784)`` in [0, 1] that show what is special about the model, by name."""
        return {}

    def graph(self) -> Tensor | None:
        """Probabilities of gates between nodes, and the gates, ``(2, N, N)``; None where there are no nodes."""
        return None
