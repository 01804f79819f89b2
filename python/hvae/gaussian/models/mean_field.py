"""Variational Bayes: a diagonal Gaussian, in the corrected and in the published form."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvae.gaussian import exact
from hvae.gaussian.data import Statistics
from hvae.gaussian.models.model import MAX_STEP_SIZE, Batch, Model, location_and_scale, logit


class MeanField(Model):
    """Variational Bayes: ``q`` a diagonal Gaussian from mean 0 and log scale 1, its bound in closed form.

    q is placed on ``y = z + Delta`` (unit Jacobian, the same family): on z, Delta and q's mean would drift together
    along the direction that the data do not identify, at about sigma^2/N a step.
    """

    def __init__(self, dim: int, *, replicas: int = 1, dtype: torch.dtype = torch.float32):
        self._build(dim, replicas, torch.zeros(dim), torch.ones(dim), dtype)

    def _build(self, dim: int, replicas: int, mean: Tensor, log_std: Tensor, dtype: torch.dtype) -> None:
        blocks = location_and_scale(dim) | {"mean": mean, "log_std": log_std}
        Model.__init__(self, replicas, blocks, dtype)
        self._one, self._two = torch.tensor([1.0, 2.0], dtype=dtype)

    def posterior(self, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and log scale ``(R, 1, d)`` of ``q(z)``."""
        return values["mean"] - values["loc"], values["log_std"]

    def bound(self, values: dict[str, Tensor], data: Statistics, noise: None = None) -> Tensor:
        """The exact bound."""
        return exact.mean_field_bound(data, values["loc"], values["log_scale"], *self.posterior(values))

    def write_gradient(self, batch: Batch, noise: None = None) -> None:
        """By hand; y's mean is pulled to the data and, through the prior, to Delta."""
        values, gradients = self.values, self.gradients
        ratio = torch.sub(batch.log_count, values["log_scale"], alpha=2).exp_()
        variance = torch.exp(values["log_std"] * self._two)
        residual = values["mean"] - batch.mean
        torch.sub(values["loc"], values["mean"], out=gradients["loc"])
        torch.addcmul(-gradients["loc"], ratio, residual, out=gradients["mean"])
        spread = residual.square_().add_(batch.variance).add_(variance)
        torch.addcmul(batch.count, ratio, spread, value=-1, out=gradients["log_scale"])
        torch.addcmul(variance, ratio, variance, out=gradients["log_std"]).sub_(self._one)

    def elbo(self, data: Statistics) -> Tensor:
        """The training bound itself."""
        return self.bound({name: value.double() for name, value in self.values.items()}, data)


class PublishedMeanField(MeanField):
    """Variational Bayes as it was printed: q on z, so that Delta never arrives.

    Above d = 100 it moreover started from the Hamiltonian model's values: every mean at ``logit(0.005/0.5)``, and ONE
    log scale from log 4 shared by all dimensions, whose prior term and entropy enter the bound once, not d times.
    """

    def __init__(self, dim: int, *, restarted: bool, replicas: int = 1, dtype: torch.dtype = torch.float32):
        mean, log_std = torch.zeros(dim), torch.ones(dim)
        if restarted:
            mean = torch.full((dim,), logit(0.005 / MAX_STEP_SIZE), dtype=torch.float64)
            log_std = torch.tensor([math.log(4)], dtype=torch.float64)
        self._build(dim, replicas, mean, log_std, dtype)

    def posterior(self, values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and log scale ``(R, 1, d)`` of ``q(z)``."""
        return values["mean"], values["log_std"].expand_as(values["mean"])

    def bound(self, values: dict[str, Tensor], data: Statistics, noise: None = None) -> Tensor:
        """The printed objective, up to constants: log scale's own terms as often as there are log scales."""
        loc, log_scale, mean, log_std = (values[name] for name in ("loc", "log_scale", "mean", "log_std"))
        variance = torch.exp(2 * log_std)
        fit = exact.expected_log_likelihood(data, loc, log_scale, mean, variance)
        return (fit - mean**2 / 2).sum((-2, -1)) + (log_std - variance / 2).sum((-2, -1))

    def write_gradient(self, batch: Batch, noise: None = None) -> None:
        """By hand."""
        values, gradients = self.values, self.gradients
        ratio = torch.sub(batch.log_count, values["log_scale"], alpha=2).exp_()
        variance = torch.exp(values["log_std"] * self._two)
        residual = (values["mean"] + values["loc"]).sub_(batch.mean)
        torch.mul(ratio, residual, out=gradients["loc"])
        torch.add(gradients["loc"], values["mean"], out=gradients["mean"])
        spread = residual.square_().add_(batch.variance).add_(variance)
        torch.addcmul(batch.count, ratio, spread, value=-1, out=gradients["log_scale"])
        pull = ratio if variance.shape == ratio.shape else ratio.sum(-1, keepdim=True)
        torch.addcmul(variance, pull, variance, out=gradients["log_std"]).sub_(self._one)

    def elbo(self, data: Statistics) -> Tensor:
        """The true bound of this q, whatever the printed objective counts."""
        return MeanField.bound(self, {name: value.double() for name, value in self.values.items()}, data)
