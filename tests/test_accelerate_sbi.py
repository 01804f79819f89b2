"""``hk.accelerate`` on sbi: what its estimators, posteriors and trainers give is the same before and after."""

from __future__ import annotations

import copy
import pickle
import warnings
from unittest import mock

import numpy as np
import peers
import pytest
import torch
from torch import nn
from torch.distributions import Distribution

import hvae_kernels as hk
from hvae_kernels.compat import _made, _network

with peers.settings():  # it imports zuko, and reads what that sets
    from sbi.diagnostics import run_sbc
    from sbi.inference import (
        NLE,
        NPE,
        NRE,
        DirectPosterior,
        EnsemblePosterior,
        ImportanceSamplingPosterior,
        MCMCPosterior,
        RejectionPosterior,
        VIPosterior,
        likelihood_estimator_based_potential,
    )
    from sbi.neural_nets import likelihood_nn, posterior_flow_nn, posterior_nn
    from sbi.utils import BoxUniform

MODELS = ("maf", "nsf", "maf_rqs", "zuko_maf", "zuko_nsf")
LAYERS, D, C = 2, 3, 4
each_model = pytest.mark.parametrize("model", MODELS)
QUIET = {"show_progress_bars": False}


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # trainers write their logs there
    with peers.settings(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    assert Distribution._validate_args is peers._BEFORE[0]


@pytest.fixture
def double_precision():
    """The noise of nflows is of the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def prior(bound=1.5):
    return BoxUniform(-bound * torch.ones(D), bound * torch.ones(D))


def simulations(rows=60, seed=1):
    generator = torch.Generator().manual_seed(seed)
    theta = 3 * torch.rand(rows, D, generator=generator) - 1.5
    x = torch.cat([theta.sin(), theta[:, :1] * theta[:, 1:2]], 1)
    return theta, x + 0.3 * torch.randn(rows, C, generator=generator)


def estimator(model, likelihood=False):
    """With parameters that a mistake shows in."""
    torch.manual_seed(0)
    theta, x = simulations()
    build = (likelihood_nn if likelihood else posterior_nn)(model, num_transforms=LAYERS, hidden_features=12)
    net = build(theta, x)
    for parameter in net.parameters():
        if parameter.dim() == 2 and parameter.shape[0] > D:
            nn.init.normal_(parameter, std=0.4 * parameter.shape[-1] ** -0.5)
    return net


def posteriors(model):
    """One of the library's, and its accelerated copy; the tight prior rejects part of the samples."""
    before = DirectPosterior(estimator(model), prior(), device="cpu")
    after, report = hk.accelerate(copy.deepcopy(before))
    assert type(after) is DirectPosterior
    assert (len(report.swapped), report.left) == (LAYERS, [])
    return before, after


def both(pair, function):
    """The same seed for each."""
    results = []
    for either in pair:
        torch.manual_seed(7)
        np.random.seed(7)  # noqa: NPY002 - what slice sampling draws from
        results.append(function(either))
    return results


def close(pair, function, tolerance=2e-4):
    torch.testing.assert_close(*both(pair, function), rtol=tolerance, atol=tolerance)


def is_swapped(module):
    return sum(isinstance(part, _network.Swapped) for part in module.modules())


# ---- Estimators ----


@each_model
@pytest.mark.parametrize("likelihood", [False, True], ids=["NPE", "NLE"])
def test_estimators_in_float64(double_precision, model, likelihood):
    """Density with its gradients, samples by the seed, both at once."""
    net = estimator(model, likelihood).double()
    pair = net, hk.accelerate(copy.deepcopy(net))[0]
    theta, x = (value[:9].double() for value in simulations())
    inputs, condition = (x, theta) if likelihood else (theta, x)

    def gradients(net):
        loss = net.loss(inputs, condition)
        return loss, *torch.autograd.grad(loss.sin().sum(), tuple(net.parameters()))

    close(pair, gradients, 1e-9)
    close(pair, lambda net: net.log_prob(inputs.unsqueeze(1).expand(-1, 9, -1), condition), 1e-9)
    close(pair, lambda net: net.sample((5,), condition), 1e-9)
    close(pair, lambda net: net.sample_and_log_prob(torch.Size((5,)), condition), 1e-9)
    close(pair, lambda net: net.inverse_transform(inputs, condition), 1e-9)


def test_one_parameter(double_precision):
    """sbi's coupling layers then have a network of the context alone."""
    torch.manual_seed(0)
    theta, x = simulations()
    net = posterior_nn("nsf", num_transforms=LAYERS, hidden_features=8)(theta[:, :1], x).double()
    pair = net, hk.accelerate(copy.deepcopy(net))[0]
    assert is_swapped(pair[1]) == LAYERS
    close(pair, lambda net: net.sample((5,), x[:3].double()), 1e-9)
    close(pair, lambda net: net.loss(theta[:3, :1].double(), x[:3].double()), 1e-9)


# ---- Posteriors ----


@each_model
def test_direct_posteriors(model):
    pair, (theta, x) = posteriors(model), simulations()
    close(pair, lambda p: p.sample((200,), x=x[:1], **QUIET))
    close(pair, lambda p: p.sample_batched((50,), x=x[:4], **QUIET))
    close(pair, lambda p: p.log_prob(theta, x=x[:1]))
    close(pair, lambda p: p.log_prob_batched(theta[:8, None].expand(-1, 4, -1), x=x[:4]))
    rates = both(pair, lambda p: p.leakage_correction(x[:1], num_rejection_samples=2000))
    assert 0.2 < rates[0] < 0.999  # so that it rejects
    assert abs(rates[0] - rates[1]) <= 1e-3
    for either in pair:
        either.set_default_x(x[0])
    close(pair, lambda p: p.map(num_iter=20, num_to_optimize=10, num_init_samples=50), 1e-3)


@each_model
def test_the_names_are_those_of_the_posterior(model):
    after = DirectPosterior(estimator(model), prior())
    _, report = hk.accelerate(after)
    for name, what in report.swapped:
        assert name.startswith("posterior_estimator.net.")
        part = after
        for step in name.split("."):
            part = getattr(part, step)
        assert isinstance(part, _network.Swapped)
        assert what.startswith(type(part).library_class.__name__)
    assert hk.accelerate(after)[1].swapped == []


@each_model
def test_copies_pickles_and_restore(model):
    before, after = posteriors(model)
    x = simulations()[1]
    after.sample((10,), x=x[:1], **QUIET)
    written = pickle.dumps(after)
    assert b"hvae_kernels" not in written
    loaded, twin = pickle.loads(written), copy.deepcopy(after)
    assert (is_swapped(loaded.posterior_estimator), is_swapped(twin.posterior_estimator)) == (0, LAYERS)
    assert twin.potential_fn.posterior_estimator is twin.posterior_estimator
    kinds = [type(part) for part in before.posterior_estimator.modules()]
    assert hk.restore(after) is after
    for either in (loaded, after):
        assert [type(part) for part in either.posterior_estimator.modules()] == kinds
    for either in (loaded, twin, after, hk.accelerate(loaded)[0]):
        close((before, either), lambda p: p.sample((20,), x=x[:1], **QUIET))


@each_model
def test_ranks_of_calibration(model):
    """Of 40 posteriors with 100 samples each: rounding can move a sample past the truth, by one rank."""
    pair, (theta, x) = posteriors(model), simulations(40, seed=2)
    ranks = both(pair, lambda p: run_sbc(theta, x, p, num_posterior_samples=100, show_progress_bar=False)[0])
    moved = (ranks[0] - ranks[1]).abs()
    assert ranks[0].std() > 5
    assert moved.max() <= 1
    assert moved.mean() < 0.02


@each_model
def test_potentials_of_likelihoods(model):
    """Their values and gradients, as every sampler asks for them; several observations at once."""
    theta, x = simulations()
    potential, _ = likelihood_estimator_based_potential(estimator(model, likelihood=True), prior(), x[:3])
    twin, report = hk.accelerate(copy.deepcopy(potential))
    assert {name.partition(".")[0] for name, _ in report.swapped} == {"likelihood_estimator"}

    def gradient(potential):
        at = theta[:9].clone().requires_grad_()
        value = potential(at, track_gradients=True)
        return value, *torch.autograd.grad(value.sum(), at)

    close((potential, twin), gradient, 1e-3)


@pytest.mark.parametrize("kind", ["mcmc", "rejection", "importance", "ensemble"])
def test_other_posteriors(kind):
    """Every object of sbi that holds an estimator, and how deep."""
    theta, x = simulations()
    potential, transform = likelihood_estimator_based_potential(
        estimator("maf_rqs", likelihood=True), prior(), x_o=x[:1]
    )
    if kind == "mcmc":
        before = MCMCPosterior(
            potential, prior(), transform, num_chains=4, warmup_steps=2, thin=1, init_strategy="proposal"
        )
    elif kind == "rejection":
        before = RejectionPosterior(potential, prior(), transform, num_samples_to_find_max=50)
    elif kind == "importance":
        before = ImportanceSamplingPosterior(potential, DirectPosterior(estimator("nsf"), prior()).set_default_x(x[0]))
    else:
        before = EnsemblePosterior([DirectPosterior(estimator(model), prior()) for model in ("maf", "zuko_nsf")])
        before.set_default_x(x[0])
    after, report = hk.accelerate(copy.deepcopy(before))
    deep = ("proposal.posterior_estimator", "posteriors.1.posterior_estimator", "potential_fn.likelihood_estimator")
    found = {name for name in deep for swapped, _ in report.swapped if swapped.startswith(name + ".net.")}
    wanted = {"importance": {deep[0], deep[2]}, "ensemble": {deep[1]}}
    assert found == wanted.get(kind, {deep[2]})
    assert len(report.swapped) == len(found | {kind == "ensemble"} - {False}) * LAYERS
    close((before, after), lambda p: p.potential(theta[:5]))
    close((before, after), lambda p: p.sample((8,), **QUIET), 1e-3)


@pytest.mark.parametrize("q", ["maf", "nsf"])
def test_variational_posteriors(q):
    """They train through samples: both the flow that is fitted and the likelihood are swapped."""
    x = simulations()[1]
    potential, transform = likelihood_estimator_based_potential(estimator("maf", likelihood=True), prior(), x[:1])
    torch.manual_seed(0)
    options = {"q": q, "num_transforms": LAYERS, "hidden_features": 8}
    before = VIPosterior(potential, prior(), theta_transform=transform, **options)
    after, report = hk.accelerate(copy.deepcopy(before))
    roots = [name.split(".")[0] for name, _ in report.swapped]
    assert roots == ["_q"] * LAYERS + ["potential_fn"] * LAYERS

    def train(posterior):
        torch.manual_seed(3)
        posterior.train(
            max_num_iters=6,
            min_num_iters=5,
            check_for_convergence=False,
            n_particles=16,
            quality_control=False,
            show_progress_bar=False,
        )
        return posterior.sample((20,), **QUIET), posterior.log_prob(simulations()[0][:5])

    close((before, after), train, 2e-3)
    assert is_swapped(after.q) == LAYERS


# ---- Training on ----


@each_model
@pytest.mark.parametrize("trainer", [NPE, NLE])
def test_a_trainer_goes_on(trainer, model):
    """A second round: the trainer's own network is swapped, and so are the copies that it hands out."""
    build = (posterior_nn if trainer is NPE else likelihood_nn)(model, num_transforms=LAYERS, hidden_features=8)
    first, second = simulations(60), simulations(60, seed=5)
    inference = trainer(prior(), density_estimator=build, **QUIET)
    options = {"training_batch_size": 20, "max_num_epochs": 1}
    torch.manual_seed(0)
    inference.append_simulations(*first).train(**options)
    twin = copy.copy(inference)
    for key in ("_neural_net", "_theta_roundwise", "_x_roundwise", "_prior_masks", "_data_round_index", "_summary"):
        setattr(twin, key, copy.deepcopy(getattr(inference, key)))
    twin, report = hk.accelerate(twin)
    assert len(report.swapped) == LAYERS
    assert all(name.startswith("_neural_net.net.") for name, _ in report.swapped)

    if trainer is NPE:
        options["force_first_round_loss"] = True

    def go_on(inference):
        return inference.append_simulations(*second).train(**options)

    before, after = both((inference, twin), go_on)
    assert (is_swapped(before), is_swapped(after)) == (0, LAYERS)
    posterior = twin.build_posterior()
    held = posterior.posterior_estimator if trainer is NPE else posterior.potential_fn.likelihood_estimator
    assert is_swapped(held) == LAYERS
    theta, x = first
    inputs, condition = (theta, x) if trainer is NPE else (x, theta)
    close((before, after), lambda net: net.loss(inputs, condition).detach(), 1e-3)


def test_a_round_with_an_accelerated_proposal():
    """NPE-C draws atoms and asks for many densities of the trained posterior."""
    theta, x = simulations()
    results = []
    for swap in (False, True):
        torch.manual_seed(0)
        inference = NPE(
            prior(), density_estimator=posterior_nn("nsf", num_transforms=LAYERS, hidden_features=8), **QUIET
        )
        net = inference.append_simulations(theta, x).train(training_batch_size=20, max_num_epochs=1)
        proposal = inference.build_posterior(net).set_default_x(x[0])
        if swap:
            hk.accelerate(inference)
            hk.accelerate(proposal)
        torch.manual_seed(4)
        draws = proposal.sample((40,), **QUIET)
        inference.append_simulations(draws, draws.repeat(1, 2)[:, :C], proposal=proposal)
        net = inference.train(training_batch_size=20, max_num_epochs=1, num_atoms=5)
        results.append((draws, net.loss(theta, x).detach()))
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-3)
    assert is_swapped(net) == LAYERS


# ---- What is refused, and left alone ----


def test_untrained_trainers_are_refused_by_name():
    expected = "accelerate: module must hold a trained network, got NPE_C whose train.. has not been called"
    with pytest.raises(ValueError, match=expected):
        hk.accelerate(NPE(prior(), **QUIET))
    fresh = NPE(prior(), **QUIET)
    assert hk.restore(fresh) is fresh


@pytest.mark.parametrize("function", [hk.accelerate, hk.restore])
def test_builders_and_classes_are_no_estimators(function):
    for wrong, what in ((posterior_nn("maf"), "function <function posterior_nn"), (NPE, "ABCMeta <class")):
        expected = f"{function.__name__}: module must be a torch.nn.Module, or a posterior, .* of sbi, got ({what})"
        with pytest.raises(TypeError, match=expected):
            function(wrong)


def test_ratio_estimators_are_left_alone_by_name():
    theta, x = simulations()
    inference = NRE(prior(), **QUIET)
    net = inference.append_simulations(theta, x).train(max_num_epochs=1)
    why = "RatioEstimator is a classifier (NRE), in which there is no flow"
    for held, name in ((net, ""), (inference.build_posterior(), "potential_fn.ratio_estimator")):
        _, report = hk.accelerate(held)
        assert (report.swapped, report.left) == ([], [(name, why)])


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: posterior_nn("mdn"), "MixtureDensityEstimator is no flow"),
        (posterior_flow_nn, "FlowMatchingEstimator integrates a vector field, in which there are no layers of a flow"),
    ],
)
def test_other_estimators_are_left_alone_by_name(build, why):
    _, report = hk.accelerate(build()(*simulations()))
    assert (report.swapped, report.left) == ([], [("", why)])


# ---- Contexts that samplers repeat ----


@pytest.mark.parametrize("model", ["maf", "maf_rqs"])
def test_a_repeated_context_is_activated_once(double_precision, model):
    """nflows repeats it for every sample; its layers then see one row of each."""
    pair = estimator(model).double(), hk.accelerate(estimator(model).double())[0]
    x = simulations()[1].double()
    rows, forward = [], nn.Linear.forward

    def counting(layer, input):
        rows.append(len(input))
        return forward(layer, input)

    with torch.no_grad():
        close(pair, lambda net: net.sample((_made.FEWEST_ROWS,), x[:3]), 1e-9)
        with mock.patch.object(nn.Linear, "forward", counting):
            pair[1].sample((_made.FEWEST_ROWS,), x[:3])
            assert set(rows) == {3}
            rows.clear()
            pair[1].sample((1,), x[:1].repeat(_made.FEWEST_ROWS - 1, 1))
            assert set(rows) == {_made.FEWEST_ROWS - 1}
    rows.clear()
    with mock.patch.object(nn.Linear, "forward", counting):
        pair[1].sample((_made.FEWEST_ROWS,), x[:3])  # whose gradient is wanted
    assert set(rows) == {3 * _made.FEWEST_ROWS}


def test_runs_of_rows():
    few = _made.FEWEST_ROWS
    rows = torch.randn(4, C)
    counts = torch.tensor([few, 1, 5, 2])
    context = rows.repeat_interleave(counts, 0)
    with torch.no_grad():
        found = _made._repeats(context)
        torch.testing.assert_close(found, (rows, counts))
        torch.testing.assert_close(_made._repeats(context[:few]), (rows[:1], counts[:1]))
        assert _made._repeats(torch.cat([rows[:1], torch.randn(few, C)])) is None
        assert _made._repeats(torch.cat([rows[:1], rows[:1], torch.randn(few, C)])) is None
        assert _made._repeats(torch.full((few, C), torch.nan)) is None
        assert _made._repeats(context.to("meta")) is None
    assert _made._repeats(context) is None
