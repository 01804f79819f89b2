"""Plain PyTorch, beside the formulas."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvae_kernels import _checks
from hvae_kernels.ops.affine_autoregressive.gates import scale_of
from hvae_kernels.ops.autoregressive_network.network import ACTIVATIONS, FEATURES, NONE, Network
from hvae_kernels.ops.masked_linear.reference import masked_linear


def outputs(x: Tensor, network: Network, linear: Callable[..., Tensor] = masked_linear) -> Tensor:
    """The last stage's values ``(rows, 2 d)`` at features ``x (rows, d)``; ``linear`` is the masked map to use."""
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


def parameters(x: Tensor, network: Network, linear: Callable[..., Tensor] = masked_linear) -> tuple[Tensor, Tensor]:
    """Shift and raw scale, ``(rows, d)`` each."""
    last = outputs(x, network, linear)
    return _features(last, network.shift, network.features), _features(last, network.scale, network.features)


def _features(raw: Tensor, place: tuple[int, int], features: int) -> Tensor:
    first, step = place
    return raw[..., first : first + max(0, step * (features - 1) + 1) : step]


def autoregressive_forward(x: Tensor, network: Network) -> tuple[Tensor, Tensor]:
    """``y_j = sigma_j(x) x_j + tau_j(x) mu_j(x)`` and the log-determinant."""
    shift, raw = parameters(x, network)
    scale, weight, log_scale = scale_of(network.tail, raw)
    return scale * x + (shift if weight is None else weight * shift), log_scale.sum(-1)


def autoregressive_inverse(y: Tensor, network: Network) -> tuple[Tensor, Tensor]:
    """One pass through the whole network for each feature; differentiable through all of them."""
    if not network.features:
        return y.clone(), y.sum(-1)
    x, log_det = torch.zeros_like(y), y.new_zeros(y.shape[:-1])
    before = (network.degrees[:, None] > network.degrees).sum(-1)
    for step in range(network.features):
        shift, raw = parameters(x, network)
        scale, weight, log_scale = scale_of(network.tail, raw)
        found = (y - (shift if weight is None else weight * shift)) / scale
        x = torch.where(before == step, found, x)
        refuse_underflow(torch.where(before == step, scale, torch.ones_like(scale)))
        log_det = log_det - torch.where(before == step, log_scale, torch.zeros_like(log_scale)).sum(-1)
    return x, log_det


def refuse_underflow(scale: Tensor) -> None:
    """Raise where there is no inverse, if the values can be looked at."""
    if _checks.values_readable(scale) and bool((scale < torch.finfo(scale.dtype).tiny).any()):
        raise RuntimeError(
            "autoregressive_inverse: a scale is below the least normal number, so the map has no inverse: "
            "use a gate with a bounded scale, as clipped, soft-clipped, softplus or shifted-sigmoid"
        )
