"""sbi's posteriors before and after ``hk.accelerate``: ``python benchmarks/sbi.py [--quick] [--cpu SET]``.

Neural posterior estimation of sbi's own linear Gaussian simulator, five parameters, with every flow that is swapped.
Three jobs: training for a fixed number of epochs, 100,000 samples of one posterior, and simulation-based calibration,
``run_sbc`` with 1,000 posteriors of 100 samples. The flow and its swapped copy take turns, the ratio is that of their
minima, and both have to give the same from one seed. The prior is normal, so that all of the time is the flows': a box
prior's corners make batched rejection draw twenty times as much, before and after alike. Training is timed without the
swap itself, 20 to 30 ms a flow.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.metadata
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The folder of a script comes first on the path, and this file would hide the library that it measures.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT / "benchmarks"]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import cpu  # noqa: E402 - needs the repository on the path, as the next lines do

if __name__ == "__main__":
    cpu.hold()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import hvae_kernels as hk  # noqa: E402
from benchmarks import results, run, tables, timing  # noqa: E402

MODELS = ("maf", "nsf", "maf_rqs", "zuko_maf", "zuko_nsf")
FEATURES = 5
#: Of the descent that is compared.
STEPS = 30
FIELDS = (
    *("model", "version", "features", "layers", "job", "before_us", "after_us", "rounds", "speedup", "same"),
    *("device", "cpu", "threads", "torch", "python", "commit", "date"),
)


@dataclass(frozen=True)
class Size:
    """How much of each job, and how often: numbers of simulations, epochs, samples, posteriors and samples of each."""

    simulations: int = 4_000
    epochs: int = 10
    samples: int = 100_000
    posteriors: int = 1_000
    samples_each: int = 100
    rounds: int = 3


QUICK = Size(simulations=400, epochs=2, samples=5_000, posteriors=50, rounds=1)
TINY = Size(simulations=60, epochs=1, samples=50, posteriors=4, samples_each=20, rounds=1)


@dataclass(frozen=True)
class Problem:
    """Parameters and data of training and of calibration."""

    prior: torch.distributions.Distribution
    theta: Tensor
    x: Tensor
    thetas: Tensor
    xs: Tensor

    @classmethod
    def draw(cls, size: Size) -> Problem:
        """From the prior and the simulator."""
        from sbi.simulators import linear_gaussian

        torch.manual_seed(0)
        prior = torch.distributions.MultivariateNormal(torch.zeros(FEATURES), torch.eye(FEATURES))

        def simulate(n: int) -> tuple[Tensor, Tensor]:
            theta = prior.sample((n,))
            return theta, linear_gaussian(theta, torch.zeros(FEATURES), 0.3 * torch.eye(FEATURES))

        return cls(prior, *simulate(size.simulations), *simulate(size.posteriors))


# ---- The jobs ----


def train(problem: Problem, size: Size, build: Callable[[Tensor, Tensor], nn.Module]) -> nn.Module:
    """A density estimator after a fixed number of epochs."""
    from sbi.inference import NPE

    torch.manual_seed(1)
    inference = NPE(problem.prior, density_estimator=build, show_progress_bars=False)
    inference.append_simulations(problem.theta, problem.x)
    options = {"max_num_epochs": size.epochs, "stop_after_epochs": size.epochs}
    return inference.train(training_batch_size=200, **options)


def sample(problem: Problem, size: Size, posterior: object) -> Tensor:
    """Samples of one posterior."""
    torch.manual_seed(2)
    return posterior.sample((size.samples,), x=problem.xs[:1], show_progress_bars=False)


def calibrate(problem: Problem, size: Size, posterior: object) -> Tensor:
    """Ranks of the true parameters, ``(posteriors, FEATURES)``."""
    from sbi.diagnostics import run_sbc

    torch.manual_seed(3)
    ranks, _ = run_sbc(
        problem.thetas, problem.xs, posterior, num_posterior_samples=size.samples_each, show_progress_bar=False
    )
    return ranks


# ---- What is the same ----


def losses(problem: Problem, before: nn.Module, after: nn.Module) -> str:
    """How far apart two trainings from one seed are: within rounding, in the steps that follow.

    From the first step on in float32 that grows: both drift from a training in float64 by a hundredth in 200 steps.
    """
    with torch.no_grad():
        pair = [estimator.loss(problem.thetas, problem.xs).mean().item() for estimator in (before, after)]
    found = []
    for dtype, most in ((torch.float32, 1e-3), (torch.float64, 1e-8)):
        start = copy.deepcopy(before).to(dtype)
        paths = [descent(problem, estimator) for estimator in (start, hk.accelerate(copy.deepcopy(start))[0])]
        found.append(max(abs(a - b) for a, b in zip(*paths, strict=True)))
        if not found[-1] <= most:
            raise AssertionError(f"losses of two descents in {dtype}: apart by {found[-1]:.1e}")
    more = f"in {STEPS} more steps apart by {found[0]:.0e}, in float64 {found[1]:.0e}"
    return f"loss {pair[0]:.4f}, {pair[1]:.4f}; {more}"


def descent(problem: Problem, estimator: nn.Module) -> list[float]:
    """The losses of some steps of the estimator's own dtype."""
    dtype = next(estimator.parameters()).dtype
    optimizer = torch.optim.Adam(estimator.parameters(), lr=5e-4)
    generator, found = torch.Generator().manual_seed(4), []
    for _ in range(STEPS):
        index = torch.randint(len(problem.theta), (200,), generator=generator)
        optimizer.zero_grad()
        loss = estimator.loss(problem.theta[index].to(dtype), problem.x[index].to(dtype)).mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def draws(before: Tensor, after: Tensor) -> str:
    """How far apart samples from one seed are."""
    apart = (before - after).abs()
    if not (apart > 1e-3).double().mean() <= 1e-3:
        raise AssertionError(f"samples differ by {apart.max().item()}")
    return f"apart by {apart.mean().item():.0e} on average, {apart.max().item():.0e} at most"


def ranks(before: Tensor, after: Tensor, most: int) -> str:
    """How many ranks are equal, and how far the others moved."""
    moved = (before - after).abs()
    if not moved.mean() <= 0.01 * most:
        raise AssertionError(f"ranks moved by {moved.mean().item()} on average")
    return f"{int((moved != 0).sum())} of {moved.numel()} ranks moved, by {int(moved.max())} of {most} at most"


# ---- Timing ----


class Swap:
    """Builds accelerated density estimators, as a trainer asks for them.

    Attributes:
        seconds: that the swaps took in all.
        layers: that the last one swapped.
    """

    def __init__(self, build: Callable[[Tensor, Tensor], nn.Module]) -> None:
        self.build, self.seconds, self.layers = build, 0.0, 0

    def __call__(self, theta: Tensor, x: Tensor) -> nn.Module:
        """The estimator, whose layers are all swapped."""
        estimator = self.build(theta, x)
        start = time.perf_counter()
        estimator, report = hk.accelerate(estimator)
        self.seconds += time.perf_counter() - start
        self.layers = len(report.swapped)
        if not report.swapped or report.left:
            raise AssertionError(str(report))
        return estimator


def alternate(
    jobs: tuple[Callable[[], object], ...], rounds: int, off_the_clock: Callable[[], float] = lambda: 0.0
) -> tuple[list[float], list[object]]:
    """Each job's least microseconds, in turns whose order changes, and its last result."""
    least, found = [float("inf")] * len(jobs), [None] * len(jobs)
    with timing.no_collection():
        for turn in range(rounds):
            for place in range(len(jobs))[:: 1 if turn % 2 == 0 else -1]:
                start, off = time.perf_counter(), off_the_clock()
                found[place] = jobs[place]()
                seconds = time.perf_counter() - start - (off_the_clock() - off)
                least[place] = min(least[place], 1e6 * seconds)
    return least, found


def measure(model: str, problem: Problem, size: Size) -> Iterator[dict[str, object]]:
    """A record for every job with one flow."""
    from sbi.inference import DirectPosterior
    from sbi.neural_nets import posterior_nn

    build = posterior_nn(model)
    swap = Swap(build)
    for either in (build, swap):
        train(problem, TINY, either)  # imports and caches
    jobs = tuple(functools.partial(train, problem, size, either) for either in (build, swap))
    trained = alternate(jobs, size.rounds, lambda: swap.seconds)
    before = DirectPosterior(trained[1][0], problem.prior)
    after, _ = hk.accelerate(copy.deepcopy(before))
    measured = [(f"training, {size.epochs} epochs of {size.simulations:,}", trained, losses(problem, *trained[1]))]
    for name, job, same in (
        (f"{size.samples:,} samples", sample, draws),
        (f"calibration, {size.posteriors:,} posteriors", calibrate, functools.partial(ranks, most=size.samples_each)),
    ):
        timed = alternate(
            tuple(functools.partial(job, problem, size, either) for either in (before, after)), size.rounds
        )
        measured.append((name, timed, same(*timed[1])))
    for name, ((slow, fast), _), same in measured:
        yield {
            **{"model": model, "version": importlib.metadata.version("sbi"), "features": FEATURES},
            **{"layers": swap.layers, "job": name, "before_us": slow, "after_us": fast, "rounds": size.rounds},
            **{"speedup": slow / fast, "same": same},
        }


@contextlib.contextmanager
def elsewhere() -> Iterator[None]:
    """In a temporary folder: sbi's trainers write their logs where they are."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a part of each job, once; writes no CSV")
    parser.add_argument("--tiny", action="store_true", help="hardly any work, to see that everything runs; the same")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the CSV goes (benchmarks/results/flows)")
    parser.add_argument("--keep", default="", help="only flows whose name contains this")
    options = cpu.parse(parser, arguments)
    size = TINY if options.tiny else QUICK if options.quick else Size()
    whole = size == Size() and not options.keep
    run.refuse_changes(whole and not options.out)
    run.keep_freed_memory()
    origin, records = run.provenance(torch.device("cpu")), []
    with warnings.catch_warnings(), elsewhere():
        warnings.simplefilter("ignore")  # sbi's advice on batches, leakage and epochs
        problem = Problem.draw(size)
        for model in MODELS:
            if options.keep not in model:
                continue
            for record in measure(model, problem, size):
                records.append({key: results.text((record | origin).get(key)) for key in FIELDS})
            print(f"  timed {model}", flush=True)
    print(f"\n{results.machine(origin)}, torch {origin['torch']}, sbi {records[0]['version']}\n")
    print(tables.sbi_table(records, "simple"))
    tables.publish("sbi", origin, records, FIELDS, options.out, whole)
    return 0


if __name__ == "__main__":
    sys.exit(main())
