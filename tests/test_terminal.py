"""What people see: plain tables of at most 100 columns, bars that keep their places, colours on a terminal alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hvae import chairs, cli, terminal
from seen import check_table, pictures, written_in_terminal

DOCS = Path(__file__).parents[1] / "docs"
#: Studies with results among the documents.
REPORTS = ["gaussian", "mnist", "priors", "draw", "densities", "sentences", "chairs"]
GAUSSIAN = ["gaussian", "--dims", "5", "--methods", "vb", "hvae", "--datasets", "1"]
BOLD = "\033[1m"


def results(study):
    content = json.loads((DOCS / study / "results.json").read_text())
    return content["config"], content["rows"]


def widened(value):
    """All that is measured, at its widest."""
    if isinstance(value, dict):
        return {name: widened(item) for name, item in value.items()}
    return -1.2345e-05 if isinstance(value, float) else value


def chair(method):
    view = {name: [0.5, 0.5] for name in ("model", "nearest", "mirrored")}
    return {"method": method, "bound": 0.5, "divergence": 0.5, "seen": [0.5, 0.5], "views": [view], "seconds": 0.5}


@pytest.mark.parametrize("change", [dict, widened])
@pytest.mark.parametrize("study", REPORTS)
def test_tables_fit(study, change):
    config, rows = results(study)
    headers, lines = cli.STUDIES[study].summary(config, [change(row) for row in rows])
    assert lines
    check_table(terminal.table(headers, lines))


def test_other_tables_fit():
    headers, lines = chairs.STUDY.summary({}, [widened(chair(method)) for method in ("gaussian", "embedding")])
    check_table(terminal.table(headers, lines))
    row = {"train_error": -1e-5, "validation_error": -1e-5, "seconds": 1e-5}
    rows = [{**row, "job": job} for job in ("convolutional", "reader-T4", "reader-T8")]
    headers, lines = cli.STUDIES["draw"].summary({"task": "classify"}, rows)
    check_table(terminal.table(headers, lines))
    config, rows = results("mnist")
    rows = [{**rows[0], "job": "helmholtz-K0-S1-U" + "x".join(["200"] * 40)}]
    headers, lines = cli.STUDIES["mnist"].summary(config, rows)
    check_table(terminal.table(headers, lines))


def test_headers_then_labels_are_broken():
    headers = ["a label", "one", "two words"]
    lines = [["short, still", 0.5, None], ["long, " * 15 + "label", 1.5e9, None], ["x", None, 1]]
    text = terminal.table(headers, lines)
    check_table(text)
    top, under, rule, first, *others, last = text.splitlines()
    assert (top.split(), under.split()) == (["a", "label", "one", "two"], ["words"])
    assert re.fullmatch(r"-+  -+  -+", rule)
    assert first.split() == ["short,", "still", "0.5", "-"]
    assert [line.split()[-2:] for line in others if "1.5e+09" in line] == [["1.5e+09", "-"]]
    assert all(line.split("  ")[0].rstrip().endswith((",", "label")) for line in others)
    assert last.split() == ["x", "-", "1"]
    known = terminal.table(headers, [[*line[:2], None] for line in lines[:1]])
    assert known.splitlines()[0].split() == ["a", "label", "one"]


def test_nothing_is_finished(tmp_path, capsys):
    config, _ = results("densities")
    (tmp_path / "results.json").write_text(json.dumps({"config": config, "rows": []}))
    assert cli.main(["report", str(tmp_path), "--quiet"]) == 0
    assert capsys.readouterr() == ("No job is finished.\n", "")


@pytest.mark.parametrize("study", cli.STUDIES)
def test_all_commands_can_be_quiet(study):
    assert cli.parser().parse_args([study, "--quiet"]).quiet
    assert not cli.parser().parse_args([study]).quiet


def test_quiet_writes_the_table_alone(tmp_path, capsys):
    ran = [], ["--quiet"]
    for number, quiet in enumerate(ran):
        out = tmp_path / str(number)
        assert cli.main([*GAUSSIAN, "--epochs", "2", "--workers", "2", "--out", str(out), *quiet]) == 0
        captured = capsys.readouterr()
        check_table(captured.out.split("\nReport: ")[0])
        assert ("Report" in captured.out) is not bool(quiet)
        lines = captured.err.splitlines()
        if quiet:
            assert not lines
        else:  # no terminal: a line for each job
            assert lines[0] == f"hvae gaussian: 3 jobs, 0 finished before; results go to {out}"
            keys = ["corrected-d5-hvae-K1", "corrected-d5-hvae-K10", "corrected-d5-vb-K0"]
            assert sorted(re.sub(r": \d+\.\d s$", "", line) for line in lines[1:]) == keys
    assert "quiet" not in json.loads((tmp_path / "1" / "results.json").read_text())["config"]["arguments"]


def test_errors_are_not_kept_quiet(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path), "--quiet"]) == 1
    assert capsys.readouterr() == ("", f"hvae: no results.json in {tmp_path}\n")


def test_colours_on_a_terminal_alone(tmp_path):
    out = shutil.copytree(DOCS / "priors", tmp_path / "priors")
    command = [sys.executable, "-m", "hvae", "report", str(out)]
    in_colour = written_in_terminal(command)
    assert in_colour.startswith(f"{BOLD}prior ")
    plain = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "TERM": "xterm"})
    assert plain.stderr == ""
    assert BOLD not in plain.stdout
    assert in_colour.replace("\r\n", "\n").replace(BOLD, "").replace("\033[0m", "") == plain.stdout
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\033" not in written_in_terminal(command, **environment)


@pytest.mark.parametrize("workers", [1, 2])
def test_bars_keep_their_places(workers, tmp_path):
    """At all times: the line, the bar of all jobs, below it one of each at work; in the end the table below both."""
    sizes = ["--epochs", "150", "--workers", str(workers), "--out", "run"]
    written = written_in_terminal([sys.executable, "-m", "hvae", *GAUSSIAN, *sizes], tmp_path)
    shown = list(pictures(written))
    first = "hvae gaussian: 3 jobs, 0 finished before; results go to run"
    for lines in shown:
        assert first.startswith(lines[0])
        if len(lines) > 1 and "100%" not in lines[1]:
            assert re.fullmatch(r"(jobs: +\d+%\|[^|]*\| [0-2]/3 \[[^]]*job[^]]*\])?", lines[1])
            bar = r"(corrected-d5-\w+-K\d+: +\d+%\|[^|]*\| \d+/150 \[[^]]*epoch[^]]*\])?"
            assert all(re.fullmatch(bar, line) for line in lines[2:])
            assert len(set(filter(None, lines[2:]))) == len(list(filter(None, lines[2:]))) <= workers
    assert any("epoch" in line for lines in shown for line in lines[2:])
    line, jobs, empty, header, *table = shown[-1]
    assert (line, empty) == (first, "")
    assert re.match(r"jobs: 100%\|.*\| 3/3 \[", jobs)
    assert header.split()[:3] == ["method", "Delta", "error"]
    assert [line.split("  ")[0] for line in table[1:4]] == ["hvae, K = 1", "hvae, K = 10", "vb"]
    assert torch.load(tmp_path / "run" / "jobs" / "corrected-d5-vb-K0.pt", weights_only=True)["epoch"] == 150


def test_what_is_said_stands_above_the_bars():
    code = """\
import time
from hvae.terminal import Screen
screen = Screen()
with screen.jobs("three jobs", 3, {"first"}):
    screen.step("second", 1, 4, figures={"bound": "-1.5"})
    screen.step("third", 2, 4, place=1)
    screen.say("something failed")
    for thing in screen.each("drawing", "chair", range(3)):
        pass
    for done in (3, 4):
        time.sleep(0.7)
        screen.step("third", done, 4, place=1)
    time.sleep(0.7)
    screen.ended("second", 1.0)
    screen.ended("first", None)
"""
    *_, last = shown = list(pictures(written_in_terminal([sys.executable, "-c", code])))
    names = [[line.split(":")[0].strip() for line in lines] for lines in shown]
    assert ["three jobs", "jobs", "second", "third"] in names
    assert ["three jobs", "something failed", "jobs", "second", "third"] in names
    assert ["three jobs", "something failed", "jobs", "drawing", "third"] in names
    assert any("something failed" in lines[1] and "jobs:" in lines[2] for lines in shown if len(lines) > 2)
    assert [line[:16] for line in last[:2]] == ["three jobs", "something failed"]
    assert re.match(r"jobs: +67%.* 2/3 ", last[2])
    assert not any("job/s" in line for lines in shown for line in lines if "2/3" in line)  # one in two seconds
    assert not any(last[3:])


@pytest.mark.parametrize(
    "command", [["-m", "hvae_kernels"], ["-m", "hvae", "report", "{densities}"]], ids=["hvae_kernels", "hvae"]
)
def test_a_reader_who_has_enough_is_no_error(command, tmp_path):
    """As ``head`` is: it closes the pipe before all is written."""
    shutil.copytree(DOCS / "densities", tmp_path / "densities")
    command = [part.format(densities=tmp_path / "densities") for part in command]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, *command], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 141
    assert "pipe" not in done.stderr.lower()
