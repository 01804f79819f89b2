"""Runs the kernels of ``csrc/kernels`` on a machine that is not there: ``python tests/arm/check.py``, or ``make arm``.

``driver.cpp`` is compiled for aarch64 and run by qemu; its numbers are held to the float64 references, with the budgets
of ``test_contract.py``. That proves what the kernels compute there, and says nothing of how fast. With ``--native
COMPILER`` it does the same here, in every instruction set that this machine has.
"""

from __future__ import annotations

import argparse
import runpy
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402 - the package and the tests are on the path now
from arm.cases import Case, Writes, cases  # noqa: E402
from test_elementary import ulp  # noqa: E402
from torch import Tensor  # noqa: E402

from hvae_kernels import testing  # noqa: E402

DRIVER = Path(__file__).with_name("driver.cpp")
#: As in the contract.
DOUBLE_TOLERANCE = 1e-12
#: What an argument is, as driver.cpp numbers it.
CODES = {int: 0, float: 1, type(None): 2}
DTYPES = {torch.float32: 3, torch.float64: 4, torch.int32: 5, torch.int64: 6, torch.uint8: 7}


@dataclass(frozen=True)
class Target:
    """How to compile for a machine and to run there; ``packages`` are Debian's that bring both."""

    compiler: tuple[str, ...]
    emulator: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    def absent(self) -> str | None:
        """What it lacks on this machine, in one sentence."""
        commands = [command[0] for command in (self.compiler, self.emulator) if command]
        missing = " and ".join(command for command in commands if shutil.which(command) is None)
        remedy = f": apt-get install {' '.join(self.packages)}" if self.packages else ""
        return f"{missing} not found{remedy}" if missing else None


ARM = Target(
    compiler=("aarch64-linux-gnu-g++", "-static"),
    emulator=("qemu-aarch64-static",),
    packages=("g++-aarch64-linux-gnu", "qemu-user-static"),
)


@dataclass(frozen=True)
class Outcome:
    """The largest error of a case's results, and the largest part that one took of its budget."""

    case: Case
    set: str
    error: float
    share: float


def build(target: Target, folder: Path) -> Path:
    """The driver, compiled as the extension is."""
    driver = folder / "driver"
    subprocess.run([*target.compiler, *build_flags(), str(DRIVER), "-o", str(driver)], check=True)
    return driver


def build_flags() -> list[str]:
    """The extension's."""
    return runpy.run_path(str(ROOT / "setup.py"), run_name="flags")["FLAGS"]


def outcomes(target: Target, folder: Path) -> Iterator[Outcome]:
    """Of all cases in all instruction sets."""
    command = [*target.emulator, str(build(target, folder))]
    every = list(cases())
    calls = b"".join(map(encoded, every))
    sets = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    runs = [subprocess.run([*command, name], input=calls, check=True, stdout=subprocess.PIPE) for name in sets]
    answers = {name: memoryview(run.stdout) for name, run in zip(sets, runs, strict=True)}
    for case in every:
        law = Law(case)
        for name in sets:
            results, answers[name] = decoded(case, answers[name])
            yield Outcome(case, name, *law.compared(results))
    assert not any(answers.values())


# ---- Calls as bytes ----


def encoded(case: Case) -> bytes:
    name = case.kernel.encode()
    head = struct.pack(f"=q{len(name)}sqq", len(name), name, DTYPES[case.dtype], len(case.arguments))
    return head + b"".join(map(_argument, case.arguments))


def _argument(x: int | float | Tensor | Writes | None) -> bytes:
    if isinstance(x, Writes):
        x = x.before
    if isinstance(x, Tensor):
        return struct.pack("=qq", DTYPES[x.dtype], x.numel()) + _bytes(x)
    form, values = {int: ("=qq", (x,)), float: ("=qd", (x,)), type(None): ("=q", ())}[type(x)]
    return struct.pack(form, CODES[type(x)], *values)


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().numpy().tobytes()


def decoded(case: Case, answer: memoryview) -> tuple[list[Tensor], memoryview]:
    """The case's results, and the rest of the answer. Inputs must come back bit by bit."""
    results = []
    for x in case.arguments:
        before = x.before if isinstance(x, Writes) else x
        if isinstance(before, Tensor):
            after, answer = _array(before, answer)
            if not isinstance(x, Writes):
                assert _bytes(after) == _bytes(before), f"{case}: an input has changed"
            elif x.checked:
                results.append(after)
    if case.returns:
        result, answer = _array(torch.empty((), dtype=torch.float64), answer)
        results.append(result)
    return results, answer


def _array(like: Tensor, answer: memoryview) -> tuple[Tensor, memoryview]:
    if like.numel() == 0:
        return like, answer
    size = like.numel() * like.element_size()
    return torch.frombuffer(bytearray(answer[:size]), dtype=like.dtype).view(like.shape), answer[size:]


# ---- The reference ----


class Law:
    """What a case's results must be, and how far they may be from it."""

    def __init__(self, case: Case):
        self.case, self.oracle = case, _results(case, torch.float64)
        self.exact = case.in_double or case.dtype == torch.float64
        if not self.exact and case.ulp is None and case.absolute is None:
            floor = testing.FLOOR_ULP * torch.finfo(torch.float32).eps
            plain = _results(case, torch.float32)
            self.budgets = [max(2 * self._error(x.float(), y), floor) for x, y in zip(plain, self.oracle, strict=True)]

    def compared(self, results: Sequence[Tensor]) -> tuple[float, float]:
        """The largest error, and the largest part of its budget that one takes."""
        case = self.case
        if case.ulp is not None or case.absolute is not None:
            error = ulp(results[0], self.oracle[0]) if case.absolute is None else self._absolute(results[0])
            budget = case.ulp if case.absolute is None else case.absolute
            return error, error / budget if budget else float(error > 0)
        errors = [self._error(x if self.exact else x.float(), y) for x, y in zip(results, self.oracle, strict=True)]
        if self.exact:
            return max(errors), max(errors) / DOUBLE_TOLERANCE
        return max(errors), max(error / budget for error, budget in zip(errors, self.budgets, strict=True))

    def _absolute(self, result: Tensor) -> float:
        return ((result - self.oracle[0]).abs() / self.case.tensors[0].abs().clamp(min=1)).max().item()

    def _error(self, result: Tensor, exact: Tensor) -> float:
        """Infinities that agree are no error, and at limits NaN."""
        agree = exact.isinf() & (result == exact) | (exact.isnan() & result.isnan() if self.case.limits else False)
        return testing.relative_error(result.masked_fill(agree, 0), exact.masked_fill(agree, 0))


def _results(case: Case, dtype: torch.dtype) -> list[Tensor]:
    return [x.detach() for x in case.law(*(x.to(dtype) if x.is_floating_point() else x for x in case.tensors))]


def table(every: Sequence[Outcome]) -> str:
    """The worst of each kernel, set and dtype."""
    groups = defaultdict(list)
    for o in every:
        groups[o.case.kernel, o.set, str(o.case.dtype).removeprefix("torch.")].append(o)
    lines = [f"{'kernel':<32} {'set':<9} {'dtype':<8} {'cases':>5} {'error':>9} {'of budget':>9}"]
    for (kernel, name, dtype), some in sorted(groups.items()):
        error, share = max(o.error for o in some), max(o.share for o in some)
        lines.append(f"{kernel:<32} {name:<9} {dtype:<8} {len(some):>5} {error:>9.2g} {share:>9.0%}")
    return "\n".join(lines)


def beyond(every: Sequence[Outcome]) -> list[str]:
    """The calls whose error is beyond its budget."""
    return [f"{o.case} on {o.set}: error {o.error:.3g}, {o.share:.3g} of its budget" for o in every if not o.share <= 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--native", metavar="COMPILER", help="compile with this, and run on this machine")
    options = parser.parse_args()
    target = Target(compiler=tuple(options.native.split())) if options.native else ARM
    if reason := target.absent():
        sys.exit(f"the kernels were not checked: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        every = list(outcomes(target, Path(folder)))
    print(table(every))
    red = beyond(every)
    sys.exit("\n".join(["beyond their budgets:", *red]) if red else None)


if __name__ == "__main__":
    main()
