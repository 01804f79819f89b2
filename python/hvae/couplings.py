"""The conditioner of additive couplings, which the experiments share."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Shift(nn.Module):
    """Shifts by a network, and log scales of 0.

    Args:
        network: of what the coupling keeps, followed by its context if it has any, ``(..., inputs)`` to ``(..., n)``.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, z: Tensor, *context: Tensor) -> Tensor:
        """``(..., 2, n)``."""
        shift = self.network(torch.cat([z, *context], -1))
        return torch.stack([shift, torch.zeros_like(shift)], -2)
