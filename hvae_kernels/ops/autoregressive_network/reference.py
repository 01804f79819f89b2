"""Plain PyTorch, beside the formulas."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvae_kernels import _checks
from hvae_kernels.ops.affine_autoregressive.gates import Gate, scale_of
from hvae_kernels.ops.autoregressive_network.network import ACTIVATIONS, FEATURES, NONE, Network
from hvae_kernels.ops.masked_linear.reference import masked_linear
from hvae_kernels.ops.rational_quadratic_spline.reference import rational_quadratic_spline
from hvae_kernels.ops.rational_quadratic_spline.spline import Spline


def outputs(x: Tensor, network: Network, linear: Callable[..., Tensor] = masked_linear) -> Tensor:
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


def parameters(x: Tensor, network: Network, linear: Callable[..., Tensor] = masked_linear) -> Tensor:
    """Of each feature, ``(rows, d, parameters)``: shift and raw scale, or those of the spline."""
    last = outputs(x, network, linear)
    d, n, (first, step, stride) = network.features, network.parameters, network.outputs
    if (first, step, stride) == (0, n, 1):
        return last.unflatten(-1, (d, n))
    if (first, step, stride) == (0, 1, d):
        return last.unflatten(-1, (n, d)).mT
    features, places = torch.arange(d, device=last.device), torch.arange(n, device=last.device)
    return last[..., first + step * features[:, None] + stride * places]


def autoregressive_forward(x: Tensor, network: Network) -> tuple[Tensor, Tensor]:
    """``y_j = f(x_j; x_{<j})``, by an affine tail ``sigma_j x_j + tau_j mu_j``, and the log-determinant."""
    given = parameters(x, network)
    if isinstance(network.tail, Spline):
        return rational_quadratic_spline(x, given, network.tail)
    scale, weight, log_scale = scale_of(network.tail, given[..., 1])
    shift = given[..., 0]
    return scale * x + (shift if weight is None else weight * shift), log_scale.sum(-1)


def autoregressive_inverse(y: Tensor, network: Network) -> tuple[Tensor, Tensor]:
    """One pass through the whole network for each feature; differentiable through all of them."""
    if not network.features:
        return y.clone(), y.sum(-1)
    x, log_det = torch.zeros_like(y), y.new_zeros(y.shape[:-1])
    before = (network.degrees[:, None] > network.degrees).sum(-1)
    for step in range(network.features):
        found, log = _inverted(y, parameters(x, network), network.tail, before == step)
        x = torch.where(before == step, found, x)
        log_det = log_det + torch.where(before == step, log, torch.zeros_like(log)).sum(-1)
    return x, log_det


def _inverted(y: Tensor, given: Tensor, tail: Gate | Spline, looked_at: Tensor) -> tuple[Tensor, Tensor]:
    """Each feature by itself, and what it adds to the log-determinant of the inverse."""
    if isinstance(tail, Spline):
        return rational_quadratic_spline(y, given, tail, inverse=True, event_ndims=0)
    shift = given[..., 0]
    scale, weight, log_scale = scale_of(tail, given[..., 1])
    refuse_underflow(torch.where(looked_at, scale, torch.ones_like(scale)))
    return (y - (shift if weight is None else weight * shift)) / scale, -log_scale


def refuse_underflow(scale: Tensor) -> None:
    """Raise where there is no inverse, if the values can be looked at."""
    if _checks.values_readable(scale) and bool((scale < torch.finfo(scale.dtype).tiny).any()):
        raise RuntimeError(
            "autoregressive_inverse: a scale is below the least normal number, so the map has no inverse: "
            "use a gate with a bounded scale, as clipped, soft-clipped, softplus or shifted-sigmoid"
        )
