"""One run of a library's tests: as the library is, or with every flow accelerated as soon as it is constructed.

A script of ``peer_suites.py``, in a process of its own: whatever the tests and ``accelerate`` change stays in it.
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib
import json
import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

#: Of a test's parts (its setup, its call, its subtests, its teardown) the last of these that one of them came to.
SEVERITY = ("passed", "xpassed", "xfailed", "skipped", "failed")


def accelerate_on_construction(packages: tuple[str, ...], found: Found) -> None:
    """Wrap ``__init__`` of every module class of these packages: what is constructed is accelerated.

    The outermost alone, when it is complete: ``accelerate`` looks at all that is in it.
    """
    import hvae_kernels as hk

    depth = 0

    def wrapped(init):
        @functools.wraps(init)
        def construct(self, *args, **kwargs):
            nonlocal depth
            depth += 1
            try:
                init(self, *args, **kwargs)
                if depth == 1 and "_modules" in self.__dict__:  # a test may have put a mock in nn.Module's place
                    found.add(hk.accelerate(self)[1])  # the modules that it makes to try a layer stay as they are
            finally:
                depth -= 1

        return construct

    for cls in set(_subclasses(nn.Module)):
        if cls.__module__.partition(".")[0] in packages and "__init__" in cls.__dict__:
            cls.__init__ = wrapped(cls.__init__)


def _subclasses(cls: type) -> Iterator[type]:
    for derived in cls.__subclasses__():
        yield derived
        yield from _subclasses(derived)


class Found:
    """What ``accelerate`` did in the whole run, and in which tests it swapped something."""

    def __init__(self) -> None:
        self.swapped: collections.Counter[str] = collections.Counter()
        self.left: collections.Counter[str] = collections.Counter()
        self.tests: set[str] = set()
        self.test = ""

    def add(self, report) -> None:
        self.swapped.update(what.partition(",")[0] for _, what in report.swapped)
        self.left.update(why for _, why in report.left if why != "already swapped")
        if report.swapped and self.test:
            self.tests.add(self.test)


class Plugin:
    """Seeds every test and writes down what became of it."""

    def __init__(self, found: Found, seed: int) -> None:
        self.found, self.seed = found, seed
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        self.found.test = item.nodeid
        random.seed(self.seed)
        np.random.seed(self.seed)  # noqa: NPY002 - the generator that the libraries' tests use
        torch.manual_seed(self.seed)

    def pytest_runtest_logreport(self, report):
        outcome = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if report.skipped else "xpassed"
        self._note(report, outcome)

    def pytest_collectreport(self, report):
        if report.failed:
            self._note(report, "failed")

    def _note(self, report, outcome):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.reasons.setdefault(report.nodeid, crash.message if crash else str(report.longrepr))
        known = self.outcomes.get(report.nodeid, "passed")
        self.outcomes[report.nodeid] = max(known, outcome, key=SEVERITY.index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True, help="the source tree that the tests import their helpers from")
    parser.add_argument("--packages", nargs="+", required=True)
    parser.add_argument("--modules", nargs="+", required=True, help="that define all classes of flows")
    parser.add_argument("--accelerate", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", required=True, help="file to write")
    options, arguments = parser.parse_known_args()

    del sys.path[0]  # our own tests
    for module in options.modules:
        importlib.import_module(module)
    sys.path.insert(0, options.root)  # now: the installed library is tested, not the one in the tree
    found = Found()
    if options.accelerate:
        accelerate_on_construction(tuple(options.packages), found)
    plugin = Plugin(found, options.seed)
    pytest.main(arguments, plugins=[plugin])
    results = {
        "outcomes": plugin.outcomes,
        "reasons": plugin.reasons,
        "swapped": found.swapped,
        "left": found.left,
        "tests": sorted(found.tests),
    }
    with open(options.results, "w", encoding="utf-8") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()
