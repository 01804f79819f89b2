"""A variational auto-encoder whose posterior a Hamiltonian flow, autoregressive flows, or both may carry on.

``log_weights`` is all there is to know of a model: its mean is the evidence bound, ``iwae_bound`` of several samples
the tighter one, of thousands the log-likelihood. Every constant is in it, and noise is an argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hvae.mnist.networks import Network
from hvae_kernels.functional import bernoulli_log_prob, leapfrog
from hvae_kernels.nn import FlowStack, HamiltonianFlow, InverseAutoregressiveFlow

N_IAF_LAYERS = 5
INITIAL_TEMPERATURE = 1.05

Decoder = Callable[[Tensor], Tensor]


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """Of ``(..., d)``: ``(...)``."""
    return -(z.square().sum(-1) + z.shape[-1] * math.log(2 * math.pi)) / 2


class Model(nn.Module):
    """``z ~ N(0, I)``, pixels Bernoulli given ``z``, and ``q(z | x)`` a diagonal Gaussian, carried on by flows.

    Args:
        encoder: pixels to location and log scale of the Gaussian, ``(B, 2 * latent)``.
        decoder: latents to logits ``(B, 784)``.
        latent: d.
        n_steps: leapfrog steps, freely tempered; 0 for no Hamiltonian flow.
        iaf_width: hidden width of five inverse autoregressive flows, on z, or on ``[z_K, rho_K]`` after leapfrog steps;
            0 for none.
        memory: of the leapfrog, ``"reversible"`` or ``"store"``.
        compile: compile the potential's gradient.
    """

    def __init__(
        self,
        encoder: Network,
        decoder: Network,
        latent: int,
        n_steps: int = 0,
        iaf_width: int = 0,
        memory: str = "reversible",
        compile: bool = False,
    ):
        super().__init__()
        self.encoder, self.decoder, self.latent = encoder, decoder, latent
        self.hamiltonian = None
        if n_steps:
            self.hamiltonian = HamiltonianFlow(
                latent, n_steps, "free", init_temperature=INITIAL_TEMPERATURE, memory=memory, compile=compile
            )
        self.noise_features = 2 * latent if n_steps else latent
        self.iaf = None
        if iaf_width:
            kind = InverseAutoregressiveFlow
            self.iaf = FlowStack.autoregressive(kind, N_IAF_LAYERS, self.noise_features, iaf_width)

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """The log weights of images ``(B, 784)``, one for each row of standard normals ``(S, B, noise_features)``."""
        return self.log_weights(pixels, self.encode(pixels), noise)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Location and log scale of ``q(z_0 | x)``, each ``(B, d)``."""
        dtype = next(self.encoder.parameters()).dtype
        loc, log_scale = self.encoder(pixels.to(dtype)).chunk(2, dim=-1)
        return loc, log_scale

    def log_weights(self, pixels: Tensor, posterior: tuple[Tensor, Tensor], noise: Tensor) -> Tensor:
        """``log p(x, z) + log N(rho) - log N(noise) + log_abs_det``, ``(S, B)``, in the terms of :meth:`transport`."""
        z, rho, log_abs_det, decode = self.transport(pixels, posterior, noise)
        log_weights = self.log_joint(decode(z.flatten(0, 1)), pixels, z) - standard_normal_log_prob(noise) + log_abs_det
        return log_weights if rho is None else log_weights + standard_normal_log_prob(rho)

    def transport(
        self, pixels: Tensor, posterior: tuple[Tensor, Tensor], noise: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Decoder]:
        """``(z, rho, log_abs_det, decode)``: noise carried to the posterior.

        ``rho`` is None without leapfrog steps. ``log_abs_det (S, B)`` is that of the map from all noise. ``decode`` is
        the decoder, with the batch norms held at z_0 where a potential needs that.
        """
        loc, log_scale = posterior
        scale, log_abs_det = log_scale.exp(), log_scale.sum(-1)
        if self.hamiltonian is None:
            z, rho, decode = loc + scale * noise, None, self.decoder
        else:
            noise, gamma = noise.chunk(2, dim=-1)
            z = loc + scale * noise
            decode, params = self.decoder.hold(z.flatten(0, 1))
            # a view: to the gradient at z_0, batch norms that depend on z_0 are constants
            z, rho, _ = self.hamiltonian(z.view_as(z), gamma, self.potential(pixels, decode), params)
        if self.iaf is None:
            return z, rho, log_abs_det.expand(z.shape[:-1]), decode
        state, iaf_log_abs_det = self.iaf(z if rho is None else torch.cat([z, rho], dim=-1))
        z, rho = (state, None) if rho is None else state.chunk(2, dim=-1)
        return z, rho, log_abs_det + iaf_log_abs_det, decode

    def potential(self, pixels: Tensor, decode: Decoder) -> Callable[[Tensor], Tensor]:
        """``U(z) = -log p(x, z)``, ``(..., B)`` of ``z (..., B, d)``."""
        return lambda z: -self.log_joint(decode(z.flatten(0, -2)), pixels, z)

    def log_joint(self, logits: Tensor, pixels: Tensor, z: Tensor) -> Tensor:
        """``log p(x | z) + log p(z)``, ``(..., B)``, of logits ``(... * B, 784)`` and z ``(..., B, d)``."""
        return self.log_likelihood(logits.view(*z.shape[:-1], -1), pixels) + standard_normal_log_prob(z)

    def log_likelihood(self, logits: Tensor, pixels: Tensor) -> Tensor:
        """``log p(x | z)``, ``(..., B)``, of logits ``(..., B, 784)`` and pixels ``(B, 784)``."""
        return bernoulli_log_prob(logits, pixels)

    @torch.no_grad()
    def trajectory(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Logits ``(K + 1, B, 784)`` along the leapfrog steps, from one row of noise ``(1, B, noise_features)``."""
        loc, log_scale = self.encode(pixels)
        noise, gamma = noise[0].chunk(2, dim=-1)
        z = loc + log_scale.exp() * noise
        (decode, _), path = self.decoder.hold(z), [z]
        temperature, alpha = self.hamiltonian.temperatures()
        rho, potential, step_size = temperature * gamma, self.potential(pixels, decode), self.hamiltonian.step_size
        for step in alpha.split(1):
            z, rho = leapfrog(z, rho, potential, step_size, step)
            path.append(z)
        return torch.stack([decode(z) for z in path])
