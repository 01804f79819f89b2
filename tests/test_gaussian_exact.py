"""The study's closed forms against direct computation, Monte Carlo and each other."""

import dataclasses
import math

import pytest
import torch
from hvae.gaussian import data, exact
from hvae.gaussian.data import Statistics
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, Normal

import hvae_kernels as hk

F64 = torch.float64


def problem(seed: int, count: int = 7, dim: int = 3, replicas: int = 2):
    """Raw points of R data sets, their statistics, and parameters near enough for the bound not to be absurd."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=F64)

    points = normal(replicas, count, dim) + 2 * normal(replicas, 1, dim)
    statistics = data.statistics(list(points))
    return points, statistics, normal(replicas, 1, dim), normal(replicas, 1, dim) / 2


def random_flow(seed: int, n_steps: int, dim: int = 3, replicas: int = 2) -> exact.Flow:
    generator = torch.Generator().manual_seed(seed + 1000)
    step_size = 0.4 * torch.rand(replicas, 1, dim, generator=generator, dtype=F64)
    excess = 3 * torch.rand(replicas, 1, generator=generator, dtype=F64)
    return exact.Flow(step_size, *exact.quadratic_tempering(excess, n_steps))


@given(seed=st.integers(0, 10_000), count=st.integers(1, 9))
def test_log_evidence_is_that_of_the_joint_gaussian(seed, count):
    points, statistics, loc, log_scale = problem(seed, count)
    result = exact.log_evidence(statistics, loc, log_scale)
    for r in range(2):
        direct = 0.0
        for j in range(3):
            covariance = torch.ones(count, count, dtype=F64) + torch.exp(2 * log_scale[r, 0, j]) * torch.eye(count)
            direct += MultivariateNormal(loc[r, 0, j].expand(count), covariance).log_prob(points[r, :, j])
        torch.testing.assert_close(result[r], direct)


def sampled_bound(points, loc, log_scale, flow, z, gamma):
    """The bound per sample ``(B,)`` of one data set from its raw points, by the plain formula of the flow."""
    scale, precision = log_scale.exp(), 1 + len(points) * torch.exp(-2 * log_scale)
    centre = (1 - 1 / precision) * (points.mean(0) - loc)
    with hk.use_impl("reference"):
        z_final, rho_final = hk.functional.gaussian_leapfrog(
            z, flow.temperature[0] * gamma, precision, centre, flow.step_size[0, 0], flow.tempering[0]
        )
    standard = Normal(torch.zeros((), dtype=F64), torch.ones((), dtype=F64))
    fit = Normal(z_final[:, None] + loc, scale).log_prob(points).sum((-2, -1))
    final = standard.log_prob(z_final).sum(-1) + standard.log_prob(rho_final).sum(-1)
    return fit + final - standard.log_prob(z).sum(-1) - standard.log_prob(gamma).sum(-1)


@pytest.mark.parametrize("n_steps", [0, 1, 4])
def test_expected_hamiltonian_bound_is_the_average_of_the_sampled_one(n_steps):
    points, statistics, loc, log_scale = problem(3, replicas=1)
    flow = random_flow(3, n_steps, replicas=1)
    # antithetic pairs in both arguments leave the means' error at zero; the variances' falls with the sample
    z, gamma = torch.randn(2, 100_000, 3, dtype=F64)
    z, gamma = torch.cat((z, z, -z, -z)), torch.cat((gamma, -gamma, gamma, -gamma))
    samples = sampled_bound(points[0], loc[0, 0], log_scale[0, 0], flow, z, gamma)
    error = samples.view(4, -1).mean(0).std() / math.sqrt(100_000)
    expected = exact.hamiltonian_bound(statistics, loc, log_scale, flow)[0]
    assert abs(samples.mean() - expected) < 4 * error
    assert error < 0.01 * abs(expected)


@given(seed=st.integers(0, 10_000), n_steps=st.integers(0, 6), count=st.integers(1, 50))
def test_expected_bounds_are_never_above_the_evidence(seed, n_steps, count):
    _, statistics, loc, log_scale = problem(seed, count)
    evidence = exact.log_evidence(statistics, loc, log_scale)
    flow = random_flow(seed, n_steps)
    assert (exact.hamiltonian_bound(statistics, loc, log_scale, flow) <= evidence + 1e-9).all()
    mean, log_std = torch.randn(2, 2, 1, 3, dtype=F64)
    assert (exact.mean_field_bound(statistics, loc, log_scale, mean, log_std) <= evidence + 1e-9).all()


@given(seed=st.integers(0, 10_000))
def test_without_steps_the_hamiltonian_bound_is_the_mean_field_bound_of_the_prior(seed):
    _, statistics, loc, log_scale = problem(seed)
    zero = torch.zeros_like(loc)
    plain = exact.mean_field_bound(statistics, loc, log_scale, zero, zero)
    torch.testing.assert_close(exact.hamiltonian_bound(statistics, loc, log_scale, random_flow(seed, 0)), plain)


@given(seed=st.integers(0, 10_000))
def test_mean_field_bound_is_tight_at_the_posterior(seed):
    _, statistics, loc, log_scale = problem(seed)
    precision = 1 + statistics.count * torch.exp(-2 * log_scale)
    mean = (1 - 1 / precision) * (statistics.mean - loc)
    bound = exact.mean_field_bound(statistics, loc, log_scale, mean, -precision.log() / 2)
    torch.testing.assert_close(bound, exact.log_evidence(statistics, loc, log_scale))


@given(seed=st.integers(0, 10_000), count=st.integers(2, 10_000))
def test_maximum_likelihood_is_the_stationary_point_of_the_evidence(seed, count):
    statistics = dataclasses.replace(problem(seed)[1], count=count)
    loc, scale = exact.maximum_likelihood(statistics)
    loc, log_scale = loc.clone().requires_grad_(), scale.log().requires_grad_()
    gradients = torch.autograd.grad(exact.log_evidence(statistics, loc, log_scale).sum(), (loc, log_scale))
    for gradient in gradients:
        torch.testing.assert_close(gradient / count, torch.zeros_like(gradient), atol=1e-10, rtol=0)


def sigma_errors(scale, truth):
    return ((scale - truth.scale) ** 2).sum((-2, -1))


def test_optimum_of_the_bound_of_a_mini_batch():
    truth = data.truth(25)
    statistics = Statistics(256, torch.zeros(1, 1, 25, dtype=F64), truth.scale.square()[None, None])
    untempered, _ = exact.one_step_optimum(statistics, tempered=False)
    tempered, temperature = exact.one_step_optimum(statistics, tempered=True)
    assert sigma_errors(untempered, truth).item() == pytest.approx(3.920, abs=5e-4)
    assert sigma_errors(tempered, truth).item() == pytest.approx(0.0323, abs=5e-5)
    assert temperature.item() == pytest.approx(5.40, abs=5e-3)


def test_optimum_of_the_bound_of_all_points():
    sets = data.data_sets(25, 3, 12345)
    scale, _ = exact.one_step_optimum(sets.full, tempered=True)
    assert sigma_errors(scale, sets.truth).tolist() == pytest.approx([0.00089, 0.00096, 0.00078], abs=5e-6)


def test_no_flow_scale_is_the_optimum_without_steps():
    statistics = problem(0)[1]
    log_scale = exact.no_flow_scale(statistics).log().requires_grad_()
    bound = exact.hamiltonian_bound(statistics, statistics.mean, log_scale, random_flow(0, 0)).sum()
    (gradient,) = torch.autograd.grad(bound, log_scale)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
