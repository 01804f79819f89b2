"""The study's problem: the truth, the reproducible data sets, and all that is kept of them.

The model is ``z ~ N(0, I_d)``, ``x_i | z ~ N(z + Delta, diag(sigma^2))``, one z for a whole data set. Every bound
depends on the data through N, the mean and the CENTRED second moment alone (raw moments would cancel in float32), so
nothing of size N is ever touched again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

N_POINTS = 10_000
BATCH_SIZE = 256
BATCHES_PER_EPOCH = -(-N_POINTS // BATCH_SIZE)


@dataclass(frozen=True)
class Statistics:
    """What the bounds need of ``count`` points: ``mean`` and ``variance`` (divided by count), ``(R, 1, d)``."""

    count: int
    mean: Tensor
    variance: Tensor

    def to(self, dtype: torch.dtype) -> Statistics:
        """The same in another precision."""
        return Statistics(self.count, self.mean.to(dtype), self.variance.to(dtype))


class Truth(NamedTuple):
    """The parameters that made the data, ``(d,)`` in float64."""

    loc: Tensor
    scale: Tensor


class DataSets(NamedTuple):
    """R data sets of one dimension, in float64: of all their points, and of each mini-batch in data order."""

    truth: Truth
    full: Statistics
    batches: tuple[Statistics, ...]


def truth(dim: int) -> Truth:
    """``Delta_i = (i - (d+1)/2)/5`` and ``sigma_i = 0.1 + 0.9 (2i-d-1)^2/(d-1)^2`` for i = 1..d."""
    i = torch.arange(1, dim + 1, dtype=torch.float64)
    return Truth((i - (dim + 1) / 2) / 5, 0.1 + 0.9 * (2 * i - dim - 1) ** 2 / (dim - 1) ** 2)


def sample_points(dim: int, count: int, seed: int, drawn_before: Callable[[], object] | None = None) -> list[Tensor]:
    """The points ``(10000, d)``, float32, of ``count`` data sets: torch's global CPU stream, one set after another.

    ``drawn_before`` draws from that stream first.
    """
    loc, scale = (t.float() for t in truth(dim))
    points = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if drawn_before is not None:
            drawn_before()
        for _ in range(count):
            z = MultivariateNormal(torch.zeros(dim), torch.eye(dim)).sample()
            points.append(MultivariateNormal(z + loc, torch.diag(scale**2)).sample([N_POINTS]))
    return points


def statistics(points: Sequence[Tensor]) -> Statistics:
    """The statistics, in float64, of R data sets of one size, each ``(N, d)``."""
    moments = [torch.var_mean(x.double(), dim=0, correction=0, keepdim=True) for x in points]
    return Statistics(len(points[0]), torch.stack([m for _, m in moments]), torch.stack([v for v, _ in moments]))


def data_sets(dim: int, count: int, seed: int, drawn_before: Callable[[], object] | None = None) -> DataSets:
    """The data sets of :func:`sample_points`, as their statistics."""
    points = sample_points(dim, count, seed, drawn_before)
    batches = zip(*(x.split(BATCH_SIZE) for x in points), strict=True)
    return DataSets(truth(dim), statistics(points), tuple(statistics(batch) for batch in batches))
