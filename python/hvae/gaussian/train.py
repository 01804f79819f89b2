"""The training loop: a page of it, with checkpoints from which a killed run goes on to the same numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvae import runs
from hvae.gaussian.data import BATCHES_PER_EPOCH, DataSets
from hvae.gaussian.models import Model
from hvae.gaussian.study import Job, measure
from hvae.runs import StudyError
from hvae_kernels.ops.rmsprop import rmsprop_step_

SECONDS_BETWEEN_CHECKPOINTS = 20.0
N_RECORDS = 200


@dataclass
class State:
    """Everything a job needs to go on; noise is a function of the epoch, so no generator is among it.

    Attributes:
        epochs: how many make the job complete.
        epoch: how many are done.
        flat: the model's parameters ``(R, P)``.
        square_average: RMSProp's running mean of squared gradients, ``(R, P)``.
        seconds: of training so far.
        history: figures of :func:`measure`, and the epoch they belong to.
        oracles: :meth:`Job.oracles`.
    """

    epochs: int
    epoch: int
    flat: Tensor
    square_average: Tensor
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    oracles: dict[str, list[float | None]] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.epoch == self.epochs

    def save(self, path: Path) -> None:
        """Write to ``path``, whole or not at all."""
        runs.save(vars(self), path)

    @classmethod
    def load(cls, path: Path) -> State:
        """What :meth:`save` wrote; StudyError where it is anything else."""
        return runs.load(cls, path)


def not_finite(model: Model, step: int, key: str) -> StudyError:
    """The error for a gradient that is not finite, naming step, parameter and data set; the parameters are whole."""
    for name, gradient in model.gradients.items():
        for data_set, row in enumerate(gradient):
            if not bool(row.isfinite().all()):
                return StudyError(f"{key}: step {step}: the gradient of {name} is not finite, data set {data_set}")
    return StudyError(f"{key}: step {step}: the gradient's norm is not finite")


@torch.no_grad()
def train(
    job: Job, data: DataSets, state: State, seed: int, checkpoint: Path, progress: Callable[[State], None]
) -> None:
    """Bring ``state`` to its end; ``progress`` is called after each epoch, and with each new record of history."""
    replicas = len(data.full.mean)
    model = job.model(replicas, seed)
    model.flat.copy_(state.flat)
    state.flat = model.flat
    batches = [model.prepare(batch) for batch in job.batches(data)]
    total, clip_norm = state.epochs * BATCHES_PER_EPOCH, job.clip_norm
    every = max(1, state.epochs // N_RECORDS)
    start, saved = time.perf_counter() - state.seconds, time.perf_counter()
    for epoch, noise in epochs_with_noise(job, model, replicas, seed, range(state.epoch, state.epochs)):
        for k, batch in enumerate(batches):
            step = epoch * BATCHES_PER_EPOCH + k
            model.write_gradient(batch, None if noise is None else noise[k])
            rate = job.learning_rate(step, total)
            if not rmsprop_step_(model.flat, model.gradient, state.square_average, rate, max_norm=clip_norm):
                raise not_finite(model, step, job.key)
        state.epoch = epoch + 1
        state.seconds = time.perf_counter() - start
        if state.epoch % every == 0 or state.finished:
            state.history.append({"epoch": state.epoch, **measure(job, model, data)})
        if time.perf_counter() - saved > SECONDS_BETWEEN_CHECKPOINTS or state.finished:
            state.save(checkpoint)
            saved = time.perf_counter()
        progress(state)


def epochs_with_noise(
    job: Job, model: Model, replicas: int, seed: int, epochs: range
) -> Iterator[tuple[int, Tensor | None]]:
    """Each epoch and its noise, which a thread draws while the epoch before it is trained."""
    with ThreadPoolExecutor(1) as pool:
        pending = None
        for epoch in epochs:
            noise = (pending or pool.submit(job.noise, model, replicas, seed, epoch)).result()
            pending = pool.submit(job.noise, model, replicas, seed, epoch + 1)
            yield epoch, noise


def initial_state(job: Job, data: DataSets, epochs: int, seed: int) -> State:
    """A job that has not begun, with its oracles and one record of history."""
    model = job.model(len(data.full.mean), seed)
    state = State(epochs, 0, model.flat, torch.zeros_like(model.flat), oracles=job.oracles(data))
    state.history.append({"epoch": 0, **measure(job, model, data)})
    return state
