"""``iwae_bound`` and its surrogates on a model whose bound and gradient are known, and at the edge of the numbers.

The model: ``z ~ N(0, 1)``, ``x | z ~ N(z, 1)``, ``q(z | x) = N(mu, s^2)``; ``log p(x) = log N(x; 0, 2)``.
"""

import itertools
import math

import numpy
import pytest
import torch

import hvae_kernels as hk
from hvae_kernels import testing
from hvae_kernels.functional import dreg_surrogate, iwae_bound, stl_surrogate

IMPLEMENTATIONS = ("cpp", "triton", "reference")
SURROGATES = {1: stl_surrogate, 2: dreg_surrogate}
INF = math.inf
X, MU, SCALE = 1.5, 0.2, 0.9


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def implementation(request):
    with hk.use_impl(request.param):
        yield request.param


def log_normal(x, loc, scale):
    return -(((x - loc) / scale) ** 2) / 2 - math.log(scale) - math.log(2 * math.pi) / 2


def log_weights(noise, mu, *, detached=False):
    """Of samples ``mu + s noise``; detached, ``log q`` does not know where it came from."""
    z = mu + SCALE * noise
    return log_normal(z, 0.0, 1.0) + log_normal(X, z, 1.0) - log_normal(z, mu.detach() if detached else mu, SCALE)


def exact_gradient(samples, nodes=64):
    """The derivative by mu of the expected bound of one or two samples, by Gauss-Hermite quadrature."""
    points, masses = (torch.from_numpy(a) for a in numpy.polynomial.hermite_e.hermegauss(nodes))
    masses = masses / masses.sum()
    noise = torch.cartesian_prod(*[points] * samples).reshape(-1, samples).T
    mass = torch.cartesian_prod(*[masses] * samples).reshape(-1, samples).prod(1)
    mu = torch.tensor(MU, dtype=torch.float64, requires_grad=True)
    bound = log_weights(noise, mu).logsumexp(0) - math.log(samples)
    return torch.autograd.grad((mass * bound).sum(), mu)[0].item()


def estimated_gradient(function, samples, *, detached, n=100_000):
    """Mean and standard error of single estimates: of the means over all signs of their noise, which vary less."""
    signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0], dtype=torch.float64)] * samples).view(-1, samples).T
    noise = (signs[:, :, None] * torch.randn(samples, 1, n // 2**samples, dtype=torch.float64)).flatten(1)
    mu = torch.full((n,), MU, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(log_weights(noise, mu, detached=detached)).sum(), mu)
    means = gradient.view(2**samples, -1).mean(0)
    return means.mean().item(), means.std().item() / len(means) ** 0.5


def test_exact_gradient_of_the_elbo():
    """The quadrature against the closed form, ``x - 2 mu``."""
    assert exact_gradient(1) == pytest.approx(X - 2 * MU, rel=1e-10)


@pytest.mark.parametrize("samples", [1, 2])
def test_estimators_are_unbiased(samples):
    """The bound's own gradient and DReG's; five standard errors are less than 2 % of the gradient."""
    exact = exact_gradient(samples)
    for function, detached in ((iwae_bound, False), (dreg_surrogate, True)):
        mean, error = estimated_gradient(function, samples, detached=detached, n=120_000 * samples)
        assert 5 * error < 0.02 * abs(exact)
        assert abs(mean - exact) < 5 * error + 1e-12  # one sample's error is linear in its noise


def test_sticking_the_landing_is_unbiased_for_one_sample_only():
    mean, error = estimated_gradient(stl_surrogate, 1, detached=True)
    assert abs(mean - exact_gradient(1)) < 5 * error + 1e-12
    mean, error = estimated_gradient(stl_surrogate, 2, detached=True)
    assert abs(mean - exact_gradient(2)) > 20 * error


def test_surrogates_vanish_at_the_posterior():
    """Where q is the posterior the weights are constant, and so is every sample's surrogate gradient: zero."""
    noise = torch.randn(5, 100, dtype=torch.float64)
    mu = torch.tensor(X / 2, dtype=torch.float64, requires_grad=True)
    z = mu + 0.5**0.5 * noise
    weights = log_normal(z, 0.0, 1.0) + log_normal(X, z, 1.0) - log_normal(z, mu.detach(), 0.5**0.5)
    torch.testing.assert_close(weights, torch.full_like(weights, log_normal(X, 0.0, 2**0.5)))
    for surrogate in SURROGATES.values():
        (gradient,) = torch.autograd.grad(surrogate(weights).sum(), mu, retain_graph=True)
        assert abs(gradient) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_sample_is_the_elbo(dtype):
    """Bit for bit, and a single weight of gradient 1."""
    single = (100 * torch.randn(1, 33, dtype=dtype)).requires_grad_()
    for function in (iwae_bound, *SURROGATES.values()):
        value = function(single)
        assert torch.equal(value, single[0])
        assert torch.equal(torch.autograd.grad(value.sum(), single)[0], torch.ones_like(single))


def test_monotone_in_samples():
    """Two halves' mean bound is at most the bound of all; the bound lies between mean and maximum."""
    weights = 5 * torch.randn(32, 200, dtype=torch.float64)
    bounds = [torch.stack([iwae_bound(part) for part in weights.chunk(32 // k)]).mean(0) for k in (1, 2, 4, 8, 16, 32)]
    for fewer, more in itertools.pairwise(bounds):
        assert (fewer <= more + 1e-12).all()
    assert (bounds[0] < bounds[-1] - 0.1).all()
    assert (bounds[-1] <= weights.amax(0)).all()


def test_below_the_evidence():
    """In expectation, rising with K and within five standard errors of nothing above it."""
    noise = torch.randn(16, 20_000, dtype=torch.float64)
    weights = log_weights(noise, torch.tensor(MU, dtype=torch.float64))
    evidence = log_normal(X, 0.0, 2**0.5)
    means = []
    for k in (1, 4, 16):
        bound = iwae_bound(weights[:k])
        error = bound.std().item() / bound.numel() ** 0.5
        means.append(bound.mean().item())
        assert means[-1] < evidence + 5 * error
    assert means[0] < means[1] < means[2]
    assert evidence - means[2] < 0.2 * (evidence - means[0])


@pytest.mark.parametrize(("dtype", "kept", "dropped"), [(torch.float32, -45, -47), (torch.float64, -354, -355)])
def test_negligible_weights_make_no_denormal_numbers(dtype, kept, dropped, implementation):
    """A convolution's backward pass took three times as long for them; the formula has them."""
    for function, power in ((iwae_bound, 1), *((surrogate, power) for power, surrogate in SURROGATES.items())):
        weights = torch.tensor([0.0, kept / power, dropped / power], dtype=dtype, requires_grad=True)
        (gradient,) = torch.autograd.grad(function(weights), weights)
        assert gradient[0] == 1
        assert gradient[1] > 0
        assert (gradient[2] == 0) == (implementation != "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_zero(dtype):
    """``-inf`` entries, a column of nothing else, a huge spread, ``+inf`` and NaN."""
    columns = torch.tensor(
        [[0.0, -INF, 1e30, INF, math.nan], [-INF, -INF, -1e30, 0.0, 0.0], [0.0, -INF, 1e30, 0.0, 0.0]], dtype=dtype
    ).requires_grad_()
    bound = iwae_bound(columns)
    two_thirds = math.log(2 / 3)
    torch.testing.assert_close(
        bound, torch.tensor([two_thirds, -INF, 1e30, INF, math.nan], dtype=dtype), equal_nan=True
    )
    (gradient,) = torch.autograd.grad(bound[:3].sum(), columns)
    weights = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 0.0], [0.5, 0.0, 0.5]], dtype=dtype)
    torch.testing.assert_close(gradient[:, :3], weights)
    for power, surrogate in SURROGATES.items():
        value = surrogate(columns)
        torch.testing.assert_close(value[:3], torch.tensor([0.0, 0.0, 2e30 * 0.5**power], dtype=dtype))
        (gradient,) = torch.autograd.grad(value[:3].sum(), columns)
        torch.testing.assert_close(gradient[:, :3], weights**power)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [iwae_bound, stl_surrogate, dreg_surrogate])
def test_samples_and_columns_in_parts(function, dtype):
    """More than one part of either: extremes in one, in the other, and weights that rise and fall."""
    samples, columns = 200, 2055
    x = 3 * torch.randn(samples, columns, dtype=dtype)
    x[:128, 0], x[128:, 1], x[:, 2], x[150, 3], x[5, 4] = -INF, -INF, -INF, INF, math.nan
    x[:, 5], x[:, 6], x[:, -1] = torch.arange(samples), -torch.arange(samples), 5 - x[:, -1]
    x.requires_grad_()
    seed = torch.arange(1.0, columns + 1, dtype=dtype)
    with hk.use_impl("reference"):
        exact = function(x)
        wanted = torch.autograd.grad(exact, x, seed)
    result = function(x)
    torch.testing.assert_close(result, exact, equal_nan=True)
    torch.testing.assert_close(torch.autograd.grad(result, x, seed), wanted, equal_nan=True)


def test_second_derivatives_of_weights_of_zero():
    """Finite, and those of the surrogates zero: their weights are constants."""
    columns = torch.tensor([[0.0, -INF], [-INF, -INF], [1.0, -INF]], dtype=torch.float64, requires_grad=True)
    for function in (iwae_bound, *SURROGATES.values()):
        (gradient,) = torch.autograd.grad(function(columns).sum(), columns, create_graph=True)
        if function is iwae_bound:
            (second,) = torch.autograd.grad((gradient * torch.arange(6.0).view(3, 2)).sum(), columns)
            p = gradient.detach()[:, 0]
            expected = p * (torch.tensor([0.0, 2.0, 4.0]) - 4 * p[2])
            torch.testing.assert_close(second, torch.stack([expected, torch.zeros(3, dtype=torch.float64)], 1))
        else:
            assert not gradient.requires_grad


def test_large_weights_keep_their_precision():
    """The gradient is that of the weights shifted to 0: nothing of size 1e4 is exponentiated after rounding."""
    weights = torch.randn(40, 50).mul(8).round() / 8  # so that adding 2^14 is exact
    gradients = []
    for shift in (0.0, -(2.0**14)):
        leaf = (weights + shift).requires_grad_()
        gradients.append(torch.autograd.grad(iwae_bound(leaf).sum(), leaf)[0])
    assert torch.equal(*gradients)


def test_saves_two_numbers_a_column(implementation):
    weights = torch.randn(40, 8, requires_grad=True)
    for function in (iwae_bound, *SURROGATES.values()):
        saved = testing.saved_bytes(lambda function=function: function(weights), (weights,))
        assert (saved == 2 * 8 * 4) == (implementation != "reference")


@pytest.mark.parametrize("function", [iwae_bound, *SURROGATES.values()])
def test_bad_input(function):
    one = torch.ones(2, 3)
    with pytest.raises(TypeError, match=f"{function.__name__}: log_weights must be a tensor"):
        function([1.0])
    with pytest.raises(TypeError, match="log_weights must be a float32 or float64 tensor"):
        function(one.int())
    with pytest.raises(TypeError, match="dim must be an integer, got float"):
        function(one, 0.0)
    with pytest.raises(ValueError, match="dim must be one of log_weights' 2 dimensions"):
        function(one, 2)
    with pytest.raises(ValueError, match="log_weights must be of at least one sample along dim 1"):
        function(one[:, :0], 1)
