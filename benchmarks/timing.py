"""Interleaved timing: rivals take turns, so that a slow half-minute of the machine hits all of them alike."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Candidate:
    """Something to time: ``call(prepare(i))``, where only ``call`` is on the clock.

    Attributes:
        name: what it is.
        call: the timed work.
        prepare: makes the argument of the i-th call; rotating through input sets, or recording a graph to go back
            through.
        calls: how many calls of the op one ``call`` stands for.
    """

    name: str
    call: Callable[[object], object]
    prepare: Callable[[int], object]
    calls: int = 1


@dataclass(frozen=True)
class Timing:
    """Microseconds a call of the op, one entry a sample."""

    samples: tuple[float, ...]

    def percentile(self, q: float) -> float:
        """The ``q``-th percentile, linear between samples."""
        ordered = sorted(self.samples)
        position = q / 100 * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    @property
    def min(self) -> float:
        """The fastest sample."""
        return min(self.samples)

    @property
    def p20(self) -> float:
        """The 20th percentile: what ratios are made of, as noise only ever adds time."""
        return self.percentile(20)

    @property
    def p50(self) -> float:
        """The median."""
        return self.percentile(50)

    @property
    def p80(self) -> float:
        """The 80th percentile."""
        return self.percentile(80)


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        rounds: how often every candidate gets its turn.
        turn: seconds of a turn; at least one sample is taken.
        cap: seconds after which a candidate sits out the remaining rounds, once it has ``fewest`` samples.
        sample: seconds that one sample should last at least; short calls are repeated inside it.
        fewest: samples every candidate gets.
    """

    rounds: int = 30
    turn: float = 0.02
    cap: float = 6.0
    sample: float = 0.001
    fewest: int = 5


#: Seconds from which on :func:`measure` takes a call once.
SLOW = 0.5
FULL = Plan()
QUICK = Plan(rounds=6, turn=0.01, cap=1.0, fewest=3)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Keep Python's garbage collector out of the samples."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _seconds_cpu(candidate: Candidate, inner: int) -> float:
    arguments = [candidate.prepare(i) for i in range(inner)]
    call = candidate.call
    start = time.perf_counter()
    for argument in arguments:
        call(argument)
    return time.perf_counter() - start


def _seconds_cuda(candidate: Candidate, inner: int) -> float:
    arguments = [candidate.prepare(i) for i in range(inner)]
    call = candidate.call
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for argument in arguments:
        call(argument)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def calibrate(clock: Callable[[Candidate, int], float], candidate: Candidate, seconds: float) -> int:
    """Calls that make up a sample of about ``seconds``: 1 to 1000."""
    clock(candidate, 1)
    single = min(clock(candidate, 1) for _ in range(3))
    if single >= seconds:
        return 1
    inner = max(1, min(1000, int(seconds / max(single, 1e-7))))
    # a lone call pays for cold caches and branch predictors; a loop tells what one really costs
    single = clock(candidate, inner) / inner
    return max(1, min(1000, round(seconds / max(single, 1e-7))))


def interleave(candidates: Sequence[Candidate], device_type: str, plan: Plan = FULL) -> dict[str, Timing]:
    """Time ``candidates`` in turns; the order rotates, so that nobody always follows the same neighbour."""
    clock = _seconds_cuda if device_type == "cuda" else _seconds_cpu
    samples: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    spent = dict.fromkeys(samples, 0.0)
    with no_collection():
        inner = {candidate.name: calibrate(clock, candidate, plan.sample) for candidate in candidates}
        for turn in range(plan.rounds):
            shift = turn % len(candidates)
            for candidate in (*candidates[shift:], *candidates[:shift]):
                name = candidate.name
                if spent[name] < plan.cap or len(samples[name]) < plan.fewest:
                    taken = _take_turn(clock, candidate, inner[name], plan.turn)
                    spent[name] += sum(taken)
                    samples[name] += [1e6 * seconds / (inner[name] * candidate.calls) for seconds in taken]
            gc.collect(0)
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _take_turn(clock: Callable[[Candidate, int], float], candidate: Candidate, inner: int, turn: float) -> list[float]:
    taken = [clock(candidate, inner)]
    while sum(taken) < turn:
        taken.append(clock(candidate, inner))
    return taken


def measure(calls: dict[str, Callable[[], object]], plan: Plan) -> dict[str, Timing]:
    """Rivals in turns; those that are slow, once."""
    fast, timings = [], {}
    for name, call in calls.items():
        candidate = Candidate(name, lambda _, call=call: call(), lambda i: i)
        with no_collection():
            _seconds_cpu(candidate, 1)
            seconds = _seconds_cpu(candidate, 1)
        if seconds < SLOW:
            fast.append(candidate)
        else:
            timings[name] = Timing((1e6 * seconds,))
    return timings | (interleave(fast, "cpu", plan) if fast else {})
