"""The registry under pytest-benchmark: ``pytest benchmarks --benchmark-only -k leapfrog``.

One group a size and direction, one line an implementation. For ratios prefer ``python benchmarks/run.py``: here rivals
run one after the other, there they take turns.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

from benchmarks import gate, registry, results
from benchmarks.registry import DIRECTIONS, Case, Row
from benchmarks.rivals import COMPILE, COPY, EAGER, OURS, Problem

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed (the extra `bench`)")

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


@functools.lru_cache(maxsize=1)
def problem(op: str, label: str, device: str) -> Problem:
    """The case's inputs, once its op has passed the gate."""
    row, case = _find(op, label)
    verdict = gate.check(row, case, torch.float32, device)
    if not verdict.passed:
        pytest.fail(f"{op} {label} is wrong and is not timed: {verdict.message}")
    return Problem(row, case, torch.float32, torch.device(device))


def _find(op: str, label: str) -> tuple[Row, Case]:
    row = next(row for row in registry.ROWS if row.name == op)
    return row, next(case for case in row.cases if case.label == label)


def _parameters() -> Iterator:
    for device in DEVICES:
        for row in registry.ROWS:
            for case in row.cases:
                for direction in DIRECTIONS if device in case.devices else ():
                    names = (OURS, *((EAGER, COMPILE, *row.peers) if case.stock else ()), COPY)
                    for name in names:
                        label = f"{row.name}-{results.slug(case.label)}-{direction}-{name}-{device}"
                        yield pytest.param(row.name, case.label, device, direction, name, id=label)


@pytest.mark.parametrize(("op", "label", "device", "direction", "name"), tuple(_parameters()))
def test_benchmark(benchmark, op: str, label: str, device: str, direction: str, name: str):
    """Time one implementation; nothing is asserted about the time."""
    held = problem(op, label, device)
    candidate = next(c for c in held.candidates(direction) if c.name == name)
    candidate.call(candidate.prepare(0))  # compile outside the clock
    benchmark.group = f"{op} {label} {direction} {device}"
    benchmark.extra_info["bytes"] = held.bytes(direction)

    def run(argument: object) -> None:
        candidate.call(argument)
        if device == "cuda":
            torch.cuda.synchronize()

    if direction == "backward":
        # what is recorded serves a single backward pass
        benchmark.pedantic(run, setup=lambda: ((candidate.prepare(0),), {}), rounds=50)
    else:
        benchmark(run, candidate.prepare(0))
