"""What the flows share whose bound is sampled: the joint density of data and sample, and its gradient."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hvae.gaussian import exact
from hvae.gaussian.data import Statistics
from hvae.gaussian.models.model import N_SAMPLES, Batch, Model

#: Samples of the full bound in :meth:`SampledModel.elbo`.
N_EVALUATION_SAMPLES = 500


@functools.cache
def evaluation_noise(dim: int) -> Tensor:
    """Fixed standard normals ``(1, N, d)`` whose mean is 0 and mean square 1 in every dimension, exactly.

    So what a flow does not change has no sampling error in a bound.
    """
    noise = torch.randn(N_EVALUATION_SAMPLES, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise -= noise.mean(0)
    return (noise / noise.square().mean(0).sqrt()).unsqueeze(0)


class OnLatent:
    """Samples are of z: ``-log p(D, z) = N log sigma + N/(2 sigma^2) (s^2 + (z - c)^2) + z^2/2``, ``c = mean - Delta``.

    Every term is a sum over dimensions, constants left out.
    """

    def energy(self, values: dict[str, Tensor], data: Statistics, z: Tensor) -> Tensor:
        """The formula, ``(R, B)``."""
        ratio = data.count * torch.exp(-2 * values["log_scale"])
        residual = z + values["loc"] - data.mean
        fit = data.count * values["log_scale"] + ratio / 2 * (data.variance + residual**2)
        return (fit + z**2 / 2).sum(-1)

    def write_gradient(
        self, values: dict[str, Tensor], gradients: dict[str, Tensor], batch: Batch, z: Tensor
    ) -> Tensor:
        """Delta's and log sigma's gradients of the samples' mean, by hand; returns that of each sample's energy."""
        ratio = torch.sub(batch.log_count, values["log_scale"], alpha=2).exp_()
        residual = z - (batch.mean - values["loc"])
        by_z = torch.addcmul(z, ratio, residual)
        torch.mul(ratio, residual.mean(1, keepdim=True), out=gradients["loc"])
        spread = residual.square_().mean(1, keepdim=True).add_(batch.variance)
        torch.addcmul(batch.count, ratio, spread, value=-1, out=gradients["log_scale"])
        return by_z


class Printed(OnLatent):
    """The printed objective of the planar and IAF runs, which misses the 1/2 before ``sum_i (x_i - Delta)^2/sigma^2``.

    Its data term ``N/sigma^2 (s^2 + c^2 - c z + z^2/2)`` is the right one and ``N/(2 sigma^2) (s^2 + c^2)``.
    """

    def energy(self, values: dict[str, Tensor], data: Statistics, z: Tensor) -> Tensor:
        """The formula, ``(R, B)``."""
        ratio = data.count * torch.exp(-2 * values["log_scale"])
        excess = ratio / 2 * (data.variance + (data.mean - values["loc"]) ** 2)
        return super().energy(values, data, z) + excess.sum(-1)

    def write_gradient(
        self, values: dict[str, Tensor], gradients: dict[str, Tensor], batch: Batch, z: Tensor
    ) -> Tensor:
        """As :meth:`OnLatent.write_gradient`."""
        by_z = super().write_gradient(values, gradients, batch, z)
        ratio = torch.sub(batch.log_count, values["log_scale"], alpha=2).exp_()
        centred = batch.mean - values["loc"]
        gradients["loc"].addcmul_(ratio, centred, value=-1)
        gradients["log_scale"].addcmul_(ratio, centred.square_().add_(batch.variance), value=-1)
        return by_z


class OnData:
    """Samples are of ``y = z + Delta``: ``N log sigma + N/(2 sigma^2) (s^2 + (y - mean)^2) + (y - Delta)^2/2``.

    On z, Delta and the samples would drift together along the direction that the data do not identify, at about
    sigma^2/N a step.
    """

    def energy(self, values: dict[str, Tensor], data: Statistics, y: Tensor) -> Tensor:
        """The formula, ``(R, B)``."""
        return OnLatent().energy(values, data, y - values["loc"])

    def write_gradient(
        self, values: dict[str, Tensor], gradients: dict[str, Tensor], batch: Batch, y: Tensor
    ) -> Tensor:
        """As :meth:`OnLatent.write_gradient`."""
        ratio = torch.sub(batch.log_count, values["log_scale"], alpha=2).exp_()
        residual, z = y - batch.mean, y - values["loc"]
        torch.neg(z.mean(1, keepdim=True), out=gradients["loc"])
        by_y = z.addcmul_(ratio, residual)
        spread = residual.square_().mean(1, keepdim=True).add_(batch.variance)
        torch.addcmul(batch.count, ratio, spread, value=-1, out=gradients["log_scale"])
        return by_y


class SampledModel(Model):
    """``z_0 ~ N(0, I)`` carried by a flow; the bound is ``E [log |det| - energy]``.

    Args:
        joint: the energy of a sample, ``-log p(D, sample)``.
        replicas: R.
        blocks: as for :class:`Model`.
        dtype: of parameters and gradients.
    """

    noise_rows = (1, N_SAMPLES)

    def __init__(self, joint: OnLatent | OnData, replicas: int, blocks: dict[str, Tensor], dtype: torch.dtype):
        super().__init__(replicas, blocks, dtype)
        self.joint = joint

    def sample(self, values: dict[str, Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        """The flow at parameters ``values``: ``z (R, B, d)`` to samples and ``log |det| (R, B)``."""
        raise NotImplementedError

    def bound(self, values: dict[str, Tensor], data: Statistics, noise: Tensor) -> Tensor:
        """Averaged over the samples; ``noise (1, R, B, d)`` is ``z_0``."""
        samples, log_abs_det = self.sample(values, noise[0])
        return (log_abs_det - self.joint.energy(values, data, samples)).mean(-1)

    def elbo(self, data: Statistics) -> Tensor:
        """The true bound, whatever the printed objective, estimated from :func:`evaluation_noise`."""
        values = {name: value.double() for name, value in self.values.items()}
        dim = data.mean.shape[-1]
        samples, log_abs_det = self.sample(values, evaluation_noise(dim).expand(len(self.flat), -1, -1))
        joint = OnLatent() if isinstance(self.joint, Printed) else self.joint
        # the entropy of z_0 less the prior's constant: half a nat a dimension
        constant = dim / 2 * (1 - data.count * exact.LOG_2PI)
        return (log_abs_det - joint.energy(values, data, samples)).mean(-1) + constant
