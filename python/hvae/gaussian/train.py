"""The training loop: a page of it, with checkpoints from which a killed run goes on to the same numbers."""

from __future__ import annotations

import math
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

RMSPROP_ALPHA, RMSPROP_EPS = 0.99, 1e-8
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


def rmsprop_(flat: Tensor, gradient: Tensor, square_average: Tensor, learning_rate: float) -> None:
    """One step of ``torch.optim.RMSprop`` with its default alpha and eps, in place."""
    square_average.mul_(RMSPROP_ALPHA).addcmul_(gradient, gradient, value=1 - RMSPROP_ALPHA)
    flat.addcdiv_(gradient, square_average.sqrt().add_(RMSPROP_EPS), value=-learning_rate)


def clip_(gradient: Tensor, max_norm: float) -> None:
    """``torch.nn.utils.clip_grad_norm_`` of each row of ``gradient (R, P)`` by itself, in place."""
    norm = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    gradient.mul_((max_norm / (norm + 1e-6)).clamp_(max=1.0))


def check_finite(model: Model, step: int, key: str) -> None:
    """Stop before a gradient that is not finite reaches the parameters, and name the step and the parameter."""
    if math.isfinite(model.gradient.sum().item()) or bool(model.gradient.isfinite().all()):
        return
    for name, gradient in model.gradients.items():
        for data_set, row in enumerate(gradient):
            if not bool(row.isfinite().all()):
                raise StudyError(f"{key}: step {step}: the gradient of {name} is not finite, data set {data_set}")


@torch.no_grad()
def train(
    job: Job, data: DataSets, state: State, seed: int, checkpoint: Path, progress: Callable[[State], None]
) -> None:
    """Bring ``state`` to its end; ``progress`` is called after each epoch, and with each new record of history."""
    replicas = len(data.full.mean)
    model = job.model(replicas)
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
            check_finite(model, step, job.key)
            if clip_norm is not None:
                clip_(model.gradient, clip_norm)
            rmsprop_(model.flat, model.gradient, state.square_average, job.learning_rate(step, total))
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


def initial_state(job: Job, data: DataSets, epochs: int) -> State:
    """A job that has not begun, with its oracles and one record of history."""
    model = job.model(len(data.full.mean))
    state = State(epochs, 0, model.flat, torch.zeros_like(model.flat), oracles=job.oracles(data))
    state.history.append({"epoch": 0, **measure(job, model, data)})
    return state
