"""A row of the contract, and what the rows of several ops share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvae_kernels import _dispatch


@dataclass(frozen=True)
class RawOp:
    """A raw kernel for ``opcheck``: its overloads and how to call it on the op's inputs."""

    overloads: dict[str, Callable]
    arguments: Callable[[tuple[Tensor, ...]], tuple]


@dataclass(frozen=True)
class OpSpec:
    """One op of the contract.

    ``make(dtype, device, **case)`` makes inputs; ``cases`` are its sizes, ``small`` the one for finite differences;
    ``extremes`` are cases at the edge of the number range; ``same`` are pairs of arguments that may be one tensor.
    ``options`` names what in a case belongs to the op and its reference, not to the inputs, ``shared`` what belongs to
    both: see :meth:`at`. Of an op that differentiates part of its value as a constant, ``held(point)`` is the op with
    that part held at ``point``, for finite differences.

    ``summed_by_torch`` are the results that torch's own products or sums have a part in, whose bits may depend on the
    number of threads; all others promise not to. Results are called ``values/i``, ``first/i`` (the gradient of input i)
    and ``second/i`` (of the cotangents, then of the inputs), and ``values``, ``first`` and ``second`` are all of an
    order. ``long_sums`` is a case, for the kernels of CPUs alone, whose sums are so long that it shows how they are
    added up, with work for several threads.

    ``interpreted`` replaces cases in Triton's interpreter; ``composed`` says that a compiler sees other operations
    around the Triton kernels than around the C++ ones, not only other names of raw ops.

    ``rows`` are the arguments with a row for each row of the batch, along their first dimension in ``row_cases``, which
    are cases but for their shape. Where an argument is infinite, kernels are NaN where the plain formula is, and
    nowhere else; but for the arguments ``defined_at_infinity``, where they may have a value, and
    ``undefined_at_infinity``, where they may have none, each with the reason.
    """

    name: str
    op: Callable[..., tuple[Tensor, ...]]
    reference: Callable[..., tuple[Tensor, ...]]
    make: Callable[..., tuple[Tensor, ...]]
    cases: dict[str, dict[str, Any]]
    small: dict[str, Any]
    extremes: dict[str, dict[str, Any]]
    same: tuple[int, int]
    raw: tuple[RawOp, ...] = field(default=())
    options: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    held: Callable[[tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]] | None = None
    summed_by_torch: tuple[str, ...] = ()
    long_sums: dict[str, Any] | None = None
    rows: tuple[int, ...] = (0,)
    row_cases: tuple[dict[str, Any], ...] = ({},)
    interpreted: dict[str, dict[str, Any]] = field(default_factory=dict)
    composed: bool = False
    defined_at_infinity: dict[int, str] = field(default_factory=dict)
    undefined_at_infinity: dict[int, str] = field(default_factory=dict)

    def at(self, case: dict[str, Any]) -> OpSpec:
        """The spec of one case: its options bound to the op and the reference, and kept from ``make``."""
        bound = {name: case[name] for name in (*self.options, *self.shared) if name in case}
        if not bound:
            return self
        op, reference = (functools.partial(function, **bound) for function in (self.op, self.reference))

        def make(*args: Any, **case: Any) -> tuple[Tensor, ...]:
            return self.make(*args, **{name: value for name, value in case.items() if name not in self.options})

        return dataclasses.replace(self, op=op, reference=reference, make=make)

    @property
    def implementations(self) -> tuple[str, ...]:
        return _dispatch.OPS[self.name].implementations

    def is_summed_by_torch(self, result: str) -> bool:
        return bool({result, result.partition("/")[0]} & set(self.summed_by_torch))


def uniform(low: float, high: float, *shape: int, **kind) -> Tensor:
    """Random numbers between ``low`` and ``high``."""
    return low + (high - low) * torch.rand(shape, **kind)


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers in other memory; ``"expanded"`` repeats the first row."""
    if layout == "strided":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor


def state_cotangents(inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Of an op that maps its first two inputs, z and rho, to others."""
    return torch.randn_like(inputs[0]), torch.randn_like(inputs[1])


#: Sizes and layouts for an op on rows of features, without its own options.
SHAPES = {
    "plain": {"shape": (7, 5)},
    "no_rows": {"shape": (0, 5)},
    "no_leading": {"shape": (5,)},
    "one_element": {"shape": (1, 1)},
    "one_feature": {"shape": (33, 1)},
    "prime": {"shape": (13, 17)},
    "below_power": {"shape": (15, 31)},
    "above_power": {"shape": (17, 33)},
    "wide": {"shape": (2, 1031)},
    "leading_dims": {"shape": (2, 3, 4, 5)},
    "no_features": {"shape": (3, 0)},
    "many_rows": {"shape": (12_000, 7)},
    "several_blocks": {"shape": (300, 129)},
    "strided": {"shape": (7, 5), "layout": "strided"},
    "transposed": {"shape": (7, 5), "layout": "transposed"},
    "expanded": {"shape": (7, 5), "layout": "expanded"},
}
EXTREMES = {"large": {"shape": (7, 5), "scale": 1e18}, "tiny": {"shape": (7, 5), "scale": 1e-18}}
ALL_RESULTS = ("values", "first", "second")
HIDDEN = "what a mask hides is not read, and not multiplied by 0"
