"""The committed reports: what ``hvae report`` writes from their results, also where no state file is, as in a clone."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from hvae import cli
from hvae.mnist import command as mnist

DOCS = Path(__file__).resolve().parents[1] / "docs"
REPORTS = sorted(path.parent.name for path in DOCS.glob("*/results.json"))


def test_there_are_reports():
    assert {"gaussian", "mnist", "draw", "sentences", "chairs", "priors", "densities"} <= {*REPORTS}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_is_that_of_its_results(name, tmp_path):
    out = shutil.copytree(DOCS / name, tmp_path / name, ignore=shutil.ignore_patterns("jobs"))
    assert cli.main(["report", str(out), "--quiet"]) == 0
    assert (out / "report.md").read_text() == (DOCS / name / "report.md").read_text()


@pytest.mark.parametrize("name", REPORTS)
def test_pictures_are_there_and_shown(name):
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", (DOCS / name / "report.md").read_text())
    assert shown
    assert sorted(shown) == sorted(path.name for path in (DOCS / name).glob("*.png"))


@pytest.mark.parametrize("name", REPORTS)
def test_rows_name_their_jobs(name):
    results = json.loads((DOCS / name / "results.json").read_text())
    study = cli.STUDIES[results["config"]["experiment"]]
    for row in results["rows"]:
        assert study.job(row["job"], results["config"]).key == row["job"]


def test_without_a_report_pictures_are_shown_all_the_same(tmp_path):
    out = shutil.copytree(DOCS / "draw", tmp_path / "draw", ignore=shutil.ignore_patterns("jobs", "report.md"))
    assert cli.main(["report", str(out), "--quiet"]) == 0
    assert set(re.findall(r"\(([^)]+\.png)\)", (out / "report.md").read_text())) == {p.name for p in out.glob("*.png")}


def test_results_from_before_rows_named_their_jobs_are_written_anew(tmp_path, capsys):
    out, command = tmp_path / "run", ["priors", "--priors", "normal", "--epochs", "1"]
    assert cli.main([*command, "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    for row in results["rows"]:
        del row["job"]
    (out / "results.json").write_text(json.dumps(results))
    assert cli.main([*command, "--out", str(out), "--resume"]) == 0
    assert [row["job"] for row in json.loads((out / "results.json").read_text())["rows"]] == ["normal-0"]
    (out / "results.json").write_text(json.dumps(results))
    (out / "jobs" / "normal-0.pt").unlink()
    assert cli.main([*command, "--out", str(out), "--resume"]) == 1
    assert "state files are not here" in capsys.readouterr().err
    assert json.loads((out / "results.json").read_text()) == results


def documented():
    """The ``hvae`` commands of the documents, with their variables filled in."""
    for path in (*sorted(DOCS.rglob("*.md")), DOCS.parent / "README.md"):
        text = path.read_text()
        for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            setting = re.search(r'SETTING="(.*?)"', block, re.DOTALL)
            block = block.replace("$SETTING", setting[1] if setting else "").replace("\\\n", " ").replace("$k", "8")
            for line in re.findall(r"(?:^|do )(hvae .*?)(?:;|$)", block, re.MULTILINE):
                yield shlex.split(line, comments=True)[1:]
        yield from (shlex.split(x)[1:] for x in re.findall(r"`(hvae [^`]+)`", text) if re.search(r" -", x))


@pytest.mark.parametrize("arguments", list(documented()), ids=" ".join)
def test_documented_commands_are_understood(arguments):
    args = cli.parser().parse_args(arguments)
    if args.command == "mnist":
        mnist._plan(args)
