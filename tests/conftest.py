"""Runs Triton in its interpreter where there is no GPU, sets rows' instruction sets, prints the contract matrix."""

import contextlib
import gc
import os
import re
import shutil
import tempfile
from collections import defaultdict

import before_torch  # noqa: F401

if "PYTEST_XDIST_WORKER" not in os.environ:
    _own_cache = os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="hvae-inductor-")

import pytest
import torch
from hypothesis import settings

import hvae_kernels as hk

settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")

if os.environ.get("TRITON_INTERPRET") == "1":
    import quick_interpreter

    quick_interpreter.install()

_matrix: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def instruction_set(request):
    """The one that the mark ``cpu_set`` names."""
    mark = request.node.get_closest_marker("cpu_set")
    with hk.use_cpu(*mark.args) if mark else contextlib.nullcontext():
        yield


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu_set(name): the instruction set of the C++ kernels during the test")


def pytest_collection_finish(session):
    """What is imported and collected by now stays: garbage collections need not look at it again."""
    gc.freeze()


def pytest_unconfigure(config):
    if "_own_cache" in globals():  # not that of the process that started this one
        shutil.rmtree(_own_cache, ignore_errors=True)


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="without interpreter, compilers, studies, other libraries")
    parser.addoption("--matrix", action="store_true", help="print the contract matrix: op x implementation x check")


#: Whole files that `--quick` leaves out, unread as other libraries may be absent: commands and their training, other
#: machines, benchmarks, other libraries, examples.
SLOW_FILES = re.compile(
    r"test_(gaussian_(annealed|command|train|models)|mnist|priors|structured|arm|absent|exports|benchmarks|machine|accelerate|peer"
    r"|regression|terminal|examples|draw_(study|classify)|densities_study|sentences|chairs|deep_models|helmholtz)"
)
#: In the files that are left: of the interpreter, of compilers and tracers, of batches larger than caches.
SLOW_TESTS = re.compile(r"triton|compile|opcheck|implementation_of_a_call|exported|of_the_stock_one|past_the_caches")


def pytest_ignore_collect(collection_path, config):
    return True if config.getoption("--quick") and SLOW_FILES.match(collection_path.name) else None


def _is_quick(item):
    """Of the contract each op's plain case, in the chosen instruction set; of all else what takes no compiler."""
    if SLOW_TESTS.search(item.name):
        return False
    callspec = getattr(item, "callspec", None)
    if callspec is None or "spec" not in callspec.params:
        return True
    cpu_set = item.get_closest_marker("cpu_set")
    of_other_set = cpu_set is not None and cpu_set.args[0] != hk.config()["cpu"]["chosen"]
    return not of_other_set and ("case" not in callspec.params or item.name.endswith("/plain]"))


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        left_out = [item for item in items if not _is_quick(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _is_quick(item)]


def pytest_runtest_logreport(report):
    found = re.search(r"test_contract\.py::test_(\w+)\[([\w-]+?)/([\w-]+)/(\w+)", report.nodeid)
    if found and (report.when == "call" or report.outcome != "passed"):
        check, op, implementation, device = found.groups()
        _matrix[op, f"{implementation}/{device}"][check].append(report.outcome)


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--matrix") or not _matrix:
        return
    checks = list(dict.fromkeys(check for row in _matrix.values() for check in row))
    terminalreporter.section("contract matrix (ok = every case passed, number of cases; - = of the chosen set alone)")
    blanks = 0
    for op in sorted({op for op, _ in _matrix}):
        columns = sorted(column for of, column in _matrix if of == op)
        terminalreporter.write_line(f"{op:<36}" + "".join(f"{column:<18}" for column in columns))
        for check in checks:
            cells = [_cell(op, column, check) for column in columns]
            terminalreporter.write_line(f"    {check:<32}" + "".join(f"{cell:<18}" for cell in cells))
            blanks += cells.count("BLANK")
    terminalreporter.write_line(f"{len(_matrix)} rows x {len(checks)} checks, {blanks} blank")


def _cell(op, column, check):
    if outcomes := _matrix[op, column].get(check):
        failed = sum(outcome != "passed" for outcome in outcomes)
        return f"ok {len(outcomes)}" if not failed else f"RED {failed} of {len(outcomes)}"
    kin = (row for (of, other), row in _matrix.items() if of == op and _without_set(other) == _without_set(column))
    return "-" if any(check in row for row in kin) else "BLANK"


def _without_set(column):
    """``cpp-avx2/cpu`` is ``cpp/cpu`` in one of its instruction sets."""
    return re.sub(r"-\w+/", "/", column)
