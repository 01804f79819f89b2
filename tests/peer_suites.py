"""The libraries' own tests for flows, with their flows as they are and with all of them accelerated on construction.

    python tests/peer_suites.py                             # all whose sdist holds its tests
    python tests/peer_suites.py zuko nflows                 # some
    python tests/peer_suites.py pyro --tests pyro=../pyro   # from a checkout or an unpacked sdist

Each library's tests run three times, each test from the same seed: "plain"; "accelerated", after ``hk.accelerate`` of
every module that they construct; "fused", the same with ``HVAE_KERNELS_IMPL=cpp``, which fuses small calls too that
the library's own code is as fast at. The sdist is that of the installed version. Exits with 1 if a test passed plain
and not accelerated, if nothing was swapped, or if ``accelerate`` left a layer alone because of an error.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field

RUN = pathlib.Path(__file__).with_name("peer_suites_run.py")
#: Name of a run: its arguments, its environment.
RUNS: dict[str, tuple[list[str], dict[str, str]]] = {
    "plain": ([], {}),
    "accelerated": (["--accelerate"], {"HVAE_KERNELS_IMPL": "auto"}),
    "fused": (["--accelerate"], {"HVAE_KERNELS_IMPL": "cpp"}),
}
GOOD = ("passed", "xpassed")
#: How a reason begins where trying a layer raised an error: of the versions that are known here none may.
ERROR = "it is not what is known here"


@dataclass(frozen=True)
class Suite:
    """A library's tests for flows.

    Attributes:
        project: its name in the package index.
        files: patterns of paths in its source tree.
        modules: what to import so that all classes of its flows are there.
        packages: whose modules are accelerated.
        arguments: for pytest.
        has_tests: whether its sdist holds them.
        looks_inside: name of a test that asserts a class or a private part of the library: why it has to differ.
    """

    project: str
    files: tuple[str, ...]
    modules: tuple[str, ...]
    packages: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    has_tests: bool = True
    looks_inside: dict[str, str] = field(default_factory=dict)


SUITES = {
    "zuko": Suite(
        "zuko",
        ("tests/test_flows.py", "tests/test_bayesian.py", "tests/test_transforms.py"),
        ("zuko", "zuko.bayesian"),
        ("zuko",),
    ),
    "nflows": Suite("nflows", ("tests/**/*_test.py",), ("nflows.flows", "nflows.transforms", "nflows.nn"), ("nflows",)),
    "glasflow": Suite(
        "glasflow",
        (
            "tests/test_*/test_*.py",
            "tests/**/*_test.py",
        ),  # and those of its fork of nflows, made to import glasflow.nflows
        ("glasflow.flows", "glasflow.nflows.flows", "glasflow.nflows.transforms"),
        ("glasflow",),
        has_tests=False,
    ),
    "normflows": Suite(
        "normflows",
        ("normflows/*_test.py", "normflows/flows/**/*_test.py", "normflows/nets/*_test.py"),
        ("normflows",),
        ("normflows",),
    ),
    "pyro": Suite(
        "pyro-ppl",
        (
            "tests/distributions/test_transforms.py",
            "tests/nn/test_autoregressive.py",
            "tests/infer/test_autoguide.py",
            "tests/infer/autoguide/test_inference.py",
            "tests/infer/reparam/test_neutra.py",
        ),
        ("pyro", "pyro.distributions.transforms", "pyro.nn", "pyro.infer.autoguide"),
        ("pyro",),
        ("-k", "test_transforms or test_autoregressive or IAF"),  # of the guides that alone holds such flows
        has_tests=False,
    ),
    "sbi": Suite(
        "sbi",
        (
            "tests/density_estimator_test.py",
            "tests/posterior_nn_test.py",
            "tests/save_and_load_test.py",
            "tests/vi_test.py",
        ),
        ("sbi.inference", "sbi.neural_nets", "zuko", "nflows.flows", "nflows.transforms"),
        ("sbi", "zuko", "nflows"),
        ("-m", "not slow and not gpu", "-k", "maf or nsf or nice or NPE_C or pickl"),  # no mixtures, no classifiers
        looks_inside={
            "tests/vi_test.py::test_every_flow_family_pickles[nsf]": "a pickle holds zuko's own flow, whose "
            "samples are the same but for rounding, of 2e-6; the test has room for 1e-5 of each number, however small"
        },
    ),
}


def download(project: str, folder: pathlib.Path) -> pathlib.Path:
    """The source tree of the installed version, from its sdist."""
    version = importlib.metadata.version(project)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), f"{project}=={version}"], check=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (root,) = (path for path in folder.iterdir() if path.is_dir())
    return root


def run(suite: Suite, root: pathlib.Path, name: str, seed: int, extra: Sequence[str]) -> dict:
    """One run of the tests: what ``peer_suites_run.py`` writes."""
    files = sorted({str(path) for pattern in suite.files for path in root.glob(pattern)})
    if not files:
        sys.exit(f"{root} holds none of {', '.join(suite.files)}")
    arguments, environment = RUNS[name]
    with tempfile.TemporaryDirectory() as scratch:
        empty = pathlib.Path(scratch, "pytest.ini")  # the library's settings name plugins that are not here
        empty.write_text("[pytest]\n")
        results = pathlib.Path(scratch, "results.json")
        command = [sys.executable, str(RUN), "--root", str(root), "--results", str(results), "--seed", str(seed)]
        command += [*arguments, "--packages", *suite.packages, "--modules", *suite.modules]
        command += ["-c", str(empty), "--rootdir", str(root), "--import-mode=importlib", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors", "--tb=no", "-q", *suite.arguments, *extra, *files]
        done = subprocess.run(
            command, cwd=scratch, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        if not results.exists():
            sys.exit(f"{name} run of {suite.project} ended without results:\n{done.stdout.decode()[-4000:]}")
        return json.loads(results.read_text(encoding="utf-8"))


def compare(library: str, found: dict[str, dict]) -> tuple[list[str], bool]:
    """The rows of a library's table, and whether it is as good accelerated as plain."""
    suite, plain = SUITES[library], found["plain"]["outcomes"]
    lines, is_good = [], True
    for test in sorted(test for test, outcome in plain.items() if outcome == "failed"):
        if all(results["outcomes"].get(test) == "failed" for results in found.values()):
            lines.append(f"    {test}: failed in all runs: {_reason(found['plain'], test)}")
    for name, results in found.items():
        outcomes = results["outcomes"]
        passed = sum(outcome in GOOD for outcome in outcomes.values())
        swapped = sum(results["swapped"].values())
        lines.append(f"{library:<10} {name:<12} {len(outcomes):>9} {passed:>7} {swapped:>8} {len(results['tests']):>9}")
        if name == "plain":
            continue
        if not swapped:
            is_good = False
            lines.append("    nothing was swapped")
        errors = [why for why in results["left"] if why.startswith(ERROR)]
        is_good &= not errors
        lines += [f"    left alone {results['left'][why]} times: {why}" for why in errors]
        for test in sorted(plain.keys() | outcomes.keys()):
            before, after = plain.get(test, "absent"), outcomes.get(test, "absent")
            if before == after:
                continue
            excuse = next((why for part, why in suite.looks_inside.items() if part in test), None)
            is_worse = before in GOOD and after not in GOOD
            is_good &= not is_worse or excuse is not None
            why = excuse or _reason(results if is_worse else found["plain"], test)
            lines.append(f"    {test}: {before} plain, {after} {name}: {why}")
    return lines, is_good


def _reason(results: dict, test: str) -> str:
    return results["reasons"].get(test, "").partition("\n")[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help=", ".join(SUITES))
    parser.add_argument("--tests", action="append", default=[], metavar="LIBRARY=DIR", help="its source tree")
    parser.add_argument("--seed", type=int, default=0, help="of every test")
    parser.add_argument("--pytest", action="append", default=[], metavar="ARG", help="a further argument of pytest")
    parser.add_argument("--reasons", action="store_true", help="what was swapped and why layers were left alone")
    options = parser.parse_args(arguments)
    for pair in options.tests:
        if "=" not in pair:
            parser.error(f"--tests must be LIBRARY=DIR, got {pair}")
    trees = dict(pair.split("=", 1) for pair in options.tests)
    libraries = options.libraries or [name for name, suite in SUITES.items() if suite.has_tests or name in trees]
    for library in [*libraries, *trees]:
        if library not in SUITES:
            parser.error(f"LIBRARY must be one of {', '.join(SUITES)}, got {library}")
    for library in libraries:
        if library not in trees and not SUITES[library].has_tests:
            parser.error(f"the sdist of {library} holds no tests of flows: give --tests {library}=DIR")

    are_good = True
    print(f"{'library':<10} {'run':<12} {'collected':>9} {'passed':>7} {'swapped':>8} {'in tests':>9}", flush=True)
    for library in libraries:
        suite = SUITES[library]
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(trees[library]) if library in trees else download(suite.project, pathlib.Path(folder))
            found = {name: run(suite, root.resolve(), name, options.seed, options.pytest) for name in RUNS}
        lines, is_good = compare(library, found)
        are_good &= is_good
        print("\n".join(lines), flush=True)
        if options.reasons:
            for title in ("swapped", "left"):
                for text, count in sorted(found["accelerated"][title].items()):
                    print(f"    {title}, {count} times: {text}")
    print("as many pass as without" if are_good else "FAULTS: see the lines below the runs")
    return 0 if are_good else 1


if __name__ == "__main__":
    sys.exit(main())
