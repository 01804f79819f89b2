"""The posteriors of deep latent Gaussian models: planar flows of the encoder's making, NICE, Hamiltonian inference."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hvae.autoencoder import Code
from hvae.couplings import Shift
from hvae.densities import normal_log_prob
from hvae.mnist import networks
from hvae.mnist.models import Decoder, Model
from hvae.mnist.networks import Network
from hvae_kernels.functional import planar_flow
from hvae_kernels.nn import CouplingFlow, FlowStack, HamiltonianFlow

#: Outputs of the encoder that couplings and momenta are told of an image.
CONTEXT = 100
NICE_WIDTH, MOMENTUM_WIDTH = 100, 300
#: ``softplus`` is 1 there, and with it a planar layer of ``u . w`` the identity.
IDENTITY = math.log(math.e - 1)
#: What networks' outputs move planar layers and momenta by. Outright, on 60,000 digits, the median norm of a gradient
#: is 306 with 40 layers, and the bound falls; a momentum's log scale sends a bound below -1e12, clipped within seven
#: updates, unclipped in epoch 21. By a tenth the norm is 14 and 15 in the first epoch.
STEP = 0.1


class PlanarModel(Model):
    """A sample of ``q(z_0 | x)`` goes through K planar layers whose parameters are the encoder's for that image.

    They begin as the identity, from where the encoder's outputs move them, :data:`STEP` each.

    Source: Rezende and Mohamed, Variational inference with normalizing flows, arXiv 1505.05770.

    Args:
        encoder: pixels to location and log scale, ``(B, 2 * latent)``; is given the outputs for the layers.
        decoder: latents to logits ``(B, 784)``.
        latent: d.
        n_layers: K.
    """

    def __init__(self, encoder: Network, decoder: Network, latent: int, n_layers: int):
        super().__init__(encoder, decoder, latent)
        self.n_layers = n_layers
        w = torch.randn(n_layers, latent) / math.sqrt(latent)
        u = IDENTITY * w / w.square().sum(-1, keepdim=True)
        first = torch.cat([u, w, w.new_zeros(n_layers, 1)], -1)
        self.register_buffer("first", first)
        networks.widen(encoder, first.new_zeros(first.numel()))

    def transport(self, pixels: Tensor, code: Code, noise: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Decoder]:
        """``(z_K, None, log_abs_det, decode)``."""
        z, _, log_abs_det, decode = super().transport(pixels, code, noise)
        layers = (self.first + STEP * code.context.unflatten(-1, self.first.shape)).expand(len(z), -1, -1, -1)
        u, w, b = layers.split([self.latent, self.latent, 1], -1)
        z, planar_log_abs_det = planar_flow(z, u, w, b.squeeze(-1), constrain=True)
        return z, None, log_abs_det + planar_log_abs_det, decode


class NiceModel(Model):
    """A sample of ``q(z_0 | x)`` goes through K additive couplings, which are told of the image.

    Halves alternate, every other dimension in each; no random orthogonal maps between them. Volume is preserved, and
    couplings begin as the identity.

    Source: Dinh, Krueger and Bengio, NICE, arXiv 1410.8516; as a posterior, Rezende and Mohamed, arXiv 1505.05770.

    Args:
        encoder: pixels to location and log scale, ``(B, 2 * latent)``; is given outputs for the couplings' context.
        decoder: latents to logits ``(B, 784)``.
        latent: d.
        n_layers: K.
    """

    def __init__(self, encoder: Network, decoder: Network, latent: int, n_layers: int):
        super().__init__(encoder, decoder, latent)
        self.flow = None
        if n_layers:
            networks.widen(encoder, torch.zeros(CONTEXT))
            self.flow = FlowStack([self._coupling(layer) for layer in range(n_layers)])

    def _coupling(self, layer: int) -> CouplingFlow:
        mask = [(place + layer) % 2 == 0 for place in range(self.latent)]
        shift = Shift(_perceptron(self.latent - sum(mask) + CONTEXT, NICE_WIDTH, sum(mask)))
        return CouplingFlow(self.latent, [], CONTEXT, "affine", mask, conditioner=shift)

    def transport(self, pixels: Tensor, code: Code, noise: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Decoder]:
        """``(z_K, None, log_abs_det, decode)``."""
        z, rho, log_abs_det, decode = super().transport(pixels, code, noise)
        if self.flow is not None:
            z, _ = self.flow(z, code.context.expand(len(z), -1, -1))
        return z, rho, log_abs_det, decode


class Momentum(nn.Module):
    """A Gaussian ``p(v | z, x)`` with ``x`` as the encoder's context; N(0, I) at first, moved by :data:`STEP`."""

    def __init__(self, latent: int):
        super().__init__()
        self.layers = _perceptron(latent + CONTEXT, MOMENTUM_WIDTH, 2 * latent)

    def forward(self, z: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        """Location and log scale, each of ``z``'s shape ``(..., d)``; ``context (..., c)``."""
        return (STEP * self.layers(torch.cat([z, context], -1))).chunk(2, -1)


class HviModel(Model):
    """Hamiltonian variational inference: fresh momenta, untempered leapfrog steps, a learned model of the way back.

    ``z_0 ~ q(z_0 | x)``; then, for t = 1..T, ``v' ~ q_t(v' | z_{t-1}, x)`` and K steps from ``(z_{t-1}, v')`` to
    ``(z_t, v_t)``. A log weight is ``log p(x, z_T) - log q(z_0 | x) + sum_t [log r_t(v_t | z_t, x) - log q_t(v'_t |
    z_{t-1}, x)]``, as the steps preserve volume.

    Source: Salimans, Kingma and Welling, Markov chain Monte Carlo and variational inference, arXiv 1410.6460,
    algorithm 3.

    Args:
        encoder: pixels to location and log scale, ``(B, 2 * latent)``; is given outputs for the momenta's context.
        decoder: latents to logits ``(B, 784)``.
        latent: d.
        n_steps: K; 0 for neither steps nor momenta.
        n_momenta: T.
        memory: of the leapfrog, ``"reversible"`` or ``"store"``.
        compile: compile the potential's gradient.
    """

    def __init__(
        self,
        encoder: Network,
        decoder: Network,
        latent: int,
        n_steps: int,
        n_momenta: int = 1,
        memory: str = "reversible",
        compile: bool = False,
    ):
        super().__init__(encoder, decoder, latent)
        self.forward_models, self.reverse_models = nn.ModuleList(), nn.ModuleList()
        if not n_steps:
            return
        networks.widen(encoder, torch.zeros(CONTEXT))
        self.noise_features = (1 + n_momenta) * latent
        self.hamiltonian = HamiltonianFlow(latent, n_steps, "none", memory=memory, compile=compile)
        for models in (self.forward_models, self.reverse_models):
            models.extend(Momentum(latent) for _ in range(n_momenta))

    def transport(self, pixels: Tensor, code: Code, noise: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Decoder]:
        """``(z_T, None, log_ratio, decode)``: log_abs_det of the map from all noise, and ``sum_t log r_t`` with it."""
        if self.hamiltonian is None:
            return super().transport(pixels, code, noise)
        first, *others = noise.split(self.latent, dim=-1)
        z = code.loc + code.log_scale.exp() * first
        context = code.context.expand(len(z), -1, -1)
        decode, params = self.decoder.hold(z.flatten(0, 1))
        potential = self.potential(pixels, decode)
        log_ratio = code.log_scale.sum(-1)
        for forward, reverse, gamma in zip(self.forward_models, self.reverse_models, others, strict=True):
            loc, log_scale = forward(z, context)
            # a view: to the gradient at z_0, batch norms that depend on z_0 are constants
            z, v, _ = self.hamiltonian(z.view_as(z), loc + log_scale.exp() * gamma, potential, params=params)
            log_ratio = log_ratio + log_scale.sum(-1) + normal_log_prob(v, *reverse(z, context))
        return z, None, log_ratio, decode

    def first_momentum(self, z: Tensor, code: Code, gamma: Tensor) -> Tensor:
        """Of ``q_1``."""
        loc, log_scale = self.forward_models[0](z, code.context)
        return loc + log_scale.exp() * gamma


def _perceptron(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """One hidden layer; the outputs begin at 0."""
    layers = nn.Sequential(nn.Linear(inputs, width), nn.Softplus(), nn.Linear(width, outputs))
    for parameter in layers[-1].parameters():
        nn.init.zeros_(parameter)
    return layers
