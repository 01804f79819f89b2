"""An autoregressive network as data: what the kernels walk through, for our modules and for other libraries' alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hvae_kernels.ops.affine_autoregressive import gates
from hvae_kernels.ops.affine_autoregressive.gates import Gate
from hvae_kernels.ops.rational_quadratic_spline import spline
from hvae_kernels.ops.rational_quadratic_spline.spline import Spline

#: A stage's ``source`` when it reads the features, not another stage.
FEATURES = -1
#: A stage's ``residual`` or ``skip`` when it has none.
NONE = -1

#: Activations by name.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "elu": torch.nn.functional.elu,
    "tanh": torch.tanh,
    "softplus": lambda x: torch.nn.functional.softplus(x, threshold=40.0),
    "sigmoid": torch.sigmoid,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}
#: Of each activation its code in the kernels.
ACTIVATION_CODES = {
    "identity": 0,
    "relu": 1,
    "elu": 2,
    "tanh": 3,
    "softplus": 4,
    "sigmoid": 5,
    "gelu": 6,
    "silu": 7,
}
_ACTIVATION_NAMES = {code: name for name, code in ACTIVATION_CODES.items()}
#: What :func:`fits_whole` allows: stages, and units of a layer.
MOST_STAGES, MOST_UNITS = 3, 128


@dataclass(frozen=True)
class Stage:
    """One masked linear map of the network and what follows it.

    ``raw = (masked(weight) source + masked(skip) features + bias + offset) * gate + raw of the residual stage``, and
    ``value = activation(raw)`` is what later stages read. A unit of degree m sees sources of degree <= m.

    Args:
        weight: ``(units, source units)``.
        bias: ``(units,)`` or None.
        degrees: int64 ``(units,)``.
        source: the stage whose value it reads, or ``FEATURES``.
        activation: a name of ``ACTIVATIONS``.
        residual: the stage whose raw value is added, unit by unit, or ``NONE``.
        skip: ``(units, features)``, a second weight that reads the features, or None.
        offset: ``(rows, units)``, what the context adds, or None.
        gate: ``(rows, units)``, what the context multiplies by, or None.
    """

    weight: Tensor
    bias: Tensor | None
    degrees: Tensor
    source: int
    activation: str = "identity"
    residual: int = NONE
    skip: Tensor | None = None
    offset: Tensor | None = None
    gate: Tensor | None = None


@dataclass(frozen=True)
class Network:
    """Stages from features to the raw parameters of the tail.

    Args:
        degrees: int64 ``(features,)``: the order of the features; equal ones do not see each other.
        stages: the last one has ``parameters`` units a feature, of the feature's degree - 1.
        tail: what is done to a feature: a gate says how a raw scale output becomes a scale.
        outputs: ``(first, step, stride)``: parameter p of feature j is unit ``first + step j + stride p`` of the last
            stage. An affine tail has a shift and a raw scale.
    """

    degrees: Tensor
    stages: tuple[Stage, ...]
    tail: Gate | Spline = field(default_factory=Gate.affine)
    outputs: tuple[int, int, int] = (0, 2, 1)

    @property
    def features(self) -> int:
        """D."""
        return self.degrees.shape[0]

    @property
    def parameters(self) -> int:
        """How many parameters a feature has."""
        return self.tail.parameters if isinstance(self.tail, Spline) else 2

    def tensors(self) -> tuple[Tensor, ...]:
        """Every floating tensor, in a fixed order."""
        return tuple(x for stage in self.stages for x in _tensors_of(stage) if x is not None)

    def with_tensors(self, tensors: tuple[Tensor, ...]) -> Network:
        """The same network with other tensors, in the order of :meth:`tensors`."""
        remaining = iter(tensors)
        stages = []
        for stage in self.stages:
            given: dict[str, Any] = {name: next(remaining) for name in _TENSORS if getattr(stage, name) is not None}
            stages.append(replace(stage, **given))
        return replace(self, stages=tuple(stages))


_TENSORS = ("weight", "bias", "skip", "offset", "gate")


def _tensors_of(stage: Stage) -> tuple[Tensor | None, ...]:
    return tuple(getattr(stage, name) for name in _TENSORS)


def _rows(weight: Tensor) -> Tensor:
    """Rows may lie apart (a slice of a wider weight), their entries may not."""
    return weight if weight.stride(-1) == 1 or weight.shape[-1] <= 1 else weight.contiguous()


def flattened(network: Network) -> tuple[tuple[int, ...], tuple, tuple[Tensor, ...]]:
    """What the raw ops take, flat: the lengths of their lists of tensors, the plain numbers, and all tensors in a row.

    The lists are weights (first one a stage, then those that skip), biases, offsets, gates and degrees;
    csrc/cpu/autoregressive_network.h reads the same. What is absent is an empty tensor.
    """
    absent = network.stages[0].weight.new_empty(0)
    weights = [_rows(stage.weight) for stage in network.stages]
    first, step, stride = network.outputs
    program = [first, step, first + stride, step]  # of the first two parameters
    for stage in network.stages:
        skip = NONE
        if stage.skip is not None:
            skip = len(weights)
            weights.append(_rows(stage.skip))
        program += [stage.source, stage.residual, ACTIVATION_CODES[stage.activation], skip]

    def packed(name: str) -> list[Tensor]:
        values = (getattr(stage, name) for stage in network.stages)
        return [absent if x is None else x.contiguous() for x in values]

    degrees = [network.degrees, *(stage.degrees for stage in network.stages)]
    lists = (weights, packed("bias"), packed("offset"), packed("gate"), degrees)
    settings = tuple(program), *_encoded(network.tail)
    return tuple(map(len, lists)), settings, tuple(x for tensors in lists for x in tensors)


#: In place of a gate's code.
_SPLINE = -1


def _encoded(tail: Gate | Spline) -> tuple[tuple[int, ...], tuple[float, ...]]:
    if isinstance(tail, Spline):
        codes, numbers = tail.encoded
        return (_SPLINE, *codes), numbers
    code, *parameters = tail.encoded
    return (code,), tuple(parameters)


def _decoded(codes: Sequence[int], numbers: Sequence[float]) -> Gate | Spline:
    if codes[0] == _SPLINE:
        return spline.decoded(codes[1:], numbers)
    return gates.decoded(codes[0], *numbers)


def unflattened(tensors: Sequence[Tensor], counts: tuple[int, ...], settings: tuple) -> Network:
    """The network again, on these tensors."""
    remaining = iter(tensors)
    weights, biases, offsets, gates, degrees = ([next(remaining) for _ in range(count)] for count in counts)
    program, codes, numbers = settings
    stages = []
    for place in range(len(biases)):
        source, residual, activation, skip = program[4 + 4 * place : 8 + 4 * place]
        stages.append(
            Stage(
                weight=weights[place],
                bias=_present(biases[place]),
                degrees=degrees[place + 1],
                source=source,
                activation=_ACTIVATION_NAMES[activation],
                residual=residual,
                skip=None if skip == NONE else weights[skip],
                offset=_present(offsets[place]),
                gate=_present(gates[place]),
            )
        )
    first, step, second = program[:3]
    return Network(degrees[0], tuple(stages), _decoded(codes, numbers), (first, step, second - first))


def _present(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def fits_whole(gates: Sequence[Tensor], degrees: Sequence[Tensor], program: Sequence[int]) -> bool:
    """Whether a GPU program keeps a sample's values of all layers in registers: a small chain of stages.

    From shapes and structure alone, as :func:`flattened` gives them. Each stage reads the one before it and nothing
    else but a bias and an offset.
    """
    wires = [tuple(program[at : at + 4]) for at in range(4, len(program), 4)]
    chain = [(stage - 1, NONE, NONE) for stage in range(len(wires))]  # before the first stage are the FEATURES, -1
    if [(source, residual, skip) for source, residual, _, skip in wires] != chain or any(g.numel() for g in gates):
        return False
    *layers, _ = degrees  # the last stage is two products of a column a feature
    return len(wires) <= MOST_STAGES and max(layer.shape[0] for layer in layers) <= MOST_UNITS
