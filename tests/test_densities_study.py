"""``hvae densities``: the energies by their formulas, divergences against closed forms, and the command end to end."""

import json
import math

import pytest
import torch
from hvae import cli, experiment, runs
from hvae.densities import normal_divergence
from hvae.energies import figures, models, report, study, targets, train
from hvae.energies.models import Density
from hvae.energies.study import Job, Setting
from seen import check_what_is_seen


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def points(count=200):
    """Inside the walls, where the energies are the printed ones."""
    return (torch.rand(count, 2, dtype=torch.float64) * 2 - 1) * targets.WINDOW


def test_energies_are_the_printed_ones():
    z = points()
    x, y = z.mT
    w1 = torch.sin(2 * math.pi * x / 4)
    w2 = 3 * torch.exp(-0.5 * ((x - 1) / 0.6) ** 2)
    w3 = 3 / (1 + torch.exp(-(x - 1) / 0.3))
    sides = torch.exp(-0.5 * ((x - 2) / 0.6) ** 2) + torch.exp(-0.5 * ((x + 2) / 0.6) ** 2)
    upper = torch.exp(-0.5 * ((y - w1) / 0.35) ** 2)
    printed = {
        1: 0.5 * ((z.norm(dim=-1) - 2) / 0.4) ** 2 - torch.log(sides),
        2: 0.5 * ((y - w1) / 0.4) ** 2,
        3: -torch.log(upper + torch.exp(-0.5 * ((y - w1 + w2) / 0.35) ** 2)),
        4: -torch.log(torch.exp(-0.5 * ((y - w1) / 0.4) ** 2) + torch.exp(-0.5 * ((y - w1 + w3) / 0.35) ** 2)),
    }
    assert printed.keys() == targets.ENERGIES.keys()
    for number, energy in targets.ENERGIES.items():
        there = printed[number].isfinite()
        assert there.double().mean() > 0.8
        torch.testing.assert_close(energy(z)[there], printed[number][there])


@pytest.mark.parametrize("number", targets.ENERGIES)
def test_walls_make_an_integral(number):
    """Finite and smooth, nothing at the edge of the square, and the same on a grid half as fine."""
    energy = targets.ENERGIES[number]
    far = torch.tensor([[30.0, 0.0], [-30.0, 0.0], [0.0, 30.0]], dtype=torch.float64)
    assert (energy(far) > 500).all()
    edge = targets.grid(0.1)[[0, -1]]
    assert energy(edge).min() > 40
    assert energy(edge.flip(-1)).min() > 40
    fine, coarse = (targets.log_normaliser(energy, step) for step in (targets.STEP, 2 * targets.STEP))
    assert abs(fine - coarse) < 1e-9


def test_the_normaliser_of_waves_has_a_closed_form():
    """U2 integrates over the second coordinate to a Gaussian's constant, and what is left has a flat top."""
    width = 2 * targets.WINDOW + math.sqrt(2 * math.pi) * targets.WALL
    exact = math.log(width * math.sqrt(2 * math.pi) * 0.4)
    assert abs(targets.log_normaliser(targets.ENERGIES[2]) - exact) < 1e-9


def gaussian(loc, scale):
    """The energy of a Gaussian, not normalised."""
    loc, scale = torch.tensor(loc, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64)
    return lambda z: 0.5 * ((z - loc) / scale).square().sum(-1) + 3.0


def as_gaussian(flow, layers, loc, scale):
    """A density whose flow changes nothing, so that it is a Gaussian."""
    model = Density(flow, layers)
    with torch.no_grad():
        for parameter in model.flow.parameters():
            parameter.zero_()
        if flow == "planar":
            model.flow.w.fill_(1.0)
            model.flow.u.fill_(math.log(math.e - 1) / 2)  # of softplus(u.w) = 1: the constraint makes it 0
        model.loc.copy_(torch.tensor(loc))
        model.log_scale.copy_(torch.tensor(scale).log())
    return model


@pytest.mark.parametrize("flow", models.FLOWS)
def test_divergence_of_gaussians_is_the_closed_form(flow):
    q, p = ([0.4, -0.3], [0.8, 1.1]), ([0.0, 0.5], [0.6, 0.9])
    found, picture = train.divergence(as_gaussian(flow, 3, *q), gaussian(*p), torch.randn(2, 100_000, 2))
    arguments = [y for loc, scale in (q, p) for y in (torch.tensor(loc), torch.tensor(scale).log())]
    exact = normal_divergence(*arguments).item()
    assert exact > 0.3
    assert abs(found["divergence"] - exact) < 4 * found["divergence_error"] < 0.02
    assert abs(found["log_normaliser"] - math.log(2 * math.pi * 0.6 * 0.9) + 3) < 1e-9
    assert picture.sum() > 199_000  # nearly all lie in the window
    middle = (picture.sum(1) * (torch.arange(train.PIXELS) + 0.5)).sum() / picture.sum()
    assert abs((middle / train.PIXELS * 2 - 1) * targets.WINDOW - q[0][0]) < 0.01


@pytest.mark.parametrize("flow", models.FLOWS)
def test_log_q_is_the_density_of_what_is_sampled(flow):
    """By the Jacobian of the whole map."""
    model = Density(flow, 3).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        noise = torch.randn(5, 2, dtype=torch.float64)
        _, log_q = model(noise)
    for x, log in zip(noise, log_q, strict=True):
        jacobian = torch.func.jacrev(lambda x: model(x[None])[0][0])(x)
        base = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum()
        torch.testing.assert_close(log, base - torch.linalg.slogdet(jacobian).logabsdet)


def test_couplings_of_nice_keep_volumes():
    flow, z = models.nice(4), torch.randn(6, 2)
    image, log_abs_det = flow(z)
    assert torch.equal(log_abs_det, torch.zeros(6))
    assert (image != z).all()
    torch.testing.assert_close(flow.inverse(image)[0], z)


def fitted(job, epochs, monkeypatch, tmp_path, updates=50):
    monkeypatch.setattr(study, "UPDATES", updates)
    state = train.State()
    with experiment.threads(1):
        train.train(job, Setting(1, epochs, 20_000), state, tmp_path / "state.pt", lambda state: None)
    return state


@pytest.mark.parametrize("flow", models.FLOWS)
def test_fitting_lowers_a_divergence_that_is_never_negative(flow, monkeypatch, tmp_path):
    state = fitted(Job(flow, 4, 1, 1), 6, monkeypatch, tmp_path)
    found = state.figures
    assert found["divergence"] > -4 * found["divergence_error"]
    before, _ = train.divergence(Job(flow, 4, 1, 1).model(), targets.ENERGIES[1], torch.randn(1, 20_000, 2))
    assert found["divergence"] < before["divergence"] - 1
    assert [record["epoch"] for record in state.history] == list(range(1, 7))


def test_a_divergence_that_is_not_finite_stops_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "LEARNING_RATE", 1e30)
    with pytest.raises(runs.StudyError, match=r"planar-K2-U3: the divergence of epoch \d is not finite"):
        fitted(Job("planar", 2, 3, 1), 3, monkeypatch, tmp_path, updates=10)


def test_temperatures_and_rates_end_where_they_should():
    setting = Setting(1, 4, 10)
    last = setting.updates
    assert (setting.temperature(0), setting.temperature(last // 2)) == (0.01, 1.0)
    assert (setting.learning_rate(0), setting.learning_rate(last // 2)) == (study.LEARNING_RATE, study.LEARNING_RATE)
    assert setting.learning_rate(last - 1) == pytest.approx(2 / last * study.LEARNING_RATE)


def test_a_picture_has_the_first_coordinate_to_the_right():
    """The bump of U4's fork parts to the right of 1, downwards."""
    shown = figures.target(targets.ENERGIES[4])
    at = [round((x / targets.WINDOW + 1) / 2 * train.PIXELS) for x in (3.0, -4.0)]
    assert shown[at[0], at[1]] > 0.9  # (3, -4): on the lower branch
    assert shown[at[1], at[0]] < 0.01


# ---- The command ----

KEYS = ("planar-K1", "planar-K2", "nice-K1", "nice-K2")


def hvae(out, *more):
    sizes = ["--flows", "planar", "nice", "--layers", "1", "2", "--energies", "4", "--epochs", "2", "--samples", "5000"]
    return cli.main(["densities", *sizes, "--threads", "1", "--out", str(out), *more])


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(study, "UPDATES", 5)
    monkeypatch.setattr(train, "SAMPLES_AT_A_TIME", 2000)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "densities"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "UPDATES", 5)
        patch.setattr(train, "SAMPLES_AT_A_TIME", 2000)
        assert hvae(out) == 0
    return out


def results(out):
    return json.loads((out / "results.json").read_text())


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_results_and_report(finished, capsys):
    rows = results(finished)["rows"]
    assert [f"{row['method']}-K{row['layers']}" for row in rows] == list(KEYS)
    for row in rows:
        assert (row["epochs"], row["energy"], row["dim"]) == (2, 4, 2)
        assert row["divergence"] > -4 * row["divergence_error"]
        assert 0 < row["samples_shown"] <= 5000
    text = (finished / "report.md").read_text()
    assert check_what_is_seen(hvae, finished, capsys)[0].startswith("flow ")
    assert "| NICE, K = 2 " in text
    assert (finished / "densities.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("stop", ["train_epoch", "divergence"])
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
        assert hvae(tmp_path) == 130
    assert "--resume" in capsys.readouterr().err
    assert hvae(tmp_path, "--resume") == 0
    assert without_times(results(tmp_path)["rows"]) == without_times(results(finished)["rows"])
    ours, other = (torch.load(out / "jobs" / "nice-K2-U4.pt", weights_only=True) for out in (tmp_path, finished))
    assert all(torch.equal(ours["model"][name], other["model"][name]) for name in other["model"])
    assert torch.equal(ours["picture"], other["picture"])


def test_resume_adds_to_a_finished_run_of_the_same_kind(finished, tmp_path, capsys):
    before = results(finished)["rows"]
    assert hvae(finished) == 1
    assert "--resume" in capsys.readouterr().err
    assert hvae(finished, "--resume") == 0
    assert results(finished)["rows"] == before
    assert hvae(finished, "--resume", "--epochs", "3") == 1
    assert "was made with epochs" in capsys.readouterr().err


@pytest.mark.parametrize("change", [lambda row: row.pop("divergence"), lambda row: row.update(method=1)])
def test_rows_of_another_form_are_one_sentence(change, finished, tmp_path, capsys):
    content = results(finished)
    change(content["rows"][0])
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert cli.main(["report", str(tmp_path)]) == 1
    assert f"{tmp_path / 'results.json'} is corrupt or not a file of this run" in capsys.readouterr().err


def test_a_state_file_of_no_job_is_one_sentence(finished, tmp_path, capsys):
    assert hvae(tmp_path, "--flows", "planar", "--layers", "1") == 0
    (tmp_path / "jobs" / "planar-K1-U4.pt").rename(tmp_path / "jobs" / "planar-K1-U9.pt")
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "planar-K1-U9.pt is corrupt or not a file of this run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", ["--epochs=0", "--layers=0", "--seed=-1", "--energies=5", "--flows=iaf", "--samples=1"]
)
def test_wrong_arguments(wrong, tmp_path):
    with pytest.raises(SystemExit):
        hvae(tmp_path, wrong)


def test_a_divergence_that_is_not_finite_leaves_the_table():
    row = {"method": "planar", "layers": 2, "energy": 1, "divergence": None, "divergence_error": None, "seconds": 1.0}
    other = {**row, "energy": 2, "divergence": 0.25, "divergence_error": 0.01}
    assert "0.2500 ± 0.0200" in report.divergences([row, other])
