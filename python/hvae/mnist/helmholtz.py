"""The Helmholtz machine: layers of bits, learned by wake-sleep."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from hvae.autoencoder import AutoEncoder, Code
from hvae.data.mnist import N_PIXELS
from hvae_kernels.functional import bernoulli_log_prob


class Helmholtz(AutoEncoder):
    """Bits ``h_L, ..., h_1, x`` from the top down, each layer Bernoulli given the one above; recognition the other way.

    There is no gradient through bits. The wake phase trains the generative weights, by ``log p(x, h)`` of recognised
    ``h``, the sleep phase the recognition weights, by ``log q(h | x)`` of fantasies ``(x, h)`` of the model. In
    training a log weight has its value, and its gradient is the sum of both phases'.

    Source: Hinton, Dayan, Frey and Neal, The wake-sleep algorithm for unsupervised neural networks, 1995; Dayan,
    Hinton, Neal and Zemel, The Helmholtz machine, 1995.

    Args:
        units: of ``h_1, ..., h_L``.
        pixels: of an image.
    """

    def __init__(self, units: Sequence[int], pixels: int = N_PIXELS):
        super().__init__()
        self.units, self.pixels, self.latent = list(units), pixels, sum(units)
        self.encoder, self.decoder = nn.Linear(pixels, units[0]), nn.Linear(units[0], pixels)
        self.upward = nn.ModuleList(nn.Linear(below, above) for below, above in pairwise(units))
        self.downward = nn.ModuleList(nn.Linear(above, below) for below, above in pairwise(units))
        self.top_logits = nn.Parameter(torch.zeros(units[-1]))

    @property
    def noise_features(self) -> int:  # type: ignore[override]
        """One for each bit that is recognised, and in training for each of a fantasy."""
        return self.latent + self.training * (self.latent + self.pixels)

    def encode(self, pixels: Tensor) -> Code:
        """The logits of ``q(h_1 | x)`` as ``loc``."""
        logits = self.encoder(pixels.to(self.top_logits.dtype))
        return Code(logits, logits[:, :0], logits[:, :0])

    def log_weights(self, pixels: Tensor, code: Code, noise: Tensor) -> Tensor:
        """``log p(x, h) - log q(h | x)``, ``(S, B)``."""
        hidden, log_q = self.recognise(code, noise[..., : self.latent])
        log_weights = self.log_joint(pixels, hidden) - log_q.detach()
        if self.training:
            sleep = self.sleep(noise[..., self.latent :])
            log_weights = log_weights + (sleep - sleep.detach())
        return log_weights

    def recognise(self, code: Code, noise: Tensor) -> tuple[list[Tensor], Tensor]:
        """Bits ``h_1, ..., h_L`` from ``noise (S, B, latent)``, and ``log q(h | x)``, ``(S, B)``."""
        logits, hidden, log_q = code.loc.expand(len(noise), -1, -1), [], noise.new_zeros(noise.shape[:-1])
        for layer, drawn in zip([*self.upward, None], noise.split(self.units, -1), strict=True):
            hidden.append(bits(logits, drawn))
            log_q = log_q + bernoulli_log_prob(logits, hidden[-1])
            logits = logits if layer is None else layer(hidden[-1])
        return hidden, log_q

    def log_joint(self, pixels: Tensor, hidden: list[Tensor]) -> Tensor:
        """``log p(x, h)``, ``(S, B)``, of bits ``h_1, ..., h_L (S, B, units)`` and pixels ``(B, 784)``."""
        total = bernoulli_log_prob(self.top_logits.expand_as(hidden[-1]), hidden[-1])
        for layer, below, above in zip(self.downward, hidden, hidden[1:], strict=False):
            total = total + bernoulli_log_prob(layer(above), below)
        return total + self.log_likelihood(self.decoder(hidden[0]), pixels)

    def sleep(self, noise: Tensor) -> Tensor:
        """``log q(h | x)`` of fantasies, from ``noise (..., latent + 784)``."""
        with torch.no_grad():
            hidden = self.dream(noise[..., : self.latent])
            layers = [bits(self.decoder(hidden[0]), noise[..., self.latent :]), *hidden]
        total = noise.new_zeros(noise.shape[:-1])
        for layer, below, above in zip([self.encoder, *self.upward], layers, hidden, strict=False):
            total = total + bernoulli_log_prob(layer(below), above)
        return total

    def dream(self, noise: Tensor) -> list[Tensor]:
        """Bits ``h_1, ..., h_L`` of the model, from ``noise (..., latent)``."""
        *below, top = noise.split(self.units, -1)
        hidden = [bits(self.top_logits, top)]
        for layer, drawn in zip(reversed(self.downward), reversed(below), strict=True):
            hidden.insert(0, bits(layer(hidden[0]), drawn))
        return hidden

    def reconstruct(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Logits ``(B, 784)``."""
        hidden, _ = self.recognise(self.encode(pixels), noise[..., : self.latent])
        return self.decoder(hidden[0][0])

    def sample_prior(self, count: int, generator: torch.Generator) -> Tensor:
        """Bits ``h_1``, ``(count, units)``."""
        noise = torch.randn(count, self.latent, generator=generator)
        return self.dream(noise.to(self.top_logits))[0]


def bits(logits: Tensor, noise: Tensor) -> Tensor:
    """Bernoulli bits, of the logits' dtype, from standard normals of the result's shape."""
    return (torch.special.ndtr(noise) < logits.sigmoid()).to(logits.dtype)
