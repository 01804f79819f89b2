"""What is run: a setting, which all models of a run share, and jobs, one model each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvae import experiment
from hvae.autoencoder import AutoEncoder
from hvae.data import mnist
from hvae.mnist import networks
from hvae.mnist.models import Model, VampPrior
from hvae.structured.models import StructuredModel

MODELS = ("vae", "iwae", "hvae", "vae-iaf", "hvae-iaf")
STRUCTURED = ("structured", "structured-iaf")
#: The encoder's gradient by a surrogate: the model, and the surrogate.
SURROGATES = {"vae-stl": ("vae", "stl"), "iwae-stl": ("iwae", "stl"), "iwae-dreg": ("iwae", "dreg")}
ALL_MODELS = (*MODELS, *STRUCTURED, *SURROGATES)
PRIORS = ("normal", "vamp")
LEAPFROG_STEPS = {"hvae": 15, "hvae-iaf": 20}
IAF_WIDTH = {"vae-iaf": 640, "hvae-iaf": 1280, "structured-iaf": 160}
IMPORTANCE_SAMPLES = 40
COMPONENTS = 500
NODES, NODE_WIDTH, CONTEXT = 5, 16, 64
LATENT = 64
EPOCHS = 40
BATCH_SIZE = 256
LEARNING_RATE = 1e-3
LAST_EPOCHS = 5

#: The printed figures in nats an image: bounds of training and of validation, and log-likelihood.
PUBLISHED = {
    "hvae": (-75.0, -84.0, None),
    "iwae": (-77.57, -76.8, None),
    "vae-iaf": (None, -102.6, -95.3),
    "structured": (None, -79.4, -73.7),
    "structured-iaf": (None, -77.7, -71.87),
}


@dataclass(frozen=True)
class Setting(experiment.Setting):
    """What all models of a run share; the order of data, too, and of all but structured ones the first parameters."""

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
        return experiment.generator(repr((self.seed, *purpose)))

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
    """One model: ``n_steps`` leapfrog steps, and the number of importance samples in its training bound.

    ``components`` are a VampPrior's, 0 for the normal one; ``gate_epochs`` for how long a structured model learns its
    gates.
    """

    model: str
    n_steps: int
    samples: int
    components: int = 0
    gate_epochs: int = 0

    def __post_init__(self):
        if self.components and self.model in (*STRUCTURED, *SURROGATES):
            raise ValueError(f"--prior vamp: {self.model} takes none")
        if bool(self.gate_epochs) != (self.model in STRUCTURED):
            raise ValueError(f"gate_epochs: expected at least 1 for {STRUCTURED}, 0 for others, got {self.gate_epochs}")

    @property
    def latent(self) -> int:
        """How many latent dimensions the model has."""
        return NODES * NODE_WIDTH if self.model in STRUCTURED else LATENT

    @property
    def key(self) -> str:
        """The name of the job and of its files."""
        rest = f"-C{self.components}" * bool(self.components) + f"-G{self.gate_epochs}" * bool(self.gate_epochs)
        return f"{self.model}-K{self.n_steps}-S{self.samples}{rest}"

    @classmethod
    def from_key(cls, key: str) -> Job:
        """The job of that name; ValueError where no job has it."""
        found = re.fullmatch(r"(.+)-K(\d+)-S(\d+)(?:-C(\d+))?(?:-G(\d+))?", key)
        job = found and cls(found[1], *(int(number or 0) for number in found.groups()[1:]))
        if not job or job.key != key or job.model not in ALL_MODELS:
            raise ValueError(f"no job is named {key}")
        return job

    @property
    def order(self) -> tuple[int, ...]:
        """Where the job stands in tables."""
        return ALL_MODELS.index(self.model), self.components, self.n_steps, self.samples, self.gate_epochs

    @property
    def label(self) -> str:
        """The job's name in tables and figures."""
        parts = [
            self.model,
            f"K = {self.n_steps}" * (self.n_steps > 0),
            f"{self.samples} samples" * (self.samples > 1),
            f"VampPrior of {self.components}" * (self.components > 0),
            f"gates learned for {self.gate_epochs} epochs" * (self.gate_epochs > 0),
        ]
        return ", ".join(filter(None, parts))

    def build(self, setting: Setting, digits: Tensor, **leapfrog: Any) -> AutoEncoder:
        """The model at its first parameters; encoder and decoder are the same for all but the structured jobs.

        Args:
            setting: of the run.
            digits: intensities of training digits, the first of which are the first pseudo-inputs.
            leapfrog: ``memory`` and ``compile``.
        """
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(setting.generator("parameters").get_state())
            return self._structured(setting) if self.model in STRUCTURED else self._flat(setting, digits, **leapfrog)

    def _flat(self, setting: Setting, digits: Tensor, **leapfrog: Any) -> Model:
        return Model(
            networks.encoder(setting.network, 2 * self.latent),
            networks.decoder(setting.network, self.latent),
            self.latent,
            self.n_steps,
            IAF_WIDTH.get(self.model, 0),
            **leapfrog,
            prior=VampPrior(mnist.binarise(digits[: self.components])) if self.components else None,
            estimator=SURROGATES[self.model][1] if self.model in SURROGATES else "plain",
        )

    def _structured(self, setting: Setting) -> StructuredModel:
        iaf_width = IAF_WIDTH.get(self.model, 0)
        context = CONTEXT if iaf_width else 0
        encoder = networks.encoder(setting.network, 2 * self.latent + context)
        decoder = networks.decoder(setting.network, self.latent)
        return StructuredModel(encoder, decoder, NODES, NODE_WIDTH, self.gate_epochs, iaf_width, context)

    def noise(self, setting: Setting, shape: tuple[int, ...], *purpose: object) -> Tensor:
        """Standard normals."""
        return torch.randn(shape, generator=setting.generator(self.key, *purpose))


def plan(
    models: list[str],
    leapfrog_steps: int | None = None,
    importance_samples: int = IMPORTANCE_SAMPLES,
    components: int = 0,
    gate_epochs: int = 1,
) -> list[Job]:
    """The jobs of a command; ``leapfrog_steps`` None takes each model's own number.

    Raises:
        ValueError: a VampPrior for a model that takes none.
    """
    jobs = []
    for model in dict.fromkeys(models):
        n_steps = LEAPFROG_STEPS.get(model, 0)
        if n_steps and leapfrog_steps is not None:
            n_steps = leapfrog_steps
        samples = importance_samples if SURROGATES.get(model, (model,))[0] == "iwae" else 1
        jobs.append(Job(model, n_steps, samples, components, gate_epochs if model in STRUCTURED else 0))
    return jobs
