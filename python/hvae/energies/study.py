"""What is run: a setting, which all flows of a run share, and jobs: a flow, how many layers, an energy."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from hvae import experiment
from hvae.energies.models import FLOWS, Density
from hvae.energies.targets import ENERGIES, Energy

LAYERS = (2, 8, 32)
EPOCHS = 20
#: An epoch is so many updates; nothing else comes in epochs here.
UPDATES = 250
BATCH_SIZE = 256
LEARNING_RATE = 5e-3


@dataclass(frozen=True)
class Setting(experiment.Setting):
    """What all flows of a run share."""

    seed: int
    epochs: int
    samples: int

    @property
    def updates(self) -> int:
        """In all."""
        return self.epochs * UPDATES

    def temperature(self, update: int) -> float:
        """What the energy is multiplied by: from 0.01 to 1 over the first half, so that no mode is missed."""
        return min(1.0, 0.01 + 2 * update / self.updates)

    def learning_rate(self, update: int) -> float:
        """Falls to nothing over the second half."""
        return LEARNING_RATE * min(1.0, 2 - 2 * update / self.updates)


@dataclass(frozen=True)
class Job:
    """A flow of K layers, fitted to one energy."""

    flow: str
    layers: int
    energy: int
    seed: int

    @property
    def key(self) -> str:
        """The name of the job and of its files."""
        return f"{self.flow}-K{self.layers}-U{self.energy}"

    @classmethod
    def from_key(cls, key: str, seed: int) -> Job:
        """The job of that name; ValueError where no job has it."""
        found = re.fullmatch(rf"({'|'.join(FLOWS)})-K([1-9]\d*)-U([{''.join(map(str, ENERGIES))}])", key)
        if found is None:
            raise ValueError(f"no job is named {key}")
        return cls(found[1], int(found[2]), int(found[3]), seed)

    @property
    def order(self) -> tuple[int, int, int]:
        """Where the job stands in tables."""
        return list(FLOWS).index(self.flow), self.layers, self.energy

    @property
    def target(self) -> Energy:
        """The energy itself."""
        return ENERGIES[self.energy]

    def generator(self, *purpose: object) -> torch.Generator:
        """A stream of random numbers for each purpose."""
        return experiment.generator(self.seed, self.key, *purpose)

    def noise(self, count: int, *purpose: object) -> Tensor:
        """Standard normals ``(count, 2)`` of the job's own."""
        return torch.randn(count, 2, generator=self.generator(*purpose))

    def model(self) -> Density:
        """At its first parameters."""
        with experiment.drawing_from(self.generator("parameters")):
            return Density(self.flow, self.layers)
