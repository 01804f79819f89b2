"""Annealed importance sampling: unbiased both ways, and the exact evidence between its two bounds."""

import math

import pytest
import torch

from hvae_kernels.functional import iwae_bound
from hvae_kernels.nn import AnnealedImportanceSampling

D = 3


def base(z):
    return z.square().sum(-1) / 2 + D / 2 * math.log(2 * math.pi)


class LinearGaussian:
    """``z ~ N(0, I)``, ``x ~ N(A z, 0.5^2)``: evidence and posterior in closed form."""

    def __init__(self, n_images=6, scale=0.5):
        torch.manual_seed(5)
        self.matrix = scale * torch.randn(5, D, dtype=torch.float64)
        self.z = torch.randn(n_images, D, dtype=torch.float64)
        self.x = self.z @ self.matrix.mT + 0.5 * torch.randn(n_images, 5, dtype=torch.float64)

    def potential(self, z):
        residual = (self.x - z @ self.matrix.mT) / 0.5
        return base(z) + residual.square().sum(-1) / 2 + 5 * math.log(0.5 * math.sqrt(2 * math.pi))

    def evidence(self):
        covariance = self.matrix @ self.matrix.mT + 0.25 * torch.eye(5, dtype=torch.float64)
        return torch.distributions.MultivariateNormal(torch.zeros(5).double(), covariance).log_prob(self.x)

    def posterior(self, n):
        precision = torch.eye(D, dtype=torch.float64) + self.matrix.mT @ self.matrix / 0.25
        loc = torch.linalg.solve(precision, self.matrix.mT @ self.x.mT / 0.25).mT
        return torch.distributions.MultivariateNormal(loc, precision_matrix=precision).sample((n,))


def sampler(n_bridges, step_size=0.15, leapfrog_steps=3):
    return AnnealedImportanceSampling(D, n_bridges, leapfrog_steps, step_size, dtype=torch.float64)


@pytest.mark.parametrize("step_size", [0.1, 1.5])
@pytest.mark.parametrize("n_bridges", [1, 3, 12])
def test_weights_are_unbiased_both_ways(n_bridges, step_size):
    """With step sizes of which many proposals are refused, too; a posterior for which 1/w has a finite variance."""
    model, n = LinearGaussian(1, 0.1), 20_000
    chains = sampler(n_bridges, step_size)
    _, forward = chains(torch.randn(n, 1, D, dtype=torch.float64), model.potential, base)
    _, backward = chains.reverse(model.posterior(n), model.potential, base)
    for ratios in ((forward - model.evidence()).exp(), (model.evidence() - backward).exp()):
        standard_error = ratios.std() / n**0.5
        assert standard_error < 0.15
        assert abs(ratios.mean() - 1) < 4 * standard_error


def test_the_evidence_lies_between_bounds_that_meet():
    model, n, gaps = LinearGaussian(), 200, []
    exact = model.evidence()
    for n_bridges in (10, 40, 160):
        chains = sampler(n_bridges)
        _, forward = chains(torch.randn(n, 6, D, dtype=torch.float64), model.potential, base)
        _, backward = chains.reverse(model.posterior(n), model.potential, base)
        assert (forward.mean(0) < exact + 4 * forward.std(0) / n**0.5).all()
        assert (backward.mean(0) > exact - 4 * backward.std(0) / n**0.5).all()
        gaps.append((backward.mean() - forward.mean()).item())
    assert gaps[2] < gaps[1] / 2 < gaps[0] / 4
    assert gaps[2] < 0.5
    lower, upper = iwae_bound(forward, 0), -iwae_bound(-backward, 0)
    torch.testing.assert_close(lower, exact, rtol=0, atol=0.1)
    torch.testing.assert_close(upper, exact, rtol=0, atol=0.1)


def test_chains_end_in_the_other_density():
    model = LinearGaussian(1)
    chains = sampler(60)
    z, log_weight = chains(torch.randn(4_000, 1, D, dtype=torch.float64), model.potential, base)
    weights = (log_weight - log_weight.max()).exp()
    mean = (weights[..., None] * z).sum(0) / weights.sum(0)[..., None]
    exact = model.posterior(1_000_000)
    torch.testing.assert_close(mean, exact.mean(0), rtol=0, atol=0.03)
    start, _ = chains.reverse(exact[:4_000], model.potential, base)
    assert abs(start.mean()) < 0.06
    assert abs(start.std() - 1) < 0.06


def test_one_bridge_is_importance_sampling():
    model, z = LinearGaussian(), torch.randn(6, D, dtype=torch.float64)
    _, log_weight = sampler(1)(z, model.potential, base)
    torch.testing.assert_close(log_weight, base(z) - model.potential(z))
    start, log_weight = sampler(1).reverse(model.posterior(1)[0], model.potential, base)
    torch.testing.assert_close(log_weight, base(start) - model.potential(start))


def test_tuning_brings_the_acceptance_near_its_target():
    model = LinearGaussian()
    for first in (2.0, 0.001):
        chains, late = sampler(200, first), sampler(50)
        start = torch.randn(50, 6, D, dtype=torch.float64)
        chains.tune(start, model.potential, base)
        late.betas.copy_(chains.betas[150:])
        late.step_size.copy_(chains.step_size[150:])
        assert late.step_size.max() / late.step_size.min() < 2
        _, acceptance, _ = late._run(start, model.potential, base, None)
        assert 0.45 < acceptance < 0.85


def test_gradients_are_counted_and_numbers_repeat():
    model, calls = LinearGaussian(), []

    def potential(z):
        calls.append(len(z))
        return model.potential(z)

    chains, z = sampler(7, leapfrog_steps=4), torch.randn(6, D, dtype=torch.float64)
    first = chains(z, potential, base, generator=torch.Generator().manual_seed(3))
    assert len(calls) == 7 * 4 + 1
    again = chains(z, potential, base, generator=torch.Generator().manual_seed(3))
    assert all(map(torch.equal, first, again))


def test_inference_mode():
    """A potential's own gradient is recorded all the same, and step sizes are tuned."""
    model, z = LinearGaussian(), torch.randn(6, D, dtype=torch.float64)
    found = []
    for mode in (torch.enable_grad, torch.inference_mode):
        chains = sampler(7)
        with mode():
            draws = torch.Generator().manual_seed(3)
            acceptance = chains.tune(z * 1, model.potential, base, generator=draws)
            forwards = chains(z * 1, model.potential, base, generator=draws)
            backwards = chains.reverse(z * 1, model.potential, base, generator=draws)
        found.append([x.clone() for x in (torch.tensor(acceptance), chains.step_size, *forwards, *backwards)])
    assert all(map(torch.equal, *found))
    assert found[0][1].unique().numel() > 1


def test_an_energy_that_is_not_finite_is_refused_not_taken():
    def potential(z):
        return torch.where(z[..., 0] > 0.5, torch.nan, 0 * z[..., 0] + z.square().sum(-1) / 2)

    z = torch.full((100, D), 0.4, dtype=torch.float64)
    end, log_weight = sampler(5, 0.5)(z, potential, base)
    assert end.isfinite().all()
    assert (end[:, 0] <= 0.5).all()
    assert log_weight.isfinite().all()


def test_bad_input():
    for options, message in (
        ({"n_bridges": 0}, "n_bridges must be an integer of at least 1"),
        ({"init_step_size": 0.0}, "init_step_size must be positive"),
        ({"init_step_size": "small"}, "init_step_size must be a number"),
        ({"init_step_size": math.inf}, "init_step_size must be finite"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"AnnealedImportanceSampling: {message}"):
            AnnealedImportanceSampling(**{"features": D, "n_bridges": 2, **options})
    chains, z = AnnealedImportanceSampling(D, 2), torch.randn(4, D)
    for arguments, message in (
        ((z[:, :2], base, base), "z must be a tensor of shape"),
        ((z, None, base), "potential must be a function"),
        ((z, lambda z: z.square(), base), "potential must be a function with energies"),
        ((z, lambda z: torch.ones(4), base), "potential must be a differentiable function of z"),
        ((z, base, lambda z: torch.ones(4)), "base_potential must be a differentiable function of z"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"AnnealedImportanceSampling: {message}"):
            chains(*arguments)
    with pytest.raises(TypeError, match=r"AnnealedImportanceSampling: generator must be a torch.Generator"):
        chains(z, base, base, generator=3)
