"""What is run: settings and jobs, a job being one prior on one data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hvae import experiment
from hvae.priors import data, models

N_TRAIN, N_TEST = 10_000, 5_000
BATCH_SIZE = 256
STEPS_PER_EPOCH = -(-N_TRAIN // BATCH_SIZE)
EPOCHS = 250
LEARNING_RATE = 1e-3
N_IMPORTANCE_SAMPLES = 2_000
N_PRIOR_SAMPLES = 20_000

#: Every prior's name, and what the report calls it.
PRIORS = {
    "normal": "standard normal",
    "mixture-fixed": "two Gaussians, weights 1/2",
    "mixture": "two Gaussians, weights learned",
    "vamp": "VampPrior",
}
#: The printed log-likelihoods, mean and standard deviation.
PUBLISHED = {"normal": (-0.76, 0.14), "mixture-fixed": (-0.82, 0.18), "mixture": (-1.0, 0.29)}


class Points(NamedTuple):
    """A data set ``(N, 2)``, and which Gaussian each point came from."""

    train: Tensor
    train_component: Tensor
    test: Tensor
    test_component: Tensor


@dataclass(frozen=True)
class Job:
    """One prior on one data set; ``components`` is the number of pseudo-inputs, for the VampPrior alone."""

    prior: str
    dataset: int
    components: int
    seed: int

    @property
    def key(self) -> str:
        """The name of the job and of its files."""
        return f"{self.prior}-{self.dataset}"

    @classmethod
    def from_key(cls, key: str, components: int, seed: int) -> Job:
        """The job of that name; ValueError where no job has it."""
        prior, _, dataset = key.rpartition("-")
        if prior not in PRIORS or not dataset.isdecimal():
            raise ValueError(f"no job is named {key}")
        return cls(prior, int(dataset), components, seed)

    @property
    def order(self) -> tuple[int, int]:
        """Where the job stands in tables."""
        return list(PRIORS).index(self.prior), self.dataset

    def generator(self, *purpose: object) -> torch.Generator:
        """A stream of random numbers for each purpose, the same for all priors unless the prior is in it."""
        return experiment.generator(self.seed, self.dataset, *purpose)

    def points(self) -> Points:
        """The data set."""
        generator = self.generator("points")
        return Points(*data.sample(N_TRAIN, generator), *data.sample(N_TEST, generator))

    def model(self, points: Points) -> models.VAE:
        """The auto-encoder at its first parameters, its networks the same for all priors."""
        with experiment.drawing_from(self.generator("parameters")):
            encoder, decoder = models.network(2 * models.LATENT), models.network(2)
        return models.VAE(encoder, decoder, self._prior(points))

    def _prior(self, points: Points) -> torch.nn.Module:
        if self.prior == "normal":
            return models.StandardNormal()
        if self.prior == "vamp":
            return models.VampPrior(points.train[: self.components])
        return models.TwoGaussians(learn_weights=self.prior == "mixture")
