"""``hvae draw``: the network against its formulas, bounds against exact evidence, and the command end to end."""

import json
import math

import pytest
import torch
from hvae import cli, experiment, runs
from hvae.data import mnist
from hvae.draw import models, study, train
from hvae.draw.models import Draw
from hvae.draw.study import Job
from seen import check_what_is_seen
from torch import nn

from hvae_kernels import functional as F
from hvae_kernels.ops.draw import reference


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network(steps, attention, latent=1, loud=3.0):
    """A small one whose latent variables move the canvas by nats."""
    model = Draw(steps, attention, hidden=6, latent=latent).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(loud)
        if attention:  # the write's first gain makes up for the spread of filters; it is not to be louder thrice
            model.write_at.bias[4] = 0.0
    return model


def pixels(count=3):
    return (torch.rand(count, mnist.N_PIXELS) < 0.3).to(torch.uint8)


@pytest.mark.parametrize("attention", [False, True])
def test_every_step_by_its_formulas(attention):
    model, images = network(3, attention, latent=4, loud=1.5), pixels()
    noise = torch.randn(3, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        model.canvas.normal_(), model.states.normal_()
    x, canvas = images.double(), model.canvas.expand(3, 784)
    states = [state.expand(3, 6) for state in model.states]
    encoded, decoded = tuple(states[:2]), tuple(states[2:])
    divergence = 0.0
    for step_noise in noise:
        error = x - torch.sigmoid(canvas)
        if attention:
            at = model.read_at(decoded[0])
            both = torch.stack([x.view(3, 28, 28), error.view(3, 28, 28)], 1)
            seen = reference.draw_read(both, at, 2).flatten(1)
        else:
            seen = torch.cat([x, error], 1)
        encoded = model.encoder(torch.cat([seen, decoded[0]], 1), encoded)
        mu, log_sigma = model.posterior(encoded[0]).split(4, 1)
        z = mu + log_sigma.exp() * step_noise
        divergence = divergence + 0.5 * (mu**2 + (2 * log_sigma).exp() - 2 * log_sigma).sum(1) - 0.5 * 4
        decoded = model.decoder(z, decoded)
        patch = model.write(decoded[0])
        if attention:
            patch = reference.draw_write(patch.view(3, 1, 5, 5), model.write_at(decoded[0]), (28, 28)).flatten(1)
        canvas = canvas + patch
    likelihood = torch.distributions.Bernoulli(logits=canvas).log_prob(x).sum(1)
    drawn, picture = model.run(images, noise)
    torch.testing.assert_close(drawn.divergence, divergence)
    torch.testing.assert_close(drawn.log_likelihood, likelihood)
    torch.testing.assert_close(picture.canvases[-1], canvas)
    assert (picture.writes is not None) is attention


@pytest.mark.parametrize("attention", [False, True])
def test_weights_and_bound_against_the_exact_evidence(attention):
    """Of two steps of one latent variable each, over whose plane p(x | z) is summed."""
    model = network(2, attention)
    with torch.no_grad():
        images = (model.generate(torch.randn(2, 2, 1).double()).canvases[-1] > 0).to(torch.uint8)
        model.write.weight.mul_(0.3 if attention else 0.02)
        line = torch.linspace(-7, 7, 161, dtype=torch.float64)
        z = torch.cartesian_prod(line, line)
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1) + 2 * math.log((line[1] - line[0]).item())
        canvas = model.generate(z.mT.unsqueeze(-1)).canvases[-1]
        for image in images:
            likelihood = torch.distributions.Bernoulli(logits=canvas).log_prob(image.double()).sum(-1)
            exact = (likelihood + prior).logsumexp(0)
            drawn = model(image.expand(20_000, -1), torch.randn(2, 20_000, 1, dtype=torch.float64))
            ratios = (drawn.log_weight - exact).exp()
            assert abs(ratios.mean() - 1) < 4 * ratios.std() / math.sqrt(len(ratios))
            assert ratios.std() / math.sqrt(len(ratios)) < 0.05, "or a wrong weight could not be told"
            bounds = drawn.bound
            assert bounds.mean() < exact - 4 * bounds.std() / math.sqrt(len(bounds)), "the gap is to be seen"
            difference = drawn.divergence + drawn.log_ratio
            assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(len(difference))


def test_log_likelihood_of_samples_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(train, "SAMPLES_AT_A_TIME", 3)
    model, images = network(2, True), pixels(4)
    parts = [torch.randn(2, n * 4, 1, dtype=torch.float64) for n in (3, 3, 1)]
    estimate = train.log_likelihood(model, images, 7, lambda number, shape: parts[number].view(shape))
    weights = [model(images.repeat(n, 1), part).log_weight.view(n, 4) for n, part in zip((3, 3, 1), parts, strict=True)]
    torch.testing.assert_close(estimate, torch.cat(weights).logsumexp(0) - math.log(7))


@pytest.mark.parametrize("read", [1, 2, 5])
def test_windows_begin_on_the_digit_and_writes_as_strong_as_their_patch(read):
    model = Draw(1, True, read=read)
    state = torch.zeros(1, model.hidden)
    left, top, side = models.window(model.read_at(state), read)[0].tolist()
    assert min(left, top) > 5
    assert max(left, top) + side < 22
    at = model.write_at(state)
    written = F.draw_write(torch.ones(1, 1, 5, 5), at, (28, 28))
    assert 0.8 < written[0, 0, 10:18, 10:18].mean() < 1.25


def test_keys_of_jobs():
    for key in ("whole-T3", "attention-T3", "attention-T3-R5"):
        assert Job.from_key(key, 1).key == key
    assert Job.from_key("attention-T3", 1).read == models.READ
    for key in ("whole-T3-R5", "attention-T3-R2", "attention-T0", "attention-T3-R0"):
        with pytest.raises(ValueError, match=f"no job is named {key}"):
            Job.from_key(key, 1)


def test_windows_lie_where_the_grid_does():
    middle = torch.zeros(5)
    torch.testing.assert_close(models.window(middle, 5), torch.tensor([0.0, 0.0, 27.0]))
    torch.testing.assert_close(models.window(middle, 1), torch.tensor([13.5, 13.5, 0.0]))
    aside = torch.tensor([2 * 7 / 29 - 1, 2 * 20 / 29 - 1, 0.0, math.log(4 / 27), 0.0])  # around pixel (7, 20) from 1
    torch.testing.assert_close(models.window(aside, 3), torch.tensor([4.0, 17.0, 4.0]))


def test_what_is_drawn_is_learned(tmp_path):
    """Some dozen steps on a few digits: the bound rises above what the pixels' frequencies alone give."""
    setting = study.Setting(1, "sample", 600, 100, 8, 0, 1)
    images = setting.pixels()
    rate = images[0].double().mean(0).clamp(1e-3, 1 - 1e-3)
    by_pixel = torch.distributions.Bernoulli(rate).log_prob(images[1].double()).sum(-1).mean()
    state = train.State()
    with experiment.threads(1):
        train.train(Job(0, 3, 1), setting, images, state, tmp_path / "state.pt", lambda state: None)
    bounds = [record["validation"] for record in state.history]
    assert bounds[-1] > by_pixel + 5


def test_a_bound_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "LEARNING_RATE", 1e30)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *arguments: None)
    setting = study.Setting(1, "sample", 200, 10, 3, 0, 1)
    with pytest.raises(runs.StudyError, match=r"attention-T2: the bound of epoch \d is not finite"):
        train.train(Job(2, 2, 1), setting, setting.pixels(), train.State(), tmp_path / "state.pt", lambda state: None)


SIZES = ("--train-size=120", "--validation-size=30", "--epochs=2", "--likelihood-images=25", "--likelihood-samples=60")
KEYS = ("attention-T2", "whole-T2", "attention-T3", "whole-T3")


def hvae(out, *more):
    return cli.main(["draw", "--draw-steps", "2", "3", "--threads", "1", *SIZES, "--out", str(out), *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "draw"
    assert hvae(out) == 0
    return out


def results(out):
    return json.loads((out / "results.json").read_text())


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_results_and_report(finished, capsys):
    rows = results(finished)["rows"]
    assert [f"{row['method']}-T{row['draw_steps']}" for row in rows] == list(KEYS)
    for row in rows:
        assert (row["epochs"], row["steps"], row["likelihood_images"]) == (2, 4, 25)
        assert row["validation_bound"] < row["log_likelihood"] + 5
    text = (finished / "report.md").read_text()
    assert check_what_is_seen(hvae, finished, capsys)[0].startswith("model ")
    for key in KEYS:
        for name in ("samples", "reconstructions"):
            assert f"({name}-{key}.png)" in text
            assert (finished / f"{name}-{key}.png").read_bytes().startswith(b"\x89PNG")
    assert "| T = 2, attention, reads 2 x 2 " in text
    assert "-80.97" in text


@pytest.mark.parametrize("stop", ["train_epoch", "log_likelihood"])
def test_a_killed_run_goes_on_to_the_same_bits(stop, finished, tmp_path, monkeypatch, capsys):
    whole, calls = getattr(train, stop), []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        patch.setattr(train, stop, killed)
        assert hvae(tmp_path, "--attention") == 130
    assert "--resume" in capsys.readouterr().err
    assert hvae(tmp_path, "--attention", "--resume") == 0
    expected = [row for row in results(finished)["rows"] if row["method"] == "attention"]
    assert without_times(results(tmp_path)["rows"]) == without_times(expected)
    ours, other = (torch.load(out / "jobs" / "attention-T2.pt", weights_only=True) for out in (tmp_path, finished))
    assert all(torch.equal(ours["model"][name], other["model"][name]) for name in other["model"])
    assert torch.equal(ours["pictures"]["samples"], other["pictures"]["samples"])


def test_resume_adds_to_a_finished_run_of_the_same_kind(finished, capsys):
    before = results(finished)["rows"]
    assert hvae(finished) == 1
    assert "--resume" in capsys.readouterr().err
    assert hvae(finished, "--resume") == 0
    assert results(finished)["rows"] == before
    assert hvae(finished, "--resume", "--epochs", "3") == 1
    assert "was made with epochs" in capsys.readouterr().err


@pytest.mark.parametrize("change", [lambda row: row.pop("train_bound"), lambda row: row.update(job="x")])
def test_rows_of_another_form_are_one_sentence(change, finished, tmp_path, capsys):
    content = results(finished)
    change(content["rows"][0])
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert cli.main(["report", str(tmp_path)]) == 1
    assert f"{tmp_path / 'results.json'} is corrupt or not a file of this run" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["--epochs=0", "--draw-steps=0", "--seed=-1", "--likelihood-images=-1"])
def test_wrong_arguments(wrong, tmp_path):
    with pytest.raises(SystemExit):
        hvae(tmp_path, wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--likelihood-images=31", "--likelihood-images 31 is more than --validation-size"),
        ("--train-size=20000", "sample has 10000 digits, not 20000"),
        ("--no-attention --read 5", "--read: --no-attention has none"),
        ("--data=/nowhere", "/nowhere has no train-images-idx3-ubyte"),
    ],
)
def test_mistakes_are_one_sentence(wrong, message, tmp_path, capsys):
    assert hvae(tmp_path, *wrong.split()) == 1
    assert message in capsys.readouterr().err
