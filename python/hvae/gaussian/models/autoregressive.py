"""Inverse autoregressive flow of the Gaussian model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import hvae_kernels as hk
from hvae.gaussian.models.model import N_SAMPLES, Batch, location_and_scale
from hvae.gaussian.models.sampled import OnData, Printed, SampledModel

EXTRA_HIDDEN = 100
LAYERS = ("first", "last")


def draw_network(dim: int) -> tuple[Tensor, nn.Linear, nn.Linear]:
    """Order and initial layers, from torch's global stream; the published runs drew their data after these."""
    order = torch.randperm(dim)
    return order, nn.Linear(dim, dim + EXTRA_HIDDEN), nn.Linear(dim + EXTRA_HIDDEN, 2 * dim)


class AutoregressiveVAE(SampledModel):
    """One step ``z' = shift + exp(log_scale) z`` whose shift and log scale a MADE of one ReLU layer computes.

    The corrected form carries ``z_0`` to ``y = z + Delta``, the printed one to z and takes the printed objective.
    Weights that the mask forbids are zero and their gradients too, so plain products serve: at ten samples they cost
    less than finding what to leave out.
    """

    def __init__(self, dim: int, *, published: bool, seed: int, replicas: int = 1, dtype: torch.dtype = torch.float32):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            order, *linear = draw_network(dim)
            self.flow = hk.nn.InverseAutoregressiveFlow(dim, dim + EXTRA_HIDDEN, order=order)
        layers = self.flow.made.layers
        masks = [layer.out_degrees[:, None] >= layer.in_degrees for layer in layers]
        blocks = location_and_scale(dim)
        for name, layer, mask in zip(LAYERS, linear, masks, strict=True):
            blocks |= {
                f"{name}_weight": (layer.weight * mask).detach().flatten(),
                f"{name}_bias": layer.bias.detach(),
            }
        super().__init__(Printed() if published else OnData(), replicas, blocks, dtype)
        self._masks = [mask.to(dtype) for mask in masks]
        self._weights, self._weight_gradients = (
            [parts[f"{name}_weight"][:, 0].unflatten(-1, mask.shape) for name, mask in zip(LAYERS, masks, strict=True)]
            for parts in (self.values, self.gradients)
        )

    def sample(self, values: dict[str, Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        """The flow of ``hvae_kernels``, one replica after the other."""
        names = {
            f"made.layers.{place}.{kind}": f"{name}_{kind}"
            for place, name in enumerate(LAYERS)
            for kind in ("weight", "bias")
        }
        shapes = {name: parameter.shape for name, parameter in self.flow.named_parameters()}
        results = []
        for replica, noise in enumerate(z):
            parameters = {name: values[block][replica].view(shapes[name]) for name, block in names.items()}
            results.append(torch.func.functional_call(self.flow, parameters, (noise,)))
        samples, log_abs_det = zip(*results, strict=True)
        return torch.stack(samples), torch.stack(log_abs_det)

    def write_gradient(self, batch: Batch, noise: Tensor) -> None:
        """Forward and backward through the network, all replicas in one product."""
        z, values, gradients = noise[0], self.values, self.gradients
        (first, last), (by_first, by_last) = self._weights, self._weight_gradients
        hidden = torch.baddbmm(values["first_bias"], z, first.mT).relu_()
        shift, log_scale = torch.baddbmm(values["last_bias"], hidden, last.mT).chunk(2, -1)
        stretched = log_scale.exp().mul_(z)
        by_samples = self.joint.write_gradient(values, gradients, batch, shift + stretched).div_(N_SAMPLES)
        by_outputs = torch.cat((by_samples, stretched.mul_(by_samples).sub_(1 / N_SAMPLES)), -1)

        by_hidden = torch.bmm(by_outputs, last).mul_(hidden > 0)
        for cotangent, inputs, to, mask, name in (
            (by_outputs, hidden, by_last, self._masks[1], "last_bias"),
            (by_hidden, z, by_first, self._masks[0], "first_bias"),
        ):
            torch.bmm(cotangent.mT, inputs, out=to).mul_(mask)
            torch.sum(cotangent, 1, keepdim=True, out=gradients[name])
