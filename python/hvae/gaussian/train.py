"""The training loop: a page of it, with checkpoints from which a killed run goes on to the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hvae import experiment
from hvae.gaussian.data import BATCHES_PER_EPOCH, DataSets
from hvae.gaussian.models import Model
from hvae.gaussian.study import Job, measure
from hvae.runs import StudyError
from hvae_kernels.ops.rmsprop import rmsprop_step_

N_RECORDS = 200


@dataclass(kw_only=True)
class State(experiment.State):
    """With what :func:`measure` says in its history.

    Attributes:
        epochs: how many make the job complete.
        flat: the model's parameters ``(R, P)``.
        square_average: RMSProp's running mean of squared gradients, ``(R, P)``.
        oracles: :meth:`Job.oracles`.
    """

    epochs: int
    flat: Tensor
    square_average: Tensor
    oracles: dict[str, Sequence[float | None]] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.epoch == self.epochs


def not_finite(model: Model, step: int, key: str) -> StudyError:
    """The error for a gradient that is not finite, naming step, parameter and data set; the parameters are whole."""
    for name, gradient in model.gradients.items():
        for data_set, row in enumerate(gradient):
            if not bool(row.isfinite().all()):
                return StudyError(f"{key}: step {step}: the gradient of {name} is not finite, data set {data_set}")
    return StudyError(f"{key}: step {step}: the gradient's norm is not finite")


@torch.no_grad()
def train(job: Job, data: DataSets, state: State, seed: int, path: Path, progress: Callable[[State], None]) -> None:
    """Bring ``state`` to its end; ``progress`` is called after each epoch, and with each new record of history."""
    replicas = len(data.full.mean)
    model = job.model(replicas, seed)
    model.flat.copy_(state.flat)
    state.flat = model.flat
    batches = [model.prepare(batch) for batch in job.batches(data)]
    total, clip_norm = state.epochs * BATCHES_PER_EPOCH, job.clip_norm
    every = max(1, state.epochs // N_RECORDS)
    noises = drawn_ahead(job, model, replicas, seed, range(state.epoch, state.epochs))
    epochs = experiment.Checkpoints(state, path, progress).epochs(state.epochs)
    for epoch, noise in zip(epochs, noises, strict=True):
        for k, batch in enumerate(batches):
            step = epoch * BATCHES_PER_EPOCH + k
            model.write_gradient(batch, None if noise is None else noise[k])
            rate = job.learning_rate(step, total)
            if not rmsprop_step_(model.flat, model.gradient, state.square_average, rate, max_norm=clip_norm):
                raise not_finite(model, step, job.key)
        if (epoch + 1) % every == 0 or epoch + 1 == state.epochs:
            state.history.append({"epoch": epoch + 1, **measure(job, model, data)})


def drawn_ahead(job: Job, model: Model, replicas: int, seed: int, epochs: range) -> Iterator[Tensor | None]:
    """Each epoch's noise, which a thread draws while the epoch before it is trained."""
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for epoch in epochs:
            noise = (pending or pool.submit(job.noise, model, replicas, seed, epoch)).result()
            pending = pool.submit(job.noise, model, replicas, seed, epoch + 1)
            yield noise


def initial_state(job: Job, data: DataSets, epochs: int, seed: int) -> State:
    """A job that has not begun, with its oracles and one record of history."""
    model = job.model(len(data.full.mean), seed)
    square_average, history = torch.zeros_like(model.flat), [{"epoch": 0, **measure(job, model, data)}]
    return State(
        epochs=epochs, flat=model.flat, square_average=square_average, history=history, oracles=job.oracles(data)
    )
