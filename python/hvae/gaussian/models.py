"""The learned models: R of them (one a data set) in one flat tensor, with their gradients written by hand.

At ten samples of a few dozen dimensions a training step is all overhead. So a model is one ``(R, P)`` tensor of
parameters and one of gradients, with a named view ``(R, 1, size)`` for each block; optimiser and clipping are a few
operations on the whole. ``bound`` is the formula to read, ``write_gradient`` its gradient in as few operations as it
takes; the tests hold the second to autograd of the first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hvae.gaussian import exact
from hvae.gaussian.data import Statistics
from hvae_kernels.functional import gaussian_leapfrog, gaussian_leapfrog_vjp

N_SAMPLES = 10
MAX_STEP_SIZE = 0.5


def _logit(x: float) -> float:
    return math.log(x / (1 - x))


class Batch(NamedTuple):
    """Statistics as training wants them: of the parameters' dtype, every number a tensor."""

    log_count: Tensor
    count: Tensor
    mean: Tensor
    variance: Tensor


class Model:
    """Parameters of R models as blocks of one flat tensor.

    Args:
        replicas: R.
        blocks: size and initial value of each named block.
        dtype: of parameters and gradients.

    Attributes:
        flat: parameters ``(R, P)``, updated in place.
        gradient: of the negative bound, ``(R, P)``, as :meth:`write_gradient` left it.
        values: views ``(R, 1, size)`` of ``flat`` by name.
        gradients: views of ``gradient`` by name.
    """

    #: Standard normals a step takes for each data set, as (how many, N_SAMPLES); None for a closed-form bound.
    noise_rows: tuple[int, int] | None = None

    def __init__(self, replicas: int, blocks: dict[str, tuple[int, float]], dtype: torch.dtype):
        self.sizes = {name: size for name, (size, _) in blocks.items()}
        rows = [torch.full((replicas, size), value, dtype=dtype) for size, value in blocks.values()]
        self.flat = torch.cat(rows, dim=1)
        self.gradient = torch.zeros_like(self.flat)
        self.values = self.views(self.flat)
        self.gradients = self.views(self.gradient)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The blocks ``(R, 1, size)`` of ``flat (R, P)`` by name."""
        parts = flat.unsqueeze(1).split(list(self.sizes.values()), dim=-1)
        return dict(zip(self.sizes, parts, strict=True))

    def bound(self, values: dict[str, Tensor], data: Statistics, noise: Tensor | None) -> Tensor:
        """The training bound ``(R,)``, up to terms without parameters, at parameters ``values``."""
        raise NotImplementedError

    def prepare(self, data: Statistics) -> Batch:
        """A batch's statistics in the form that :meth:`write_gradient` takes."""
        data = data.to(self.flat.dtype)
        count = torch.tensor(float(data.count), dtype=self.flat.dtype)
        return Batch(count.log(), count, data.mean, data.variance)

    def write_gradient(self, batch: Batch, noise: Tensor | None) -> None:
        """Write the gradient of ``-bound`` at ``flat`` to ``gradient``; to be called under ``torch.no_grad()``."""
        raise NotImplementedError

    def estimate(self) -> tuple[Tensor, Tensor]:
        """``(Delta, log sigma)``, ``(R, 1, d)`` in float64."""
        return self.values["loc"].double(), self.values["log_scale"].double()

    def elbo(self, data: Statistics) -> Tensor:
        """The full bound ``(R,)`` with all constants, in expectation and in float64; ``data`` in float64."""
        raise NotImplementedError


class _Temperatures:
    """The quadratic schedule ``T_k = 1 + x (1 - k^2/K^2)`` and its gradient for ``log x``, in buffers of its own.

    Args:
        log_excess: log x, ``(R, 1, 1)``, read at each :meth:`start`.
        gradient: where :meth:`write_gradient` writes, ``(R, 1, 1)``.
        n_steps: K.
    """

    def __init__(self, log_excess: Tensor, gradient: Tensor, n_steps: int):
        self._log_excess, self._gradient = log_excess, gradient[:, 0, 0]
        self._one = log_excess.new_ones(())
        self._profile = exact.quadratic_profile(n_steps, log_excess.dtype)
        self._excess = torch.empty_like(log_excess)
        self._excess_row = self._excess[:, 0, 0]
        self._temperature = log_excess.new_empty(len(log_excess), 1, n_steps + 1)
        self._first = self._temperature[:, :, :1]
        self._before, self._after = self._temperature[:, 0, :-1], self._temperature[:, 0, 1:]

    def start(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """``rho_0 = T_0 gamma (R, B, d)`` and ``alpha_k = T_k/T_{k-1} (R, K)``."""
        torch.exp(self._log_excess, out=self._excess)
        torch.addcmul(self._one, self._excess, self._profile, out=self._temperature)
        return gamma * self._first, self._after / self._before

    def write_gradient(self, gamma: Tensor, tempering: Tensor, by_rho: Tensor, by_tempering: Tensor) -> None:
        """``dT_k/dlog x = T_k - 1``, hence ``dalpha_k/dlog x = (alpha_k - 1)/T_{k-1}``."""
        chain = (tempering - self._one).div_(self._before).mul_(by_tempering).sum(-1)
        torch.addcmul(chain, (by_rho * gamma).sum((1, 2)), self._excess_row, out=self._gradient)


class HamiltonianVAE(Model):
    """``z_0 ~ N(0, I)`` carried through K leapfrog steps, quadratically tempered or not at all.

    Learned: Delta, log sigma, step sizes ``0.5 sigmoid(.)`` from 0.005, and ``log(T_0 - 1)`` from ``T_0 = 5``.
    The potential is ``U(z) = 1/2 precision (z - centre)^2`` with ``precision = 1 + N/sigma^2`` and
    ``centre = (1 - 1/precision) (mean - Delta)``.
    """

    noise_rows = (2, N_SAMPLES)

    def __init__(
        self, dim: int, n_steps: int, *, tempered: bool, replicas: int = 1, dtype: torch.dtype = torch.float32
    ):
        blocks = {
            "loc": (dim, 0.0),
            "log_scale": (dim, 3.0),
            "step_size_logit": (dim, _logit(0.005 / MAX_STEP_SIZE)),
        }
        if tempered:
            blocks["log_excess_temperature"] = (1, math.log(5.0 - 1))
        super().__init__(replicas, blocks, dtype)
        self.n_steps, self.tempered = n_steps, tempered
        self._no_tempering = torch.ones(replicas, n_steps, dtype=dtype)
        self._one, self._max_step_size, self._per_sample = torch.tensor(
            [1.0, MAX_STEP_SIZE, 1 / N_SAMPLES], dtype=dtype
        )
        if tempered:
            name = "log_excess_temperature"
            self._temperatures = _Temperatures(self.values[name], self.gradients[name], n_steps)

    def flow(self, values: dict[str, Tensor]) -> exact.Flow:
        """Step sizes, initial temperature and tempering."""
        step_size = MAX_STEP_SIZE * torch.sigmoid(values["step_size_logit"])
        if not self.tempered:
            return exact.Flow(step_size, self._no_tempering[:, :1].to(step_size), self._no_tempering.to(step_size))
        excess = torch.exp(values["log_excess_temperature"][:, 0])
        return exact.Flow(step_size, *exact.quadratic_tempering(excess, self.n_steps))

    def bound(self, values: dict[str, Tensor], data: Statistics, noise: Tensor) -> Tensor:
        """``log p(D, z_K) + log N(rho_K)``, averaged over the samples; ``noise (2, R, B, d)`` is ``z_0, gamma``."""
        loc, log_scale = values["loc"], values["log_scale"]
        step_size, temperature, tempering = self.flow(values)
        ratio = data.count * torch.exp(-2 * log_scale)
        centre = ratio / (1 + ratio) * (data.mean - loc)
        z, gamma = noise
        z, rho = gaussian_leapfrog(z, temperature[:, :, None] * gamma, 1 + ratio, centre, step_size, tempering)
        fit = data.count * log_scale + ratio / 2 * (data.variance + (z + loc - data.mean) ** 2)
        return -(fit + z**2 / 2 + rho**2 / 2).sum(-1).mean(-1)

    def prepare(self, data: Statistics) -> Batch:
        """Every term is a sum over the samples, so the parts without samples are multiplied by their number."""
        count = torch.tensor(float(data.count), dtype=self.flat.dtype)
        data = data.to(self.flat.dtype)
        return Batch(count.log(), count * N_SAMPLES, data.mean, data.variance * N_SAMPLES)

    def write_gradient(self, batch: Batch, noise: Tensor) -> None:
        """The leapfrog, its backward pass, and the element-wise terms before and after them chained by hand.

        Sums over the samples are divided by their number in the end, all at once. Constants are tensors: a Python
        number costs an operation twice its time.
        """
        z, gamma = noise
        values, gradients = self.values, self.gradients
        centred = batch.mean - values["loc"]
        ratio = torch.sub(batch.log_count, values["log_scale"], alpha=2).exp_()
        precision = self._one + ratio
        shrink = ratio / precision
        centre = shrink * centred
        step_size = torch.sigmoid(values["step_size_logit"]).mul_(self._max_step_size)
        rho, tempering = gamma, self._no_tempering
        if self.tempered:
            rho, tempering = self._temperatures.start(gamma)
        flow = (z, rho, precision, centre, step_size, tempering)
        z_final, rho_final = gaussian_leapfrog(*flow)
        residual = z_final - centred
        _, by_rho, by_precision, by_centre, by_step_size, by_tempering = gaussian_leapfrog_vjp(
            torch.addcmul(z_final, ratio, residual), rho_final, *flow
        )

        pull = by_centre / precision
        torch.mul(ratio, residual.sum(1, keepdim=True).sub_(pull), out=gradients["loc"])
        # d centre / d ratio = centred / precision^2
        by_ratio = torch.addcmul(by_precision, pull, centred / precision)
        spread = residual.square_().sum(1, keepdim=True).add_(batch.variance).add_(by_ratio, alpha=2)
        torch.addcmul(batch.count, ratio, spread, value=-1, out=gradients["log_scale"])
        slope = torch.addcmul(step_size, step_size, step_size, value=-1 / MAX_STEP_SIZE)
        torch.mul(by_step_size, slope, out=gradients["step_size_logit"])
        if self.tempered:
            self._temperatures.write_gradient(gamma, tempering, by_rho, by_tempering)
        self.gradient.mul_(self._per_sample)

    def elbo(self, data: Statistics) -> Tensor:
        """Closed form: the flow is affine and the samples are Gaussian."""
        flow = self.flow({name: value.double() for name, value in self.values.items()})
        return exact.hamiltonian_bound(data, *self.estimate(), flow)


class MeanField(Model):
    """Variational Bayes: ``q`` a diagonal Gaussian from mean 0 and log scale 1, its bound in closed form.

    q is placed on ``y = z + Delta`` (unit Jacobian, the same family): on z, Delta and q's mean would drift together
    along the direction that the data do not identify, at about sigma^2/N a step.
    """

    def __init__(self, dim: int, *, replicas: int = 1, dtype: torch.dtype = torch.float32):
        blocks = {"loc": (dim, 0.0), "log_scale": (dim, 3.0), "mean": (dim, 0.0), "log_std": (dim, 1.0)}
        self._build(replicas, blocks, dtype)

    def _build(self, replicas: int, blocks: dict[str, tuple[int, float]], dtype: torch.dtype) -> None:
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
        mean, log_std = (_logit(0.005 / MAX_STEP_SIZE), math.log(4)) if restarted else (0.0, 1.0)
        blocks = {
            "loc": (dim, 0.0),
            "log_scale": (dim, 3.0),
            "mean": (dim, mean),
            "log_std": (1 if restarted else dim, log_std),
        }
        self._build(replicas, blocks, dtype)

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
