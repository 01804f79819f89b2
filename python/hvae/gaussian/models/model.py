"""What every model of the study is: R of them (one a data set) in one flat tensor, gradients written by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvae.gaussian.data import Statistics

N_SAMPLES = 10
MAX_STEP_SIZE = 0.5


def logit(x: float) -> float:
    """The inverse of the sigmoid."""
    return math.log(x / (1 - x))


@dataclass(frozen=True)
class Batch:
    """Statistics as training wants them: of the parameters' dtype, every number a tensor."""

    log_count: Tensor
    count: Tensor
    mean: Tensor
    variance: Tensor


class Model:
    """Parameters of R models as blocks of one flat tensor.

    Args:
        replicas: R.
        blocks: initial values of each named block, ``(size,)``, the same for all replicas.
        dtype: of parameters and gradients.

    Attributes:
        flat: parameters ``(R, P)``, updated in place.
        gradient: of the negative bound, ``(R, P)``, as :meth:`write_gradient` left it.
        values: views ``(R, 1, size)`` of ``flat`` by name.
        gradients: views of ``gradient`` by name.
    """

    #: Standard normals a step takes for each data set, as (how many, N_SAMPLES); None for a closed-form bound.
    noise_rows: tuple[int, int] | None = None

    def __init__(self, replicas: int, blocks: dict[str, Tensor], dtype: torch.dtype):
        self.sizes = {name: len(values) for name, values in blocks.items()}
        self.flat = torch.cat(list(blocks.values())).to(dtype).repeat(replicas, 1)
        self.gradient = torch.zeros_like(self.flat)
        self.values = self.views(self.flat)
        self.gradients = self.views(self.gradient)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The blocks ``(R, 1, size)`` of ``flat (R, P)`` by name."""
        parts = flat.unsqueeze(1).split(list(self.sizes.values()), dim=-1)
        return dict(zip(self.sizes, parts, strict=True))

    def bound(self, values: dict[str, Tensor], data: Statistics, noise: Any) -> Tensor:
        """The training bound ``(R,)``, up to terms without parameters, at parameters ``values``.

        ``noise`` is a tensor as :attr:`noise_rows` says, or None.
        """
        raise NotImplementedError

    def prepare(self, data: Statistics) -> Batch:
        """A batch's statistics in the form that :meth:`write_gradient` takes."""
        data = data.to(self.flat.dtype)
        count = torch.tensor(float(data.count), dtype=self.flat.dtype)
        return Batch(count.log(), count, data.mean, data.variance)

    def write_gradient(self, batch: Batch, noise: Any) -> None:
        """Write the gradient of ``-bound`` at ``flat`` to ``gradient``; to be called under ``torch.no_grad()``."""
        raise NotImplementedError

    def estimate(self) -> tuple[Tensor, Tensor]:
        """``(Delta, log sigma)``, ``(R, 1, d)`` in float64."""
        return self.values["loc"].double(), self.values["log_scale"].double()

    def elbo(self, data: Statistics) -> Tensor:
        """The full bound ``(R,)`` with all constants, in expectation and in float64; ``data`` in float64."""
        raise NotImplementedError


def location_and_scale(dim: int) -> dict[str, Tensor]:
    """The blocks that every model learns: Delta from 0, log sigma from 3."""
    return {"loc": torch.zeros(dim), "log_scale": torch.full((dim,), 3.0)}
