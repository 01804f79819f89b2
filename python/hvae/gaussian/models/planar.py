"""Planar flows of the Gaussian model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvae.gaussian.models.model import N_SAMPLES, Batch, location_and_scale
from hvae.gaussian.models.sampled import OnData, Printed, SampledModel
from hvae_kernels.functional import planar_flow, planar_flow_with_vjp

if TYPE_CHECKING:
    import numpy as np


def truncated_normal(random: np.random.RandomState, size: int) -> Tensor:
    """0.1 times standard normals truncated to [-2, 2], from the uniforms that ``scipy.stats.truncnorm.rvs`` draws."""
    low, high = torch.special.ndtr(torch.tensor([-2.0, 2.0], dtype=torch.float64))
    return 0.1 * torch.special.ndtri(low + (high - low) * torch.from_numpy(random.uniform(size=size)))


class PlanarVAE(SampledModel):
    """K constrained planar layers: separate ones, or, as printed and with the printed objective, one repeated K times.

    The printed layers carry ``z_0`` to z. The corrected ones, with a learned shift after them, carry it to
    ``y = z + Delta``: on z, Delta would keep whatever mean the layers leave.

    Learned beside Delta and log sigma: u and w from :func:`truncated_normal`, layer by layer, b from 0.1, shift from 0.
    """

    def __init__(
        self,
        dim: int,
        n_layers: int,
        *,
        published: bool,
        seed: int,
        replicas: int = 1,
        dtype: torch.dtype = torch.float32,
    ):
        self.n_layers, self.shape = n_layers, (1 if published else n_layers, dim)
        import numpy as np

        random = np.random.RandomState(seed)
        drawn = [truncated_normal(random, dim) for _ in range(2 * self.shape[0])]
        blocks = location_and_scale(dim) | {"u": torch.cat(drawn[::2]), "w": torch.cat(drawn[1::2])}
        blocks["b"] = torch.full(self.shape[:1], 0.1, dtype=torch.float64)
        if not published:
            blocks["shift"] = torch.zeros(dim)
        super().__init__(Printed() if published else OnData(), replicas, blocks, dtype)
        self._by_log_abs_det = torch.full((replicas, N_SAMPLES), -1 / N_SAMPLES, dtype=dtype)
        self._by_u, self._by_w = (self.gradients[name][:, 0].unflatten(-1, self.shape) for name in ("u", "w"))
        self._by_b = self.gradients["b"][:, 0]

    def layers(self, values: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """``u, w (R, K, d)`` and ``b (R, K)``."""
        u, w = (values[name][:, 0].unflatten(-1, self.shape).expand(-1, self.n_layers, -1) for name in ("u", "w"))
        return u, w, values["b"][:, 0].expand(-1, self.n_layers)

    def sample(self, values: dict[str, Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        """The layers, one after the other, then the shift."""
        samples, log_abs_det = planar_flow(z, *self.layers(values), constrain=True)
        return samples + values["shift"] if "shift" in values else samples, log_abs_det

    def write_gradient(self, batch: Batch, noise: Tensor) -> None:
        """The flow, the energy's gradient, and the flow's backward pass."""
        (samples, _), vjp = planar_flow_with_vjp(noise[0], *self.layers(self.values), constrain=True)
        if "shift" in self.values:
            samples += self.values["shift"]
        by_samples = self.joint.write_gradient(self.values, self.gradients, batch, samples).div_(N_SAMPLES)
        if "shift" in self.values:
            torch.sum(by_samples, 1, keepdim=True, out=self.gradients["shift"])
        _, *by_layers = vjp((by_samples, self._by_log_abs_det))
        for gradient, to in zip(by_layers, (self._by_u, self._by_w, self._by_b), strict=True):
            if gradient.shape == to.shape:
                to.copy_(gradient)
            else:
                torch.sum(gradient, 1, keepdim=True, out=to)
