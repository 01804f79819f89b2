"""Runs Triton in its interpreter where there is no GPU, and prints the contract matrix on request."""

import glob
import os
import re
from collections import defaultdict

if not glob.glob("/dev/nvidia[0-9]*"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before torch, which may import Triton

# A stale compiled backward must never make a test pass: the caches know the names of our ops, not their formulas.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")

if os.environ.get("TRITON_INTERPRET") == "1":
    import quick_interpreter

    quick_interpreter.install()

_matrix: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--matrix", action="store_true", help="print the contract matrix: op x implementation x check")


def pytest_runtest_logreport(report):
    found = re.search(r"test_contract\.py::test_(\w+)\[([\w-]+?)/(\w+)/(\w+)", report.nodeid)
    if found and (report.when == "call" or report.outcome != "passed"):
        check, op, implementation, device = found.groups()
        _matrix[op, f"{implementation}/{device}"][check].append(report.outcome)


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--matrix") or not _matrix:
        return
    checks = list(dict.fromkeys(check for row in _matrix.values() for check in row))
    terminalreporter.section("contract matrix (ok = every case passed, number of cases)")
    for (op, implementation), row in sorted(_matrix.items()):
        terminalreporter.write_line(f"{op} {implementation}")
        for check in checks:
            terminalreporter.write_line(f"    {check:<36} {_cell(row.get(check))}")
    blanks = sum(check not in row for row in _matrix.values() for check in checks)
    terminalreporter.write_line(f"{len(_matrix)} rows x {len(checks)} checks, {blanks} blank")


def _cell(outcomes):
    if not outcomes:
        return "BLANK"
    failed = sum(outcome != "passed" for outcome in outcomes)
    return f"ok {len(outcomes)}" if not failed else f"RED {failed} of {len(outcomes)}"
