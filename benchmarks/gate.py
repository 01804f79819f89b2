"""The correctness gate: what is not right is not timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.registry import Case, Row

#: The fused op may err by this factor more than the plain formula does in the same precision.
FACTOR = 2.0


@dataclass(frozen=True)
class Verdict:
    """Whether an op agrees with its formula in float64, and by how much it misses or makes it."""

    passed: bool
    message: str


def values_and_gradients(
    function: Callable[..., tuple[Tensor, ...]], leaves: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs, then the gradients of every leaf that requires one."""
    outputs = function(*leaves)
    gradients = torch.autograd.grad(outputs, [x for x in leaves if x.requires_grad], tuple(cotangents))
    return [x.detach() for x in (*outputs, *gradients)]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|`` in the Euclidean norm; NaN for NaN."""
    expected = expected.double()
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-300)).item()


def check(row: Row, case: Case, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Verdict:
    """Compare ``row.op`` with its formula in float64, values and all gradients, on random inputs."""
    sizes = {**case.sizes, **case.gate}
    inputs = row.inputs(dtype=dtype, device=device, seed=seed, **sizes)
    exact_inputs = [x.double() for x in inputs]
    with torch.no_grad():
        outputs = row.formula(*inputs)
    generator = torch.Generator().manual_seed(seed + 1)
    cotangents = [torch.randn(y.shape, generator=generator, dtype=dtype).to(device) for y in outputs]
    exact = values_and_gradients(row.formula, row.leaves(exact_inputs), [g.double() for g in cotangents])
    plain = values_and_gradients(row.formula, row.leaves(inputs), cotangents)
    fused = values_and_gradients(row.op, row.leaves(inputs), cotangents)
    return _judge(exact, plain, fused, torch.finfo(dtype).eps)


def _judge(exact: Sequence[Tensor], plain: Sequence[Tensor], fused: Sequence[Tensor], eps: float) -> Verdict:
    worst = 0.0
    for index, (reference, formula, ours) in enumerate(zip(exact, plain, fused, strict=True)):
        if ours.shape != reference.shape or not torch.isfinite(ours).all():
            return Verdict(False, f"result {index}: shape {tuple(ours.shape)}, or values that are not finite")
        # where the formula happens to be exact, a few roundings are still allowed
        budget = FACTOR * relative_error(formula, reference) + 4 * eps
        error = relative_error(ours, reference)
        if not error <= budget:
            return Verdict(False, f"result {index}: relative error {error:.1e}, allowed {budget:.1e}")
        worst = max(worst, error)
    return Verdict(True, f"largest relative error {worst:.1e} of {len(exact)} results")
