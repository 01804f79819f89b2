"""The Hamiltonian variational auto-encoder of the Gaussian model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvae.gaussian import exact
from hvae.gaussian.data import Statistics
from hvae.gaussian.models.model import MAX_STEP_SIZE, N_SAMPLES, Batch, Model, location_and_scale, logit
from hvae_kernels.functional import gaussian_leapfrog, gaussian_leapfrog_with_vjp


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
        blocks = location_and_scale(dim)
        blocks["step_size_logit"] = torch.full((dim,), logit(0.005 / MAX_STEP_SIZE), dtype=torch.float64)
        if tempered:
            blocks["log_excess_temperature"] = torch.tensor([math.log(5.0 - 1)], dtype=torch.float64)
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
        (z_final, rho_final), vjp = gaussian_leapfrog_with_vjp(z, rho, precision, centre, step_size, tempering)
        residual = z_final - centred
        by_final = torch.addcmul(z_final, ratio, residual), rho_final
        _, by_rho, by_precision, by_centre, by_step_size, by_tempering = vjp(by_final)

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
