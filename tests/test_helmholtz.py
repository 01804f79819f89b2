"""The Helmholtz machine against the enumeration of all its bits, and in the study."""

import itertools
import json
import math

import pytest
import torch
from hvae import cli, experiment
from hvae.mnist import likelihood, study, train
from hvae.mnist.helmholtz import Helmholtz, bits
from hvae.mnist.study import Job, Setting
from torch.distributions import Bernoulli

UNITS, PIXELS = (3, 2, 1), 6
BITS = sum(UNITS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def machine():
    model = Helmholtz(UNITS, PIXELS).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model.eval()


def patterns(count):
    """All rows of bits."""
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=count)), dtype=torch.float64)


def log_prob(logits, values):
    return Bernoulli(logits=logits).log_prob(values).sum(-1)


def log_joint(model, x, hidden):
    """``log p(x, h)`` by the layers' products, of rows ``x`` and ``hidden`` that broadcast."""
    first, second, top = hidden.split(UNITS, -1)
    to_first, to_second = model.downward
    upper = log_prob(model.top_logits, top) + log_prob(to_second(top), second)
    return upper + log_prob(to_first(second), first) + log_prob(model.decoder(first), x)


def log_posterior(model, x, hidden):
    first, second, top = hidden.split(UNITS, -1)
    from_first, from_second = model.upward
    lower = log_prob(model.encoder(x), first) + log_prob(from_first(first), second)
    return lower + log_prob(from_second(second), top)


@torch.no_grad()
def evidence(model, x):
    return log_joint(model, x[:, None], patterns(BITS)).logsumexp(-1)


def noise_of(rows):
    """That from which the bits become these whatever the logits are."""
    return torch.where(rows > 0, -math.inf, math.inf).to(rows)


@torch.no_grad()
def test_weights_of_all_bits_are_the_exact_ones():
    """And sum up to the evidence, which sums up to 1 over all images."""
    model, x = machine(), patterns(PIXELS)
    hidden = patterns(BITS)
    weights = model(x, noise_of(hidden)[:, None].expand(-1, len(x), -1))
    log_q = log_posterior(model, x, hidden[:, None])
    torch.testing.assert_close(weights, log_joint(model, x, hidden[:, None]) - log_q)
    torch.testing.assert_close(log_q.logsumexp(0), torch.zeros(len(x)).double())
    torch.testing.assert_close((weights + log_q).logsumexp(0), evidence(model, x))
    torch.testing.assert_close(evidence(model, x).logsumexp(0), torch.zeros(()).double())


@torch.no_grad()
def test_importance_sampling_finds_the_evidence():
    model, x = machine(), patterns(PIXELS)[[0, 11, 37, 63]]
    eps = torch.randn(20_000, len(x), BITS, dtype=torch.float64)
    ratios = (model(x, eps) - evidence(model, x)).exp()
    error = ratios.std(0) / math.sqrt(len(eps))
    assert ((ratios.mean(0) - 1).abs() < 4 * error).all()
    assert (error < 0.03).all(), "or a wrong weight could not be told"
    assert (model(x, eps).mean(0) < evidence(model, x)).all()
    found = likelihood.log_likelihood(model, x, len(eps), lambda number, rows: eps[500 * number :][:rows], 500)
    torch.testing.assert_close(found, evidence(model, x) + ratios.mean(0).log())


def test_gradients_are_those_of_wake_and_sleep():
    """Generative weights by recognised bits, recognition weights by fantasies; the values are the bound's."""
    model, x = machine(), patterns(PIXELS)[[3, 40, 21]]
    recognised, fantasies = (torch.randint(0, 2, (2, 3, n)).double() for n in (BITS, BITS + PIXELS))
    eps = noise_of(torch.cat([recognised, fantasies], -1))
    assert model.noise_features == BITS
    expected = model(x, eps[..., :BITS])
    model.train()
    assert model.noise_features == eps.shape[-1]
    weights = model(x, eps)
    torch.testing.assert_close(weights, expected)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(weights.sum(), parameters)
    hidden, pixels = fantasies.split([BITS, PIXELS], -1)
    phases = log_joint(model, x, recognised).sum() + log_posterior(model, pixels, hidden).sum()
    wanted = dict(zip(names, torch.autograd.grad(phases, parameters), strict=True))
    # log q of recognised bits and log p of fantasies are no part of it
    for name, gradient in zip(names, found, strict=True):
        torch.testing.assert_close(gradient, wanted[name])
        assert gradient.abs().max() > 0


@torch.no_grad()
def test_fantasies_come_as_often_as_the_model_says():
    model, count = machine(), 40_000
    hidden = torch.cat(model.dream(torch.randn(count, BITS, dtype=torch.float64)), -1)
    places = (hidden * 2.0 ** torch.arange(BITS - 1, -1, -1)).sum(-1).long()
    found = torch.bincount(places, minlength=2**BITS) / count
    everything = log_joint(model, patterns(PIXELS)[:, None], patterns(BITS))
    exact = everything.logsumexp(0).exp()
    assert ((found - exact).abs() < 4 * (exact * (1 - exact) / count).sqrt() + 1e-9).all()
    torch.testing.assert_close(model.sample_prior(7, torch.Generator().manual_seed(1)).shape, torch.Size([7, 3]))


def test_bits_are_on_as_often_as_their_logits_say():
    logits = torch.tensor([-30.0, -1.0, 0.0, 2.0, 30.0])
    means = bits(logits.expand(100_000, 5), torch.randn(100_000, 5)).mean(0)
    torch.testing.assert_close(means, logits.sigmoid(), atol=0.007, rtol=0)


def test_wake_sleep_learns_two_patterns():
    """Near the entropy of their mixture with flipped pixels; single pixels are fair coins."""
    model, flipped = Helmholtz(UNITS, PIXELS).train(), 0.05
    optimizer = torch.optim.Adam(model.parameters(), 0.03)
    pattern = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])

    def images(count):
        which = torch.rand(count, 1) < 0.5
        return torch.where(which, pattern, 1 - pattern).sub((torch.rand(count, 6) < flipped).float()).abs()

    for _ in range(400):
        x = images(64)
        optimizer.zero_grad()
        (-model(x, torch.randn(1, len(x), model.noise_features)).mean()).backward()
        optimizer.step()
    entropy = math.log(2) + 6 * Bernoulli(torch.tensor(flipped)).entropy().item()
    mean = evidence(model.double(), images(2_000).double()).mean().item()
    assert -6 * math.log(2) + 1 < -entropy - 0.3 < mean


# ---- In the study ----

SMALL = ["--train-size", "40", "--validation-size", "24", "--batch-size", "16", "--epochs", "2", "--network", "mlp"]
COMMAND = ["mnist", *SMALL, "--likelihood-samples", "7", "--threads", "1"]


def hvae(out, *more):
    return cli.main([*COMMAND, "--out", str(out), *more])


def rows_of(out):
    rows = json.loads((out / "results.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_the_command_trains_machines_of_several_sizes_and_goes_on_after_a_kill(tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert hvae(whole, "--model", "helmholtz") == 0
    assert hvae(whole, "--model", "helmholtz", "--units", "20", "20", "3", "--resume") == 0
    rows = rows_of(whole)
    assert [(row["units"], row["dim"]) for row in rows] == [([20, 20, 3], 43), ([200, 10], 210)]
    for row in rows:
        assert -784 < row["elbo"] < row["log_likelihood"] < 0
    text = (whole / "report.md").read_text()
    assert "| helmholtz, 200-10 " in text
    assert "wake-sleep" in text
    for name in ("samples", "reconstructions"):
        assert (whole / f"{name}-helmholtz-K0-S1-U200x10.png").read_bytes().startswith(b"\x89PNG")
    epoch = train.Trainer.train_epoch

    def stopped(self, pixels):
        if self.state.epoch == 1:
            raise KeyboardInterrupt
        return epoch(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        patch.setattr(train.Trainer, "train_epoch", stopped)
        assert hvae(killed, "--model", "helmholtz") == 130
    assert hvae(killed, "--model", "helmholtz", "--resume") == 0
    assert rows_of(killed) == rows[1:]
    ours, other = (torch.load(out / "jobs" / "helmholtz-K0-S1-U200x10.pt") for out in (killed, whole))
    assert all(torch.equal(ours["model"][name], value) for name, value in other["model"].items())


def test_a_job_by_its_key():
    job = Job.from_key("helmholtz-K0-S1-U200x200")
    assert (job.units, job.label, job.published("conv")) == ((200, 200), "helmholtz, 200-200", (None, None, None))
    model = job.build(Setting(1, "sample", 64, 32, "round", "conv", 8, 1, 0, 1), torch.zeros(0, 784))
    assert (model.units, model.latent) == ([200, 200], 400)
    assert study.plan(["helmholtz"]) == [Job("helmholtz", 0, 1, units=(200, 10))]
