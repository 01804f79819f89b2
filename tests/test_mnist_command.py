"""``hvae mnist`` from end to end on a few digits: results, report, resumption to the same bits, faults named."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hvae import cli, experiment
from hvae.data import mnist
from hvae.mnist import study, train
from hvae.mnist.models import Model
from hvae.mnist.study import Job, Setting
from seen import check_what_is_seen

from hvae_kernels import testing

SMALL = ["--train-size", "40", "--validation-size", "24", "--batch-size", "16", "--epochs", "2", "--network", "mlp"]
COMMAND = ["mnist", *SMALL, "--likelihood-samples", "7"]
#: Options that only these models have.
SHORT = {"--leapfrog-steps": ("2", study.LEAPFROG_STEPS), "--importance-samples": ("3", study.IMPORTANCE_WEIGHTED)}
KEYS = ["vae-K0-S1", "iwae-K0-S3", "hvae-K2-S1", "vae-iaf-K0-S1", "hvae-iaf-K2-S1"]


def hvae(out, *more):
    short = [
        x
        for name, (value, models) in SHORT.items()
        if {*models} & {*more} or "--model" not in more
        for x in (name, value)
    ]
    return cli.main([*COMMAND, *short, "--out", str(out), *more])


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with testing.threads(1):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mnist"
    assert hvae(out) == 0
    return out


def test_help_has_groups_and_lists_models_once(capsys):
    with pytest.raises(SystemExit):
        cli.main(["mnist", "--help"])
    text = capsys.readouterr().out
    places = [text.index(f"\n{group}:\n") for group in ("models", "data", "training", "evaluation", "running")]
    assert places == sorted(places)
    assert text.count("dlgm-planar") == 1
    assert "grows to 1 (default: 0)" in " ".join(text.split())


def test_results(finished):
    results = strict_json(finished / "results.json")
    config, rows = results["config"], results["rows"]
    assert (config["experiment"], config["seed"], config["n_train"], config["data"]) == ("mnist", 12345, 40, "sample")
    assert [row["method"] for row in rows] == list(study.MODELS)
    for row in rows:
        assert (row["epochs"], row["steps"], row["likelihood_images"], row["likelihood_samples"]) == (2, 6, 24, 7)
        assert row["leapfrog_steps"] == (2 if row["method"].startswith("hvae") else 0)
        assert -784 < row["elbo"] <= row["validation_bound"] < 0
        assert row["elbo"] < row["log_likelihood"] < 0
        assert row["seconds"] > 0


@pytest.mark.parametrize("change", [lambda row: row.pop("elbo"), lambda row: row.update(epochs=0)])
def test_rows_of_another_form_are_one_sentence(change, finished, tmp_path, capsys):
    results = strict_json(finished / "results.json")
    change(results["rows"][0])
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert cli.main(["report", str(tmp_path)]) == 1
    assert f"{tmp_path / 'results.json'} is corrupt or not a file of this run" in capsys.readouterr().err


def test_report_and_figures(finished, capsys):
    text = (finished / "report.md").read_text()
    assert check_what_is_seen(hvae, finished, capsys)[0].startswith("model ")
    names = ["curves", *(f"samples-{key}" for key in KEYS), *(f"reconstructions-{key}" for key in KEYS)]
    for name in [*names, "trajectories-hvae-K2-S1", "trajectories-hvae-iaf-K2-S1"]:
        assert f"({name}.png)" in text
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    lines = {line[0]: dict(zip(table[0], line, strict=True)) for line in table[2:]}
    assert "validation" in lines["hvae, K = 2"]
    assert not [name for name in lines["hvae, K = 2"] if name.startswith("printed")]  # which are of another network


def test_printed_figures_are_of_the_reports_network():
    assert study.Job("iwae", 0, 40).published("conv") == (-77.57, -76.8, None)
    assert study.Job("iwae", 0, 5).published("conv") == (None, None, None)
    assert study.Job("hvae", 15, 1).published("conv-plain") == (-75.0, -84.0, None)
    assert study.Job("hvae", 3, 1).published("conv") == (None, None, None)
    assert study.Job("hvae", 15, 1, components=9).published("conv") == (None, None, None)
    assert study.Job("structured", 0, 1, gate_epochs=1).published("conv") == (None, -79.4, -73.7)
    assert study.Job("iwae", 0, 40).published("mlp") == (None, None, None)


def test_more_models_and_priors(tmp_path):
    """Beside the study's own; and their pictures."""
    assert hvae(tmp_path, "--model", *study.STRUCTURED, *study.SURROGATES, "--gate-epochs", "1") == 0
    assert hvae(tmp_path, "--model", "vae", "hvae", "--prior", "vamp", "--components", "9", "--resume") == 0
    rows = strict_json(tmp_path / "results.json")["rows"]
    assert [row["method"] for row in rows] == ["vae", "hvae", *study.STRUCTURED, *study.SURROGATES]
    assert [row["components"] for row in rows] == [9, 9, 0, 0, 0, 0, 0]
    assert [row["gate_epochs"] for row in rows] == [0, 0, 1, 1, 0, 0, 0]
    assert [row["importance_samples"] for row in rows] == [1, 1, 1, 1, 1, 3, 3]
    for row in rows:
        assert -784 < row["elbo"] < row["log_likelihood"] < 0
    text = (tmp_path / "report.md").read_text()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    lines = {line[0]: dict(zip(table[0], line, strict=True)) for line in table[2:]}
    assert {"hvae, K = 2, VampPrior of 9", "structured, gates learned for 1 epochs"} <= lines.keys()
    assert {row["method"]: row["dim"] for row in rows}["structured"] == 80
    for name in ("graph-structured-K0-S1-G1", "graph-structured-iaf-K0-S1-G1", "pseudo-inputs-vae-K0-S1-C9"):
        assert f"({name}.png)" in text
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--model", "structured", "--prior", "vamp", "--components", "9"], "--prior vamp: structured takes none"),
        (["--prior", "vamp"], "--components 500 is more than --train-size"),
        (["--model", "structured", "--gate-epochs", "3"], "--gate-epochs 3 is more than --epochs"),
        (["--model", "vae", "--gate-epochs", "1"], "--gate-epochs: only --model structured structured-iaf has gates"),
        (["--components", "9"], "--components: only --prior vamp has any"),
    ],
)
def test_priors_and_gates_that_cannot_be_are_refused(wrong, said, tmp_path, capsys):
    assert hvae(tmp_path, *wrong) == 1
    assert said in capsys.readouterr().err


def test_pictures_are_of_the_digits(finished):
    state = train.State.load(experiment.state_path(finished, Job("hvae", 2, 1)))
    originals, reconstructions = state.pictures["reconstructions"]
    assert torch.equal(originals, mnist.load().validation[:16])
    assert 0 < reconstructions.float().mean() < 255
    assert state.pictures["trajectories"].shape == (8, 3, 784)
    assert state.pictures["samples"].shape == (8, 8, 784)


class Killed(Exception):
    pass


@pytest.mark.parametrize("saves", [1, 3], ids=["training", "log-likelihoods"])
def test_a_killed_run_goes_on_to_the_same_bits(saves, finished, tmp_path, monkeypatch):
    save, saved = train.State.save, []

    def killed(self, path):
        if len(saved) == saves:
            raise Killed
        saved.append(path)
        save(self, path)

    for job in study.plan(list(study.MODELS), 2, 3):
        saved.clear()
        monkeypatch.setattr(experiment, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        monkeypatch.setattr(train.State, "save", killed)
        with pytest.raises(Killed):
            hvae(tmp_path, "--model", job.model, "--resume")
        monkeypatch.undo()
        state = train.State.load(experiment.state_path(tmp_path, job))
        assert (state.epoch, len(state.log_likelihoods)) == {1: (1, 0), 3: (2, 20)}[saves]
    assert strict_json(tmp_path / "results.json")["rows"] == []
    assert hvae(tmp_path, "--resume") == 0
    for job in study.plan(list(study.MODELS), 2, 3):
        whole, resumed = (train.State.load(experiment.state_path(out, job)) for out in (finished, tmp_path))
        assert resumed.history == whole.history
        assert torch.equal(resumed.log_likelihoods, whole.log_likelihoods)
        assert all(torch.equal(resumed.model[name], value) for name, value in whole.model.items())
        assert all(torch.equal(resumed.pictures[name], value) for name, value in whole.pictures.items())
    assert without_times(strict_json(tmp_path / "results.json")["rows"]) == without_times(
        strict_json(finished / "results.json")["rows"]
    )


@pytest.mark.parametrize(
    "model",
    [
        ["hvae", "--leapfrog-steps", "1"],
        ["vae", "--prior", "vamp", "--components", "3"],
        ["structured-iaf", "--gate-epochs", "1"],
        ["structured", "--gate-epochs", "2"],
    ],
    ids=lambda model: model[0],
)
def test_batch_norms_and_gates_are_resumed(model, tmp_path, monkeypatch):
    command = ["mnist", "--train-size", "8", "--validation-size", "4", "--batch-size", "4", "--epochs", "2"]
    command += ["--model", *model, "--likelihood-images", "0", "--out"]
    assert cli.main([*command, str(tmp_path / "whole")]) == 0
    epoch = train.Trainer.train_epoch

    def killed(self, pixels):
        if self.state.epoch == 1:
            raise KeyboardInterrupt
        return epoch(self, pixels)

    monkeypatch.setattr(experiment, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(train.Trainer, "train_epoch", killed)
    assert cli.main([*command, str(tmp_path / "killed")]) == 130
    monkeypatch.undo()
    assert cli.main([*command, str(tmp_path / "killed"), "--resume"]) == 0
    rows = [strict_json(tmp_path / name / "results.json")["rows"] for name in ("whole", "killed")]
    assert without_times(rows[0]) == without_times(rows[1])
    assert rows[0][0]["log_likelihood"] is None
    whole, resumed = (torch.load(next((tmp_path / name / "jobs").glob("*.pt"))) for name in ("whole", "killed"))
    for part in ("model", "pictures"):
        assert all(torch.equal(resumed[part][name], value) for name, value in whole[part].items())


def test_leapfrog_options_arrive_in_the_model(tmp_path, monkeypatch):
    given = []

    def spy(*arguments, memory, compile, **options):
        given.append((memory, compile))
        return Model(*arguments, memory=memory, **options)

    monkeypatch.setattr(study, "Model", spy)
    for name, options in (("one", []), ("two", ["--memory", "store", "--compile"])):
        assert hvae(tmp_path / name, "--model", "hvae", "--epochs", "1", "--likelihood-images", "0", *options) == 0
    assert given == [("reversible", False), ("store", True)]


def test_a_checkpoint_of_other_networks_is_named(tmp_path, capsys):
    path = tmp_path / "jobs" / "vae-K0-S1.pt"
    path.parent.mkdir()
    train.State(epoch=1, model={"encoder.weight": torch.zeros(2)}).save(path)
    assert hvae(tmp_path, "--model", "vae", "--resume") == 1
    assert str(path) in capsys.readouterr().err


def test_a_nan_stops_the_run_and_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "LEARNING_RATE", 1e20)
    assert hvae(tmp_path, "--model", "vae") == 1
    assert "vae-K0-S1: epoch 1, step 1: the gradient of encoder.layers" in capsys.readouterr().err


def test_the_same_start_and_order_for_every_model():
    setting = Setting(3, "sample", 40, 8, "round", "conv", 16, 1, 0, 1)
    models = [job.build(setting, torch.zeros(0, 784)) for job in study.plan(list(study.MODELS), None, 40)]
    for model in models[1:]:
        for network in ("encoder", "decoder"):
            pairs = zip(getattr(model, network).parameters(), getattr(models[0], network).parameters(), strict=True)
            assert all(torch.equal(*pair) for pair in pairs)
    assert [model.noise_features for model in models] == [64, 64, 128, 64, 128]


def test_binarisation_and_order():
    intensities = torch.randint(0, 256, (40, 784), dtype=torch.uint8)

    def epochs(binarisation):
        setting = Setting(3, "folder", 40, 8, binarisation, "mlp", 16, 1, 0, 1)
        validation = [setting.validation_pixels(intensities) for _ in range(2)]
        assert torch.equal(*validation)
        return [setting.training_pixels(intensities, epoch) for epoch in (0, 0, 1)]

    def in_any_order(pixels):
        return sorted(map(tuple, pixels.tolist()))

    for binarisation in mnist.BINARISATIONS:
        first, again, second = epochs(binarisation)
        assert torch.equal(first, again)
        assert not torch.equal(first, second)
        assert (in_any_order(first) == in_any_order(second)) == (binarisation != "dynamic")
    assert in_any_order(epochs("round")[0]) == in_any_order(mnist.binarise(intensities))


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert hvae(tmp_path, "--model", "vae", "--tensorboard") == 0
    events = EventAccumulator(str(tmp_path / "tensorboard" / "vae-K0-S1")).Reload()
    history = train.State.load(experiment.state_path(tmp_path, Job("vae", 0, 1))).history
    for name in ("train", "validation", "elbo"):
        points = [(scalar.step, scalar.value) for scalar in events.Scalars(f"bound/{name}")]
        assert points == [(record["epoch"], pytest.approx(record[name])) for record in history]


def test_tensorboard_is_not_needed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert hvae(tmp_path, "--model", "vae", "--tensorboard") == 1
    assert "pip install tensorboard" in capsys.readouterr().err


REFUSED = [
    (["--likelihood-images", "25"], "more than --validation-size"),
    (["--binarisation", "dynamic"], "needs --data DIR"),
    (["--data", "nowhere"], "nowhere has no train-images"),
    (["--train-size", "10001"], "sample has 10000 digits, not 10001"),
]


@pytest.mark.parametrize(("wrong", "said"), REFUSED)
def test_what_the_data_do_not_hold_is_refused(wrong, said, tmp_path, capsys):
    assert hvae(tmp_path / "out", *wrong) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed", [["--seed", "1"], ["--batch-size", "8"], ["--epochs", "3"], ["--network", "conv"]])
def test_resume_refuses_another_setting(changed, finished, capsys):
    before = (finished / "results.json").read_bytes()
    assert hvae(finished, "--resume", *changed) == 1
    assert changed[0].strip("-").replace("-", "_") in capsys.readouterr().err
    assert hvae(finished) == 1
    assert "--resume" in capsys.readouterr().err
    assert (finished / "results.json").read_bytes() == before


@pytest.mark.parametrize("wrong", [["--epochs", "0"], ["--leapfrog-steps", "-1"], ["--model", "x"], ["--device", "x"]])
def test_wrong_arguments(wrong, tmp_path):
    with pytest.raises(SystemExit):
        hvae(tmp_path, *wrong)


@pytest.mark.parametrize(
    "name", ["vae-K0-S1", "model", "chess-K0-S1", "vae-K00-S1", "structured-K0-S1", "vae-K0-S1-G3", "vae-stl-K0-S1-C3"]
)
def test_a_foreign_state_file_is_named(name, tmp_path, capsys):
    (tmp_path / "jobs").mkdir()
    torch.save({"model": torch.zeros(2)}, tmp_path / "jobs" / f"{name}.pt")
    assert hvae(tmp_path, "--model", "vae", "--resume") == 1
    assert str(tmp_path / "jobs" / f"{name}.pt") in capsys.readouterr().err


IN_FLOAT64 = """
import sys, torch
torch.set_default_dtype(torch.float64)
from hvae.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_two_processes_give_the_numbers_of_one(tmp_path):
    """Batch norm over both, gradients averaged, log-likelihoods joined; the last batch cannot be halved."""
    script = tmp_path / "script.py"
    script.write_text(IN_FLOAT64)  # Adam makes steps of float32's rounding of gradients that are zero
    command = ["mnist", "--train-size", "13", "--validation-size", "5", "--batch-size", "8", "--epochs", "2"]
    command += ["--model", "iwae", "hvae", "structured-iaf", "--leapfrog-steps", "2", "--importance-samples", "3"]
    command += ["--likelihood-samples", "120", "--threads", "1"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, prefix in (("one", []), ("two", launcher)):
        arguments = [sys.executable, *prefix, str(script), *command, "--out", str(tmp_path / name)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
    for key in ("iwae-K0-S3", "hvae-K2-S1", "structured-iaf-K0-S1-G1"):
        one, two = (torch.load(tmp_path / name / "jobs" / f"{key}.pt") for name in ("one", "two"))
        for state in (one, two):  # batch norms take these biases away again: Adam makes steps of gradients' rounding
            for name in ("encoder.layers.8.bias", "encoder.layers.9.running_mean", "encoder.layers.14.bias"):
                del state["model"][name]
        for name in ("model", "history", "log_likelihoods"):
            torch.testing.assert_close(two[name], one[name], rtol=1e-9, atol=1e-9)
    assert len(one["log_likelihoods"]) == 5
