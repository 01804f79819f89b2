"""A row of the benchmarks, and cases that several ops have."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Sizes = Mapping[str, int]

#: What is timed: the op alone, its gradient alone, and both as a training step pays for them.
DIRECTIONS = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One size of an op.

    Attributes:
        label: how tables name it.
        sizes: keyword arguments for the row's functions.
        stock: whether the rivals run at this size: the plain formula eager and compiled, and peers. Unrolling many
            steps takes minutes to compile and gigabytes to run, and says nothing that fewer steps do not.
        gate: sizes that differ in the correctness check, where float64 autograd through the formula needs too much.
        devices: device types on which the case makes sense.
        dtype: of the inputs.
    """

    label: str
    sizes: Sizes
    stock: bool = True
    gate: Sizes = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Row:
    """An op in the benchmarks.

    Attributes:
        name: the op's name: its folder, schema, test and benchmark key; `_inverse` behind it for its other direction.
        op: the public function.
        formula: the same in plain PyTorch as one writes it, the eager rival and, compiled, the second one.
        inputs: ``inputs(dtype, device, seed, **sizes)`` makes the arguments.
        forward_bytes: ``forward_bytes(element_size, **sizes)``: each large input read once, each large output written
            once; per-feature parameters do not count.
        backward_bytes: the same for the gradient with respect to every input.
        flops: ``flops(direction, **sizes)``: the fewest operations of ``"forward"`` and ``"backward"``.
        cases: the sizes, the one for the README's chart first.
        peers: further rivals by name: other packages, a more careful plain formula, a yardstick; timed, not checked.
        n_constants: how many of the last inputs need no gradient.
    """

    name: str
    op: Callable[..., tuple[Tensor, ...]]
    formula: Callable[..., tuple[Tensor, ...]]
    inputs: Callable[..., tuple[Tensor, ...]]
    forward_bytes: Callable[..., int]
    backward_bytes: Callable[..., int]
    flops: Callable[..., int]
    cases: tuple[Case, ...]
    peers: Mapping[str, Callable[..., tuple[Tensor, ...]]] = field(default_factory=dict)
    n_constants: int = 0

    def leaves(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The inputs as autograd's leaves, constants as they are."""
        n_variables = len(inputs) - self.n_constants
        return (*(x.detach().requires_grad_() for x in inputs[:n_variables]), *inputs[n_variables:])

    def bytes(self, direction: str, element_size: int, sizes: Sizes) -> int:
        """Bytes that ``direction`` has to move at least."""
        parts = {"forward": self.forward_bytes, "backward": self.backward_bytes}
        return sum(part(element_size, **sizes) for name, part in parts.items() if name in direction.split("+"))

    def operations(self, direction: str, sizes: Sizes) -> int:
        """Floating-point operations that ``direction`` has to do at least."""
        return sum(self.flops(part, **sizes) for part in direction.split("+"))


def steps_case(batch: int, features: int, steps: int, **options) -> Case:
    """Of K steps or layers."""
    sizes = {"batch": batch, "features": features, "steps": steps}
    return Case(f"({batch}, {features}), K = {steps}", sizes, **options)


def linear_case(batch: int, inputs: int, outputs: int, **options) -> Case:
    """Of a linear layer."""
    sizes = {"batch": batch, "inputs": inputs, "outputs": outputs}
    return Case(f"({batch}, {inputs}) to {outputs}", sizes, **options)
