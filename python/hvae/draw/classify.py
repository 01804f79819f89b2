"""The task ``classify``: cluttered digits, by glimpses or by a convolutional network; setting, jobs and training."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvae import experiment
from hvae.data import mnist
from hvae.data.clutter import cluttered
from hvae.draw import study
from hvae.draw.classifiers import Convolutional, Reader
from hvae.draw.train import State
from hvae.runs import StudyError

GLIMPSES = (4, 8)
SIDE, PIECES = 100, 8
EVALUATION_BATCH = 250
N_SHOWN = 8
#: At 1e-3 a reader of 8 glimpses loses the digits for good in the sixth epoch of 60,000: gradients' norms pass 10,000.
LEARNING_RATE = 3e-4
#: Errors in per cent of the papers, 100 x 100 with 8 pieces: of differentiable glimpses, and of RAM's, which are not.
PUBLISHED = {4: (4.18, 9.41), 8: (3.36, 8.11)}
PUBLISHED_CONVOLUTIONAL = 14.35


class Digits(NamedTuple):
    """Intensities ``(N, 784)`` and labels ``(N,)``."""

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Setting(experiment.Setting):
    """What all models of a run share; the images, too."""

    seed: int
    task: str
    data: str
    n_train: int
    n_validation: int
    epochs: int
    side: int
    pieces: int

    @property
    def steps_per_epoch(self) -> int:
        """The last step may have fewer images."""
        return -(-self.n_train // study.BATCH_SIZE)

    def digits(self) -> tuple[Digits, Digits]:
        """Those of training and of validation."""
        arguments = self.data, self.n_train, self.n_validation
        train, validation = map(Digits, mnist.load(*arguments), mnist.load_labels(*arguments))
        return train, validation

    def generator(self, *purpose: object) -> torch.Generator:
        """A stream of random numbers for each purpose."""
        return experiment.generator(self.seed, *purpose)

    def images(self, pixels: Tensor, others: Tensor, *purpose: object) -> Tensor:
        """Cluttered images ``(B, side, side)`` of digits, uint8."""
        images, _ = cluttered(pixels, others, self.side, self.pieces, self.generator("clutter", *purpose))
        return images

    def validation(self, digits: Digits) -> Tensor:
        """All of validation, cluttered once and for all, ``(N, side, side)``."""
        return self.images(digits.pixels, digits.pixels, "validation")


@dataclass(frozen=True)
class Job:
    """A reader of T glimpses; the convolutional network where T is 0."""

    glimpses: int

    @property
    def key(self) -> str:
        """The name of the job and of its files."""
        return f"reader-T{self.glimpses}" if self.glimpses else "convolutional"

    @classmethod
    def from_key(cls, key: str) -> Job:
        """The job of that name; ValueError where no job has it."""
        found = re.fullmatch(r"convolutional|reader-T([1-9]\d*)", key)
        if found is None:
            raise ValueError(f"no job is named {key}")
        return cls(int(found[1] or 0))

    @property
    def order(self) -> tuple[int]:
        """Where the job stands in tables."""
        return (self.glimpses,)

    @property
    def label(self) -> str:
        """The job's name in tables and figures."""
        return f"{self.glimpses} glimpses" if self.glimpses else "convolutional"

    @property
    def published(self) -> tuple[float | None, float | None]:
        """The printed errors, and RAM's beside those of differentiable glimpses."""
        return PUBLISHED.get(self.glimpses, (None, None)) if self.glimpses else (PUBLISHED_CONVOLUTIONAL, None)

    def model(self, setting: Setting) -> nn.Module:
        """At its first parameters."""
        with experiment.drawing_from(setting.generator("parameters")):
            return Reader(self.glimpses, setting.side) if self.glimpses else Convolutional(setting.side)


def train(
    job: Job,
    setting: Setting,
    digits: tuple[Digits, Digits],
    state: State,
    path: Path,
    progress: Callable[[State], None],
) -> nn.Module:
    """Bring ``state`` to its end; ``progress`` is called after each epoch. Returns the model."""
    model = job.model(setting)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=True)
    checkpoint = experiment.Checkpoints(state, path, progress, model=model, optimizer=optimizer)
    images = setting.validation(digits[1])
    for epoch in checkpoint.epochs(setting.epochs):
        loss, error = train_epoch(setting, digits[0], model, optimizer, epoch)
        if not math.isfinite(loss):
            raise StudyError(f"{job.key}: the loss of epoch {epoch + 1} is not finite")
        held_loss, held = evaluate(model, images, digits[1].labels)
        record = {"train": error, "validation": held, "train_loss": loss, "validation_loss": held_loss}
        state.history.append({"epoch": epoch + 1, **record})
    state.pictures = pictures(model, images[:N_SHOWN], digits[1].labels[:N_SHOWN])
    checkpoint(force=True)
    return model


def train_epoch(
    setting: Setting, digits: Digits, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int
) -> tuple[float, float]:
    """One pass over the digits, in places and clutter of the epoch's own that all jobs share; see :func:`evaluate`."""
    order = torch.randperm(len(digits.labels), generator=setting.generator("order", epoch))
    total = torch.zeros(2, dtype=torch.float64)
    for step, chosen in enumerate(order.split(study.BATCH_SIZE)):
        images = setting.images(digits.pixels[chosen], digits.pixels, epoch, step)
        loss, wrong = measures(model(images / 255), digits.labels[chosen])
        optimizer.zero_grad()
        (loss / len(chosen)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), study.LARGEST_GRADIENT)
        optimizer.step()
        total += torch.stack([loss.detach().double(), wrong])
    loss_mean, error = (total / len(order)).tolist()
    return loss_mean, error


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """The mean cross-entropy in nats, and the part of the images that is classified wrong."""
    total = torch.zeros(2, dtype=torch.float64)
    for batch, given in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
        loss, wrong = measures(model(batch / 255), given)
        total += torch.stack([loss.double(), wrong])
    loss_mean, error = (total / len(images)).tolist()
    return loss_mean, error


def measures(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over a batch: of the cross-entropy, and how many are wrong."""
    labels = labels.long()
    return F.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) != labels).sum().double()


@torch.no_grad()
def pictures(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Images ``(B, side, side)``, uint8, labels and what they are taken for; of a reader its numbers ``(T, B, 5)``."""
    kept = {"images": images, "labels": labels}
    if isinstance(model, Reader):
        logits, kept["reads"] = model.run(images / 255)
    else:
        logits = model(images / 255)
    return kept | {"predicted": logits.argmax(-1)}
