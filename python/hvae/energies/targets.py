"""The energies U1 to U4 of Rezende and Mohamed (2015), Table 1, and their normalisers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

#: The printed window, [-4, 4] in both directions.
WINDOW = 4.0
#: How steep the walls are at its sides, as a standard deviation.
WALL = 0.4
#: Quadrature: a square around everything that counts, and the distance of its points.
REACH, STEP = 8.0, 0.02

Energy = Callable[[Tensor], Tensor]


def _bump(x: Tensor, width: float) -> Tensor:
    return -0.5 * (x / width).square()


def _wave(z: Tensor) -> Tensor:
    return torch.sin(math.pi / 2 * z[..., 0])


def _walls(z: Tensor) -> Tensor:
    """Energies 2 to 4 do not grow along the first coordinate, so without walls they have no normaliser."""
    return -_bump((z[..., 0].abs() - WINDOW).clamp(min=0), WALL)


def ring(z: Tensor) -> Tensor:
    """U1: a ring of radius 2, heavier on its left and right."""
    sides = torch.logaddexp(_bump(z[..., 0] - 2, 0.6), _bump(z[..., 0] + 2, 0.6))
    return -_bump(z.norm(dim=-1) - 2, 0.4) - sides


def wave(z: Tensor) -> Tensor:
    """U2: along a sine."""
    return -_bump(z[..., 1] - _wave(z), 0.4) + _walls(z)


def split(z: Tensor) -> Tensor:
    """U3: a sine that parts in two and meets again."""
    away = 3 * torch.exp(_bump(z[..., 0] - 1, 0.6))
    above = z[..., 1] - _wave(z)
    return -torch.logaddexp(_bump(above, 0.35), _bump(above + away, 0.35)) + _walls(z)


def fork(z: Tensor) -> Tensor:
    """U4: a sine that parts in two for good."""
    away = 3 * torch.sigmoid((z[..., 0] - 1) / 0.3)
    above = z[..., 1] - _wave(z)
    return -torch.logaddexp(_bump(above, 0.4), _bump(above + away, 0.35)) + _walls(z)


#: By their number in the paper: ``z (..., 2)`` to ``(...)``.
ENERGIES: dict[int, Energy] = {1: ring, 2: wave, 3: split, 4: fork}


def grid(step: float) -> Tensor:
    """Points ``(n, n, 2)`` of the quadrature's square, the first coordinate along the first dimension."""
    line = torch.arange(round(2 * REACH / step) + 1, dtype=torch.float64) * step - REACH
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)


@functools.cache
def log_normaliser(energy: Energy, step: float = STEP) -> float:
    """``log`` of the integral of ``exp(-U)``, by the trapezoidal rule on a grid at whose edge there is nothing."""
    return (-energy(grid(step))).flatten().logsumexp(0).item() + 2 * math.log(step)
