"""Plain PyTorch, beside the formulas."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvae_kernels.ops.affine_autoregressive.gates import invert, refuse_underflow
from hvae_kernels.ops.affine_autoregressive.reference import affine_autoregressive
from hvae_kernels.ops.autoregressive_network.network import ACTIVATIONS, FEATURES, NONE, Network
from hvae_kernels.ops.masked_linear.reference import masked_linear
from hvae_kernels.ops.rational_quadratic_spline.reference import rational_quadratic_spline
from hvae_kernels.ops.rational_quadratic_spline.spline import Spline

#: The masked map that a network is made of.
Linear = Callable[..., Tensor]


def outputs(x: Tensor, network: Network, linear: Linear = masked_linear) -> Tensor:
    """The last stage's values ``(rows, parameters d)`` at ``x (rows, d)``; ``linear`` is the masked map to use."""
    raws: list[Tensor] = []
    values: list[Tensor] = []
    for stage in network.stages:
        source = x if stage.source == FEATURES else values[stage.source]
        degrees = network.degrees if stage.source == FEATURES else network.stages[stage.source].degrees
        raw = linear(source, stage.weight, stage.bias, degrees, stage.degrees)
        if stage.skip is not None:
            raw = raw + linear(x, stage.skip, None, network.degrees, stage.degrees)
        if stage.offset is not None:
            raw = raw + stage.offset
        if stage.gate is not None:
            raw = raw * stage.gate
        if stage.residual != NONE:
            raw = raw + raws[stage.residual]
        raws.append(raw)
        values.append(ACTIVATIONS[stage.activation](raw))
    return values[-1]


def shift_and_scale(x: Tensor, network: Network, linear: Linear = masked_linear) -> tuple[Tensor, Tensor]:
    """Each feature's shift and raw scale, ``(rows, d)``."""
    shift, raw = _columns(outputs(x, network, linear), network)
    return shift, raw


def spline_parameters(x: Tensor, network: Network, linear: Linear = masked_linear) -> Tensor:
    """Each feature's parameters, ``(rows, d, P)``."""
    last = outputs(x, network, linear)
    d, n = network.features, network.parameters
    if network.outputs == (0, n, 1):
        return last.unflatten(-1, (d, n))
    if network.outputs == (0, 1, d):
        return last.unflatten(-1, (n, d)).mT
    return torch.stack(_columns(last, network), -1)


def _columns(last: Tensor, network: Network) -> list[Tensor]:
    """Of each parameter that of all features."""
    first, step, stride = network.outputs
    begins = [first + stride * p for p in range(network.parameters)]
    return [last[..., begin : begin + max(0, step * (network.features - 1) + 1) : step] for begin in begins]


def autoregressive_forward(x: Tensor, network: Network) -> tuple[Tensor, Tensor]:
    """``y_j = f(x_j; x_{<j})``, by a spline or an affine tail ``sigma_j x_j + tau_j mu_j``, and the log-determinant."""
    if isinstance(network.tail, Spline):
        return rational_quadratic_spline(x, spline_parameters(x, network), network.tail)
    return affine_autoregressive(x, *shift_and_scale(x, network), network.tail)


def autoregressive_inverse(y: Tensor, network: Network) -> tuple[Tensor, Tensor]:
    """One pass through the whole network for each feature; differentiable through all of them."""
    if not network.features:
        return y.clone(), y.sum(-1)
    x, log_det = torch.zeros_like(y), y.new_zeros(y.shape[:-1])
    before = (network.degrees[:, None] > network.degrees).sum(-1)
    for step in range(network.features):
        if isinstance(network.tail, Spline):
            given = spline_parameters(x, network)
            found, log = rational_quadratic_spline(y, given, network.tail, inverse=True, event_ndims=0)
        else:
            found, log, scale = invert(network.tail, y, *shift_and_scale(x, network))
            refuse_underflow("autoregressive_inverse", torch.where(before == step, scale, torch.ones_like(scale)))
        x = torch.where(before == step, found, x)
        log_det = log_det + torch.where(before == step, log, torch.zeros_like(log)).sum(-1)
    return x, log_det
