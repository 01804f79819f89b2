"""What is run: a setting, which all models of a run share, and jobs, one model each."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from hvae import experiment
from hvae.data import mnist
from hvae.draw.models import READ, Draw

STEPS = (10, 25)
EPOCHS = 40
LIKELIHOOD_IMAGES, LIKELIHOOD_SAMPLES = 100, 1000
BATCH_SIZE = 100
LEARNING_RATE = 1e-3
#: Of the gradient's norm.
LARGEST_GRADIENT = 10.0
#: Bounds in nats an image of the paper, T = 64, binarised MNIST, by what is read; quoted from memory.
PUBLISHED = {READ: -80.97, 0: -87.40}


@dataclass(frozen=True)
class Setting(experiment.Setting):
    """What all models of a run share; the order of data, too."""

    seed: int
    data: str
    n_train: int
    n_validation: int
    epochs: int
    likelihood_images: int
    likelihood_samples: int

    @property
    def steps_per_epoch(self) -> int:
        """The last step may have fewer images."""
        return -(-self.n_train // BATCH_SIZE)

    def pixels(self) -> tuple[Tensor, Tensor]:
        """Training and validation images ``(N, 784)``, bits."""
        digits = mnist.load(self.data, self.n_train, self.n_validation)
        return mnist.binarise(digits.train), mnist.binarise(digits.validation)


@dataclass(frozen=True)
class Job:
    """A model of T steps, whose attention reads ``read`` filters a side; 0 without attention."""

    read: int
    steps: int
    seed: int

    @property
    def key(self) -> str:
        """The name of the job and of its files."""
        own = f"-R{self.read}" if self.read not in (0, READ) else ""
        return f"{'attention' if self.attention else 'whole'}-T{self.steps}{own}"

    @classmethod
    def from_key(cls, key: str, seed: int) -> Job:
        """The job of that name; ValueError where no job has it."""
        found = re.fullmatch(r"(attention|whole)-T([1-9]\d*)(?:-R([1-9]\d*))?", key)
        if found is not None:
            job = cls(int(found[3] or READ) if found[1] == "attention" else 0, int(found[2]), seed)
            if job.key == key:
                return job
        raise ValueError(f"no job is named {key}")

    @property
    def attention(self) -> bool:
        """Whether there is any."""
        return self.read > 0

    @property
    def order(self) -> tuple[int, bool, int]:
        """Where the job stands in tables."""
        return self.steps, not self.attention, self.read

    @property
    def label(self) -> str:
        """The job's name in tables and figures."""
        reader = f"attention, reads {self.read} x {self.read}" if self.attention else "the whole image"
        return f"T = {self.steps}, {reader}"

    def generator(self, *purpose: object) -> torch.Generator:
        """A stream of random numbers for each purpose."""
        return experiment.generator(self.seed, *purpose)

    def noise(self, shape: tuple[int, ...], *purpose: object) -> Tensor:
        """Standard normals of the job's own."""
        return torch.randn(shape, generator=self.generator(self.key, *purpose))

    def model(self, images: Tensor) -> Draw:
        """At its first parameters, the canvas at the logits of how often the pixels of training images are on."""
        rates = (images.double().sum(0) + 1) / (len(images) + 2)
        with experiment.drawing_from(self.generator("parameters")):
            return Draw(self.steps, self.attention, canvas=rates.logit().float(), read=self.read)
