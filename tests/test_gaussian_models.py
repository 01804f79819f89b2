"""The learned models: gradients by hand equal autograd of the readable bound, and the bound equals its other forms."""

import pytest
import torch
from hvae.gaussian import data, exact
from hvae.gaussian.models import N_SAMPLES, HamiltonianVAE, MeanField, PublishedMeanField

import hvae_kernels as hk

F64 = torch.float64
MODELS = {
    "tempered-K1": lambda dtype: HamiltonianVAE(5, 1, tempered=True, replicas=3, dtype=dtype),
    "tempered-K10": lambda dtype: HamiltonianVAE(5, 10, tempered=True, replicas=3, dtype=dtype),
    "untempered-K1": lambda dtype: HamiltonianVAE(5, 1, tempered=False, replicas=3, dtype=dtype),
    "untempered-K10": lambda dtype: HamiltonianVAE(5, 10, tempered=False, replicas=3, dtype=dtype),
    "vb": lambda dtype: MeanField(5, replicas=3, dtype=dtype),
    "vb-published": lambda dtype: PublishedMeanField(5, restarted=False, replicas=3, dtype=dtype),
    "vb-published-restarted": lambda dtype: PublishedMeanField(5, restarted=True, replicas=3, dtype=dtype),
}


def setting(model, count=50):
    """Random statistics, noise, and parameters moved off their initial values, log sigma to about 0."""
    statistics = data.statistics([torch.randn(count, 5, dtype=F64) + torch.randn(5, dtype=F64) for _ in range(3)])
    model.flat += torch.randn_like(model.flat) / 3
    model.values["log_scale"] -= 3
    return statistics, torch.randn(2, 3, N_SAMPLES, 5, dtype=model.flat.dtype)


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
