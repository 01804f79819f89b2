"""What is run: a setting, which all models of a run share, and jobs, one model each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvae.data import mnist
from hvae.mnist import networks
from hvae.mnist.models import Model

MODELS = ("vae", "iwae", "hvae", "vae-iaf", "hvae-iaf")
LEAPFROG_STEPS = {"hvae": 15, "hvae-iaf": 20}
IAF_WIDTH = {"vae-iaf": 640, "hvae-iaf": 1280}
IMPORTANCE_SAMPLES = 40
LATENT = 64
EPOCHS = 40
BATCH_SIZE = 256
LEARNING_RATE = 1e-3
LAST_EPOCHS = 5

#: The printed figures, bounds in nats an image: of training and of validation.
PUBLISHED = {"hvae": (-75.0, -84.0), "iwae": (-77.57, -76.8)}


@dataclass(frozen=True)
class Setting:
    """What all models of a run share; models differ by nothing else, first parameters and order of data included."""

    seed: int
    data: str
    n_train: int
    n_validation: int
    binarisation: str
    network: str
    batch_size: int
    epochs: int
    likelihood_images: int
    likelihood_samples: int

    @property
    def steps_per_epoch(self) -> int:
        """The last step may have fewer images."""
        return -(-self.n_train // self.batch_size)

    def generator(self, *purpose: object) -> torch.Generator:
        """A stream of random numbers for each purpose, so that a run can go on anywhere."""
        digest = hashlib.blake2b(repr((self.seed, *purpose)).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

    def digits(self) -> mnist.Digits:
        """The intensities."""
        return mnist.load(self.data, self.n_train, self.n_validation)

    def training_pixels(self, intensities: Tensor, epoch: int) -> Tensor:
        """Training digits, binarised, in the epoch's order."""
        order = torch.randperm(len(intensities), generator=self.generator("order", epoch))
        drawn = {"round": None, "static": ("train",), "dynamic": ("train", epoch)}[self.binarisation]
        return mnist.binarise(intensities, drawn and self.generator(*drawn))[order]

    def validation_pixels(self, intensities: Tensor) -> Tensor:
        """Validation digits, binarised once and for all."""
        drawn = None if self.binarisation == "round" else self.generator("validation")
        return mnist.binarise(intensities, drawn)


@dataclass(frozen=True)
class Job:
    """One model: ``n_steps`` leapfrog steps, and the number of importance samples in its training bound."""

    model: str
    n_steps: int
    samples: int

    @property
    def key(self) -> str:
        """The name of the job and of its files."""
        return f"{self.model}-K{self.n_steps}-S{self.samples}"

    @classmethod
    def from_key(cls, key: str) -> Job:
        """The job of that name; ValueError where no job has it."""
        *model, n_steps, samples = key.split("-")
        job = cls("-".join(model), int(n_steps[1:]), int(samples[1:]))
        if job.key != key or job.model not in MODELS:
            raise ValueError(f"no job is named {key}")
        return job

    @property
    def order(self) -> tuple[int, int, int]:
        """Where the job stands in tables."""
        return MODELS.index(self.model), self.n_steps, self.samples

    @property
    def label(self) -> str:
        """The job's name in tables and figures."""
        parts = [self.model, f"K = {self.n_steps}" * (self.n_steps > 0), f"{self.samples} samples" * (self.samples > 1)]
        return ", ".join(filter(None, parts))

    def build(self, setting: Setting, **leapfrog: Any) -> Model:
        """The model at its first parameters, encoder and decoder being the same for all jobs of a setting.

        ``leapfrog`` holds ``memory`` and ``compile``.
        """
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(setting.generator("parameters").get_state())
            return Model(
                networks.encoder(setting.network, LATENT),
                networks.decoder(setting.network, LATENT),
                LATENT,
                self.n_steps,
                IAF_WIDTH.get(self.model, 0),
                **leapfrog,
            )

    def noise(self, setting: Setting, shape: tuple[int, ...], *purpose: object) -> Tensor:
        """Standard normals."""
        return torch.randn(shape, generator=setting.generator(self.key, *purpose))


def plan(models: list[str], leapfrog_steps: int | None, importance_samples: int) -> list[Job]:
    """The jobs of a command; ``leapfrog_steps`` None takes each model's own number."""
    jobs = []
    for model in dict.fromkeys(models):
        n_steps = LEAPFROG_STEPS.get(model, 0)
        if n_steps and leapfrog_steps is not None:
            n_steps = leapfrog_steps
        jobs.append(Job(model, n_steps, importance_samples if model == "iwae" else 1))
    return jobs
