"""Posteriors that are annealed from the encoder's Gaussian to the model's own: uncorrected Hamiltonian annealing."""

from __future__ import annotations

import torch
from torch import Tensor

from hvae.autoencoder import Code
from hvae.densities import normal_log_prob, standard_normal_log_prob
from hvae.mnist.models import Decoder, Model
from hvae.mnist.networks import Network
from hvae_kernels.nn import AnnealedHamiltonianFlow

#: Units of the two hidden layers of ldvi's score.
SCORE_WIDTH = 128


class AnnealedModel(Model):
    """``z_0 ~ q(z_0 | x)`` is carried along K bridges to ``p(z | x)``, a leapfrog step each, by a learned flow.

    A log weight is ``log p(x, z_K) - log q(z_0 | x) + log w``, with the flow's w.

    Source: Geffner and Domke, MCMC variational inference via uncorrected Hamiltonian annealing, 2021; with a score,
    Langevin diffusion variational inference, 2022.

    Args:
        encoder: pixels to location and log scale, ``(B, 2 * latent)``.
        decoder: latents to logits ``(B, 784)``.
        latent: d.
        n_bridges: K; 0 for none, which leaves the encoder's Gaussian.
        score_width: None, or the width of a score's hidden layers.
        memory: ``"store"`` for the graphs of all bridges; else states are kept.
        compile: compile the potential's gradient.
    """

    def __init__(
        self,
        encoder: Network,
        decoder: Network,
        latent: int,
        n_bridges: int,
        score_width: int | None = None,
        memory: str = "reversible",
        compile: bool = False,
    ):
        super().__init__(encoder, decoder, latent)
        self.noise_features = (2 + n_bridges) * latent if n_bridges else latent
        self.annealed = None
        if not n_bridges:
            return
        self.annealed = AnnealedHamiltonianFlow(
            latent,
            n_bridges,
            init_step_size=0.05,
            score_features=score_width,
            memory="store" if memory == "store" else "states",
            compile=compile,
        )

    def log_weights(self, pixels: Tensor, code: Code, noise: Tensor) -> Tensor:
        """``log p(x, z_K) - log q(z_0 | x) + log w``, ``(S, B)``."""
        z, log_weight, decode = self.anneal(pixels, code, noise)
        log_joint = self.log_joint(decode(z.flatten(0, 1)), pixels, z)
        if self.training:
            log_joint = self.annealing * log_joint
        return log_joint + log_weight

    def anneal(self, pixels: Tensor, code: Code, noise: Tensor) -> tuple[Tensor, Tensor, Decoder]:
        """``(z_K, log w - log q(z_0 | x), decode)``."""
        first, *others = noise.split(self.latent, dim=-1)
        z = code.loc + code.log_scale.exp() * first
        log_q = standard_normal_log_prob(first) - code.log_scale.sum(-1)
        if self.annealed is None:
            return z, -log_q, self.decoder
        decode, params = self.decoder.hold(z.flatten(0, 1))
        # views: to the gradient at z_0, batch norms that depend on z_0, and so on q, are constants
        loc, log_scale = (x.view_as(x) for x in (code.loc, code.log_scale))
        z, log_weight = self.annealed(
            z.view_as(z),
            torch.stack(others),
            self.potential(pixels, decode),
            lambda z: -normal_log_prob(z, loc.expand_as(z), log_scale.expand_as(z)),
            params=[*params, loc, log_scale],
        )
        return z, log_weight - log_q, decode

    def transport(self, pixels: Tensor, code: Code, noise: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Decoder]:
        """``(z_K, None, log w - log q(z_0 | x), decode)``."""
        z, log_weight, decode = self.anneal(pixels, code, noise)
        return z, None, log_weight, decode
