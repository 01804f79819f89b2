"""uha on the Gaussian model: its bound in closed form, below the evidence, and its gradient."""

import json

import pytest
import torch
from hvae import cli
from hvae.gaussian import exact
from hvae.gaussian.data import data_sets
from hvae.gaussian.models import AnnealedVAE
from hvae.gaussian.study import Job

D, R = 4, 2
DATA = data_sets(D, R, 3).full


def model_of(n_bridges, seed=0):
    """Away from the start, with steps as long as the posterior is wide."""
    model = AnnealedVAE(D, n_bridges, replicas=R, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    model.flat += 0.1 * torch.randn(model.flat.shape, generator=generator, dtype=torch.float64)
    model.values["log_scale"].sub_(1.5)
    model.values["step_size_logit"].add_(2.0)
    return model


@pytest.mark.parametrize("n_bridges", [1, 3, 10])
def test_the_closed_form_is_the_mean_of_the_sampled_bound(n_bridges):
    """A log weight is quadratic in all noise, so points along the axes average it exactly."""
    model = model_of(n_bridges)
    rows = (2 + n_bridges) * D
    points = rows**0.5 * torch.cat([torch.eye(rows), -torch.eye(rows)]).double()
    noise = points.unflatten(1, (2 + n_bridges, D)).movedim(1, 0)[:, None].expand(-1, R, -1, -1)
    sampled = model.bound(model.values, DATA, noise)
    constant = D / 2 * (1 - DATA.count * exact.LOG_2PI)
    torch.testing.assert_close(model.elbo(DATA), sampled + constant, rtol=1e-9, atol=0)


@pytest.mark.parametrize("n_bridges", [1, 4, 16])
@pytest.mark.parametrize("shift", [-4.0, 0.0, 1.5])
def test_it_is_never_above_the_evidence(n_bridges, shift):
    model = model_of(n_bridges)
    model.values["step_size_logit"].add_(shift)
    assert (model.elbo(DATA) < exact.log_evidence(DATA, *model.estimate())).all()


def test_without_a_move_it_is_the_prior_as_posterior():
    model = model_of(5)
    model.values["step_size_logit"].fill_(-60.0)
    loc, log_scale = model.estimate()
    none = torch.zeros_like(loc)
    torch.testing.assert_close(model.elbo(DATA), exact.mean_field_bound(DATA, loc, log_scale, none, none))


def test_more_bridges_come_nearer():
    gaps = []
    for n_bridges in (4, 16, 64, 256):
        model = AnnealedVAE(2, n_bridges, dtype=torch.float64)
        data = data_sets(2, 1, 3).full
        model.values["loc"].copy_(data.mean)
        model.values["log_scale"].fill_(3.5)
        model.values["step_size_logit"].fill_(-0.5)
        gaps.append((exact.log_evidence(data, *model.estimate()) - model.elbo(data)).item())
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] > 0


def test_the_gradient_is_the_bounds():
    model = model_of(3)
    noise = torch.randn(5, R, 10, D, dtype=torch.float64)
    model.write_gradient(model.prepare(DATA), noise)
    step = 1e-6
    for column in (0, D, 2 * D, 3 * D + 1, model.flat.shape[1] - 1):
        values = []
        for sign in (1, -1):
            moved = model.flat.clone()
            moved[:, column] += sign * step
            values.append(model.bound(model.views(moved), DATA, noise))
        numeric = (values[1] - values[0]) / (2 * step)
        torch.testing.assert_close(model.gradient[:, column], numeric, rtol=1e-4, atol=1e-3)


def test_the_command_trains_it_and_tells_the_exact_floors(tmp_path, capsys):
    options = ["--dims", "3", "--methods", "uha", "hvae", "--leapfrog-steps", "2", "--datasets", "2", "--workers", "1"]
    assert cli.main(["gaussian", *options, "--epochs", "3", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert sorted({row["method"] for row in rows}) == ["hvae", "uha"]
    for row in rows:
        assert row["elbo"] < row["log_evidence"] <= row["elbo_ceiling"]
    assert "uha, K = 2" in (tmp_path / "report.md").read_text()
    assert Job.from_key("corrected-d3-uha-K2").model(2, 1).n_bridges == 2
    assert cli.main(["gaussian", "--methods", "uha", "--setting", "published", "--out", str(tmp_path)]) != 0
    assert "--methods uha: nothing was printed of it" in capsys.readouterr().err
