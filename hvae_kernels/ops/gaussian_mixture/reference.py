"""Reference: every component's log density from differences, nothing expanded."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_joint(value: Tensor, log_weight: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """``log_weight + log N(value; loc, exp(2 log_scale))`` of every component, ``(..., C)``; weights normalised."""
    t = (value.unsqueeze(-2) - loc) * torch.exp(-log_scale)
    normaliser = log_scale.sum(-1) + 0.5 * math.log(2 * math.pi) * loc.shape[-1]
    return log_weight - normaliser - 0.5 * t.square().sum(-1)


def gaussian_mixture_log_prob(value: Tensor, mixture_logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """Arguments as for the public function."""
    return log_joint(value, mixture_logits.log_softmax(-1), loc, log_scale).logsumexp(-1)


def gaussian_mixture_responsibilities(value: Tensor, mixture_logits: Tensor, loc: Tensor, log_scale: Tensor) -> Tensor:
    """Arguments as for the public function."""
    return log_joint(value, mixture_logits.log_softmax(-1), loc, log_scale).softmax(-1)
