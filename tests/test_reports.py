"""The committed reports: what ``hvae report`` writes from their results, also where no state file is, as in a clone."""

import json
import re
import shutil
from pathlib import Path

import pytest
from hvae import cli

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
