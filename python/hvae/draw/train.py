"""The training loop, with checkpoints from which a killed run goes on to the same numbers, and the final figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvae import experiment, importance
from hvae.draw import study
from hvae.draw.models import Draw
from hvae.draw.study import Job, Setting
from hvae.runs import StudyError

IMAGES_AT_A_TIME, SAMPLES_AT_A_TIME = 20, 50
N_DRAWN = 8


@dataclass(kw_only=True)
class State(experiment.State):
    """With a record an epoch in its history: the mean bounds of ``train`` and ``validation``.

    Attributes:
        model: the model's state dict.
        optimizer: the optimiser's.
        log_likelihoods: of the first validation images, in batches as they are estimated.
        pictures: canvases as intensities, uint8, and windows, of samples and of validation images; empty before.
    """

    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    log_likelihoods: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    pictures: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return bool(self.pictures)


def train(
    job: Job,
    setting: Setting,
    pixels: tuple[Tensor, Tensor],
    state: State,
    path: Path,
    progress: Callable[[State], None],
) -> Draw:
    """Bring ``state`` to its end; ``progress`` is called after each epoch. Returns the model."""
    images, validation = pixels
    model = job.model(images)
    optimizer = torch.optim.Adam(model.parameters(), study.LEARNING_RATE, fused=True)
    checkpoint = experiment.Checkpoints(state, path, progress, model=model, optimizer=optimizer)
    for epoch in checkpoint.epochs(setting.epochs):
        bound = train_epoch(job, images, model, optimizer, epoch)
        if not math.isfinite(bound):
            raise StudyError(f"{job.key}: the bound of epoch {epoch + 1} is not finite")
        held = mean_bound(job, model, validation, epoch)
        state.history.append({"epoch": epoch + 1, "train": bound, "validation": held})
    estimate(job, setting, model, validation, state, checkpoint)
    state.pictures = pictures(job, model, validation)
    checkpoint(force=True)
    return model


def train_epoch(job: Job, images: Tensor, model: Draw, optimizer: torch.optim.Optimizer, epoch: int) -> float:
    """One pass over the images in an order that all jobs share; returns the mean of the bounds on the way."""
    order = torch.randperm(len(images), generator=job.generator("order", epoch))
    total = torch.zeros((), dtype=torch.float64)
    for step, chosen in enumerate(order.split(study.BATCH_SIZE)):
        noise = job.noise((model.steps, len(chosen), model.latent), "epoch", epoch, step)
        bounds = model(images[chosen], noise).bound
        optimizer.zero_grad()
        (-bounds.mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), study.LARGEST_GRADIENT)
        optimizer.step()
        total += bounds.detach().sum()
    return total.item() / len(images)


@torch.no_grad()
def mean_bound(job: Job, model: Draw, images: Tensor, epoch: int) -> float:
    """Over images, one sample each."""
    total = torch.zeros((), dtype=torch.float64)
    for step, batch in enumerate(images.split(study.BATCH_SIZE)):
        noise = job.noise((model.steps, len(batch), model.latent), "validation", epoch, step)
        total += model(batch, noise).bound.sum()
    return total.item() / len(images)


@torch.no_grad()
def log_likelihood(model: Draw, images: Tensor, n_samples: int, noise: Callable[[int, tuple], Tensor]) -> Tensor:
    """``log 1/S sum_s p(x, z_s) / q(z_s | x)`` of images ``(B, 784)``, ``(B,)`` in float64; a few samples at a time."""

    def log_weights(number: int, samples: int) -> Tensor:
        repeated = images.repeat(samples, 1)
        scored = model(repeated, noise(number, (model.steps, len(repeated), model.latent)))
        return scored.log_weight.view(samples, -1)

    return importance.log_mean_weight(log_weights, n_samples, SAMPLES_AT_A_TIME)


def estimate(
    job: Job,
    setting: Setting,
    model: Draw,
    images: Tensor,
    state: State,
    checkpoint: Callable[[], None],
) -> None:
    """Log-likelihoods of the first images, from where the state stands."""
    wanted = images[: setting.likelihood_images]
    for first in range(len(state.log_likelihoods), len(wanted), IMAGES_AT_A_TIME):
        batch = wanted[first : first + IMAGES_AT_A_TIME]

        def noise(number: int, shape: tuple[int, ...], first: int = first) -> Tensor:
            return job.noise(shape, "likelihood", first, number)

        found = log_likelihood(model, batch, setting.likelihood_samples, noise)
        state.log_likelihoods = torch.cat([state.log_likelihoods, found])
        checkpoint()


@torch.no_grad()
def pictures(job: Job, model: Draw, images: Tensor) -> dict[str, Any]:
    """Canvases ``(T, 8, 784)`` and windows ``(T, 8, 5)`` of samples and of reconstructions, and the images."""
    shape = model.steps, N_DRAWN, model.latent
    shown = images[:N_DRAWN]
    _, rebuilt = model.run(shown, job.noise((model.steps, len(shown), model.latent), "pictures", "reconstructions"))
    generated = model.generate(job.noise(shape, "pictures", "samples"))
    kept: dict[str, Any] = {"images": shown * 255}
    for name, picture in (("samples", generated), ("reconstructions", rebuilt)):
        kept[name] = (picture.canvases.sigmoid() * 255).round().to(torch.uint8)
        for part, windows in (("reads", picture.reads), ("writes", picture.writes)):
            if windows is not None:
                kept[f"{name}-{part}"] = windows
    return kept
