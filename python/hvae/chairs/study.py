"""What is run: a setting, which all models of a run share, and jobs, one model each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hvae import experiment
from hvae.chairs.data import Gallery
from hvae.chairs.models import Generator

N_CHAIRS, N_AZIMUTHS, SIZE = 200, 16, 64
EPOCHS = 60
BATCH_SIZE = 32
LEARNING_RATE = 2e-3
LATENT = 32
METHODS = {"gaussian": "a Gaussian a chair", "embedding": "an embedding a chair"}


@dataclass(frozen=True)
class Setting(experiment.Setting):
    """What all models of a run share; the pictures and their order, too."""

    seed: int
    n_chairs: int
    n_azimuths: int
    size: int
    epochs: int
    latent: int

    def gallery(self, watch: Callable[[Iterable], Iterable] = iter) -> Gallery:
        """The pictures; ``watch`` may show how they come, chair by chair."""
        seed = experiment.generator(self.seed, "chairs").initial_seed()
        return Gallery(seed, self.n_chairs, self.n_azimuths, self.size, watch)

    def learning_rate(self, epoch: int) -> float:
        """From ``LEARNING_RATE`` to 0 along half a cosine."""
        return LEARNING_RATE * (1 + math.cos(math.pi * epoch / self.epochs)) / 2


@dataclass(frozen=True)
class Job(experiment.NamedJob):
    """A model of one kind."""

    methods = METHODS

    @property
    def label(self) -> str:
        """Its name in tables and figures."""
        return METHODS[self.name]

    def model(self, setting: Setting) -> Generator:
        """At its first parameters."""
        with experiment.drawing_from(self.generator("parameters")):
            return Generator(setting.n_chairs, setting.size, setting.latent, self.name == "gaussian")
