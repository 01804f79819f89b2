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
from hvae.priors import data, likelihood, study
from hvae.priors.models import VAE
from hvae.priors.study import Job, Points
from hvae.runs import StudyError

SANDWICH_POINTS = 100  # at a time


@dataclass(kw_only=True)
class State(experiment.State):
    """With a record an epoch in its history: the mean training ``bound``, and the ``weight`` of the smaller Gaussian.

    Attributes:
        model: the model's state dict.
        optimizer: the optimiser's.
        sandwich: what :func:`likelihood.sandwich` says of N points drawn from the finished model, ``(3, N)``.
        figures: what :func:`measure` says of the finished model; empty before.
    """

    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    sandwich: Tensor = field(default_factory=lambda: torch.zeros(3, 0, dtype=torch.float64))
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return bool(self.figures)


def train(
    job: Job,
    points: Points,
    state: State,
    epochs: int,
    path: Path,
    progress: Callable[[State], None],
    sandwich: tuple[int, int] = (0, 0),
) -> VAE:
    """Bring ``state`` to its end; ``progress`` is called whenever it could be saved. Returns the model.

    ``sandwich`` says of how many points, drawn from the model, the likelihood is bounded, along how many bridges.
    """
    model = job.model(points)
    optimizer = torch.optim.Adam(model.parameters(), study.LEARNING_RATE, fused=True)
    checkpoint = experiment.Checkpoints(state, path, progress, model=model, optimizer=optimizer)
    for epoch in checkpoint.epochs(epochs):
        bound = train_epoch(job, points, model, optimizer, epoch)
        if not math.isfinite(bound):
            raise StudyError(f"{job.key}: the bound of epoch {epoch + 1} is not finite")
        state.history.append({"epoch": epoch + 1, "bound": bound, "weight": smaller_weight(model)})
    n_points, n_bridges = sandwich
    for start in range(state.sandwich.shape[1], n_points, SANDWICH_POINTS):
        generator = job.generator(job.prior, "sandwich", start)
        done = likelihood.sandwich(model, min(SANDWICH_POINTS, n_points - start), n_bridges, generator)
        state.sandwich = torch.cat([state.sandwich, done], 1)
        checkpoint()
    state.figures = measure(job, model, points)
    checkpoint(force=True)
    return model


def train_epoch(job: Job, points: Points, model: VAE, optimizer: torch.optim.Optimizer, epoch: int) -> float:
    """One pass over the points in an order of its own; returns the mean of the bounds on the way."""
    generator = job.generator(job.prior, "epoch", epoch)
    x = points.train[torch.randperm(len(points.train), generator=generator)]
    noise = torch.randn(x.shape, generator=generator)
    total = torch.zeros((), dtype=torch.float64)
    for x_batch, noise_batch in zip(x.split(study.BATCH_SIZE), noise.split(study.BATCH_SIZE), strict=True):
        bounds = model.bound(x_batch, noise_batch)
        optimizer.zero_grad()
        (-bounds.mean()).backward()
        optimizer.step()
        total += bounds.detach().sum()
    return total.item() / len(x)


@torch.no_grad()
def smaller_weight(model: VAE) -> float | None:
    """The smaller weight of a prior of two Gaussians (they may swap), None for others."""
    weights = model.mixture().logits.softmax(-1)
    return weights.min().item() if len(weights) == 2 else None


@torch.no_grad()
def measure(job: Job, model: VAE, points: Points) -> dict[str, float]:
    """The finished model's figures, means over the test points.

    ``gap`` is the true log density minus the model's, ``gap_error`` its paired standard error. ``generated_weight`` is
    the share of the prior that the decoder takes to the side of the rarer Gaussian.
    """
    truth = data.log_prob(points.test.double())
    generator = job.generator(job.prior, "likelihood")
    bound, estimate = likelihood.by_importance_sampling(model, points.test, study.N_IMPORTANCE_SAMPLES, generator)
    z = model.mixture().sample(study.N_PRIOR_SAMPLES, generator)
    gap = truth - estimate
    return {
        "elbo": bound.mean().item(),
        "log_likelihood": estimate.mean().item(),
        "log_likelihood_by_prior_samples": likelihood.by_prior_samples(model, points.test, z).mean().item(),
        "true_log_likelihood": truth.mean().item(),
        "gap": gap.mean().item(),
        "gap_error": gap.std().item() / math.sqrt(len(gap)),
        "weight": smaller_weight(model),
        "generated_weight": (model.decoder(z).sum(-1) > 0).double().mean().item(),
        "training_weight": (points.train_component == 0).double().mean().item(),
    }
