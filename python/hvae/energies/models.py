"""Flows over a diagonal Gaussian, as densities of points in the plane."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import hvae_kernels as hk
from hvae.couplings import Shift
from hvae.densities import standard_normal_log_prob

#: Of the networks that shift one coordinate by the other, in NICE.
HIDDEN = 32


def nice(layers: int) -> hk.nn.FlowStack:
    """Additive couplings, which keep volumes; every other one shifts the other coordinate."""
    masks = ([k % 2 == 0, k % 2 == 1] for k in range(layers))
    return hk.nn.FlowStack([hk.nn.CouplingFlow(2, [], mask=mask, conditioner=_shift()) for mask in masks])


def _shift() -> Shift:
    return Shift(nn.Sequential(nn.Linear(1, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1)))


#: By name: a flow of K layers.
FLOWS = {
    "planar": lambda layers: hk.nn.PlanarFlow(2, layers),
    "radial": lambda layers: hk.nn.RadialFlow(2, layers),
    "nice": nice,
}


class Density(nn.Module):
    """``q(z)``: a Gaussian with learned means and scales, and a flow of it.

    Args:
        flow: a name of :data:`FLOWS`.
        layers: K.
    """

    def __init__(self, flow: str, layers: int) -> None:
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        self.flow = FLOWS[flow](layers)

    def forward(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Standard normals ``(N, 2)`` to points and ``log q`` of them."""
        z, log_abs_det = self.flow(self.loc + self.log_scale.exp() * noise)
        return z, standard_normal_log_prob(noise) - self.log_scale.sum() - log_abs_det
