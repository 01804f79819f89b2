"""Uncorrected Hamiltonian annealing of the Gaussian model."""

from __future__ import annotations

import torch
from torch import Tensor

from hvae.gaussian import exact
from hvae.gaussian.data import Statistics
from hvae.gaussian.models.model import MAX_STEP_SIZE, N_SAMPLES, Batch, Model, location_and_scale, logit
from hvae_kernels.functional import gaussian_leapfrog

INITIAL_REFRESHMENT = 0.5


class AnnealedVAE(Model):
    """``z_0 ~ N(0, I)``, the prior, carried along M bridges to the posterior, a leapfrog step each.

    Learned: Delta, log sigma, step sizes ``0.5 sigmoid(.)`` from 0.005, beta from equal increments, and eta. Bridge m
    has the precision ``1 + beta_m N/sigma^2`` and the centre ``(1 - 1/precision) (mean - Delta)``. Gradients are
    autograd's, through the leapfrog's kernels.
    """

    def __init__(self, dim: int, n_bridges: int, *, replicas: int = 1, dtype: torch.dtype = torch.float32):
        blocks = location_and_scale(dim)
        blocks["step_size_logit"] = torch.full((dim,), logit(0.005 / MAX_STEP_SIZE), dtype=torch.float64)
        blocks["beta_logits"] = torch.zeros(n_bridges)
        blocks["refreshment_logit"] = torch.tensor([logit(INITIAL_REFRESHMENT)], dtype=torch.float64)
        super().__init__(replicas, blocks, dtype)
        self.n_bridges = n_bridges
        self.noise_rows = (2 + n_bridges, N_SAMPLES)
        self._no_tempering = torch.ones(replicas, 1, dtype=dtype)

    def flow(self, values: dict[str, Tensor]) -> exact.Annealing:
        """Step sizes, beta and refreshment."""
        beta = values["beta_logits"].softmax(-1).cumsum(-1)[:, 0]
        return exact.Annealing(
            MAX_STEP_SIZE * torch.sigmoid(values["step_size_logit"]),
            torch.cat([beta[:, :-1], torch.ones_like(beta[:, :1])], -1),
            torch.sigmoid(values["refreshment_logit"]),
        )

    def bound(self, values: dict[str, Tensor], data: Statistics | Batch, noise: Tensor) -> Tensor:
        """``log p(D, z_M) + log w``, averaged over the samples; ``noise (2 + M, R, B, d)`` is ``z_0, rho_0, xi``."""
        loc, log_scale = values["loc"], values["log_scale"]
        step_size, betas, eta = self.flow(values)
        ratio = data.count * torch.exp(-2 * log_scale)
        z, rho, *refreshments = noise
        sigma, log_weight = torch.sqrt((1 - eta) * (1 + eta)), 0.0
        tempering = self._no_tempering.to(z)
        for beta, xi in zip(betas.mT, refreshments, strict=True):
            drawn = beta[:, None, None] * ratio
            begun = eta * rho + sigma * xi
            centre = drawn / (1 + drawn) * (data.mean - loc)
            z, rho = gaussian_leapfrog(z, begun, 1 + drawn, centre, step_size, tempering)
            log_weight = log_weight + ((begun - rho) * (begun + rho)).sum(-1) / 2
        fit = data.count * log_scale + ratio / 2 * (data.variance + (z + loc - data.mean) ** 2)
        return (log_weight - (fit + z**2 / 2).sum(-1)).mean(-1)

    def write_gradient(self, batch: Batch, noise: Tensor) -> None:
        """By autograd."""
        with torch.enable_grad():
            flat = self.flat.detach().requires_grad_()
            loss = -self.bound(self.views(flat), batch, noise).sum()
            self.gradient.copy_(torch.autograd.grad(loss, flat)[0])

    def elbo(self, data: Statistics) -> Tensor:
        """Closed form: every map is affine and all noise is Gaussian."""
        flow = self.flow({name: value.double() for name, value in self.values.items()})
        return exact.annealed_bound(data, *self.estimate(), flow)
