"""What is run: a setting, which all models of a run share, and jobs, one model each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvae import experiment
from hvae.autoencoder import AutoEncoder
from hvae.data import mnist
from hvae.mnist import networks
from hvae.mnist.annealed import SCORE_WIDTH, AnnealedModel
from hvae.mnist.deep import HviModel, NiceModel, PlanarModel
from hvae.mnist.helmholtz import Helmholtz
from hvae.mnist.models import Model, VampPrior
from hvae.structured.models import StructuredModel

MODELS = ("vae", "iwae", "hvae", "vae-iaf", "hvae-iaf")
STRUCTURED = ("structured", "structured-iaf")
#: The encoder's gradient by a surrogate: the model, and the surrogate.
SURROGATES = {"vae-stl": ("vae", "stl"), "iwae-stl": ("iwae", "stl"), "iwae-dreg": ("iwae", "dreg")}
IMPORTANCE_WEIGHTED = ("iwae", "iwae-stl", "iwae-dreg")
#: Deep latent Gaussian models: a maxout network by default, and a posterior each.
DEEP = ("dlgm", "dlgm-planar", "dlgm-nice", "hvi")
LAYERED = ("dlgm-planar", "dlgm-nice")
#: Annealed Hamiltonian flows, without and with a score.
BRIDGED = ("uha", "ldvi")
ALL_MODELS = (*MODELS, *STRUCTURED, *SURROGATES, *DEEP, *BRIDGED, "helmholtz")
#: Those whose bound can be annealed.
ANNEALED = (*MODELS, *DEEP, *BRIDGED)
#: Those whose decoder's likelihood can be bounded from both sides.
SANDWICHED = (*MODELS, *SURROGATES, *DEEP, *BRIDGED)
PRIORS = ("normal", "vamp")
LEAPFROG_STEPS = {"hvae": 15, "hvae-iaf": 20, "hvi": 8, "uha": 8, "ldvi": 8}
IAF_WIDTH = {"vae-iaf": 640, "hvae-iaf": 1280, "structured-iaf": 160}
CLIP_NORM = {"hvi": 100, "uha": 100, "ldvi": 100}
IMPORTANCE_SAMPLES = 40
COMPONENTS = 500
NODES, NODE_WIDTH, CONTEXT = 5, 16, 64
LATENT, MAXOUT_LATENT = 64, 40
FLOW_LAYERS = 10
#: Of the Helmholtz machine, from below.
UNITS = (200, 10)
#: The log joint's weight in an annealed model's first step.
FIRST_WEIGHT = 0.01
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
#: Printed bounds by layers or steps: of Rezende and Mohamed's table; of uha by Geffner and Domke.
PUBLISHED_DEEP = {
    "dlgm": {0: -89.9},
    "dlgm-planar": {10: -87.5, 20: -86.5, 40: -85.7, 80: -85.1},
    "dlgm-nice": {10: -88.6, 20: -87.9, 40: -87.3, 80: -87.2},
    "uha": {1: -93.4, 8: -89.8, 16: -88.8, 32: -88.1, 64: -87.6},
}
#: Printed log-likelihoods of hvi by steps: Salimans, Kingma and Welling's table 1, by importance sampling.
PUBLISHED_HVI = {1: -88.08, 4: -86.40, 8: -85.51}


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

    @property
    def latent(self) -> int:
        """Latent dimensions that go with the network."""
        return MAXOUT_LATENT if self.network == "maxout" else LATENT

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


#: Letters of a job's key, and the fields that they stand for where these are not 0.
KEYS = {
    "C": "components",
    "G": "gate_epochs",
    "L": "flow_layers",
    "M": "momenta",
    "A": "annealing",
    "N": "clip_norm",
}


@dataclass(frozen=True)
class Job:
    """One model.

    Attributes:
        model: its name.
        n_steps: leapfrog steps.
        samples: importance samples in the training bound.
        components: of a VampPrior, 0 for the normal one.
        gate_epochs: for how long a structured model learns its gates.
        flow_layers: of planar layers or couplings.
        momenta: how often hvi draws one.
        annealing: updates in which the log joint's weight grows to 1; 0 for none.
        clip_norm: the largest norm that an update's gradient may have; 0 for any.
        units: of the Helmholtz machine's layers, from below.
    """

    model: str
    n_steps: int
    samples: int
    components: int = 0
    gate_epochs: int = 0
    flow_layers: int = 0
    momenta: int = 0
    annealing: int = 0
    clip_norm: int = 0
    units: tuple[int, ...] = ()

    def __post_init__(self):
        if self.components and self.model in (*STRUCTURED, *SURROGATES, *DEEP, *BRIDGED, "helmholtz"):
            raise ValueError(f"--prior vamp: {self.model} takes none")
        if self.annealing and self.model not in ANNEALED:
            raise ValueError(f"--annealing: {self.model} takes none")
        if bool(self.gate_epochs) != (self.model in STRUCTURED):
            raise ValueError(f"gate_epochs: expected at least 1 for {STRUCTURED}, 0 for others, got {self.gate_epochs}")
        if self.flow_layers and self.model not in LAYERED:
            raise ValueError(f"flow_layers: expected 0 but for {LAYERED}, got {self.flow_layers}")
        if bool(self.momenta) != (self.model == "hvi"):
            raise ValueError(f"momenta: expected at least 1 for hvi, 0 for others, got {self.momenta}")
        if bool(self.units) != (self.model == "helmholtz"):
            raise ValueError(f"units: expected some for helmholtz, none for others, got {self.units}")

    def latent(self, setting: Setting) -> int:
        """How many latent dimensions the model has, or bits."""
        if self.model == "helmholtz":
            return sum(self.units)
        return NODES * NODE_WIDTH if self.model in STRUCTURED else setting.latent

    @property
    def key(self) -> str:
        """The name of the job and of its files."""
        parts = [self.model, f"K{self.n_steps}", f"S{self.samples}"]
        parts += [f"{letter}{value}" for letter, name in KEYS.items() if (value := getattr(self, name))]
        return "-".join(parts + ["U" + "x".join(map(str, self.units))] * bool(self.units))

    @classmethod
    def from_key(cls, key: str) -> Job:
        """The job of that name; ValueError where no job has it."""
        options = "".join(rf"(?:-{letter}(?P<{name}>\d+))?" for letter, name in KEYS.items())
        found = re.fullmatch(rf"(.+?)-K(\d+)-S(\d+){options}(?:-U(?P<units>\d+(?:x\d+)*))?", key)
        if found:
            given = {name: value for name, value in found.groupdict().items() if value}
            units = tuple(map(int, given.pop("units", "").split("x"))) if "units" in given else ()
            numbers = {name: int(value) for name, value in given.items()}
            job = cls(found[1], int(found[2]), int(found[3]), **numbers, units=units)
            if job.key == key and job.model in ALL_MODELS:
                return job
        raise ValueError(f"no job is named {key}")

    @property
    def order(self) -> tuple[Any, ...]:
        """Where the job stands in tables."""
        options = (getattr(self, name) for name in KEYS.values() if name != "components")
        return ALL_MODELS.index(self.model), self.components, self.n_steps, self.samples, *options, self.units

    @property
    def decoder_passes(self) -> int | None:
        """Of an image in an update, each of which has its gradient taken once, too; None where nothing compares."""
        if self.model not in SANDWICHED:
            return None
        return self.samples * (1 + (max(self.momenta, 1) * (self.n_steps + 1) if self.n_steps else 0))

    @property
    def label(self) -> str:
        """The job's name in tables and figures."""
        parts = [
            self.model,
            f"K = {self.n_steps}" * (self.n_steps > 0),
            f"{self.samples} samples" * (self.samples > 1),
            f"VampPrior of {self.components}" * (self.components > 0),
            f"gates learned for {self.gate_epochs} epochs" * (self.gate_epochs > 0),
            f"{self.flow_layers} layers" * (self.flow_layers > 0),
            f"{self.momenta} momenta" * (self.momenta > 1),
            f"annealed for {self.annealing:,} updates" * (self.annealing > 0),
            self._clipped() * (self.clip_norm != CLIP_NORM.get(self.model, 0)),
            "-".join(map(str, self.units)),
        ]
        return ", ".join(filter(None, parts))

    def _clipped(self) -> str:
        return f"gradients clipped at {self.clip_norm}" if self.clip_norm else "gradients not clipped"

    def published(self, network: str) -> tuple[float | None, float | None, float | None]:
        """The printed figures: bounds of training and of validation, and log-likelihood; of the report, its network.

        Of as many steps, samples and momenta, too.
        """
        if self.model == "hvi":
            return None, None, PUBLISHED_HVI.get(self.n_steps) if self.momenta == 1 else None
        if self.model in PUBLISHED_DEEP:
            return None, PUBLISHED_DEEP[self.model].get(self.flow_layers or self.n_steps), None
        steps, samples = LEAPFROG_STEPS.get(self.model, 0), IMPORTANCE_SAMPLES if self.model == "iwae" else 1
        alike = (self.n_steps, self.samples, self.components) == (steps, samples, 0) and network.startswith("conv")
        return PUBLISHED.get(self.model, (None,) * 3) if alike else (None,) * 3

    def joint_weight(self, step: int) -> float:
        """Of ``log p(x, z)`` in a step of training, counted from 0."""
        return min(1.0, FIRST_WEIGHT + step / self.annealing) if self.annealing else 1.0

    def build(self, setting: Setting, digits: Tensor, **leapfrog: Any) -> AutoEncoder:
        """The model at its first parameters; encoder and decoder are those of all but structured ones and helmholtz.

        Args:
            setting: of the run.
            digits: intensities of training digits, the first of which are the first pseudo-inputs.
            leapfrog: ``memory`` and ``compile``.
        """
        with experiment.drawing_from(setting.generator("parameters")):
            if self.model == "helmholtz":
                return Helmholtz(self.units)
            return self._structured(setting) if self.model in STRUCTURED else self._flat(setting, digits, **leapfrog)

    def _flat(self, setting: Setting, digits: Tensor, **leapfrog: Any) -> Model:
        latent = setting.latent
        parts = networks.encoder(setting.network, 2 * latent), networks.decoder(setting.network, latent), latent
        if self.model in LAYERED:
            return {"dlgm-planar": PlanarModel, "dlgm-nice": NiceModel}[self.model](*parts, self.flow_layers)
        if self.model in BRIDGED:
            score = SCORE_WIDTH if self.model == "ldvi" else None
            return AnnealedModel(*parts, self.n_steps, score, **leapfrog)
        if self.model == "hvi":
            return HviModel(*parts, self.n_steps, self.momenta, **leapfrog)
        return Model(
            *parts,
            self.n_steps,
            IAF_WIDTH.get(self.model, 0),
            **leapfrog,
            prior=VampPrior(mnist.binarise(digits[: self.components])) if self.components else None,
            estimator=SURROGATES[self.model][1] if self.model in SURROGATES else "plain",
        )

    def _structured(self, setting: Setting) -> StructuredModel:
        iaf_width = IAF_WIDTH.get(self.model, 0)
        context = CONTEXT if iaf_width else 0
        latent = self.latent(setting)
        encoder = networks.encoder(setting.network, 2 * latent + context)
        decoder = networks.decoder(setting.network, latent)
        return StructuredModel(encoder, decoder, NODES, NODE_WIDTH, self.gate_epochs, iaf_width, context)

    def noise(self, setting: Setting, shape: tuple[int, ...], *purpose: object) -> Tensor:
        """Standard normals."""
        return torch.randn(shape, generator=setting.generator(self.key, *purpose))


def plan(
    models: list[str],
    leapfrog_steps: int | Sequence[int] | None = None,
    importance_samples: int = IMPORTANCE_SAMPLES,
    components: int = 0,
    gate_epochs: int = 1,
    *,
    flow_layers: int = FLOW_LAYERS,
    momenta: int = 1,
    annealing: int = 0,
    clip_norm: int | None = None,
    units: tuple[int, ...] = UNITS,
) -> list[Job]:
    """The jobs of a command; of several ``leapfrog_steps`` each makes one, and None takes each model's own number.

    So it does of ``clip_norm``: leapfrog steps diverge where a decoder is steep for their first step sizes.

    Raises:
        ValueError: a VampPrior or annealing for a model that takes none.
    """
    jobs = []
    given = [leapfrog_steps] if isinstance(leapfrog_steps, int) else leapfrog_steps
    own = ((model, LEAPFROG_STEPS.get(model, 0)) for model in dict.fromkeys(models))
    for model, n_steps in ((m, k) for m, own_steps in own for k in (given if own_steps and given else [own_steps])):
        job = Job(
            model,
            n_steps,
            samples=importance_samples if model in IMPORTANCE_WEIGHTED else 1,
            components=components,
            gate_epochs=gate_epochs if model in STRUCTURED else 0,
            flow_layers=flow_layers if model in LAYERED else 0,
            momenta=momenta if model == "hvi" else 0,
            annealing=annealing,
            clip_norm=CLIP_NORM.get(model, 0) if clip_norm is None else clip_norm,
            units=units if model == "helmholtz" else (),
        )
        jobs.append(job)
    return jobs
