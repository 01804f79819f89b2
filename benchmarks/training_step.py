"""One training step of the Gaussian study: ``python benchmarks/training_step.py [--dim 25] [--steps 10] [--cpu SET]``.

The HVAE with K leapfrog steps, setting ``published``: mini-batches of 256, each treated as a data set of its own, ten
latent samples, ``clip_grad_norm_``, RMSProp. The loops take turns, epochs at a time:

- *source style*: what the formulas say, written down: a ``DataLoader``, 2K gradients, the batch in every bound;
- *frugal eager*: sufficient statistics of the batches, K + 1 gradients, no ``DataLoader``;
- *ours*: the study's own step, three data sets as replicas, its time divided by three.

Before anything is timed, all loops have to find the same bound and the same gradients in float64.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from benchmarks import cpu  # noqa: E402 - needs the repository on the path, as the next lines do

if __name__ == "__main__":
    cpu.hold()

import torch  # noqa: E402
from hvae.gaussian import data, models, study, train  # noqa: E402
from hvae.gaussian.models import N_SAMPLES  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from benchmarks import results, run  # noqa: E402
from benchmarks.timing import FULL, QUICK, Candidate, Plan, Timing, interleave  # noqa: E402
from hvae_kernels.ops.gaussian_leapfrog import reference  # noqa: E402

DATASETS, SEED = 3, 12345
LEARNING_RATE, CLIP = 1e-3, 1e-4
MAX_STEP_SIZE, STEP_SIZE, TEMPERATURE = 0.5, 0.005, 5.0


class Parameters(nn.Module):
    """What the eager loops learn, as their author would name it."""

    def __init__(self, dim: int):
        super().__init__()
        ratio = STEP_SIZE / MAX_STEP_SIZE
        self.delta = nn.Parameter(torch.zeros(dim))
        self.log_sigma = nn.Parameter(torch.full((dim,), 3.0))
        self.step_size_logit = nn.Parameter(torch.full((dim,), math.log(ratio / (1 - ratio))))
        self.log_excess = nn.Parameter(torch.tensor(math.log(TEMPERATURE - 1)))

    def schedule(self, steps: int) -> tuple[Tensor, Tensor]:
        """``(T_0, alpha)`` of quadratic tempering."""
        k = torch.arange(steps + 1, dtype=self.delta.dtype)
        temperature = 1 + self.log_excess.exp() * (1 - (k / steps) ** 2)
        return temperature[0], temperature[1:] / temperature[:-1]

    def normal_terms(self, z: Tensor, rho: Tensor, first: Tensor, gamma: Tensor) -> Tensor:
        """``log N(z_K) + log N(rho_K) - log N(z_0) - log N(gamma)``; the constants cancel."""
        squares = z.square() + rho.square() - first.square() - gamma.square()
        return -squares.sum(-1) / 2


class SourceStyle(Parameters):
    """The formulas as they stand, batch by batch."""

    def bound(self, x: Tensor, z: Tensor, gamma: Tensor, steps: int) -> Tensor:
        """The bound's mean over samples."""
        n, first = x.shape[0], z
        variance = torch.exp(2 * self.log_sigma)
        mean = x.mean(0)
        step = MAX_STEP_SIZE * torch.sigmoid(self.step_size_logit)
        initial, alpha = self.schedule(steps)

        def gradient(z: Tensor) -> Tensor:
            return z + n * (z + self.delta - mean) / variance

        rho = initial * gamma
        for k in range(steps):
            half = rho - step / 2 * gradient(z)
            z = z + step * half
            rho = alpha[k] * (half - step / 2 * gradient(z))
        centred = x - self.delta
        fit = -n / 2 * torch.log(2 * math.pi * variance).sum() - (centred**2 / variance).sum() / 2
        cross = (n * (mean - self.delta) * z / variance).sum(-1) - (n * z**2 / variance).sum(-1) / 2
        return (fit + cross + self.normal_terms(z, rho, first, gamma)).mean()


class FrugalEager(Parameters):
    """Sufficient statistics and the plain formula with K + 1 gradients."""

    def bound(self, statistics: tuple[int, Tensor, Tensor], z: Tensor, gamma: Tensor, steps: int) -> Tensor:
        """The bound's mean over samples."""
        n, mean, moment = statistics
        variance = torch.exp(2 * self.log_sigma)
        step = MAX_STEP_SIZE * torch.sigmoid(self.step_size_logit)
        initial, alpha = self.schedule(steps)
        precision = 1 + n / variance
        loc = n / variance * (mean - self.delta) / precision
        last, rho = reference.gaussian_leapfrog(z, initial * gamma, precision, loc, step, alpha)
        residual = moment + (mean - self.delta - last).square()
        fit = -n / 2 * (torch.log(2 * math.pi * variance) + residual / variance).sum(-1)
        return (fit + self.normal_terms(last, rho, z, gamma)).mean()


def statistics(batch: Tensor) -> tuple[int, Tensor, Tensor]:
    """``(n, mean, centred second moment)`` of a batch."""
    return batch.shape[0], batch.mean(0), batch.var(0, correction=0)


class Loop:
    """An eager training loop; a call is one epoch."""

    def __init__(self, model: SourceStyle | FrugalEager, steps: int):
        self.model, self.steps = model, steps
        self.optimizer = torch.optim.RMSprop(model.parameters(), lr=LEARNING_RATE)

    def batches(self) -> Iterator:
        """What ``bound`` takes, batch after batch."""
        raise NotImplementedError

    def __call__(self) -> None:
        """Train for one epoch."""
        dim = self.model.delta.shape[0]
        for batch in self.batches():
            z, gamma = torch.randn(N_SAMPLES, dim), torch.randn(N_SAMPLES, dim)
            self.optimizer.zero_grad()
            loss = -self.model.bound(batch, z, gamma, self.steps)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()


class SourceLoop(Loop):
    """Mini-batches from a ``DataLoader``, stacked row by row."""

    def __init__(self, points: Tensor, steps: int):
        super().__init__(SourceStyle(points.shape[1]), steps)
        self.loader = DataLoader(TensorDataset(points), batch_size=data.BATCH_SIZE)

    def batches(self) -> Iterator[Tensor]:
        """The rows themselves."""
        for (batch,) in self.loader:
            yield batch


class FrugalLoop(Loop):
    """Statistics of all batches, computed once."""

    def __init__(self, points: Tensor, steps: int):
        super().__init__(FrugalEager(points.shape[1]), steps)
        self.held = [statistics(batch) for batch in points.split(data.BATCH_SIZE)]

    def batches(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """The statistics."""
        return iter(self.held)


class StudyLoop:
    """The study's own loop: all data sets as replicas of one model, noise, clipping, checks and records included.

    A call is ``EPOCHS`` epochs, at the end of which the study writes the record that it writes every ten epochs of a
    full run, and a checkpoint.
    """

    EPOCHS = 10

    def __init__(self, dim: int, steps: int, folder: Path):
        self.job = study.Job("published", dim, "hvae", steps)
        self.data = data.data_sets(dim, DATASETS, SEED)
        self.checkpoint = folder / "checkpoint"
        flat = self.job.model(DATASETS, SEED).flat
        self.state = train.State(self.EPOCHS, 0, flat, torch.zeros_like(flat))

    def __call__(self) -> None:
        """Train for ``EPOCHS`` epochs, on from where the last call ended."""
        self.state.epoch = 0
        with mock.patch.object(train, "N_RECORDS", 1):
            train.train(self.job, self.data, self.state, SEED, self.checkpoint, lambda state: None)


def agree(dim: int, steps: int) -> None:
    """Require the same gradients of all three, and the same bound of those that compute it, in float64.

    Raises:
        AssertionError: they differ.
    """
    generator = torch.Generator().manual_seed(0)
    z, gamma = torch.randn(2, N_SAMPLES, dim, generator=generator, dtype=torch.float64)
    batch = data.sample_points(dim, 1, SEED)[0].double()[: data.BATCH_SIZE]
    loops = SourceStyle(dim).double(), FrugalEager(dim).double()
    bounds = [loop.bound(x, z, gamma, steps) for loop, x in zip(loops, (batch, statistics(batch)), strict=True)]
    torch.testing.assert_close(*bounds)
    source, frugal = (torch.autograd.grad(-b, tuple(m.parameters())) for b, m in zip(bounds, loops, strict=True))
    torch.testing.assert_close(frugal, source)
    ours = models.HamiltonianVAE(dim, steps, tempered=True, dtype=torch.float64)
    with torch.no_grad():
        ours.flat.copy_(nn.utils.parameters_to_vector(loops[0].parameters()))
        ours.write_gradient(ours.prepare(data.statistics([batch])), torch.stack((z, gamma))[:, None])
    torch.testing.assert_close(ours.gradient[0], nn.utils.parameters_to_vector(source))


def compare(dim: int, steps: int, plan: Plan) -> dict[str, Timing]:
    """Microseconds a step and data set of the three loops, and of the ``DataLoader`` alone."""
    points = data.sample_points(dim, 1, SEED)[0]
    source, frugal = SourceLoop(points, steps), FrugalLoop(points, steps)
    with tempfile.TemporaryDirectory() as folder:
        ours = StudyLoop(dim, steps, Path(folder))
        loops = {
            "source style": (source, 1),
            "of which the DataLoader": (lambda: [None for _ in source.batches()], 1),
            "frugal eager": (frugal, 1),
            "ours": (ours, ours.EPOCHS * DATASETS),
        }
        candidates = [
            Candidate(name, lambda loop: loop(), lambda i, loop=loop: loop, epochs * data.BATCHES_PER_EPOCH)
            for name, (loop, epochs) in loops.items()
        ]
        return interleave(candidates, "cpu", plan)


def main(arguments: list[str] | None = None) -> int:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=25)
    parser.add_argument("--steps", type=int, default=10, help="K")
    parser.add_argument("--quick", action="store_true", help="few rounds, for a look")
    options = cpu.parse(parser, arguments)
    agree(options.dim, options.steps)
    timings = compare(options.dim, options.steps, QUICK if options.quick else FULL)
    ours, origin = timings["ours"].p20, run.provenance(torch.device("cpu"))
    rows = [
        (name, *(f"{value:.1f}" for value in (t.min, t.p20, t.p50, t.p80)), f"{t.p20 / ours:.3g}x")
        for name, t in timings.items()
    ]
    print(
        f"HVAE, d = {options.dim}, K = {options.steps}, published setting, {results.machine(origin)}, "
        f"torch {origin['torch']}: microseconds a training step and data set (ours: {DATASETS} at a time)\n"
    )
    print(results.table(("loop", "min", "p20", "p50", "p80", "over ours"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
