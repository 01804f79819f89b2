"""Closed forms: evidence, expected bounds, their optima, floors. Shapes: data and parameters ``(R, 1, d)``.

The evidence of N points with mean m and centred second moment s^2 is, summed over dimensions,

    -N/2 log(2 pi sigma^2) - N s^2/(2 sigma^2) - 1/2 log(1 + N/sigma^2) - (m - Delta)^2 / (2 (1 + sigma^2/N)),

and a bound's data term ``E log p(D | z)`` is ``-N/2 log(2 pi sigma^2) - N/(2 sigma^2) (s^2 + E (z + Delta - m)^2)``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hvae.gaussian.data import Statistics
from hvae_kernels.functional import gaussian_leapfrog

LOG_2PI = math.log(2 * math.pi)


class Flow(NamedTuple):
    """A tempered leapfrog flow: step sizes ``(R, 1, d)``, ``T_0 (R, 1)``, tempering ``(R, K)``."""

    step_size: Tensor
    temperature: Tensor
    tempering: Tensor


class Annealing(NamedTuple):
    """An annealed flow: step sizes ``(R, 1, d)``, beta ``(R, M)``, refreshment ``(R, 1, 1)``."""

    step_size: Tensor
    betas: Tensor
    refreshment: Tensor


def quadratic_profile(n_steps: int, dtype: torch.dtype) -> Tensor:
    """``1 - k^2/K^2`` for k = 0..K, ``(K + 1,)``; zero for K = 0, where ``T_0 = 1``."""
    k = torch.arange(n_steps + 1, dtype=dtype)
    return 1 - (k / n_steps) ** 2 if n_steps else torch.zeros_like(k)


def quadratic_tempering(excess: Tensor, n_steps: int) -> tuple[Tensor, Tensor]:
    """``T_0 (R, 1)`` and ``alpha_k = T_k/T_{k-1} (R, K)`` of ``T_k = 1 + excess (1 - k^2/K^2)``, excess ``(R, 1)``."""
    temperature = 1 + excess * quadratic_profile(n_steps, excess.dtype)
    return temperature[:, :1], temperature[:, 1:] / temperature[:, :-1]


def log_evidence(data: Statistics, loc: Tensor, log_scale: Tensor) -> Tensor:
    """``log p(D) (R,)`` by the formula above."""
    noise = torch.exp(2 * log_scale) / data.count
    z = torch.log1p(1 / noise) + (data.mean - loc) ** 2 / (1 + noise)
    fit = data.count * (LOG_2PI + 2 * log_scale) + data.variance / noise
    return -(fit + z).sum((-2, -1)) / 2


def expected_log_likelihood(data: Statistics, loc: Tensor, log_scale: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """``E log p(D | z)``, ``(R, 1, d)``, for a z with this mean and variance."""
    residual = data.variance + (mean + loc - data.mean) ** 2 + variance
    return -data.count / 2 * (LOG_2PI + 2 * log_scale + torch.exp(-2 * log_scale) * residual)


def mean_field_bound(data: Statistics, loc: Tensor, log_scale: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """The bound ``(R,)`` with ``q(z) = N(mean, exp(2 log_std))``: data term less ``KL(q || N(0, I))``."""
    variance = torch.exp(2 * log_std)
    divergence = (mean**2 + variance - 1) / 2 - log_std
    return (expected_log_likelihood(data, loc, log_scale, mean, variance) - divergence).sum((-2, -1))


def hamiltonian_bound(data: Statistics, loc: Tensor, log_scale: Tensor, flow: Flow) -> Tensor:
    """The expectation ``(R,)`` of the Hamiltonian bound over ``z_0, gamma ~ N(0, I)``.

    Each dimension's flow is a 2x2 matrix on ``(z - centre, rho)``: its columns are the trajectories of two unit
    vectors, and with them the final state is Gaussian with known moments.
    """
    centred = data.mean - loc
    ratio = data.count * torch.exp(-2 * log_scale)
    precision = 1 + ratio
    centre = ratio / precision * centred
    unit = torch.eye(2, dtype=loc.dtype)[:, :, None].expand(2, 2, loc.shape[-1])
    z, rho = (u.expand(len(loc), -1, -1) for u in unit)
    by_z, by_rho = gaussian_leapfrog(z, rho, precision, torch.zeros_like(centre), flow.step_size, flow.tempering)
    stretch = torch.stack((torch.ones_like(flow.temperature), flow.temperature**2), 1)
    z_mean, z_variance = centre - by_z[:, :1] * centre, (by_z**2 * stretch).sum(1, keepdim=True)
    rho_mean, rho_variance = -by_rho[:, :1] * centre, (by_rho**2 * stretch).sum(1, keepdim=True)
    fit = expected_log_likelihood(data, loc, log_scale, z_mean, z_variance)
    final = z_mean**2 + z_variance + rho_mean**2 + rho_variance
    # the initial state's two entropies less the priors' constants: one nat a dimension
    return (fit - final / 2 + 1).sum((-2, -1))


def annealed_bound(data: Statistics, loc: Tensor, log_scale: Tensor, flow: Annealing) -> Tensor:
    """The expectation ``(R,)`` of the annealed bound over all noise, from the moments of ``(z, rho)`` on the way.

    A bridge's leapfrog step is a 2x2 matrix on ``(z - centre, rho)`` in each dimension.
    """
    centred = data.mean - loc
    ratio = data.count * torch.exp(-2 * log_scale)
    eta, sigma_squared = flow.refreshment, (1 - flow.refreshment) * (1 + flow.refreshment)
    ones, none = torch.ones_like(ratio), torch.zeros_like(ratio)
    unit = torch.eye(2, dtype=loc.dtype)[:, :, None].expand(2, 2, loc.shape[-1])
    z, rho = (u.expand(len(loc), -1, -1) for u in unit)
    mean, cov = (none, none), (ones, none, ones)  # of z and rho; of zz, z rho, rho rho
    log_weight = none
    for beta in flow.betas.mT:
        drawn = beta[:, None, None] * ratio
        centre = drawn / (1 + drawn) * centred
        by_z, by_rho = gaussian_leapfrog(z, rho, 1 + drawn, none, flow.step_size, torch.ones_like(flow.betas[:, :1]))
        mean = mean[0] - centre, eta * mean[1]
        cov = cov[0], eta * cov[1], eta**2 * cov[2] + sigma_squared
        log_weight = log_weight + (mean[1] ** 2 + cov[2]) / 2
        (a, b), (c, d) = by_z.split(1, 1), by_rho.split(1, 1)
        mean = a * mean[0] + b * mean[1] + centre, c * mean[0] + d * mean[1]
        cov = (
            a**2 * cov[0] + 2 * a * b * cov[1] + b**2 * cov[2],
            a * c * cov[0] + (a * d + b * c) * cov[1] + b * d * cov[2],
            c**2 * cov[0] + 2 * c * d * cov[1] + d**2 * cov[2],
        )
        log_weight = log_weight - (mean[1] ** 2 + cov[2]) / 2
    fit = expected_log_likelihood(data, loc, log_scale, mean[0], cov[0])
    # the entropy of z_0 less the prior's constant: half a nat a dimension
    return (fit - (mean[0] ** 2 + cov[0]) / 2 + log_weight + 0.5).sum((-2, -1))


def maximum_likelihood(data: Statistics) -> tuple[Tensor, Tensor]:
    """``(Delta, sigma)`` that maximise the evidence: Delta = m, and v = sigma^2 solves v^2 + (N-1-s^2) v = N s^2."""
    b = data.count - 1 - data.variance
    root = torch.sqrt(b**2 + 4 * data.count * data.variance)
    # the root's usual form would cancel for b > 0
    return data.mean, torch.sqrt(2 * data.count * data.variance / (b + root))


def no_flow_scale(data: Statistics) -> Tensor:
    """The best sigma when z keeps its prior: ``sqrt(s^2 + 1)``."""
    return torch.sqrt(data.variance + 1)


def one_step_optimum(data: Statistics, *, tempered: bool) -> tuple[Tensor, Tensor]:
    """``(sigma (R, 1, d), T_0 (R, 1))`` that maximise the expected K = 1 bound, Delta being at its optimum m.

    Found numerically, over each data set's log sigma, step sizes and ``T_0`` together.
    """
    centred = Statistics(data.count, torch.zeros_like(data.mean), data.variance)
    log_scale = torch.log(data.variance + 0.1) / 2
    # step sizes on the scale of the posterior's width, inside the leapfrog's region of stability
    log_step = log_scale - math.log(data.count) / 2
    log_excess = torch.full_like(data.mean[:, 0, :1], math.log(4.0))
    free = [log_scale.clone().requires_grad_(), log_step.requires_grad_(), log_excess.requires_grad_()]

    def flow() -> Flow:
        excess = torch.exp(free[2]) if tempered else torch.zeros_like(free[2])
        return Flow(torch.exp(free[1]), *quadratic_tempering(excess, 1))

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -hamiltonian_bound(centred, torch.zeros_like(data.mean), free[0], flow()).sum()
        value.backward()
        return value

    optimizer = torch.optim.LBFGS(
        free, max_iter=5000, max_eval=20000, history_size=50, line_search_fn="strong_wolfe",
        tolerance_grad=1e-9, tolerance_change=1e-13,
    )  # fmt: skip
    optimizer.step(loss)
    return torch.exp(free[0].detach()), flow().temperature.detach()
