"""``hvae gaussian`` and ``hvae report`` from end to end, with a few epochs in a temporary directory."""

import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from hvae import cli, experiment, runs
from hvae.gaussian import published, report, train
from hvae.gaussian.study import Job
from seen import check_what_is_seen, terminal

SIZE = ["--datasets", "2", "--epochs", "3", "--workers", "1"]
DIMS = ["--dims", "5", "6"]
STEPS = ["--leapfrog-steps", "1", "2", "--planar-layers", "3"]
COMMAND = ["gaussian", *DIMS, *STEPS, *SIZE]


def hvae(out, *more, steps=STEPS):
    return cli.main(["gaussian", *DIMS, *steps, *SIZE, "--out", str(out), *more])


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "gaussian"
    assert hvae(out) == 0
    return out


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_results(finished):
    results = strict_json(finished / "results.json")
    config, rows = results["config"], results["rows"]
    assert (config["seed"], config["datasets"], config["versions"]["torch"]) == (12345, 2, torch.__version__)
    assert config["arguments"]["dims"] == [5, 6]
    cases = {(row["dim"], row["method"], row["leapfrog_steps"], row["dataset"]) for row in rows}
    flows = [(method, k) for method in ("hvae", "hvae-untempered") for k in (1, 2)]
    others = [("planar", 3), ("iaf", 1), ("vb", 0)]
    assert cases == {(d, *case, r) for d in (5, 6) for case in (*flows, *others) for r in (0, 1)}
    assert len(rows) == len(cases)
    for row in rows:
        assert (row["setting"], row["steps"]) == ("corrected", 120)
        assert row["theta_error"] == pytest.approx(row["delta_error"] + row["sigma_error"])
        assert row["elbo"] <= row["log_evidence"] <= row["elbo_ceiling"]
        assert row["seconds"] > 0


def test_report_and_figures(finished, capsys):
    text = (finished / "report.md").read_text()
    assert check_what_is_seen(hvae, finished, capsys)[0].startswith("method ")
    tables = ("Theta error", "Theta error with and without tempering", "Delta error", "Sigma error")
    for heading in (*(f"Table {i}. {title}" for i, title in enumerate(tables, 1)), "Bounds", "Time"):
        assert f"\n## {heading}\n" in text
    for number in range(1, 9):
        assert f"\n## Figure {number}. " in text
        assert f"(figure{number}.png)" in text
        assert (finished / f"figure{number}.png").read_bytes().startswith(b"\x89PNG")


def test_report_puts_printed_and_both_settings_side_by_side():
    def row(setting, sigma_error):
        return {
            "dim": 25, "method": "hvae", "leapfrog_steps": 1, "setting": setting, "dataset": 0,
            "sigma_error": sigma_error, "sigma_floor": 0.5, "sigma_optimum": 0.25, "sigma_no_flow": None,
        }  # fmt: skip

    table = report.error_table("sigma_error", [row("published", 0.125), row("corrected", 0.75)]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    ours = [f"{name}{column}" for name in ("published", "corrected") for column in ("", " floor", " optimum")]
    assert cells[0] == ["d", "method", "printed", "off", *ours]
    assert cells[2] == ["25", "hvae, K = 1", "0.04", "+212.50 %", "0.125", "0.5", "0.25", "0.75", "0.5", "0.25"]


def test_report_says_where_a_printed_run_turned_nan():
    row = {"dim": 300, "method": "planar", "leapfrog_steps": 1, "setting": "published", "sigma_error": 187.0}
    row |= {"sigma_floor": 0.5, "sigma_optimum": None, "sigma_no_flow": 188.0}
    line = report.error_table("sigma_error", [row]).splitlines()[2]
    assert "222.84 (NaN: 189.6)" in line
    assert "-1.37 %" in line


def test_time_table_adds_up():
    rows = [
        {"job": f"corrected-d{dim}-{method}-K1", "dataset": r, "dim": dim, "seconds": 1.5}
        for dim in (25, 50) for method in ("hvae", "iaf") for r in (0, 1)
    ]  # fmt: skip
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.time_table(rows).splitlines()]
    assert cells[2:] == [
        ["corrected", "hvae, K = 1", "3", "3", "6"],
        ["corrected", "iaf", "3", "3", "6"],
        ["corrected", "all", "6", "6", "12"],
    ]


def test_a_bound_that_overflows_is_left_out():
    job = Job("published", 5, "vb", 0)
    figures = {name: [1.0] for name in ("delta_error", "sigma_error", "theta_error", "log_evidence")}
    state = train.State(
        epochs=1,
        epoch=1,
        flat=torch.zeros(1, 2),
        square_average=torch.zeros(1, 2),
        history=[{"epoch": 1, "elbo": [-math.inf], **figures}],
    )
    state.oracles = {"elbo_ceiling": [2.0]}
    (row,) = report.rows_of(job, state)
    assert (row["elbo"], row["log_evidence"]) == (None, 1.0)
    assert "vb" in report.bound_table([row])


def test_printed_figures():
    assert published.figure("theta_error", "hvae-untempered", 10, 300) == 485.5
    assert published.figure("theta_error", "hvae-untempered", 10, 400) is None
    assert published.figure("theta_error", "hvae", 2, 25) is None
    assert published.figure("delta_error", "vb", 0, 26) is None


def test_results_are_not_overwritten(finished, capsys):
    before = (finished / "results.json").read_bytes()
    assert hvae(finished) == 1
    message = capsys.readouterr().err
    assert "--resume" in message
    assert "--out" in message
    assert (finished / "results.json").read_bytes() == before


def test_resume_after_a_kill(finished, tmp_path, monkeypatch, capsys):
    saves = []
    save = train.State.save

    def killed(self, path):
        if len(saves) == 4:
            raise KeyboardInterrupt
        saves.append(path)
        save(self, path)

    monkeypatch.setattr(experiment, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(train.State, "save", killed)
    assert hvae(tmp_path) == 130
    assert "--resume" in capsys.readouterr().err
    assert len(strict_json(tmp_path / "results.json")["rows"]) == 2
    monkeypatch.undo()
    assert hvae(tmp_path, "--resume") == 0
    expected = strict_json(finished / "results.json")["rows"]
    assert without_times(strict_json(tmp_path / "results.json")["rows"]) == without_times(expected)


def test_several_processes_give_the_same_numbers(finished, tmp_path):
    assert hvae(tmp_path, "--workers", "2", "--dims", "5", "--methods", "iaf", "vb", steps=[]) == 0
    rows = {(row["method"], row["dataset"]): row for row in strict_json(tmp_path / "results.json")["rows"]}
    expected = [row for row in strict_json(finished / "results.json")["rows"] if row["dim"] == 5]
    compared = [row for row in expected if (row["method"], row["dataset"]) in rows]
    assert len(compared) == len(rows) == 4
    assert without_times(rows[row["method"], row["dataset"]] for row in compared) == without_times(compared)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_job_that_fails_does_not_stop_the_others(workers, tmp_path, capsys):
    (tmp_path / "jobs").mkdir()
    run = {"experiment": "gaussian", "seed": 12345, "datasets": 2}
    (tmp_path / "jobs" / runs.RUN).write_text(json.dumps(run))
    other = train.State(epochs=7, flat=torch.zeros(1), square_average=torch.zeros(1))
    other.save(experiment.state_path(tmp_path, Job("corrected", 6, "vb", 0)))
    assert hvae(tmp_path, "--resume", "--methods", "vb", "--workers", workers, steps=[]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.endswith("is a run of 7 epochs, not 3")
    assert [row["dim"] for row in strict_json(tmp_path / "results.json")["rows"]] == [5, 5]


def test_a_directory_without_states_keeps_its_rows_and_figures(finished, tmp_path):
    """As the committed report's: its states stay at home."""
    out = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(out / "jobs")
    before = (out / "report.md").read_text(), (out / "figure4.png").read_bytes()
    assert cli.main(["report", str(out)]) == 0
    assert ((out / "report.md").read_text(), (out / "figure4.png").read_bytes()) == before
    assert cli.main(["gaussian", "--dims", "7", "--methods", "vb", *SIZE, "--out", str(out), "--resume"]) == 0
    rows = strict_json(out / "results.json")["rows"]
    assert rows[:-2] == strict_json(finished / "results.json")["rows"]
    assert [row["dim"] for row in rows[-2:]] == [7, 7]


def test_other_errors_name_their_job_and_leave_a_report(tmp_path, monkeypatch, capsys):
    def broken(self, *_):
        raise ZeroDivisionError("no")

    monkeypatch.setattr(Job, "data_sets", broken)
    assert cli.main(["gaussian", "--dims", "5", "--methods", "vb", *SIZE, "--out", str(tmp_path)]) == 1
    assert "hvae: corrected-d5-vb-K0: ZeroDivisionError: no" in capsys.readouterr().err
    assert (tmp_path / "report.md").exists()


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_the_command(kind, tmp_path):
    """Killed, or interrupted with its whole group as by Ctrl-C: no process goes on training."""
    command = ["gaussian", "--dims", "5", "6", "--methods", "vb", "--epochs", "1000000", "--workers", "2"]
    code = f"import sys; from hvae import cli; sys.exit(cli.main({[*command, '--out', str(tmp_path)]!r}))"
    options = {"start_new_session": True}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # which background jobs ignore
    ours, stderr = terminal()
    os.set_blocking(ours, False)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=stderr, **options)
    os.close(stderr)
    said = bytearray()

    def says(pattern):
        with contextlib.suppress(BlockingIOError):
            said.extend(os.read(ours, 1 << 16))
        return re.search(pattern, said.decode(errors="replace"))

    try:
        for dim in (5, 6):  # both train: a bar shows the bound of an epoch
            wait_for(lambda dim=dim: says(rf"d{dim}-vb-K0: .*bound="))
        assert len(group_of(process.pid)) >= 3
        os.killpg(process.pid, kind) if kind == signal.SIGINT else process.kill()
        process.wait(120)
        wait_for(lambda: not group_of(process.pid))
    finally:
        os.close(ours)
        for pid in group_of(process.pid):
            os.kill(pid, signal.SIGKILL)


def group_of(leader):
    """The living processes of a session."""
    listed = subprocess.run(["ps", "-o", "pid=,stat=", "-s", str(leader)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "Z" not in line.split()[1]]


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_both_settings_in_one_command(tmp_path):
    both = ["--setting", "published", "corrected", "--dims", "5", "--methods", "iaf"]
    assert hvae(tmp_path, *both, steps=[]) == 0
    rows = strict_json(tmp_path / "results.json")["rows"]
    assert [row["setting"] for row in rows] == ["corrected"] * 2 + ["published"] * 2
    assert rows[0]["delta_floor"] != rows[2]["delta_floor"]


def test_resume_adds_to_a_finished_run(tmp_path, capsys):
    one = ["gaussian", "--dims", "5", "--methods", "vb", *SIZE, "--out", str(tmp_path)]
    assert cli.main([*one, "--resume"]) == 0
    assert cli.main([*one, "--resume", "--setting", "published"]) == 0
    assert {row["setting"] for row in strict_json(tmp_path / "results.json")["rows"]} == {"corrected", "published"}
    capsys.readouterr()
    for changed, name in ((["--seed", "1"], "seed"), (["--datasets", "3"], "datasets"), (["--epochs", "4"], "epochs")):
        assert cli.main([*one, "--resume", *changed]) == 1
        assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [["--dims", "1"], ["--epochs", "0"], ["--leapfrog-steps", "0"], ["--planar-layers", "0"], ["--methods", "x"]],
)
def test_wrong_arguments(wrong, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["gaussian", "--out", str(tmp_path), *wrong])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "vb", "--leapfrog-steps", "3"], "--leapfrog-steps: only --methods hvae hvae-untempered uha"),
        (["--methods", "vb", "--planar-layers", "3"], "--planar-layers: only --methods planar has any"),
    ],
)
def test_options_that_no_method_has(options, said, tmp_path, capsys):
    assert hvae(tmp_path, *options, steps=[]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_a_seed_out_of_range(seed, tmp_path, capsys):
    with pytest.raises(SystemExit):
        hvae(tmp_path, "--seed", str(seed))
    assert "argument --seed" in capsys.readouterr().err
    args = cli.parser().parse_args(["gaussian", "--seed", str(2**32 - 1)])
    assert args.seed == 2**32 - 1


def test_out_is_a_file(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("kept")
    for out, said in ((file, "choose another --out"), (file / "below", "Not a directory")):
        assert hvae(out) == 1
        message = capsys.readouterr().err
        assert str(file) in message
        assert said in message
        assert message.count("\n") == 1
    assert file.read_text() == "kept"


def foreign_state(path):
    torch.save({"model": torch.zeros(2)}, path)


CORRUPTIONS = [
    ("results.json", lambda path: path.write_text('{"config": {')),
    ("results.json", lambda path: path.write_bytes(b"\xff\xfe")),
    ("results.json", lambda path: path.write_text("[]")),
    ("results.json", lambda path: path.write_text('{"config": {}, "rows": []}')),
    ("results.json", lambda path: path.write_text('{"config": [], "rows": []}')),
    ("jobs/corrected-d5-vb-K0.pt", lambda path: path.write_bytes(b"")),
    ("jobs/corrected-d5-vb-K0.pt", lambda path: path.write_bytes(path.read_bytes()[:500])),
    ("jobs/corrected-d5-vb-K0.pt", lambda path: path.write_text("hello")),
    ("jobs/corrected-d5-vb-K0.pt", foreign_state),
    ("jobs/model.pt", foreign_state),
    ("jobs/corrected-d5-other-K0.pt", lambda path: shutil.copy(path.with_name("corrected-d5-vb-K0.pt"), path)),
]


@pytest.mark.parametrize(("name", "corrupt"), CORRUPTIONS)
def test_a_corrupt_file_is_named_and_can_be_deleted(name, corrupt, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    corrupt(out / name)
    for command in ([*COMMAND, "--out", str(out), "--resume"], ["report", str(out)]):
        assert cli.main(command) == 1
        message = capsys.readouterr().err
        assert str(out / name) in message
        assert "delete it and run the command with --resume" in message
    (out / name).unlink()
    assert hvae(out, "--resume") == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.pop("leapfrog_steps"),
        lambda row: row.update(job="other-d7-vb-K0"),
        lambda row: row.update(method=["vb"]),
        lambda row: row.update(dim="25"),
        lambda row: row.update(seconds=None),
        lambda row: row.update(elbo="far"),
        lambda row: row.update(versions=["2.13"]),  # the config's
    ],
)
def test_rows_of_another_form_are_one_sentence(change, finished, tmp_path, capsys):
    results = strict_json(finished / "results.json")
    change(results["rows"][0])
    results["config"]["versions"] = results["rows"][0].get("versions", results["config"]["versions"])
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert cli.main(["report", str(tmp_path)]) == 1
    assert f"{tmp_path / 'results.json'} is corrupt or not a file of this run" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_not_called_corrupt(finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    path = out / "jobs" / "corrected-d7-vb-K0.pt"
    path.mkdir()
    assert cli.main(["report", str(out)]) == 1
    message = capsys.readouterr().err
    assert str(path) in message
    assert "delete" not in message


def test_report_of_nothing(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "results.json" in capsys.readouterr().err


def test_report_of_another_experiment(tmp_path, capsys):
    runs.write_results(tmp_path, {"experiment": "chess", "seed": 0, "versions": {}}, [])
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "chess" in capsys.readouterr().err


def test_a_missing_extra_is_one_sentence(monkeypatch, capsys, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tqdm" else find_spec(name))
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "pip install 'hvae-kernels[study]'" in capsys.readouterr().err


@pytest.mark.parametrize("study", cli.STUDIES)
def test_help_names_defaults_where_there_are_any(study, capsys):
    with pytest.raises(SystemExit):
        cli.main([study, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 12345)" in text
    assert not re.search(r"default: (None|False|\[)", text)


def test_help_and_import_need_no_extra():
    code = "import sys; sys.modules.update(dict.fromkeys(('matplotlib', 'numpy', 'tabulate', 'tqdm'))); import hvae.cli"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
