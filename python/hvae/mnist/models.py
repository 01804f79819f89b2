"""A variational auto-encoder whose posterior a Hamiltonian flow, autoregressive flows, or both may carry on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hvae.autoencoder import AutoEncoder, Code
from hvae.densities import Mixture, normal_log_prob, standard_normal_log_prob
from hvae.mnist.networks import Network
from hvae_kernels.functional import leapfrog
from hvae_kernels.nn import FlowStack, HamiltonianFlow, InverseAutoregressiveFlow

N_IAF_LAYERS = 5
INITIAL_TEMPERATURE = 1.05
#: Of a pseudo-input where the digit that it starts from is white or black, before the sigmoid.
FIRST_PSEUDO_LOGIT = 3.0
N_TRAJECTORIES, N_PSEUDO_INPUTS = 8, 64
ESTIMATORS = ("plain", "stl", "dreg")

Decoder = Callable[[Tensor], Tensor]


class VampPrior(nn.Module):
    """``1/C sum_c q(z | u_c)`` with learned pseudo-inputs, ``u_c`` the sigmoid of a row of pixel logits ``(C, 784)``.

    Source: Tomczak and Welling, VAE with a VampPrior, arXiv 1705.07120, equation 9.

    Args:
        digits: pixels ``(C, 784)`` to start from.
    """

    def __init__(self, digits: Tensor):
        super().__init__()
        self.pixel_logits = nn.Parameter((2 * digits.to(torch.get_default_dtype()) - 1) * FIRST_PSEUDO_LOGIT)

    def pseudo_inputs(self) -> Tensor:
        """``(C, 784)``, in (0, 1)."""
        return torch.sigmoid(self.pixel_logits)


class Model(AutoEncoder):
    """``z ~ prior``, pixels Bernoulli given ``z``, and ``q(z | x)`` a diagonal Gaussian, carried on by flows.

    Args:
        encoder: pixels to location and log scale of the Gaussian, ``(B, 2 * latent)``.
        decoder: latents to logits ``(B, 784)``.
        latent: d.
        n_steps: leapfrog steps, freely tempered; 0 for no Hamiltonian flow.
        iaf_width: hidden width of five inverse autoregressive flows, on z, or on ``[z_K, rho_K]`` after leapfrog steps;
            0 for none.
        memory: of the leapfrog, ``"reversible"`` or ``"store"``.
        compile: compile the potential's gradient.
        prior: None for ``N(0, I)``.
        estimator: of the encoder's gradient in training, where no flow follows the encoder: ``"plain"``; ``"stl"``, in
            which log q is held fixed but for its argument; ``"dreg"``, in which the weights are squared, too.

    Raises:
        ValueError: an estimator that is not known, or one for a model with a flow or a prior made by the encoder.
    """

    encoder: Network
    decoder: Network
    hamiltonian: HamiltonianFlow | None
    frozen = False

    def __init__(
        self,
        encoder: Network,
        decoder: Network,
        latent: int,
        n_steps: int = 0,
        iaf_width: int = 0,
        memory: str = "reversible",
        compile: bool = False,
        prior: VampPrior | None = None,
        estimator: str = "plain",
    ):
        super().__init__()
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator: expected one of {', '.join(ESTIMATORS)}, got {estimator!r}")
        if estimator != "plain" and (n_steps or iaf_width or prior is not None):
            raise ValueError(f"estimator: expected 'plain' where flows or a learned prior are, got {estimator!r}")
        self.encoder, self.decoder, self.latent, self.prior = encoder, decoder, latent, prior
        self.estimator = estimator
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

    def freeze(self, decoder: dict[str, Tensor]) -> None:
        """Take the decoder of this state dict, and keep it: parameters, and batch norms as in evaluation."""
        self.decoder.load_state_dict(decoder)
        self.decoder.requires_grad_(False).eval()
        self.frozen = True

    def train(self, mode: bool = True) -> Model:
        """As ever, but for a decoder that is kept."""
        super().train(mode)
        self.decoder.train(mode and not self.frozen)
        return self

    def encode(self, pixels: Tensor) -> Code:
        """Location and log scale of ``q(z_0 | x)``, each ``(B, d)``, the encoder's other outputs, and the prior."""
        output, held = self.encoder.run(pixels.to(next(self.encoder.parameters()).dtype))
        loc, log_scale, context = output.tensor_split([self.latent, 2 * self.latent], dim=-1)
        prior = None
        if self.prior is not None:
            of_pseudo_inputs = self.encoder(self.prior.pseudo_inputs(), held).chunk(2, dim=-1)
            prior = Mixture(output.new_zeros(len(of_pseudo_inputs[0])), *of_pseudo_inputs)
        return Code(loc, log_scale, context, prior)

    def log_weights(self, pixels: Tensor, code: Code, noise: Tensor) -> Tensor:
        """``log p(x, z) + log N(rho) - log N(noise) + log_abs_det``, ``(S, B)``, in the terms of :meth:`transport`."""
        if self.training and self.estimator != "plain":
            return self._surrogate_log_weights(pixels, code, noise)
        z, rho, log_abs_det, decode = self.transport(pixels, code, noise)
        log_joint = self.log_joint(decode(z.flatten(0, 1)), pixels, z, code.prior)
        if self.training:
            log_joint = self.annealing * log_joint
        log_weights = log_joint - standard_normal_log_prob(noise) + log_abs_det
        return log_weights if rho is None else log_weights + standard_normal_log_prob(rho)

    def _surrogate_log_weights(self, pixels: Tensor, code: Code, noise: Tensor) -> Tensor:
        """The same numbers; the gradient of ``iwae_bound`` is the surrogate's for the encoder, as ever for the decoder.

        The encoder's gradient passes through z alone, where DReG multiplies it by the normalised weight once more: one
        backward pass for two objectives. Batch norms are held, so that a weight depends on its own sample alone.
        """
        z = code.loc + code.log_scale.exp() * noise
        log_q = normal_log_prob(z, code.loc.detach().expand_as(z), code.log_scale.detach().expand_as(z))
        decode, _ = self.decoder.hold(z.detach().flatten(0, 1))
        log_weights = self.log_joint(decode(z.flatten(0, 1)), pixels, z) - log_q
        if self.estimator == "dreg" and z.requires_grad:
            weights = log_weights.detach().softmax(0)[..., None]
            z.register_hook(lambda grad: grad * weights)
        return log_weights

    def transport(self, pixels: Tensor, code: Code, noise: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Decoder]:
        """``(z, rho, log_abs_det, decode)``: noise carried to the posterior.

        ``rho`` is None without leapfrog steps. ``log_abs_det (S, B)`` is that of the map from all noise. ``decode`` is
        the decoder, with the batch norms held at z_0 where a potential needs that.
        """
        scale, log_abs_det = code.log_scale.exp(), code.log_scale.sum(-1)
        decode: Decoder = self.decoder
        if self.hamiltonian is None:
            z, rho = code.loc + scale * noise, None
        else:
            noise, gamma = noise.chunk(2, dim=-1)
            z = code.loc + scale * noise
            decode, params = self.decoder.hold(z.flatten(0, 1))
            prior = code.prior and Mixture(*(x.view_as(x) for x in code.prior))
            params += prior[1:] if prior else ()
            # a view: to the gradient at z_0, batch norms that depend on z_0 are constants
            z, rho, _ = self.hamiltonian(z.view_as(z), gamma, self.potential(pixels, decode, prior), params=params)
        if self.iaf is None:
            return z, rho, log_abs_det.expand(z.shape[:-1]), decode
        state, iaf_log_abs_det = self.iaf(z if rho is None else torch.cat([z, rho], dim=-1))
        z, rho = (state, None) if rho is None else state.chunk(2, dim=-1)
        return z, rho, log_abs_det + iaf_log_abs_det, decode

    def potential(self, pixels: Tensor, decode: Decoder, prior: Mixture | None = None) -> Callable[[Tensor], Tensor]:
        """``U(z) = -log p(x, z)``, ``(..., B)`` of ``z (..., B, d)``."""
        return lambda z: -self.log_joint(decode(z.flatten(0, -2)), pixels, z, prior)

    def log_joint(self, logits: Tensor, pixels: Tensor, z: Tensor, prior: Mixture | None = None) -> Tensor:
        """``log p(x | z) + log p(z)``, ``(..., B)``, of logits ``(... * B, 784)`` and z ``(..., B, d)``."""
        log_prior = standard_normal_log_prob(z) if prior is None else prior.log_prob(z)
        return self.log_likelihood(logits.view(*z.shape[:-1], logits.shape[-1]), pixels) + log_prior

    def reconstruct(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Logits ``(B, 784)``."""
        z, *_, decode = self.transport(pixels, self.encode(pixels), noise)
        return decode(z[0])

    def sample_prior(self, count: int, generator: torch.Generator) -> Tensor:
        """Latents ``(count, d)``."""
        if self.prior is None:
            return torch.randn(count, self.latent, generator=generator)
        mixture = self.encode(self.prior.pseudo_inputs()[:1]).prior
        assert mixture is not None
        return Mixture(*(x.cpu() for x in mixture)).sample(count, generator)

    def pictures(self, pixels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Digits along the leapfrog steps, and the first pseudo-inputs."""
        pictures = {}
        if self.hamiltonian is not None:
            shown = pixels[:N_TRAJECTORIES]
            noise = torch.randn(1, len(shown), self.noise_features, generator=generator).to(shown.device)
            pictures["trajectories"] = torch.sigmoid(self.trajectory(shown, noise)).transpose(0, 1)
        if self.prior is not None:
            shown = self.prior.pseudo_inputs()[:N_PSEUDO_INPUTS]
            pictures["pseudo-inputs"] = shown.unflatten(0, (-1, 8 if len(shown) % 8 == 0 else len(shown)))
        return pictures

    def first_momentum(self, z: Tensor, code: Code, gamma: Tensor) -> Tensor:
        """Where the leapfrog begins at ``z (B, d)``, of standard normals ``gamma (B, d)``."""
        assert self.hamiltonian is not None
        return self.hamiltonian.temperatures()[0] * gamma

    @torch.no_grad()
    def trajectory(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Logits ``(K + 1, B, 784)`` along the leapfrog steps, from one row of noise ``(1, B, noise_features)``."""
        assert self.hamiltonian is not None
        code = self.encode(pixels)
        noise, gamma, *_ = noise[0].split(self.latent, dim=-1)
        z = code.loc + code.log_scale.exp() * noise
        (decode, _), path = self.decoder.hold(z), [z]
        _, alpha = self.hamiltonian.temperatures()
        rho, step_size = self.first_momentum(z, code, gamma), self.hamiltonian.step_size
        potential = self.potential(pixels, decode, code.prior)
        for step in alpha.split(1):
            z, rho = leapfrog(z, rho, potential, step_size, step)
            path.append(z)
        return torch.stack([decode(z) for z in path])
