"""The auto-encoder, and its priors: each a mixture of diagonal Gaussians on the latent space."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hvae.densities import Mixture, normal_divergence, standard_normal_log_prob

LATENT = 2
HIDDEN = 64
#: Where the means of the two Gaussians of the learned mixtures begin.
FIRST_MEANS = ((2.0, 0.0), (-2.0, 0.0))

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


class StandardNormal(nn.Module):
    """``N(0, I)``, a mixture of one."""

    def forward(self, encode: Encode) -> Mixture:
        """The prior as a mixture."""
        return Mixture(torch.zeros(1), torch.zeros(1, LATENT), torch.zeros(1, LATENT))


class TwoGaussians(nn.Module):
    """Two Gaussians with learned means and scales; their weights are learned, or both 1/2."""

    def __init__(self, learn_weights: bool):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2), requires_grad=learn_weights)
        self.loc = nn.Parameter(torch.tensor(FIRST_MEANS))
        self.log_scale = nn.Parameter(torch.zeros(2, LATENT))

    def forward(self, encode: Encode) -> Mixture:
        """The prior as a mixture."""
        return Mixture(self.logits, self.loc, self.log_scale)


class VampPrior(nn.Module):
    """``1/K sum_k q(z | u_k)`` with learned pseudo-inputs ``u (K, 2)``.

    Source: Tomczak and Welling, VAE with a VampPrior, arXiv 1705.07120, equation 9.
    """

    def __init__(self, pseudo_inputs: Tensor):
        super().__init__()
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.clone())

    def forward(self, encode: Encode) -> Mixture:
        """The prior as a mixture; encodes the pseudo-inputs."""
        return Mixture(torch.zeros(len(self.pseudo_inputs)), *encode(self.pseudo_inputs))


class VAE(nn.Module):
    """``z ~ prior``, ``x | z ~ N(decoder(z), I)``, ``q(z | x)`` a diagonal Gaussian.

    Args:
        encoder: from ``(..., 2)`` to mean and log-scale of q side by side.
        decoder: from z to the mean of x.
        prior: a module that gives a :class:`Mixture` when called with :meth:`encode`.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, prior: nn.Module):
        super().__init__()
        self.encoder, self.decoder, self.prior = encoder, decoder, prior

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-scale of ``q(z | x)``."""
        loc, log_scale = self.encoder(x).chunk(2, dim=-1)
        return loc, log_scale

    def mixture(self) -> Mixture:
        """The prior as it stands."""
        return self.prior(self.encode)

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """``log p(x | z)``."""
        return standard_normal_log_prob(x - self.decoder(z))

    def bound(self, x: Tensor, noise: Tensor) -> Tensor:
        """The bound on ``log p(x)`` by one sample for each point ``(B, 2)``, ``(B,)``; ``noise`` like z.

        Against one Gaussian the Kullback-Leibler divergence has a closed form, against several it is sampled too.
        """
        loc, log_scale = self.encode(x)
        z = loc + log_scale.exp() * noise
        mixture = self.mixture()
        if len(mixture.logits) == 1:
            divergence = normal_divergence(loc, log_scale, mixture.loc, mixture.log_scale)
        else:
            divergence = standard_normal_log_prob(noise) - log_scale.sum(-1) - mixture.log_prob(z)
        return self.log_likelihood(x, z) - divergence

    def log_weights(self, x: Tensor, noise: Tensor) -> Tensor:
        """``log p(x, z) - log q(z | x)``, ``(S, B)``, for ``noise (S, B, d)``."""
        loc, log_scale = self.encode(x)
        z = loc + log_scale.exp() * noise
        log_q = standard_normal_log_prob(noise) - log_scale.sum(-1)
        return self.log_likelihood(x, z) + self.mixture().log_prob(z) - log_q


def network(outputs: int) -> nn.Sequential:
    """A perceptron of two hidden layers."""
    layers = nn.Linear(2, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, outputs)
    return nn.Sequential(*layers)
