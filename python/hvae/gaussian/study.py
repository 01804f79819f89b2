r"""What is run: methods, the two settings, and jobs (one method at one dimension, all data sets together).

``published`` reproduces the printed tables, flaws included: each mini-batch is a whole data set of its own size, and
gradients are clipped where they were. ``corrected`` trains the true bound of all points. Side by side:

=============== ============================================== =====================================
\\               published                                      corrected
=============== ============================================== =====================================
an epoch        40 mini-batches in data order, the last of 16  40 steps on all 10,000 points
epochs          2,000; VB 4,000 above d = 100, 5,000 from 400  2,000
clipping        1e-4: hvae, planar to d = 300, vb to d = 100   none
learning rate   1e-3                                           1e-3, from half-way a cosine to 0
planar          q on z, one layer K times, objective less 1/2  q on y = z + Delta, K layers and a shift
IAF             q on z, objective less 1/2, own data sets      q on y, data sets of all others
VB              q on z; above d = 100 with HVAE's start values q on y
=============== ============================================== =====================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvae import experiment
from hvae.gaussian import data, exact
from hvae.gaussian.data import BATCHES_PER_EPOCH, DataSets, Statistics
from hvae.gaussian.models import (
    AnnealedVAE,
    AutoregressiveVAE,
    HamiltonianVAE,
    MeanField,
    Model,
    PlanarVAE,
    PublishedMeanField,
    draw_network,
)

#: Those that have printed figures, and all.
METHODS = ("hvae", "hvae-untempered", "planar", "iaf", "vb")
ALL_METHODS = (*METHODS, "uha")
SETTINGS = ("corrected", "published")
DIMS = (25, 50, 100, 200, 300, 400)
LEARNING_RATE = 1e-3
CLIP_NORM = 1e-4
BATCH_SIZE_TAKEN_FOR_N = 256

#: The errors by their name in results, each with its title and the floors that add up to its own.
ERRORS = {"theta_error": "Theta error", "delta_error": "Delta error", "sigma_error": "Sigma error"}
FLOORS = {
    "theta_error": ("delta_floor", "sigma_floor"),
    "delta_error": ("delta_floor",),
    "sigma_error": ("sigma_floor",),
}


@dataclass(frozen=True)
class Job:
    """One method at one dimension in one setting; ``n_steps`` is K: steps, bridges or layers, 0 without a flow."""

    setting: str
    dim: int
    method: str
    n_steps: int

    @property
    def key(self) -> str:
        """The name of the job and of its files."""
        return f"{self.setting}-d{self.dim}-{self.method}-K{self.n_steps}"

    @classmethod
    def from_key(cls, key: str) -> Job:
        """The job of that name; ValueError where no job has it."""
        setting, dim, *method, n_steps = key.split("-")
        job = cls(setting, int(dim[1:]), "-".join(method), int(n_steps[1:]))
        if job.key != key or job.setting not in SETTINGS or job.method not in ALL_METHODS:
            raise ValueError(f"no job is named {key}")
        return job

    @property
    def order(self) -> tuple[str, int, int, int]:
        """Where the job stands in tables."""
        return self.setting, self.dim, ALL_METHODS.index(self.method), self.n_steps

    @property
    def published(self) -> bool:
        """Whether this job reproduces the printed tables."""
        return self.setting == "published"

    @property
    def default_epochs(self) -> int:
        """The setting's number of epochs."""
        if self.restarted:
            return 4000 if self.dim < 400 else 5000
        return 2000

    @property
    def clip_norm(self) -> float:
        """Largest norm of one data set's gradient."""
        largest_dim = {"hvae": 300, "planar": 300, "vb": 100}.get(self.method, 0)
        return CLIP_NORM if self.published and self.dim <= largest_dim else math.inf

    @property
    def doubles_variance(self) -> bool:
        """Whether the objective is the printed one without the 1/2: in sigma that of data with twice the variance."""
        return self.published and self.method in ("planar", "iaf")

    def data_sets(self, count: int, seed: int) -> DataSets:
        """What it trains on; the published IAF runs drew their networks from the stream of the data, before these."""
        own = self.published and self.method == "iaf"
        return data.data_sets(self.dim, count, seed, (lambda: draw_network(self.dim)) if own else None)

    def model(self, replicas: int, seed: int) -> Model:
        """The model at its initial values."""
        if self.method == "planar":
            return PlanarVAE(self.dim, self.n_steps, published=self.published, seed=seed, replicas=replicas)
        if self.method == "iaf":
            return AutoregressiveVAE(self.dim, published=self.published, seed=seed, replicas=replicas)
        if self.method == "uha":
            return AnnealedVAE(self.dim, self.n_steps, replicas=replicas)
        if self.method != "vb":
            return HamiltonianVAE(self.dim, self.n_steps, tempered=self.method == "hvae", replicas=replicas)
        if self.published:
            return PublishedMeanField(self.dim, restarted=self.restarted, replicas=replicas)
        return MeanField(self.dim, replicas=replicas)

    @property
    def restarted(self) -> bool:
        """Whether VB began with the Hamiltonian model's values."""
        return self.published and self.method == "vb" and self.dim > 100

    def batches(self, data: DataSets) -> tuple[Statistics, ...]:
        """The statistics that the 40 steps of an epoch train on."""
        return data.batches if self.published else (data.full,) * BATCHES_PER_EPOCH

    def objective(self, data: DataSets) -> Statistics:
        """The statistics of what one step takes for the data: all points, or the first mini-batch."""
        return self.batches(data)[0]

    def learning_rate(self, step: int, n_steps: int) -> float:
        """At step ``step`` of ``n_steps``."""
        progress = 2 * step / n_steps - 1
        if self.published or progress <= 0:
            return LEARNING_RATE
        return LEARNING_RATE * (1 + math.cos(math.pi * progress)) / 2

    def noise(self, model: Model, data_sets: int, seed: int, epoch: int) -> Tensor | None:
        """An epoch's standard normals ``(40, 2, R, B, d)``, which depend on the job, the seed and the epoch alone.

        Data sets are drawn one after another, so that the first are the same however many follow.
        """
        if model.noise_rows is None:
            return None
        shape = (data_sets, BATCHES_PER_EPOCH, *model.noise_rows, self.dim)
        noise = torch.randn(shape, generator=experiment.generator(seed, self.key, epoch))
        return noise.permute(1, 2, 0, 3, 4).contiguous()

    def oracles(self, data: DataSets) -> dict[str, Sequence[float | None]]:
        """What the best possible result of this job would be, for each data set.

        ``delta_floor`` and ``sigma_floor`` are the errors of the maximum-likelihood estimate, ``elbo_ceiling`` its
        log evidence, ``objective_ceiling`` the same for :meth:`objective`. ``sigma_optimum`` is the error at the
        optimum of the job's own objective, in the published setting for mini-batches of 256, where it is known;
        ``sigma_no_flow`` the error where a flow from N(0, I) does nothing.
        """
        loc, scale = exact.maximum_likelihood(data.full)
        objective = self.objective(data)
        objective_loc, objective_scale = exact.maximum_likelihood(objective)
        optimum, no_flow = self._optimum(data)
        unknown: Sequence[None] = [None] * len(data.full.mean)
        return {
            "delta_floor": error(loc, data.truth.loc),
            "sigma_floor": error(scale, data.truth.scale),
            "elbo_ceiling": exact.log_evidence(data.full, loc, scale.log()).tolist(),
            "objective_ceiling": exact.log_evidence(objective, objective_loc, objective_scale.log()).tolist(),
            "sigma_optimum": unknown if optimum is None else error(optimum, data.truth.scale),
            "sigma_no_flow": unknown if no_flow is None else error(no_flow, data.truth.scale),
        }

    def _optimum(self, data: DataSets) -> tuple[Tensor | None, Tensor | None]:
        """Sigma at the optimum of the objective, and where the flow does nothing; None where unknown or senseless."""
        count = BATCH_SIZE_TAKEN_FOR_N if self.published else data.full.count
        variance = data.full.variance * (2 if self.doubles_variance else 1)
        trained = Statistics(count, data.full.mean, variance)
        if self.method in ("vb", "iaf"):  # q contains the posterior, unless VB has one scale for all dimensions
            return None if self.restarted else exact.maximum_likelihood(trained)[1], None
        optimum = None
        if self.method not in ("planar", "uha") and self.n_steps == 1:
            optimum, _ = exact.one_step_optimum(trained, tempered=self.method == "hvae")
        return optimum, exact.no_flow_scale(trained)


def plan(setting: str, dims: list[int], methods: list[str], steps: dict[str, list[int]]) -> list[Job]:
    """The jobs of a command, dimension by dimension; ``steps`` holds the K to run of each method."""
    return [Job(setting, dim, method, k) for dim in dims for method in methods for k in steps[method]]


def method_label(method: str, n_steps: int) -> str:
    """A method's name in tables and figures."""
    return f"{method}, K = {n_steps}" if method not in ("iaf", "vb") else method


def error(estimate: Tensor, target: Tensor) -> list[float]:
    """Sum of squared differences of ``(R, 1, d)`` and ``(d,)``, for each data set."""
    return (estimate - target).square().sum((-2, -1)).tolist()


def measure(job: Job, model: Model, data: DataSets) -> dict[str, list[float]]:
    """A model's figures, one a data set.

    Bounds have all constants; ``elbo`` is the bound of all points, ``objective`` that of :meth:`Job.objective`.
    """
    loc, log_scale = model.estimate()
    delta, sigma = error(loc, data.truth.loc), error(log_scale.exp(), data.truth.scale)
    return {
        "delta_error": delta,
        "sigma_error": sigma,
        "theta_error": [a + b for a, b in zip(delta, sigma, strict=True)],
        "elbo": model.elbo(data.full).tolist(),
        "objective": model.elbo(job.objective(data)).tolist(),
        "log_evidence": exact.log_evidence(data.full, loc, log_scale).tolist(),
    }
