"""The training loop, with checkpoints from which a killed run goes on to the same numbers, and the final figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvae import experiment
from hvae.energies import study, targets
from hvae.energies.models import Density
from hvae.energies.study import Job, Setting
from hvae.energies.targets import Energy
from hvae.runs import StudyError

SAMPLES_AT_A_TIME = 1 << 16
#: Of the pictures, across the printed window.
PIXELS = 100


@dataclass(kw_only=True)
class State(experiment.State):
    """With a record an epoch in its history: ``loss``, the mean of ``log q + U`` less log-normaliser, untempered.

    Attributes:
        model: the model's state dict.
        optimizer: the optimiser's.
        figures: what :func:`divergence` says of the finished model; empty before.
        picture: how many samples fell into each pixel, ``(PIXELS, PIXELS)``, int32.
    """

    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    picture: Tensor = field(default_factory=lambda: torch.zeros(PIXELS, PIXELS, dtype=torch.int32))

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return bool(self.figures)


def train(job: Job, setting: Setting, state: State, path: Path, progress: Callable[[State], None]) -> Density:
    """Bring ``state`` to its end; ``progress`` is called after each epoch. Returns the model."""
    model = job.model()
    optimizer = torch.optim.Adam(model.parameters(), study.LEARNING_RATE, fused=True)
    checkpoint = experiment.Checkpoints(state, path, progress, model=model, optimizer=optimizer)
    log_normaliser = targets.log_normaliser(job.target)
    for epoch in checkpoint.epochs(setting.epochs):
        loss = train_epoch(job, setting, model, optimizer, epoch) + log_normaliser
        if not math.isfinite(loss):
            raise StudyError(f"{job.key}: the divergence of epoch {epoch + 1} is not finite")
        state.history.append({"epoch": epoch + 1, "loss": loss})
    noise = (job.noise(count, "divergence", number) for number, count in enumerate(_parts(setting.samples)))
    state.figures, state.picture = divergence(model, job.target, noise)
    checkpoint(force=True)
    return model


def train_epoch(job: Job, setting: Setting, model: Density, optimizer: torch.optim.Optimizer, epoch: int) -> float:
    """Some updates; returns the mean of ``log q(z) + U(z)`` on the way."""
    total = torch.zeros((), dtype=torch.float64)
    noise = job.noise(study.UPDATES * study.BATCH_SIZE, "epoch", epoch)
    for step, batch in enumerate(noise.split(study.BATCH_SIZE)):
        update = epoch * study.UPDATES + step
        for group in optimizer.param_groups:
            group["lr"] = setting.learning_rate(update)
        z, log_q = model(batch)
        energy = job.target(z)
        optimizer.zero_grad()
        (log_q + setting.temperature(update) * energy).mean().backward()
        optimizer.step()
        total += (log_q + energy).detach().mean()
    return total.item() / study.UPDATES


def _parts(samples: int) -> list[int]:
    return [min(SAMPLES_AT_A_TIME, samples - done) for done in range(0, samples, SAMPLES_AT_A_TIME)]


@torch.no_grad()
def divergence(model: Density, energy: Energy, noise: Any) -> tuple[dict[str, float], Tensor]:
    """``KL(q | p)`` in nats and its standard error, from ``noise`` in parts; and where the samples fell.

    The mean of ``log q + U`` over samples of q, plus the log-normaliser by quadrature.
    """
    parts, picture = [], torch.zeros(PIXELS * PIXELS, dtype=torch.int64)
    for part in noise:
        z, log_q = model(part)
        parts.append(log_q.double() + energy(z.double()))
        pixel = ((z + targets.WINDOW) * (PIXELS / 2 / targets.WINDOW)).floor().long()
        pixel = pixel[((pixel >= 0) & (pixel < PIXELS)).all(-1)]
        picture += torch.bincount(pixel[:, 0] * PIXELS + pixel[:, 1], minlength=PIXELS * PIXELS)
    values, log_normaliser = torch.cat(parts), targets.log_normaliser(energy)
    figures = {
        "divergence": values.mean().item() + log_normaliser,
        "divergence_error": values.std().item() / math.sqrt(len(values)),
        "log_normaliser": log_normaliser,
    }
    return figures, picture.view(PIXELS, PIXELS).int()
