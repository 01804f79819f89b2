"""uha and ldvi of the MNIST study against exact evidence, their bits after a kill, and likelihoods between bounds."""

import json

import pytest
import torch
from hvae import cli, experiment
from hvae.mnist import annealed, likelihood, networks, study, train
from hvae.mnist.annealed import AnnealedModel
from hvae.mnist.state import State
from hvae.mnist.study import Job, Setting
from hvae.runs import StudyError
from test_mnist_models import LATENT, PIXELS, SCALE, LinearGaussian, expected_bound

SETTING = Setting(1, "sample", 64, 32, "round", "mlp", 8, 1, 0, 1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def carried(n_bridges, score_width=None):
    """A linear Gaussian model with its evidence, and the same with an annealed posterior, away from its start."""
    plain = LinearGaussian(0)
    model = AnnealedModel(plain.encoder, plain.decoder, LATENT, n_bridges, score_width).double()
    model.log_likelihood = plain.log_likelihood
    with torch.no_grad():
        model.annealed.step_size_logit.fill_(-1.0)
        model.annealed.beta_logits.copy_(0.3 * torch.randn(n_bridges))
        if score_width:
            for parameter in model.annealed.score.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return plain, model.eval()


@pytest.mark.parametrize("n_bridges", [1, 3, 10])
def test_the_expected_bound_is_never_above_the_evidence(n_bridges):
    plain, model = carried(n_bridges)
    x = torch.randn(50, PIXELS, dtype=torch.float64)
    assert (expected_bound(model, x) < plain.evidence(x)).all()
    plain.exact_posterior()
    assert (expected_bound(model, x) < plain.evidence(x)).all()


def test_bridges_bring_the_bound_nearer():
    """From the prior: the encoder says nothing of the image."""
    bounds, x = [], torch.randn(50, PIXELS, dtype=torch.float64)
    for n_bridges in (1, 4, 16):
        torch.manual_seed(0)
        plain, model = carried(n_bridges)
        with torch.no_grad():
            model.annealed.beta_logits.zero_()
            for parameter in plain.encoder.parameters():
                parameter.zero_()
        bounds.append((expected_bound(model, x) - plain.evidence(x)).mean())
    assert bounds[0] < bounds[1] < bounds[2] < 0


@pytest.mark.parametrize("score_width", [None, 5])
def test_weights_are_unbiased(score_width):
    plain, model = carried(3, score_width)
    plain.exact_posterior()
    x, n = torch.randn(2, PIXELS, dtype=torch.float64), 40_000
    noise = torch.randn(n, 2, model.noise_features, dtype=torch.float64)
    with torch.no_grad():
        ratios = (model(x, noise) - plain.evidence(x)).exp()
    standard_error = ratios.std(0) / n**0.5
    assert (standard_error < 0.05).all()
    assert ((ratios.mean(0) - 1).abs() < 4 * standard_error).all()


def test_no_bridges_are_the_vae():
    """To rounding: it adds up in another order."""
    pixels, noise = torch.randint(0, 2, (3, 784), dtype=torch.uint8), torch.randn(2, 3, 64, dtype=torch.float64)
    models = [Job(name, 0, 1).build(SETTING, torch.zeros(0, 784)).double().eval() for name in ("vae", "uha", "ldvi")]
    expected, *others = (model(pixels, noise) for model in models)
    for values in others:
        torch.testing.assert_close(values, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_gradients_are_the_same_with_every_memory(network):
    """With batch norms that depend on z_0, and so on the encoder's output, too."""
    pixels, gradients = torch.randint(0, 2, (4, 784), dtype=torch.uint8), []
    for memory in ("store", "states", "reversible"):
        setting = Setting(1, "sample", 64, 32, "round", network, 8, 1, 0, 1)
        model = Job("ldvi", 2, 1).build(setting, torch.zeros(0, 784), memory="store", compile=False).double().train()
        model.annealed.memory = memory
        torch.manual_seed(4)
        noise = torch.randn(1, 4, model.noise_features, dtype=torch.float64)
        model(pixels, noise).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], rtol=1e-8, atol=1e-10)
    model = Job("ldvi", 2, 1).build(setting, torch.zeros(0, 784), memory="reversible", compile=False)
    assert model.annealed.memory == "states"


# ---- Likelihoods between two bounds ----


def test_the_sandwich_holds_the_exact_value():
    """Of images drawn as Bernoulli pixels the model has no evidence in closed form: so they are handed over."""

    class Drawn(LinearGaussian):
        def sample_prior(self, count, generator):
            self.z = torch.randn(count, LATENT, generator=generator, dtype=torch.float64)
            return self.z

        def encode(self, pixels):
            weight = self.decoder.layers[0].weight
            noise = torch.randn(len(self.z), PIXELS, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
            self.x = (self.z @ weight.T + self.decoder.layers[0].bias + SCALE * noise).detach()
            return super().encode(self.x)

        def log_joint(self, logits, pixels, z, prior=None):
            return super().log_joint(logits, self.x, z, prior)

    model, gaps = Drawn(0).eval(), []
    model.exact_posterior()
    for n_bridges in (5, 60):
        lower, upper = likelihood.sandwich(model, 30, n_bridges, torch.Generator().manual_seed(1))
        exact = model.evidence(model.x)
        for bound, side in ((lower, -1), (upper, 1)):
            distance = side * (bound - exact)
            assert distance.mean() > -4 * distance.std() / 30**0.5
            assert distance.abs().max() < 1.5
        gaps.append((upper - lower).mean())
    assert gaps[1] < gaps[0]
    assert gaps[1] < 0.1


# ---- The command ----

TINY = ["--train-size", "48", "--validation-size", "24", "--batch-size", "16", "--epochs", "2", "--network", "mlp"]
TINY += ["--likelihood-samples", "5", "--likelihood-images", "22"]
SANDWICH = ["--sandwich-images", "21", "--sandwich-bridges", "3"]
MODELS = ["--model", "uha", "ldvi", "--leapfrog-steps", "1", "2"]


def hvae(out, *more):
    models = [] if "--model" in more else MODELS
    sandwich = [] if "--sandwich-images" in more else SANDWICH
    return cli.main(["mnist", *TINY, *sandwich, *models, "--threads", "1", "--out", str(out), *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("annealed")
    assert hvae(out) == 0
    return out


def test_results_and_report(finished):
    results = json.loads((finished / "results.json").read_text())
    assert [(row["method"], row["leapfrog_steps"]) for row in results["rows"]] == [
        ("uha", 1), ("uha", 2), ("ldvi", 1), ("ldvi", 2)
    ]  # fmt: skip
    assert results["config"]["sandwich_bridges"] == 3
    for row in results["rows"]:
        assert row["sandwich_images"] == 21
        assert -784 < row["sandwich_lower"] < row["sandwich_upper"] < 0
        assert row["elbo"] < row["log_likelihood"] < 0
    report = (finished / "report.md").read_text()
    assert "## The likelihood between two bounds" in report
    assert "ldvi has a network in the momentum's way back" in report
    assert Job("uha", 8, 1).published("mlp") == (None, -89.8, None)
    assert Job("hvae", 8, 1).published("mlp") == (None, None, None)


def test_a_killed_run_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    save, saved = train.State.save, []

    def killed(self, path):
        if self.sandwich.shape[1] == 20 or len(saved) == 20:
            raise Killed
        saved.append(path)
        save(self, path)

    monkeypatch.setattr(experiment, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(train.State, "save", killed)
    with pytest.raises(Killed):
        hvae(tmp_path)
    monkeypatch.undo()
    assert hvae(tmp_path, "--resume") == 0
    for job in study.plan(["uha", "ldvi"], [1, 2]):
        whole, resumed = (train.State.load(experiment.state_path(out, job)) for out in (finished, tmp_path))
        assert resumed.history == whole.history
        assert torch.equal(resumed.sandwich, whole.sandwich)
        assert all(torch.equal(resumed.model[name], value) for name, value in whole.model.items())


@pytest.mark.parametrize("model", ["uha", "ldvi"])
def test_without_bridges_it_is_an_auto_encoder(model, tmp_path):
    assert hvae(tmp_path, "--model", model, "--leapfrog-steps", "0", "--sandwich-images", "0") == 0
    assert train.State.load(tmp_path / "jobs" / f"{model}-K0-S1-N100.pt").finished


def test_a_sandwich_is_of_a_whole_run(finished, capsys):
    assert hvae(finished, "--resume", "--sandwich-images", "0") == 1
    assert "was made with sandwich_images 21, not None" in capsys.readouterr().err


# ---- One decoder for all ----


def held(out, file, *more):
    options = [*TINY, *([] if "--sandwich-images" in more else SANDWICH), "--decoder", str(file)]
    if "--model" not in more:
        options += [
            "--model",
            "vae",
            "iwae",
            "hvae",
            "uha",
            "ldvi",
            "--leapfrog-steps",
            "2",
            "--importance-samples",
            "4",
        ]
    return cli.main(["mnist", *options, "--out", str(out), *more])


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_a_decoder_is_kept(network, tmp_path, capsys):
    assert hvae(tmp_path / "first", "--network", network, "--model", "vae") == 0
    file = tmp_path / "first" / "jobs" / "vae-K0-S1.pt"
    kept = train.State.load(file).model
    assert held(tmp_path / "held", file, "--network", network) == 0
    for path in (tmp_path / "held" / "jobs").glob("*.pt"):
        model = train.State.load(path).model
        assert all(torch.equal(model[name], x) for name, x in kept.items() if name.startswith("decoder."))
        assert not all(torch.equal(model[name], x) for name, x in kept.items() if name.startswith("encoder."))
    results = json.loads((tmp_path / "held" / "results.json").read_text())
    assert results["config"]["decoder"]["job"] == "vae-K0-S1"
    report = (tmp_path / "held" / "report.md").read_text()
    assert "the decoder of vae-K0-S1 after 2 epochs" in report
    assert "printed, validation" not in report
    assert "costs.png" in report
    capsys.readouterr()
    assert hvae(tmp_path / "held", "--network", network, "--model", "vae", "--resume") == 1
    assert "was made with decoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state, path: path.unlink(), "no such file; expected a job's"),
        (lambda state, path: path.write_bytes(b"0"), "uha-K1-S1-N100.pt: corrupt, or no job's of hvae mnist"),
        (lambda state, path: state.pictures.clear(), "is not finished"),
        (lambda state, path: state.model.pop("decoder.layers.0.weight"), "is of another network than --network mlp"),
    ],
)
def test_a_decoder_that_does_not_fit_is_refused(change, said, finished, tmp_path, capsys):
    state = train.State.load(finished / "jobs" / "uha-K1-S1-N100.pt")
    path = tmp_path / "uha-K1-S1-N100.pt"
    state.save(path)
    change(state, path)
    if path.exists() and path.read_bytes() != b"0":
        state.save(path)
    assert held(tmp_path / "out", path) == 1
    assert said in capsys.readouterr().err
    assert held(tmp_path / "out", path, "--model", "helmholtz", "--sandwich-images", "0") == 1
    assert "--decoder: helmholtz has its own" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["vae", "iwae", "hvae", "uha", "ldvi", "hvi"])
def test_decoder_passes_are_those_that_run(model, monkeypatch):
    (job,) = study.plan([model], [3], 4, momenta=2)
    built, rows, run = job.build(SETTING, torch.zeros(1, 784), memory="store"), [], networks.Network.run

    def counted(self, x, *args):
        rows.append(len(x) * (self is built.decoder))
        return run(self, x, *args)

    monkeypatch.setattr(networks.Network, "run", counted)
    built(torch.zeros(2, 784), torch.randn(job.samples, 2, built.noise_features)).sum().backward()
    assert sum(rows) == 2 * job.decoder_passes


VAMP = ("--prior", "vamp", "--components", "9")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--model", "helmholtz", *SANDWICH], "--sandwich-images: helmholtz has none"),
        (["--model", "uha", *VAMP, *SANDWICH], "--sandwich-images: with --prior normal alone"),
        (["--model", "uha", *VAMP], "uha takes none"),
        (["--model", "vae", "hvae", *VAMP, "--decoder", "x.pt"], "--decoder: with --prior normal alone"),
        (
            ["--model", "vae", "--leapfrog-steps", "3"],
            "--leapfrog-steps: only --model hvae hvae-iaf hvi uha ldvi has any",
        ),
        (["--model", "vae", "--importance-samples", "3"], "--importance-samples: only --model iwae iwae-stl iwae-dreg"),
        (["--model", "uha", "--sandwich-bridges", "3"], "--sandwich-bridges: only --sandwich-images have any"),
    ],
)
def test_what_a_model_does_not_have_is_refused(wrong, said, tmp_path, capsys):
    assert cli.main(["mnist", *TINY, *wrong, "--out", str(tmp_path)]) != 0
    assert said in capsys.readouterr().err


def test_networks_and_scores_are_as_they_say():
    job = Job("ldvi", 4, 1)
    model = job.build(SETTING, torch.zeros(0, 784))
    assert model.annealed.score.network[0].out_features == annealed.SCORE_WIDTH
    assert isinstance(model.decoder, networks.Network)
    assert Job.from_key(job.key) == job
    assert [j.n_steps for j in study.plan(["vae", "hvae", "uha"], [2, 3])] == [0, 2, 3, 2, 3]


# ---- Gradients of steps that diverge ----


@pytest.fixture
def trainer(tmp_path):
    """Of a job before its first update, with a gradient of ones."""

    def make(**options):
        job, setting = Job("uha", 2, 1, **options), SETTING
        made = train.Trainer(job, setting, State(), tmp_path / "job.pt")
        made.model = job.build(setting, torch.zeros(1, 784))
        for parameter in made.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        return made

    return make


def norm(model):
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


def test_gradients_are_clipped_where_that_is_asked_for(trainer):
    free, clipped = trainer(), trainer(clip_norm=3)
    before = norm(free.model)
    for each in (free, clipped):
        each.bound_gradients(0)
    assert before > 100
    assert norm(free.model) == before
    assert norm(clipped.model) == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize("clip_norm", [0, 3])
def test_every_update_is_clipped(trainer, clip_norm):
    made, norms = trainer(clip_norm=clip_norm), []
    made.watchers.append(lambda trainer: norms.append(norm(trainer.model)))
    made.run(SETTING.digits())
    assert len(norms) >= SETTING.steps_per_epoch
    assert (max(norms) < 3.01) == bool(clip_norm)


def test_the_command_clips(tmp_path):
    assert hvae(tmp_path, "--model", "uha", "--leapfrog-steps", "2", "--clip-norm", "3") == 0
    row = json.loads((tmp_path / "results.json").read_text())["rows"][0]
    assert row["clip_norm"] == 3
    assert [path.stem for path in (tmp_path / "jobs").glob("*.pt")] == ["uha-K2-S1-N3"]


def test_gradients_whose_norm_overflows_become_zero_or_are_refused(trainer):
    """One image's leapfrog steps that diverge must not reach Adam's averages, whose steps would be 0 ever after."""
    free, clipped = trainer(), trainer(clip_norm=3)
    for each in (free, clipped):
        next(each.model.parameters()).grad.fill_(1e30)
    with pytest.raises(StudyError, match=r"uha-K2-S1: epoch 1, step 7: the norm .* is not finite; --clip-norm bounds"):
        free.bound_gradients(7)
    clipped.bound_gradients(7)
    assert norm(clipped.model) == 0


@pytest.mark.parametrize("options", [{}, {"clip_norm": 3}])
def test_a_gradient_that_is_not_finite_is_named(trainer, options):
    made = trainer(**options)
    made.model.encoder.layers[0].bias.grad[1] = torch.nan
    with pytest.raises(StudyError, match=r"epoch 1, step 7: the gradient of encoder.layers.0.bias is not finite"):
        made.bound_gradients(7)


def test_a_clipped_job_has_a_name_of_its_own():
    job = study.plan(["uha"], 2, clip_norm=99)[0]
    assert (job.key, job.label) == ("uha-K2-S1-N99", "uha, K = 2, gradients clipped at 99")
    assert Job.from_key(job.key) == job


def test_what_is_clipped_by_default():
    keys = [job.key for job in study.plan(["vae", "uha", "ldvi"], 2)]
    assert keys == ["vae-K0-S1", "uha-K2-S1-N100", "ldvi-K2-S1-N100"]
    labels = [study.plan(["uha"], 2, clip_norm=norm)[0].label for norm in (None, 0)]
    assert labels == ["uha, K = 2", "uha, K = 2, gradients not clipped"]
