"""Small autoregressive networks of every structure that the kernels know, for the contract and the property tests."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from hvae_kernels.functional import Gate, Spline
from hvae_kernels.ops.autoregressive_network import FEATURES, Network, Stage

#: Structures: which stages there are, and what they read besides their source.
PLACEHOLDER = object()
KINDS = ("linear", "one_hidden", "two_hidden", "three_hidden", "residual", "skip", "context", "gated")


def network(
    kind: str,
    features: int,
    hidden: int,
    rows: int,
    *,
    activation: str = "tanh",
    gate: str = "affine",
    tail: Spline | None = None,
    order: str = "natural",
    halves: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Network:
    """A network; ``order`` is natural, shuffled or levels (some features share one degree).

    With a ``tail``, of splines. Its tensors are random, or, without a dtype, placeholders for ``with_tensors``.
    """
    degrees = {
        "natural": torch.arange(features),
        "shuffled": (torch.arange(features) * 7 + 3) % max(features, 1),  # a permutation unless 7 divides their number
        "levels": torch.arange(features) // 2 * 3,
    }[order]
    top = (features - 1) // 2 * 3 if order == "levels" else features - 1
    units = torch.arange(hidden) % max(top + 1, 1) - 1  # -1: sees the context alone
    count = 2 if tail is None else tail.parameters
    last = (degrees - 1).repeat(count) if halves else (degrees - 1).repeat_interleave(count)

    def stage(source: int, own: Tensor, reads: Tensor, last: bool = False, **options) -> Stage:
        def random(*shape: int) -> Tensor | object:
            return (
                PLACEHOLDER
                if dtype is None
                else 0.5 * torch.randn(shape, dtype=dtype, device=device) / max(shape[-1], 1) ** 0.5
            )

        skip, offset, gated = (options.pop(name, False) for name in ("skip", "offset", "gate"))
        return Stage(
            weight=random(len(own), len(reads)),
            bias=random(len(own)),
            degrees=own.to(device),
            source=source,
            activation=options.pop("activation", "identity" if last else activation),
            skip=random(len(own), features) if skip else None,
            offset=random(rows, len(own)) if offset else None,
            gate=random(rows, len(own)) if gated else None,
            **options,
        )

    depth = {"linear": 0, "one_hidden": 1, "two_hidden": 2, "three_hidden": 3}.get(kind, 1)
    if kind in ("residual", "gated"):  # nflows and normflows: two masked maps a block round a stream
        stages = [
            stage(FEATURES, units, degrees, offset=kind == "gated"),
            stage(0, units, units),
            stage(1, units, units, residual=0, gate=kind == "gated", activation="identity"),
            stage(2, last, units, last=True),
        ]
    else:
        sizes = [degrees, *[units] * depth]
        stages = [
            stage(place - 1 if place else FEATURES, own, reads, offset=kind == "context" and place == 0)
            for place, (reads, own) in enumerate(itertools.pairwise(sizes))
        ]
        stages.append(stage(depth - 1 if depth else FEATURES, last, sizes[-1], last=True, skip=kind == "skip"))
    outputs = (0, 1, features) if halves else (0, count, 1)
    return Network(degrees.to(device), tuple(stages), tail or Gate(gate), outputs)
