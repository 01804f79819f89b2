"""``hvae priors``: the problem, the bounds and likelihoods against exact ones, training, and the command end to end."""

import json
import math

import pytest
import torch
from hvae import cli, densities, experiment, runs
from hvae.priors import data, likelihood, models, report, study, train
from hvae.priors.study import PRIORS, Job
from seen import check_what_is_seen
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal, kl_divergence

from hvae_kernels.functional import gaussian_mixture_log_prob


def job(prior, dataset=0):
    return Job(prior, dataset, components=7, seed=12345)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def points():
    return job("normal").points()


@pytest.fixture
def small_evaluation(monkeypatch):
    sizes = {"N_TEST": 1000, "N_IMPORTANCE_SAMPLES": 50, "N_PRIOR_SAMPLES": 2000, "EPOCHS": 3}
    for name, value in sizes.items():
        monkeypatch.setattr(study, name, value)


def assert_mean(samples, expected):
    """The mean over the first dimension is within four of its standard errors of what is expected."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - expected).abs() < 4 * error).all()
    return error


def gaussians(weights, loc, scale):
    return MixtureSameFamily(Categorical(torch.as_tensor(weights)), Independent(Normal(loc, scale), 1))


def test_points(points):
    assert (points.train.shape, points.test.shape) == ((10_000, 2), (5_000, 2))
    rare = points.train_component == 0
    assert rare.double().mean() == pytest.approx(data.WEIGHT, abs=4 * math.sqrt(0.21 / 10_000))
    for x, mean in ((points.train[rare], 2.0), (points.train[~rare], -2.0)):
        error = 4 / math.sqrt(len(x))
        assert (x.mean(0) - mean).abs().max() < error
        assert (x.mT.cov() - torch.eye(2)).abs().max() < 2 * error


def test_true_density(points):
    truth = gaussians([0.3, 0.7], data.MEANS.double(), torch.ones(2, 2).double())
    x = points.test.double()
    torch.testing.assert_close(data.log_prob(x), truth.log_prob(x))


@pytest.mark.parametrize("prior", PRIORS)
def test_priors_of_a_data_set_begin_with_the_same_points_and_networks(prior, points):
    own = job(prior).points()
    assert torch.equal(own.train, points.train)
    networks, expected = (job(name).model(points).encoder.state_dict() for name in (prior, "normal"))
    assert all(torch.equal(networks[name], expected[name]) for name in expected)
    assert not torch.equal(job(prior, dataset=1).points().train, own.train)


def linear_vae(matrix, scale, prior):
    """``x | z ~ N(W z, I)`` with the encoder's mean that of ``p(z | x)``; W ``(2, 2)``, scale ``(2,)`` of q."""
    encoder, decoder = nn.Linear(2, 4), nn.Linear(2, 2)
    posterior = torch.linalg.solve(torch.eye(2) + matrix.mT @ matrix, matrix.mT)
    with torch.no_grad():
        encoder.weight.copy_(torch.cat([posterior, torch.zeros(2, 2)]))
        encoder.bias.copy_(torch.cat([torch.zeros(2), scale.log()]))
        decoder.weight.copy_(matrix)
        decoder.bias.zero_()
    return models.VAE(encoder, decoder, prior)


def two_equal_gaussians():
    prior = models.TwoGaussians(learn_weights=True)
    with torch.no_grad():
        prior.logits.copy_(torch.tensor([1.0, -0.5]))
        prior.loc.zero_()
    return prior


@pytest.mark.parametrize("prior", [models.StandardNormal, two_equal_gaussians])
def test_with_the_exact_posterior_every_weight_is_the_likelihood(prior, generator):
    slope = torch.tensor([1.5, -0.4])
    model = linear_vae(slope.diag(), (1 + slope**2).rsqrt(), prior())
    x = 2 * torch.randn(50, 2, generator=generator)
    exact = MultivariateNormal(torch.zeros(2), torch.eye(2) + slope.diag() ** 2).log_prob(x)
    weights = model.log_weights(x, torch.randn(30, 50, 2, generator=generator))
    torch.testing.assert_close(weights, exact.expand(30, 50), atol=2e-5, rtol=1e-5)


def test_likelihoods_and_bound_of_a_linear_model(generator):
    matrix = torch.tensor([[1.0, 0.8], [-0.3, 0.6]])
    model = linear_vae(matrix, torch.tensor([0.9, 0.9]), models.StandardNormal())
    x = torch.randn(40, 2, generator=generator)
    exact = MultivariateNormal(torch.zeros(2), torch.eye(2) + matrix @ matrix.mT).log_prob(x).double()
    bounds, estimates = zip(
        *(likelihood.by_importance_sampling(model, x, 200, generator) for _ in range(400)), strict=True
    )
    ratios = (torch.stack(estimates) - exact).exp()  # of likelihoods, not of their logarithms, which are biased
    assert assert_mean(ratios, 1).max() < 0.005
    covariance = torch.linalg.inv(torch.eye(2) + matrix.mT @ matrix)
    posterior = MultivariateNormal(torch.zeros(2), covariance)
    divergence = kl_divergence(MultivariateNormal(torch.zeros(2), 0.81 * torch.eye(2)), posterior).item()
    assert divergence > 0.05, "or a bound and a likelihood could not be told apart"
    assert assert_mean(torch.stack(bounds), exact - divergence).max() < 0.005
    mixture = model.mixture()
    estimates = [likelihood.by_prior_samples(model, x, mixture.sample(2_000, generator)) for _ in range(400)]
    assert assert_mean((torch.stack(estimates) - exact).exp(), 1).max() < 0.005


MATRIX = torch.tensor([[1.0, 0.8], [-0.3, 1.5]])
LINEAR_PRIORS = {
    "normal": models.StandardNormal,
    "mixture": lambda: models.TwoGaussians(learn_weights=True),
    "vamp": lambda: models.VampPrior(2 * torch.randn(20, 2, generator=torch.Generator().manual_seed(1))),
}


def linear_with_density(prior):
    """A linear model whose encoder fits badly, and its exact density, in float64."""
    model = linear_vae(MATRIX, torch.tensor([1.2, 0.6]), LINEAR_PRIORS[prior]())
    logits, loc, log_scale = (parameter.detach().double() for parameter in model.mixture())
    factor = MATRIX.double() @ (2 * log_scale).exp().diag_embed() @ MATRIX.double().mT
    gaussians = MultivariateNormal(loc @ MATRIX.double().mT, torch.eye(2).double() + factor)
    return model, MixtureSameFamily(Categorical(logits=logits), gaussians)


@pytest.mark.parametrize("prior", LINEAR_PRIORS)
def test_quadrature_of_a_linear_model_is_exact(prior, generator, monkeypatch):
    monkeypatch.setattr(likelihood, "NODES", 0)  # axes of the fewest nodes are good enough for what is smooth
    model, density = linear_with_density(prior)
    x = 2 * torch.randn(40, 2, generator=generator)
    torch.testing.assert_close(likelihood.by_quadrature(model, x), density.log_prob(x.double()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("prior", LINEAR_PRIORS)
def test_the_sandwich_holds_the_exact_value(prior, generator, monkeypatch):
    monkeypatch.setattr(likelihood, "NODES", 0)
    model, density = linear_with_density(prior)
    torch.manual_seed(0)
    mean, gaps = density.log_prob(density.sample([20_000])).mean(), []
    for n_bridges in (3, 30):
        lower, upper, exact = likelihood.sandwich(model, 300, n_bridges, generator)
        assert_mean(exact, mean)  # or the points are not the model's
        for side in (exact - lower, upper - exact):
            assert side.mean() > -4 * side.std() / math.sqrt(len(side))
        gaps.append((upper - lower).mean())
    assert gaps[0] > 0.08, "or two sides could not be told apart"
    assert gaps[1] < gaps[0] / 4
    assert_mean((lower - exact).exp(), 1)  # an estimate of the evidence without a bias, and here of its inverse
    assert_mean((exact - upper).exp(), 1)


def test_samples_that_come_a_few_at_a_time(points, generator):
    model, x = job("mixture").model(points), points.test[:20]
    bound, estimate = likelihood.by_importance_sampling(model, x, 19, generator)
    generator.manual_seed(0)
    noise = torch.cat([torch.randn(n, 20, 2, generator=generator) for n in (8, 8, 3)])
    weights = model.log_weights(x, noise).double()
    torch.testing.assert_close(bound, weights.mean(0))
    torch.testing.assert_close(estimate, weights.logsumexp(0) - math.log(19))
    assert (bound < estimate).all()


@pytest.mark.parametrize("prior", PRIORS)
def test_training_bound_is_the_mean_log_weight(prior, points, generator):
    model, x = job(prior).model(points), 5 * points.test[:4]  # where the divergence is some nats
    noise = torch.randn(100_000, 4, 2, generator=generator)
    with torch.no_grad():
        difference = model.bound(x, noise) - model.log_weights(x, noise)
    error = difference.std(0) / math.sqrt(len(noise))
    assert (difference.mean(0).abs() < 4 * error + 1e-5).all()


def test_vamp_prior_is_the_mean_of_the_posteriors_of_its_pseudo_inputs(points):
    model = job("vamp").model(points)
    pseudo_inputs = model.prior.pseudo_inputs
    assert torch.equal(pseudo_inputs, points.train[:7])
    z = torch.randn(11, 2)
    loc, log_scale = model.encoder(pseudo_inputs).chunk(2, -1)
    components = Independent(Normal(loc, log_scale.exp()), 1).log_prob(z.unsqueeze(1))
    density = model.mixture().log_prob(z)
    torch.testing.assert_close(density, components.logsumexp(1) - math.log(7))
    density.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in (pseudo_inputs, *model.encoder.parameters()))


def test_samples_of_a_mixture(generator):
    loc, scale = torch.tensor([[3.0, 0.0], [-3.0, 1.0]]), torch.tensor([[0.5, 1.0], [2.0, 0.1]])
    z = densities.Mixture(torch.tensor([0.2, 0.8]).log(), loc, scale.log()).sample(100_000, generator)
    exact = gaussians([0.2, 0.8], loc, scale)
    assert_mean(z, exact.mean)
    assert_mean((z - exact.mean).square(), exact.variance)


def test_the_learned_mixture_finds_the_weight_and_the_density(points, tmp_path, small_evaluation):
    state = train.State()
    train.train(job("mixture"), points, state, 40, tmp_path / "state.pt", lambda state: None)
    figures = state.figures
    assert figures["weight"] == pytest.approx(figures["training_weight"], abs=0.02)
    assert figures["generated_weight"] == pytest.approx(figures["training_weight"], abs=0.02)
    assert -2 * figures["gap_error"] < figures["gap"] < 0.03
    assert state.history[-1]["weight"] == figures["weight"]


def test_a_bound_that_is_not_finite_stops_the_run(points, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "LEARNING_RATE", 1e30)
    with pytest.raises(runs.StudyError, match=r"mixture-0: the bound of epoch \d is not finite"):
        train.train(job("mixture"), points, train.State(), 3, tmp_path / "state.pt", lambda state: None)
    assert not (tmp_path / "state.pt").exists()


def hvae(out, *more):
    return cli.main(["priors", "--datasets", "1", "--epochs", "3", "--components", "7", "--out", str(out), *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "priors"
    with pytest.MonkeyPatch.context() as patch:
        small_evaluation.__wrapped__(patch)
        assert hvae(out) == 0
    return out


def results(out):
    return json.loads((out / "results.json").read_text())


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_results(finished):
    rows = results(finished)["rows"]
    assert [(row["method"], row["dataset"], row["steps"]) for row in rows] == [(prior, 0, 120) for prior in PRIORS]
    for row in rows:
        assert row["gap"] == pytest.approx(row["true_log_likelihood"] - row["log_likelihood"])
        assert row["gap"] > -2 * row["gap_error"], "no model is better than the truth"
        assert row["elbo"] < row["log_likelihood"]
    weights = {row["method"]: row["weight"] for row in rows}
    assert weights["normal"] is weights["vamp"] is None
    assert weights["mixture-fixed"] == 0.5
    assert weights["mixture"] < 0.47


@torch.no_grad()
@pytest.mark.parametrize("prior", PRIORS)
def test_likelihood_by_prior_samples_is_the_integral(prior, finished, small_evaluation, generator):
    """Of the trained model, whose likelihood is a sum over a grid of the plane; and results say it of its samples."""
    own = job(prior)
    state, points = train.State.load(experiment.state_path(finished, own)), own.points()
    model = own.model(points)
    model.load_state_dict(state.model)
    (row,) = (row for row in results(finished)["rows"] if row["method"] == prior)
    assert train.measure(own, model, points).items() <= row.items()
    mixture, x = model.mixture(), points.test[:200]
    reach = 6 * mixture.log_scale.exp()
    ends = (mixture.loc - reach).amin(0), (mixture.loc + reach).amax(0)
    z = torch.cartesian_prod(*(torch.linspace(*pair, 300) for pair in torch.stack(ends, -1).tolist()))
    loc = model.decoder(z)
    exact = gaussian_mixture_log_prob(x, mixture.log_prob(z), loc, torch.zeros_like(loc))
    estimates = [likelihood.by_prior_samples(model, x, mixture.sample(5_000, generator)) for _ in range(40)]
    ratios = (torch.stack(estimates) - exact).exp().mean(1)
    assert assert_mean(ratios, 1) < 0.005


@pytest.mark.parametrize("prior", PRIORS)
def test_quadrature_agrees_with_importance_sampling(prior, finished, generator):
    own = job(prior)
    state, points = train.State.load(experiment.state_path(finished, own)), own.points()
    model = own.model(points)
    model.load_state_dict(state.model)
    x = points.test[:20]
    exact = likelihood.by_quadrature(model, x)
    estimates = [likelihood.by_importance_sampling(model, x, 200, generator)[1] for _ in range(40)]
    assert assert_mean((torch.stack(estimates) - exact).exp().mean(1), 1) < 0.005


def test_report_and_figures(finished, capsys):
    text = (finished / "report.md").read_text()
    assert check_what_is_seen(hvae, finished, capsys)[0].startswith("prior ")
    for prior, label in PRIORS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {label} "))
        assert prior == "vamp" or "{} ± {}".format(*study.PUBLISHED[prior]) in line
    for name in ("points", "latent", "weight", "bound"):
        assert f"({name}.png)" in text
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("prior", PRIORS)
def test_a_killed_run_goes_on_to_the_same_bits(prior, finished, tmp_path, monkeypatch, capsys, small_evaluation):
    def killed(job, points, model, optimizer, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return train_epoch(job, points, model, optimizer, epoch)

    train_epoch = train.train_epoch
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        patch.setattr(train, "train_epoch", killed)
        assert hvae(tmp_path, "--priors", prior) == 130
    assert "--resume" in capsys.readouterr().err
    assert results(tmp_path)["rows"] == []
    assert hvae(tmp_path, "--priors", prior, "--resume") == 0
    expected = [row for row in results(finished)["rows"] if row["method"] == prior]
    assert without_times(results(tmp_path)["rows"]) == without_times(expected)
    ours, other = (torch.load(out / "jobs" / f"{prior}-0.pt", weights_only=True) for out in (tmp_path, finished))
    assert all(torch.equal(ours["model"][name], other["model"][name]) for name in other["model"])


def test_resume_adds_to_a_finished_run_of_the_same_kind(finished, capsys):
    before = results(finished)["rows"]
    assert hvae(finished) == 1
    assert "--resume" in capsys.readouterr().err
    assert hvae(finished, "--resume") == 0
    assert results(finished)["rows"] == before
    for name, value in (("seed", "1"), ("components", "3"), ("epochs", "4")):
        assert hvae(finished, "--resume", f"--{name}", value) == 1
        assert f"was made with {name}" in capsys.readouterr().err


# ---- Likelihoods between two bounds ----

SANDWICH = ["--priors", "mixture", "--sandwich-points", "21", "--sandwich-bridges", "3"]


def smaller_sandwich(patch):
    patch.setattr(train, "SANDWICH_POINTS", 8)
    patch.setattr(likelihood, "NODES", 0)


@pytest.fixture(scope="module")
def bounded(tmp_path_factory):
    out = tmp_path_factory.mktemp("bounded")
    with pytest.MonkeyPatch.context() as patch:
        small_evaluation.__wrapped__(patch)
        smaller_sandwich(patch)
        assert hvae(out, *SANDWICH) == 0
    return out


def test_a_sandwich_adds_to_a_row_and_changes_nothing_else(bounded, finished, capsys):
    plain = {row["method"]: row for row in without_times(results(finished)["rows"])}
    assert not any(name.startswith("sandwich") for row in plain.values() for name in row)
    assert "between two bounds" not in (finished / "report.md").read_text()
    for row in without_times(results(bounded)["rows"]):
        assert plain[row["method"]].items() <= row.items()
        assert row["sandwich_points"] == 21
        assert row["sandwich_lower"] - 4 * row["sandwich_below_error"] < row["sandwich_exact"]
        assert row["sandwich_exact"] < row["sandwich_upper"] + 4 * row["sandwich_above_error"]
    assert "## The likelihood between two bounds" in (bounded / "report.md").read_text()
    assert "along 3 bridges" in (bounded / "report.md").read_text()
    assert check_what_is_seen(lambda out, *more: hvae(out, *SANDWICH, *more), bounded, capsys)


def test_a_sandwich_goes_on_to_the_same_bits_after_a_kill(bounded, tmp_path, monkeypatch, small_evaluation):
    def killed(self, path):
        if self.sandwich.shape[1] == 16:
            raise KeyboardInterrupt
        save(self, path)

    save = train.State.save
    smaller_sandwich(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        patch.setattr(train.State, "save", killed)
        assert hvae(tmp_path, *SANDWICH) == 130
    assert train.State.load(experiment.state_path(tmp_path, job("mixture"))).sandwich.shape == (3, 8)
    assert hvae(tmp_path, *SANDWICH, "--resume") == 0
    assert without_times(results(tmp_path)["rows"]) == without_times(results(bounded)["rows"])


def test_a_sandwich_is_of_a_whole_run_or_of_none(bounded, finished, capsys):
    assert hvae(finished, "--resume", "--sandwich-points", "5") == 1
    assert "was made with sandwich_points None, not 5" in capsys.readouterr().err
    assert hvae(bounded, "--resume") == 1
    assert "was made with sandwich_points 21, not None" in capsys.readouterr().err


def test_a_sandwich_of_one_point_has_no_error():
    state = train.State(sandwich=torch.tensor([[-2.0], [-1.0], [-1.5]], dtype=torch.float64))
    row = report.row_of(job("normal"), state)
    assert row["sandwich_below_error"] is row["sandwich_above_error"] is None
    text = report.sandwich_table({"sandwich_bridges": 9}, [row])[-1]
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")]
    assert cells[3:-1] == ["-2", "-1.5", "-1", "1", "0.5000", "0.5000", "1"]


@pytest.mark.parametrize("name", ["normal-0.pt", "other-0.pt", "normal-x.pt", "normal.pt"])
def test_a_corrupt_file_is_named(name, finished, tmp_path, capsys):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "results.json").write_bytes((finished / "results.json").read_bytes())
    (tmp_path / "jobs" / name).write_text("hello")
    for run in (lambda: hvae(tmp_path, "--resume"), lambda: cli.main(["report", str(tmp_path)])):
        assert run() == 1
        assert name in capsys.readouterr().err


@pytest.mark.parametrize("change", [lambda row: row.pop("gap"), lambda row: row.update(method=1)])
def test_rows_of_another_form_are_one_sentence(change, finished, tmp_path, capsys):
    content = results(finished)
    change(content["rows"][0])
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert cli.main(["report", str(tmp_path)]) == 1
    assert f"{tmp_path / 'results.json'} is corrupt or not a file of this run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", ["--epochs=0", "--components=10001", "--priors=x", "--datasets=0", "--seed=-1", "--sandwich-points=-1"]
)
def test_wrong_arguments(wrong, tmp_path):
    with pytest.raises(SystemExit):
        hvae(tmp_path, wrong)


def test_bridges_without_a_sandwich(tmp_path, capsys):
    assert hvae(tmp_path, "--sandwich-bridges", "3") == 1
    assert "--sandwich-bridges: only --sandwich-points have any" in capsys.readouterr().err
