"""The training loop, with checkpoints from which a killed run goes on to the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hvae import experiment
from hvae.runs import StudyError
from hvae.sentences import measure, study
from hvae.sentences.data import Corpus, Sentences
from hvae.sentences.models import SentenceModel
from hvae.sentences.study import Job, Setting

SENTENCES_AT_A_TIME = 20


@dataclass(kw_only=True)
class State(experiment.State):
    """With a record an epoch in its history: mean ``bound`` and ``divergence`` of training and held-out sentences.

    Those of training are with their words dropped.

    Attributes:
        model: the model's state dict.
        optimizer: the optimiser's.
        log_likelihoods: of the first held-out sentences, in batches as they are estimated.
        figures: numbers of the finished model, by :func:`measure.figures`; empty before.
        texts: sentences of the finished model, by :func:`measure.texts`.
    """

    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    log_likelihoods: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    figures: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return bool(self.figures)


class Means(NamedTuple):
    """Of sentences: the bound, and the divergence in it."""

    bound: float
    divergence: float


def train(
    job: Job, setting: Setting, corpus: Corpus, state: State, path: Path, progress: Callable[[State], None]
) -> SentenceModel:
    """Bring ``state`` to its end; ``progress`` is called after each epoch. Returns the model."""
    model = job.model(corpus, setting)
    optimizer = torch.optim.Adam(model.parameters(), study.LEARNING_RATE, fused=True)
    checkpoint = experiment.Checkpoints(state, path, progress, model=model, optimizer=optimizer)
    for epoch in checkpoint.epochs(setting.epochs):
        trained = train_epoch(job, setting, corpus.train, model, optimizer, epoch)
        if not math.isfinite(trained.bound):
            raise StudyError(f"{job.key}: the bound of epoch {epoch + 1} is not finite")
        held_out = means(job, model, corpus.held_out, epoch)
        record = {"epoch": epoch + 1, "bound": trained.bound, "divergence": trained.divergence}
        state.history.append({**record, "held_out": held_out.bound, "held_out_divergence": held_out.divergence})
    estimate(job, setting, model, corpus.held_out, state, checkpoint)
    last = state.history[-1]
    bounds = {"bound": last["held_out"], "divergence": last["held_out_divergence"]}
    state.texts, found = measure.texts(job, model, corpus)
    state.figures = {**bounds, **measure.figures(model, corpus, state.log_likelihoods), **found}
    checkpoint(force=True)
    return model


def train_epoch(
    job: Job, setting: Setting, sentences: Sentences, model: SentenceModel, optimizer: Any, epoch: int
) -> Means:
    """One pass over the sentences in an order that all jobs share; returns means on the way."""
    order = torch.randperm(len(sentences), generator=job.generator("order", epoch))
    total = torch.zeros(2, dtype=torch.float64)
    for step, chosen in enumerate(order.split(study.BATCH_SIZE)):
        batch = sentences.batch(chosen)
        noise = job.noise((len(chosen), model.latent), "epoch", epoch, step)
        scored = model(batch, noise, job.dropped(batch, setting, "dropout", epoch, step))
        weight = setting.weight(job.method, epoch * setting.steps_per_epoch + step)
        optimizer.zero_grad()
        (weight * scored.divergence - scored.log_likelihood).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), study.LARGEST_GRADIENT)
        optimizer.step()
        total += torch.stack([scored.bound.detach().sum(), scored.divergence.detach().sum()])
    return Means(*(total / len(sentences)).tolist())


@torch.no_grad()
def means(job: Job, model: SentenceModel, sentences: Sentences, epoch: int) -> Means:
    """Over sentences, one sample each, all words seen by a decoder that sees any."""
    total = torch.zeros(2, dtype=torch.float64)
    for step, chosen in enumerate(torch.arange(len(sentences)).split(study.BATCH_SIZE)):
        scored = model(sentences.batch(chosen), job.noise((len(chosen), model.latent), "held out", epoch, step))
        total += torch.stack([scored.bound.sum(), scored.divergence.sum()])
    return Means(*(total / len(sentences)).tolist())


def estimate(
    job: Job,
    setting: Setting,
    model: SentenceModel,
    sentences: Sentences,
    state: State,
    checkpoint: Callable[[], None],
) -> None:
    """Log-likelihoods of the first sentences, from where the state stands; without z one sample says all."""
    samples = setting.likelihood_samples if model.latent else 1
    wanted = torch.arange(min(setting.likelihood_sentences, len(sentences)))
    for first in range(len(state.log_likelihoods), len(wanted), SENTENCES_AT_A_TIME):
        batch = sentences.batch(wanted[first : first + SENTENCES_AT_A_TIME])

        def noise(number: int, shape: tuple[int, ...], first: int = first) -> Tensor:
            return job.noise(shape, "likelihood", first, number)

        found = measure.log_likelihood(model, batch, samples, noise)
        state.log_likelihoods = torch.cat([state.log_likelihoods, found])
        checkpoint()
