"""The examples, each in a process of its own as a user runs it: they check their own numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
#: What every one of them prints last or along the way.
PRINTED = {
    "bayesian_regression": "means off by",
    "ensembles_by_vmap": "on fresh data:",
    "faster_zuko_flow": "swapped (3):",
    "hamiltonian_vae_digits": "K = 3 leapfrog steps",
    "importance_weighted_dreg": "variance, DReG",
    "sbi_posterior": "swapped (2):",
    "vamp_prior": "VampPrior of 12:",
}


def test_all_are_known():
    assert [path.stem for path in EXAMPLES] == sorted(PRINTED)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error::FutureWarning", path]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert PRINTED[path.stem] in done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_is_short(path):
    assert len(path.read_text().splitlines()) < 80
