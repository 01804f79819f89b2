"""Where the microseconds of a small ``gaussian_leapfrog`` call go: ``python benchmarks/run.py --breakdown``.

Every line is timed on its own, interleaved with the others. What PyTorch asks of any op is told by an empty Function
with as many inputs and outputs: through ``torch.autograd.grad``, and through the engine without its argument handling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.ops.gaussian_leapfrog import GAUSSIAN_LEAPFROG
from benchmarks.timing import FULL, Candidate, Plan, Timing, interleave
from hvae_kernels import _dispatch, _library, functional
from hvae_kernels.ops.gaussian_leapfrog import autograd, reference

ROW = GAUSSIAN_LEAPFROG
SIZES: Mapping[str, int] = {"batch": 10, "features": 25, "steps": 10}
NAME = "gaussian_leapfrog"


class _Empty(_library.OpFunction):
    """As many inputs and outputs as the op, saved as the op saves them, and nothing computed."""

    @staticmethod
    def forward(*inputs):
        return tuple(x.clone() for x in inputs[:2])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.gradients = tuple(torch.zeros_like(x) for x in inputs)

    @staticmethod
    def backward(ctx, *cotangents):
        return ctx.gradients if ctx.saved_tensors else None


def pieces(device: torch.device) -> dict[str, Callable[[], object]]:
    """What a call consists of, each piece callable on its own, and the wholes they add up to."""
    inputs = ROW.inputs(dtype=torch.float32, device=device, seed=0, **SIZES)
    leaves = tuple(x.clone().requires_grad_() for x in inputs)
    cotangents = tuple(torch.randn_like(x) for x in inputs[:2])
    implementation = _dispatch.resolve(NAME, inputs[0])
    if implementation == "reference":
        raise RuntimeError(f"nothing to break down on {device}: {NAME} has no kernel here (python -m hvae_kernels)")
    forward, backward = autograd.RAW_FORWARD[implementation], autograd.RAW_BACKWARD[implementation]
    every = autograd.NEEDS_STATE | autograd.NEEDS_PARAMETERS
    empty = _Empty.apply(*leaves)
    run_engine = torch.autograd.Variable._execution_engine.run_backward

    def gradients(function: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves), leaves, cotangents)

    return {
        "kernel, forward": lambda: forward(*inputs),
        "Function, no gradients": lambda: autograd.call(implementation, *inputs),
        "Function, gradients": lambda: autograd.call(implementation, *leaves),
        "op, no gradients": lambda: functional.gaussian_leapfrog(*inputs),
        "op, gradients": lambda: functional.gaussian_leapfrog(*leaves),
        "kernel, backward": lambda: backward(*cotangents, *inputs, every),
        "empty Function, autograd.grad": lambda: torch.autograd.grad(empty, leaves, cotangents, retain_graph=True),
        "empty Function, engine": lambda: run_engine(
            empty, cotangents, True, False, leaves, allow_unreachable=False, accumulate_grad=False
        ),
        "op, forward + backward": lambda: gradients(functional.gaussian_leapfrog),
        "formula, forward + backward": lambda: gradients(reference.gaussian_leapfrog),
    }


def account(us: Mapping[str, float]) -> list[tuple[str, float]]:
    """Forward + backward split into parts that add up to it."""
    backward = us["op, forward + backward"] - us["op, gradients"] - us["kernel, backward"]
    return [
        (
            "public function: autocast, implementation, explaining errors",
            us["op, gradients"] - us["Function, gradients"],
        ),
        ("autograd.Function, forward", us["Function, gradients"] - us["kernel, forward"]),
        ("raw kernel, forward (dispatcher, allocation, arithmetic)", us["kernel, forward"]),
        ("raw kernel, backward", us["kernel, backward"]),
        ("autograd.Function, backward", backward - us["empty Function, autograd.grad"]),
        ("autograd engine, for an empty Function", us["empty Function, engine"]),
        ("torch.autograd.grad, argument handling", us["empty Function, autograd.grad"] - us["empty Function, engine"]),
    ]


def measure(device: torch.device, plan: Plan = FULL) -> dict[str, Timing]:
    """Time the pieces."""
    candidates = [Candidate(name, lambda call: call(), lambda i, p=piece: p) for name, piece in pieces(device).items()]
    return interleave(candidates, device.type, plan)


def main(device_type: str, plan: Plan = FULL) -> int:
    """Print the breakdown."""
    try:
        timings = measure(torch.device(device_type), plan)
    except RuntimeError as error:
        print(error)
        return 1
    us = {name: timing.p20 for name, timing in timings.items()}
    rows = [(name, f"{t.p20:.2f}", f"{t.p50:.2f}", f"{t.p80:.2f}") for name, t in timings.items()]
    label = "({batch}, {features}), K = {steps}".format(**SIZES)
    print(f"{NAME} {label}, float32, {device_type}, microseconds\n")
    print(results.table(("measured", "p20", "p50", "p80"), rows), end="\n\n")
    whole = us["op, forward + backward"]
    shares = [(name, f"{value:.2f}", f"{100 * value / whole:.0f} %") for name, value in account(us)]
    total = (f"sum, {us['formula, forward + backward'] / whole:.3g}x faster than the formula", f"{whole:.2f}", "100 %")
    print(results.table(("forward + backward consists of", "p20", "share"), [*shares, total]))
    return 0
