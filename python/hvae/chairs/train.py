"""The training loop, with checkpoints from which a killed run goes on to the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hvae import experiment
from hvae.chairs import measure, study
from hvae.chairs.data import Gallery
from hvae.chairs.models import Generator
from hvae.chairs.study import Job, Setting
from hvae.runs import StudyError


@dataclass(kw_only=True)
class State(experiment.State):
    """With a record an epoch in its history: the mean ``bound`` of training pictures, the error of ``unseen`` ones.

    Attributes:
        model: the model's state dict.
        optimizer: the optimiser's.
        figures: numbers of the finished model, by :func:`measure.figures`; empty before.
        pictures: of the finished model, by :func:`measure.pictures`, uint8.
    """

    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return bool(self.figures)


def train(
    job: Job, setting: Setting, gallery: Gallery, state: State, path: Path, progress: Callable[[State], None]
) -> Generator:
    """Bring ``state`` to its end; ``progress`` is called after each epoch. Returns the model."""
    model = job.model(setting)
    optimizer = torch.optim.Adam(model.parameters(), study.LEARNING_RATE, fused=True)
    checkpoint = experiment.Checkpoints(state, path, progress, model=model, optimizer=optimizer)
    unseen = gallery.indices(unseen=True)
    for epoch in checkpoint.epochs(setting.epochs):
        bound = train_epoch(job, setting, gallery, model, optimizer, epoch)
        if not math.isfinite(bound):
            raise StudyError(f"{job.key}: the bound of epoch {epoch + 1} is not finite")
        error = measure.quality(*measure.predicted(model, gallery, unseen)).error
        state.history.append({"epoch": epoch + 1, "bound": bound, "unseen": error})
    state.pictures = measure.pictures(job, model, gallery)
    state.figures = measure.figures(model, gallery)
    checkpoint(force=True)
    return model


def train_epoch(
    job: Job, setting: Setting, gallery: Gallery, model: Generator, optimizer: torch.optim.Optimizer, epoch: int
) -> float:
    """One pass over the pictures that may be seen, in an order that all jobs share; returns the mean bound on the way.

    A chair's z is behind all of its pictures, so each of n bears 1/n of its divergence.
    """
    index = gallery.indices(unseen=False)
    share = 1 / torch.bincount(index[:, 0], minlength=setting.n_chairs)
    order = torch.randperm(len(index), generator=job.generator("order", epoch))
    for group in optimizer.param_groups:
        group["lr"] = setting.learning_rate(epoch)
    total = torch.zeros((), dtype=torch.float64)
    for step, chosen in enumerate(order.split(study.BATCH_SIZE)):
        batch = index[chosen]
        noise = job.noise((len(batch), setting.latent), "epoch", epoch, step)
        scored = model(gallery.condition(batch), gallery.target(batch), noise)
        bounds = scored.image + scored.mask - scored.divergence * share[batch[:, 0]]
        optimizer.zero_grad()
        (-bounds.mean()).backward()
        optimizer.step()
        total += bounds.detach().sum()
    return total.item() / len(index)
