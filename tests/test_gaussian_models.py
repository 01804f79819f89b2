"""The learned models: gradients by hand equal autograd of the readable bound, and the bound equals its other forms."""

import math

import numpy as np
import pytest
import torch
from hvae.gaussian import data, exact
from hvae.gaussian.models import (
    N_SAMPLES,
    AutoregressiveVAE,
    HamiltonianVAE,
    MeanField,
    PlanarVAE,
    PublishedMeanField,
    draw_network,
)
from hvae.gaussian.models.planar import truncated_normal
from hvae.gaussian.models.sampled import N_EVALUATION_SAMPLES, evaluation_noise
from torch.distributions import Normal

import hvae_kernels as hk

F64 = torch.float64
SEED = 12345
SAMPLED = {
    f"{name}-{setting}": (
        lambda dtype, make=make, setting=setting: make(published=setting == "published", replicas=3, dtype=dtype)
    )
    for name, make in (
        ("planar-K1", lambda **options: PlanarVAE(5, 1, seed=SEED, **options)),
        ("planar-K4", lambda **options: PlanarVAE(5, 4, seed=SEED, **options)),
        ("iaf", lambda **options: AutoregressiveVAE(5, seed=SEED, **options)),
    )
    for setting in ("corrected", "published")
}
MODELS = {
    "tempered-K1": lambda dtype: HamiltonianVAE(5, 1, tempered=True, replicas=3, dtype=dtype),
    "tempered-K10": lambda dtype: HamiltonianVAE(5, 10, tempered=True, replicas=3, dtype=dtype),
    "untempered-K1": lambda dtype: HamiltonianVAE(5, 1, tempered=False, replicas=3, dtype=dtype),
    "untempered-K10": lambda dtype: HamiltonianVAE(5, 10, tempered=False, replicas=3, dtype=dtype),
    "vb": lambda dtype: MeanField(5, replicas=3, dtype=dtype),
    "vb-published": lambda dtype: PublishedMeanField(5, restarted=False, replicas=3, dtype=dtype),
    "vb-published-restarted": lambda dtype: PublishedMeanField(5, restarted=True, replicas=3, dtype=dtype),
    **SAMPLED,
}


def setting(model, count=50):
    """Random statistics, noise, and parameters moved off their initial values, log sigma to about 0."""
    statistics = data.statistics([torch.randn(count, 5, dtype=F64) + torch.randn(5, dtype=F64) for _ in range(3)])
    allowed = {name: value != 0 for name, value in model.values.items() if name.endswith("_weight")}
    model.flat += torch.randn_like(model.flat) / 3
    for name, mask in allowed.items():
        model.values[name] *= mask
    model.values["log_scale"] -= 3
    rows = model.noise_rows or (1, N_SAMPLES)
    return statistics, torch.randn(rows[0], 3, N_SAMPLES, 5, dtype=model.flat.dtype)


def autograd_gradient(model, statistics, noise):
    flat = model.flat.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-model.bound(model.views(flat), statistics, noise).sum(), flat)
    return gradient


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [16, 10_000])
def test_gradient_by_hand_is_that_of_the_bound(name, count):
    model = MODELS[name](F64)
    statistics, noise = setting(model, count)
    expected = model.views(autograd_gradient(model, statistics, noise))
    with torch.no_grad():
        model.write_gradient(model.prepare(statistics), noise)
    for block, gradient in model.gradients.items():
        torch.testing.assert_close(gradient, expected[block], rtol=1e-9, atol=1e-9 * expected[block].abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_gradient_in_float32(name):
    model, exact_model = MODELS[name](torch.float32), MODELS[name](F64)
    statistics, noise = setting(model)
    exact_model.flat.copy_(model.flat)
    with torch.no_grad():
        model.write_gradient(model.prepare(statistics), noise)
    expected = exact_model.views(autograd_gradient(exact_model, statistics, noise.double()))
    for block, gradient in model.gradients.items():
        scale = expected[block].abs().max().item()
        torch.testing.assert_close(gradient.double(), expected[block], rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize(("tempered", "tempering"), [(True, "quadratic"), (False, "none")])
def test_bound_is_that_of_the_flow_module(tempered, tempering):
    """``log p(D, z_K) + log N(rho_K)`` again, from ``hk.nn`` and from the potential's own energies."""
    model = HamiltonianVAE(5, 4, tempered=tempered, replicas=3, dtype=F64)
    statistics, (z, gamma) = setting(model)
    values = model.values
    flow = hk.nn.HamiltonianFlow(5, 4, tempering, replicas=3).double()
    with torch.no_grad():
        flow.step_size_logit.copy_(values["step_size_logit"])
        if tempered:
            flow.log_excess_temperature.copy_(values["log_excess_temperature"][:, 0])
    ratio = statistics.count * torch.exp(-2 * values["log_scale"])
    centred = statistics.mean - values["loc"]
    potential = hk.nn.GaussianPotential(1 + ratio, ratio / (1 + ratio) * centred)
    z_final, rho_final, log_abs_det = flow(z, gamma, potential)
    least_energy = (ratio * statistics.variance + ratio / (1 + ratio) * centred**2).sum(-1) / 2
    energy = potential(z_final) + least_energy + statistics.count * values["log_scale"].sum(-1)
    expected = (log_abs_det - energy - rho_final.square().sum(-1) / 2).mean(-1)
    torch.testing.assert_close(model.bound(values, statistics, torch.stack((z, gamma))), expected)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(("tempered", "untempered"))])
def test_elbo_is_the_expectation_of_the_bound_with_its_constants(name):
    model = MODELS[name](F64)
    statistics, _ = setting(model, 20)
    z, gamma = torch.randn(2, 3, 100_000, 5, dtype=F64)
    noise = torch.stack((torch.cat((z, z, -z, -z), 1), torch.cat((gamma, -gamma, gamma, -gamma), 1)))
    constant = 5 * (1 - statistics.count / 2 * exact.LOG_2PI)
    sampled = model.bound(model.values, statistics, noise) + constant
    torch.testing.assert_close(model.elbo(statistics), sampled, rtol=2e-2, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_elbo_is_below_the_evidence(name):
    model = MODELS[name](torch.float32)
    statistics, _ = setting(model)
    assert (model.elbo(statistics) < exact.log_evidence(statistics, *model.estimate())).all()


def test_mean_field_on_y_is_mean_field_on_z():
    on_y, on_z = MODELS["vb"](F64), MODELS["vb-published"](F64)
    statistics, _ = setting(on_y)
    on_z.flat.copy_(on_y.flat)
    on_z.values["mean"] -= on_y.values["loc"]
    torch.testing.assert_close(on_y.elbo(statistics), on_z.elbo(statistics))
    difference = on_z.bound(on_z.values, statistics) - on_z.elbo(statistics)
    torch.testing.assert_close(difference, torch.full_like(difference, -5 / 2))


def test_restarted_mean_field_counts_its_one_log_scale_once():
    one, many = MODELS["vb-published-restarted"](F64), MODELS["vb-published"](F64)
    statistics, _ = setting(one)
    for name, value in one.values.items():
        many.values[name].copy_(value)
    log_std = one.values["log_std"][:, 0, 0]
    once = log_std - torch.exp(2 * log_std) / 2
    difference = many.bound(many.values, statistics) - one.bound(one.values, statistics)
    torch.testing.assert_close(difference, 4 * once)


def test_initial_values():
    model = HamiltonianVAE(5, 10, tempered=True)
    flow = model.flow(model.values)
    torch.testing.assert_close(flow.step_size, torch.full((1, 1, 5), 0.005))
    torch.testing.assert_close(flow.temperature, torch.tensor([[5.0]]))
    torch.testing.assert_close(flow.tempering.prod(), torch.tensor(0.2))
    assert (model.values["log_scale"] == 3).all()
    assert (model.values["loc"] == 0).all()
    restarted = PublishedMeanField(5, restarted=True)
    torch.testing.assert_close(restarted.values["mean"], torch.full((1, 1, 5), -4.595), atol=1e-3, rtol=0)
    torch.testing.assert_close(restarted.values["log_std"], torch.full((1, 1, 1), 1.3863), atol=1e-4, rtol=0)


# ---- The sampled flows ----


def sampled_bound(points, loc, scale, model, replica, z):
    """``log p(D, sample) - log q(sample)`` of a data set's raw points, row of z by row, from ``torch.distributions``.

    The flow's density is that of z less autograd's log-determinant of the Jacobian.
    """

    def flow(z):
        stacked = z.expand(3, 1, -1)
        return model.sample(model.values, stacked)[0][replica, 0]

    standard, bounds = Normal(torch.zeros((), dtype=F64), torch.ones((), dtype=F64)), []
    for row in z:
        sample = flow(row)
        latent = sample - loc if "corrected" in model.name else sample
        determinant = torch.linalg.slogdet(torch.func.jacrev(flow)(row)).logabsdet
        log_joint = Normal(latent + loc, scale).log_prob(points).sum() + standard.log_prob(latent).sum()
        bounds.append(log_joint - standard.log_prob(row).sum() + determinant)
    return torch.stack(bounds).mean()


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_bound_is_that_of_the_raw_points(name):
    model = SAMPLED[name](F64)
    model.name = name
    points = torch.randn(3, 20, 5, dtype=F64) + torch.randn(3, 1, 5, dtype=F64)
    statistics, noise = data.statistics(list(points)), setting(model)[1]
    bound = model.bound(model.values, statistics, noise)
    for r in range(3):
        loc, scale = model.values["loc"][r, 0], model.values["log_scale"][r, 0].exp()
        expected = sampled_bound(points[r], loc, scale, model, r, noise[0, r])
        if "published" in name:
            expected = expected - ((points[r] - loc) / scale).square().sum() / 2
        constants = noise[0, r].square().sum(-1).mean() / 2 - 20 * 5 / 2 * exact.LOG_2PI
        torch.testing.assert_close(bound[r] + constants, expected)


@pytest.mark.parametrize("name", [name for name in SAMPLED if "published" in name])
def test_the_printed_data_term_misses_a_half_of_the_squares(name):
    """``-sum (x - Delta)^2/sigma^2 + N (xbar - Delta) E z/sigma^2 - N E z^2/(2 sigma^2)``, from the raw points."""
    model = SAMPLED[name](F64)
    points = torch.randn(3, 20, 5, dtype=F64)
    statistics, noise = data.statistics(list(points)), setting(model)[1]
    samples, log_abs_det = model.sample(model.values, noise[0])
    loc, log_scale = model.values["loc"], model.values["log_scale"]
    variance, mean = torch.exp(2 * log_scale), points.mean(1, keepdim=True)
    printed = -((points - loc) ** 2 / variance).sum((-2, -1), keepdim=True)
    by_sample = 20 / variance * ((mean - loc) * samples - samples**2 / 2) - samples**2 / 2
    printed = printed[:, 0, 0] + (by_sample.sum(-1) + log_abs_det).mean(-1) - 20 * log_scale.sum((-2, -1))
    torch.testing.assert_close(model.bound(model.values, statistics, noise), printed)


@pytest.mark.parametrize("name", SAMPLED)
def test_elbo_is_the_true_bound(name):
    """To the digit on its own 500 samples, and of 200,000 others within a standard error of 500: its own are better."""
    model = SAMPLED[name](F64)
    statistics = data.statistics([torch.randn(20, 5, dtype=F64) + torch.randn(5, dtype=F64) for _ in range(3)])
    model.values["loc"] += torch.randn(3, 1, 5)
    model.values["log_scale"] -= 3

    def bounds(noise):
        samples, log_abs_det = model.sample(model.values, noise)
        latent = samples - model.values["loc"] if "corrected" in name else samples
        centred, mean = latent + model.values["loc"] - statistics.mean, latent**2
        log_scale = model.values["log_scale"]
        fit = -20 / 2 * (exact.LOG_2PI + 2 * log_scale + torch.exp(-2 * log_scale) * (statistics.variance + centred**2))
        return (fit - mean / 2).sum(-1) + log_abs_det + 5 / 2

    elbo, others = model.elbo(statistics), bounds(torch.randn(3, 200_000, 5, dtype=F64))
    torch.testing.assert_close(elbo, bounds(evaluation_noise(5).expand(3, -1, -1)).mean(-1))
    assert ((elbo - others.mean(-1)).abs() < others.std(-1) / math.sqrt(500)).all()


def test_evaluation_noise_has_the_moments_of_a_standard_normal():
    noise = evaluation_noise(7)
    assert noise.shape == (1, N_EVALUATION_SAMPLES, 7)
    torch.testing.assert_close(noise.mean(1), torch.zeros(1, 7, dtype=F64))
    torch.testing.assert_close(noise.square().mean(1), torch.ones(1, 7, dtype=F64))
    assert torch.equal(noise, evaluation_noise(7))


def test_initial_planar_layers():
    """u, then w, layer by layer, from one stream of numpy's; the printed flow repeats one layer."""
    random = np.random.RandomState(SEED)
    drawn = [truncated_normal(random, 5) for _ in range(8)]
    separate, printed = (PlanarVAE(5, 4, published=p, seed=SEED, replicas=2, dtype=F64) for p in (False, True))
    u, w, b = separate.layers(separate.values)
    for replica in range(2):
        torch.testing.assert_close(u[replica], torch.stack(drawn[::2]))
        torch.testing.assert_close(w[replica], torch.stack(drawn[1::2]))
    assert (b == 0.1).all()
    u, w, _ = printed.layers(printed.values)
    torch.testing.assert_close(u, drawn[0].expand(2, 4, 5))
    torch.testing.assert_close(w, drawn[1].expand(2, 4, 5))
    assert printed.values["u"].shape == (2, 1, 5)


def test_truncated_normal():
    sample = truncated_normal(np.random.RandomState(1), 100_000)
    assert sample.abs().max() < 0.2
    # the variance of a standard normal truncated to [-2, 2]
    density, mass = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))
    assert sample.var().item() == pytest.approx(0.01 * (1 - 4 * density / mass), rel=2e-2)


def test_initial_network_is_torchs_and_masked():
    model = AutoregressiveVAE(5, published=True, seed=SEED, replicas=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        order, first, last = draw_network(5)
    assert model.flow.made.layers[0].in_degrees[order].tolist() == list(range(5))
    for name, layer in (("first", first), ("last", last)):
        weight = model.values[f"{name}_weight"][1].view_as(layer.weight)
        mask = weight != 0
        assert 0.3 < mask.float().mean() < 0.7
        assert torch.equal(weight[mask], layer.weight[mask])
        assert torch.equal(model.values[f"{name}_bias"][1, 0], layer.bias)


def test_forbidden_weights_stay_zero():
    model = AutoregressiveVAE(5, published=False, seed=SEED, replicas=3)
    forbidden = [model.values[name] == 0 for name in ("first_weight", "last_weight")]
    statistics = data.statistics([torch.randn(20, 5, dtype=F64) for _ in range(3)])
    with torch.no_grad():
        model.write_gradient(model.prepare(statistics), torch.randn(1, 3, N_SAMPLES, 5))
    for name, zeros in zip(("first_weight", "last_weight"), forbidden, strict=True):
        assert zeros.any()
        assert (model.gradients[name][zeros] == 0).all()
        assert (model.gradients[name][~zeros] != 0).float().mean() > 0.8
