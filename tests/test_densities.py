"""What the experiments' densities are, beside torch's own."""

import torch
from hvae import densities
from torch.distributions import Independent, Normal, kl_divergence

LOC, LOG_SCALE, OTHER_LOC, OTHER_LOG_SCALE, X = torch.randn(5, 4, 3, dtype=torch.float64)


def normal(loc, log_scale):
    return Independent(Normal(loc, log_scale.exp()), 1)


def test_standard_normal():
    expected = normal(torch.zeros_like(X), torch.zeros_like(X)).log_prob(X)
    torch.testing.assert_close(densities.standard_normal_log_prob(X), expected)


def test_normal():
    torch.testing.assert_close(densities.normal_log_prob(X, LOC, LOG_SCALE), normal(LOC, LOG_SCALE).log_prob(X))


def test_divergence():
    found = densities.normal_divergence(LOC, LOG_SCALE, OTHER_LOC, OTHER_LOG_SCALE)
    torch.testing.assert_close(found, kl_divergence(normal(LOC, LOG_SCALE), normal(OTHER_LOC, OTHER_LOG_SCALE)))


def test_divergence_from_the_standard_normal():
    found = densities.standard_normal_divergence(LOC, LOG_SCALE)
    zero = torch.zeros_like(LOC)
    torch.testing.assert_close(found, kl_divergence(normal(LOC, LOG_SCALE), normal(zero, zero)))


def test_divergences_of_what_is_almost_the_same_do_not_cancel():
    loc, log_scale = torch.full((4, 3), 1e-4), torch.full((4, 3), 1e-4)
    zero, exact = torch.zeros_like(loc), 3 * 1.50006667e-8  # (expm1(2e-4) + 1e-8) / 2 - 1e-4, in more digits
    for found in (
        densities.standard_normal_divergence(loc, log_scale),
        densities.normal_divergence(loc, log_scale, zero, zero),
    ):
        torch.testing.assert_close(found, torch.full((4,), exact), rtol=1e-3, atol=0)
