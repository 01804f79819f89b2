"""The training loop, with checkpoints from which a killed run goes on to the same numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvae import experiment
from hvae.data.mnist import Digits
from hvae.mnist import distributed, figures
from hvae.mnist.likelihood import log_likelihood, sandwich
from hvae.mnist.models import Model
from hvae.mnist.state import State
from hvae.mnist.study import LEARNING_RATE, Job, Setting
from hvae.runs import StudyError
from hvae_kernels.functional import iwae_bound

EVALUATION_BATCH = 250
LIKELIHOOD_IMAGES, LIKELIHOOD_SAMPLES = 20, 50  # at a time


@dataclass
class Trainer:
    """A job on its way.

    Args:
        job: what to train.
        setting: and how.
        state: where it stands, brought to its end by :meth:`run`.
        path: of the checkpoints.
        device: to compute on.
        leapfrog: its ``memory`` and whether to ``compile``.
        decoder: None, or the state dict of one that the model takes and keeps.
        sandwich: of how many images, drawn from the model, the likelihood is bounded, along how many bridges.
        watchers: called with the trainer after every step, epoch and batch of log-likelihoods.
    """

    job: Job
    setting: Setting
    state: State
    path: Path
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    leapfrog: dict[str, Any] = field(default_factory=dict)
    decoder: dict[str, Tensor] | None = None
    sandwich: tuple[int, int] = (0, 0)
    watchers: list[Callable[[Trainer], None]] = field(default_factory=list)

    def run(self, digits: Digits) -> None:
        """Train, estimate log-likelihoods, and keep what the figures show."""
        state, device = self.state, self.device
        self.model = self.job.build(self.setting, digits.train, **self.leapfrog).to(device)
        if self.decoder is not None:
            assert isinstance(self.model, Model)
            self.model.freeze(self.decoder)
        self.optimizer = torch.optim.Adam(self.model.parameters(), LEARNING_RATE)
        parts = {"model": self.model, "optimizer": self.optimizer}
        checkpoint = experiment.Checkpoints(state, self.path, lambda state: self.report(), **parts)
        self.parallel = distributed.parallel(self.model)
        self.step = state.epoch * self.setting.steps_per_epoch
        validation = self.setting.validation_pixels(digits.validation).to(device)
        for epoch in checkpoint.epochs(self.setting.epochs):
            pixels = self.setting.training_pixels(digits.train, epoch).to(device)
            train = self.train_epoch(pixels)
            bound, elbo = self.evaluate(validation)
            state.history.append({"epoch": epoch + 1, "train": train, "validation": bound, "elbo": elbo})
        self.model.begin_epoch(state.epoch)
        self.model.eval()
        self.estimate_log_likelihoods(validation, checkpoint)
        self.bound_both_sides(checkpoint)
        state.pictures = figures.pictures(self.model, validation, self.setting.generator("pictures"))
        checkpoint(force=True)

    def report(self) -> None:
        """Tell the watchers."""
        for watcher in self.watchers:
            watcher(self)

    def train_epoch(self, pixels: Tensor) -> float | None:
        """One pass over the images ``(N, 784)``; returns the mean of the bounds on the way.

        None where the log joint was annealed in any of its steps: what was maximised then is no bound.
        """
        self.model.train()
        self.model.begin_epoch(self.state.epoch)
        annealed = self.job.joint_weight(self.step) < 1
        total = torch.zeros((), dtype=torch.float64)
        for step, batch in enumerate(pixels.split(self.setting.batch_size)):
            noise = self.noise((self.job.samples, len(batch)), "train", self.state.epoch, step)
            self.model.annealing = self.job.joint_weight(self.step)
            log_weights = self.parallel(distributed.share(batch), distributed.share(noise, 1))
            bounds = iwae_bound(log_weights)
            # DistributedDataParallel averages over the processes, of which some may have an image more
            loss = self.model.penalty() - bounds.sum() * (distributed.size() / len(batch))
            self.optimizer.zero_grad()
            loss.backward()
            self.bound_gradients(step)
            self.optimizer.step()
            total += bounds.detach().double().sum().cpu()
            self.step += 1
            self.report()
        mean = distributed.all_reduce(total).item() / len(pixels)
        return None if annealed else mean

    def bound_gradients(self, step: int) -> None:
        """Clip the gradient; stop before one that is not finite reaches the parameters, and name the step.

        A norm that overflows leaves no direction: clipped, such a gradient is zero.
        """
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        norm = torch.nn.utils.get_total_norm(gradients.values())
        if not bool(norm.isfinite()):
            where = f"{self.job.key}: epoch {self.state.epoch + 1}, step {step}"
            for name, gradient in gradients.items():
                if not bool(gradient.isfinite().all()):
                    raise StudyError(f"{where}: the gradient of {name} is not finite")
            if not self.job.clip_norm:
                raise StudyError(f"{where}: the norm of the gradient is not finite; --clip-norm bounds it")
        if self.job.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.job.clip_norm, norm)

    @torch.no_grad()
    def evaluate(self, pixels: Tensor) -> tuple[float, float]:
        """Mean bound and mean one-sample bound of the images, with running statistics and the training's samples."""
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for number, batch in enumerate(pixels.split(EVALUATION_BATCH)):
            noise = self.noise((self.job.samples, len(batch)), "validation", self.state.epoch, number)
            log_weights = self.model(distributed.share(batch), distributed.share(noise, 1)).double().cpu()
            total += torch.stack([iwae_bound(log_weights).sum(), log_weights.mean(0).sum()])
        bound, elbo = (distributed.all_reduce(total) / len(pixels)).tolist()
        return bound, elbo

    def estimate_log_likelihoods(self, pixels: Tensor, checkpoint: Callable[[], None]) -> None:
        """Of the images that :attr:`State.log_likelihoods` lacks."""
        pixels = pixels[: self.setting.likelihood_images]
        for start in range(len(self.state.log_likelihoods), len(pixels), LIKELIHOOD_IMAGES):
            batch = pixels[start : start + LIKELIHOOD_IMAGES]
            noise = functools.partial(self.likelihood_noise, start, len(batch))
            done = log_likelihood(self.model, batch, self.setting.likelihood_samples, noise, LIKELIHOOD_SAMPLES)
            self.state.log_likelihoods = torch.cat([self.state.log_likelihoods, done])
            checkpoint()

    def bound_both_sides(self, checkpoint: Callable[[], None]) -> None:
        """Of the drawn images that :attr:`State.sandwich` lacks, a few at a time."""
        n_images, n_bridges = self.sandwich
        for start in range(self.state.sandwich.shape[1], n_images, LIKELIHOOD_IMAGES):
            images = min(LIKELIHOOD_IMAGES, n_images - start)
            generator = self.setting.generator(self.job.key, "sandwich", start)
            assert isinstance(self.model, Model)
            done = sandwich(self.model, images, n_bridges, generator)
            self.state.sandwich = torch.cat([self.state.sandwich, done], 1)
            checkpoint()

    def likelihood_noise(self, start: int, images: int, number: int, samples: int) -> Tensor:
        """For the ``number``-th batch of samples of the images from ``start`` on."""
        return self.noise((samples, images), "likelihood", start, number)

    def noise(self, shape: tuple[int, ...], *purpose: object) -> Tensor:
        """Standard normals, the same however many processes there are."""
        shape = (*shape, self.model.noise_features)
        return self.job.noise(self.setting, shape, *purpose).to(self.device)
