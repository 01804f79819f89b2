"""A network as the kernels take it: who sees whom, where values lie, and the activations.

Units are ranked by degree, in each layer for itself (layer 0 is the features, layer s + 1 is stage s), so that a unit
sees a leading range of its source and is seen by a trailing range of its readers: see :class:`Plan`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._triton.device import (
    decay,
    expm1_nonpositive,
    exponential,
    hyperbolic_tangent,
    log1p_unit,
    logistic,
)
from hvae_kernels.ops.autoregressive_network.network import ACTIVATIONS, FEATURES, NONE

_ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
_RELU = tl.constexpr(_ACTIVATION_CODES["relu"])
_ELU = tl.constexpr(_ACTIVATION_CODES["elu"])
_TANH = tl.constexpr(_ACTIVATION_CODES["tanh"])
_SOFTPLUS = tl.constexpr(_ACTIVATION_CODES["softplus"])
_SIGMOID = tl.constexpr(_ACTIVATION_CODES["sigmoid"])
_GELU = tl.constexpr(_ACTIVATION_CODES["gelu"])
_SILU = tl.constexpr(_ACTIVATION_CODES["silu"])


class Plan(NamedTuple):
    """Who sees whom, for the units of all layers in a row, each layer ascending by degree: N entries, int32.

    Args:
        order: ``(N,)``: which unit of its layer that is.
        upto: ``(layers, N)``: how many units of a layer have no higher degree: those that it sees.
        below: ``(layers, N)``: how many have a lower degree: those before the first one that sees it. At feature t - 1,
            how many units of a layer are finished before step t.
        entries: N.
    """

    order: Tensor
    upto: Tensor
    below: Tensor
    entries: int


def plan(degrees: list[Tensor]) -> Plan:
    """Made on the tensors' device, without a look at their values on the host."""
    values, orders = zip(*(layer.sort(stable=True) for layer in degrees), strict=True)
    every = torch.cat(values)

    def counts(right: bool) -> Tensor:
        return torch.stack([torch.searchsorted(layer, every, right=right, out_int32=True) for layer in values])

    return Plan(torch.cat(orders).to(torch.int32), counts(True), counts(False), every.shape[0])


class Layer(NamedTuple):
    """Where a layer lies: its first entry in the plan, its size, and the place of its values among a tile's."""

    first: int
    size: int
    value: int


class Stage(NamedTuple):
    """A stage's tensors, None where absent, with the strides of the weights' rows; ``raw`` is a place as in Layer."""

    weight: Tensor
    weight_row: int
    skip: Tensor | None
    skip_row: int
    bias: Tensor | None
    offset: Tensor | None
    gate: Tensor | None
    raw: int


class Net(NamedTuple):
    """All that the kernels take of a network; layer 0 is the features, layer s + 1 is stage s."""

    plan: Plan
    layers: tuple[Layer, ...]
    stages: tuple[Stage, ...]


def require(fits: bool) -> None:
    """Refuse what does not fit.

    Raises:
        RuntimeError: it does not.
    """
    if not fits:
        raise RuntimeError("autoregressive network: shapes or dtypes do not fit")


def _present(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """The tensor, of this shape, or None if it is empty."""
    if tensor.numel() == 0:
        return None
    require(tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous())
    return tensor


def _matrix(weight: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, int]:
    """A weight of this shape, and the stride of its rows."""
    require(weight.shape == shape and weight.dtype == dtype and (shape[1] <= 1 or weight.stride(1) == 1))
    return weight, weight.stride(0)


def parts(
    known: Tensor, weights, biases, offsets, gates, degrees, program, parameters: int = 2
) -> tuple[tuple, tuple, tuple, int]:
    """A network's layers, stages and wires for the kernels, and how many values a sample has in ``work``."""
    rows, features, dtype = *known.shape, known.dtype
    count, sizes = len(degrees) - 1, [layer.numel() for layer in degrees]
    require(count >= 1 and sizes[0] == features and len(program) == 4 + 4 * count)
    require(len(biases) == len(offsets) == len(gates) == count <= len(weights))
    require(all(layer.dtype == torch.int64 and layer.dim() == 1 for layer in degrees))
    first, step, second, other = program[:4]
    corners = (j + p for j in (0, step * (features - 1)) for p in (first, first + (second - first) * (parameters - 1)))
    require(sizes[-1] == parameters * features and step == other and all(0 <= unit < sizes[-1] for unit in corners))
    layers, stages, wires = [Layer(0, features, 0)], [], []
    first = place = features
    for s, size in enumerate(sizes[1:]):
        source, residual, activation, skip = program[4 + 4 * s : 8 + 4 * s]
        require(FEATURES <= source < s and NONE <= residual < s and NONE <= skip < len(weights))
        require(residual == NONE or sizes[residual + 1] == size)
        wires.append((source + 1, residual, activation))
        stages.append(
            Stage(
                *_matrix(weights[s], (size, sizes[source + 1]), dtype),
                *((None, 0) if skip == NONE else _matrix(weights[skip], (size, features), dtype)),
                bias=_present(biases[s], (size,), dtype),
                offset=_present(offsets[s], (rows, size), dtype),
                gate=_present(gates[s], (rows, size), dtype),
                raw=place,
            )
        )
        layers.append(Layer(first, size, place + size))
        first, place = first + size, place + 2 * size
    return tuple(layers), tuple(stages), tuple(wires), place


# ---- Activations -----------------------------------------------------------------------------------------------------


@triton.jit
def _normal_distribution(x):
    return 0.5 + 0.5 * tl.erf(0.7071067811865476 * x)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """An activation of ``ACTIVATIONS``, by its place there."""
    if ACTIVATION == _RELU:
        return tl.where(x < 0, 0.0, x)
    elif ACTIVATION == _ELU:
        return tl.where(x > 0, x, expm1_nonpositive(tl.where(x > 0, 0.0, x)))
    elif ACTIVATION == _TANH:
        return hyperbolic_tangent(x)
    elif ACTIVATION == _SOFTPLUS:
        return tl.where(x < 0, 0.0, x) + log1p_unit(decay(x))
    elif ACTIVATION == _SIGMOID:
        return logistic(x)[1]
    elif ACTIVATION == _GELU:
        return x * _normal_distribution(x)
    elif ACTIVATION == _SILU:
        return x * logistic(x)[1]
    else:
        return x


@triton.jit
def derivative(x, ACTIVATION: tl.constexpr):
    """The derivative of ``activate``."""
    if ACTIVATION == _RELU:
        return tl.where(x > 0, tl.full(x.shape, 1.0, x.dtype), 0.0)
    elif ACTIVATION == _ELU:
        return exponential(tl.where(x > 0, 0.0, x))
    elif ACTIVATION == _TANH:
        _, p, rest = logistic(x + x)
        return 4.0 * p * rest
    elif ACTIVATION == _SOFTPLUS:
        return logistic(x)[1]
    elif ACTIVATION == _SIGMOID:
        _, p, rest = logistic(x)
        return p * rest
    elif ACTIVATION == _GELU:
        return _normal_distribution(x) + x * 0.3989422804014327 * exponential(-0.5 * x * x)
    elif ACTIVATION == _SILU:
        _, p, rest = logistic(x)
        return p + x * p * rest
    else:
        return tl.full(x.shape, 1.0, x.dtype)
