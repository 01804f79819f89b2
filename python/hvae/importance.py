"""What an auto-encoder's samples come to: its bound, its weights, and the likelihood by importance sampling."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Scored(NamedTuple):
    """What a sample of q came to for each of B observations.

    Attributes:
        log_likelihood: ``log p(x | z)``, ``(B,)``.
        divergence: ``KL(q(z | x) | p(z))``, ``(B,)``.
        log_ratio: ``log p(z) - log q(z | x)`` at the sample, ``(B,)``; minus its mean is the divergence's.
    """

    log_likelihood: Tensor
    divergence: Tensor
    log_ratio: Tensor

    @property
    def bound(self) -> Tensor:
        """Of ``log p(x)``, by one sample of the likelihood."""
        return self.log_likelihood - self.divergence

    @property
    def log_weight(self) -> Tensor:
        """``log p(x, z) - log q(z | x)``: its exponential is p(x) on average."""
        return self.log_likelihood + self.log_ratio


def log_mean_weight(log_weights: Callable[[int, int], Tensor], n_samples: int, at_a_time: int) -> Tensor:
    """``log 1/S sum_s w_s`` for each of B observations, ``(B,)`` in float64.

    Args:
        log_weights: of so many samples, ``(N, B)``, for the number of the batch of samples and its size N.
        n_samples: S.
        at_a_time: how many samples are asked for at once.
    """
    sums = [
        log_weights(number, min(at_a_time, n_samples - done)).double().logsumexp(0)
        for number, done in enumerate(range(0, n_samples, at_a_time))
    ]
    return torch.stack(sums).logsumexp(0) - math.log(n_samples)
