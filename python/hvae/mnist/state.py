"""A job on its way, as it is kept in a file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvae import experiment
from hvae.mnist import distributed


@dataclass(kw_only=True)
class State(experiment.State):
    """With a record an epoch in its history.

    It holds ``train`` and ``validation`` bounds and the one-sample ``elbo`` of the validation images, each a mean over
    images; ``train`` is None while the log joint is annealed.

    Attributes:
        model: the model's state dict.
        optimizer: the optimiser's.
        log_likelihoods: of the validation images that are done, float64.
        sandwich: lower and upper bounds of the log-likelihood of images drawn from the model, ``(2, N)``.
        pictures: what :func:`figures.pictures` shows; empty before the end.
    """

    model: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    log_likelihoods: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    sandwich: Tensor = field(default_factory=lambda: torch.zeros(2, 0, dtype=torch.float64))
    pictures: dict[str, Tensor] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return bool(self.pictures)

    def save(self, path: Path) -> None:
        """Write to ``path``, whole or not at all; of several processes the first does."""
        if distributed.rank() == 0:
            super().save(path)
