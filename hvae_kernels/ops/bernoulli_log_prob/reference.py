"""Reference: independent Bernoulli variables in plain PyTorch. Any dtype, any device, differentiable to any order."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def bernoulli_log_prob(logits: Tensor, value: Tensor, event_ndims: int = 1) -> Tensor:
    """``value log p + (1 - value) log(1 - p)`` with ``p = sigmoid(logits)``, summed over the event."""
    value = value.to(logits.dtype)
    terms = value * logsigmoid(logits) + (1 - value) * logsigmoid(-logits)
    certain = logits.isinf() & (value == (logits > 0))  # 0 log 0 is 0
    terms = terms.masked_fill(certain, 0)
    return terms.sum(tuple(range(-event_ndims, 0))) if event_ndims else terms


def residual(logits: Tensor, value: Tensor) -> Tensor:
    """``value - p``, the derivative by the logits, without cancellation."""
    value = value.to(logits.dtype)
    return value * (-logits).sigmoid() - (1 - value) * logits.sigmoid()


def variance(logits: Tensor) -> Tensor:
    """``p (1 - p)``: less the second derivative by the logits."""
    return logits.sigmoid() * (-logits).sigmoid()
