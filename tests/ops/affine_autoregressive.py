"""``affine_autoregressive``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvae_kernels import functional as F
from hvae_kernels.ops.affine_autoregressive import autograd, reference
from hvae_kernels.ops.affine_autoregressive.gates import DEFAULTS, PARAMETERS
from ops._mutation import Mutation
from ops._spec import SHAPES, OpSpec, RawOp, in_layout, uniform


def autoregressive_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, ...],
    layout: str = "contiguous",
    scale: float = 1.0,
    around: float | None = None,
) -> tuple[Tensor, ...]:
    """Inputs of ``affine_autoregressive``, whose raw scale is of size ``scale``, or all of it close to ``around``."""
    kind = {"dtype": dtype, "device": device}
    z, shift, log_scale = (torch.randn(shape, **kind) for _ in range(3))
    log_scale = scale * log_scale if around is None else around * uniform(0.99, 1.0, *shape, **kind)
    return tuple(in_layout(x, layout) for x in (z, shift, log_scale))


#: One gate with a straight-through gradient, one with a logarithm, one that blends; every gate has a case of its own.
TYPICAL_GATES = ("clipped", "softplus", "sigmoid")


def _gated(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    """The op for several gates at once, each with results of its own."""

    def gated(*inputs: Tensor, gates: tuple[str, ...] = TYPICAL_GATES, **options: str) -> tuple[Tensor, ...]:
        return tuple(result for gate in gates for result in op(*inputs, DEFAULTS[gate], **options))

    return gated


def _raw(gate: str) -> tuple[RawOp, ...]:
    """The raw kernels under one gate, with and without cotangents, directions and the shift."""
    numbers = DEFAULTS[gate].encoded
    forward, backward, double_backward = (
        autograd.RAW_FORWARD,
        autograd.RAW_BACKWARD,
        autograd.RAW_DOUBLE_BACKWARD,
    )

    def cotangents(x):
        return torch.randn_like(x[0]), torch.randn_like(x[0][..., 0])

    return (
        RawOp(forward, lambda x: (*x, *numbers)),
        RawOp(backward, lambda x: (*cotangents(x), *x, *numbers, 7)),
        RawOp(backward, lambda x: (None, cotangents(x)[1], x[0], None, x[2], *numbers, 4)),
        RawOp(double_backward, lambda x: (*(torch.randn_like(t) for t in x), *cotangents(x), *x, *numbers, 31)),
        RawOp(double_backward, lambda x: (*(None,) * 3, *cotangents(x), x[0], None, x[2], *numbers, 5)),
    )


#: The cases under all of :data:`TYPICAL_GATES`.
_UNDER_ALL = ("plain", "no_rows", "prime", "above_power")
CASES = {
    **{name: case if name in _UNDER_ALL else {**case, "gates": ("sigmoid",)} for name, case in SHAPES.items()},
    "many_rows": {"shape": (1500, 3), "gates": ("sigmoid",)},
    "several_blocks": {"shape": (9, 1000), "gates": ("sigmoid",)},
    **{gate: {"shape": (13, 17), "scale": 3.0, "gates": (gate,)} for gate in PARAMETERS},
}
EXTREMES = {
    f"{gate}_{around:g}": {"shape": (5, 17), "around": around, "gates": (gate,)}
    for gate in PARAMETERS
    for around in (80.0, -80.0, 1e4, -1e4)
    if (gate, around) != ("affine", 1e4)  # overflows in float64 too
}

SPECS = (
    OpSpec(
        name="affine_autoregressive",
        rows=(0, 1, 2),
        row_cases=tuple({"gates": (gate,)} for gate in PARAMETERS),
        defined_at_infinity={2: "the clamp's straight-through formula subtracts infinities"},
        op=_gated(lambda *x, **options: F.affine_autoregressive(*x[:-1], gate=x[-1], **options)),
        reference=_gated(reference.affine_autoregressive),
        make=autoregressive_inputs,
        cases=CASES,
        small={"shape": (2, 2)},
        extremes=EXTREMES,
        same=(0, 1),
        raw=(*_raw("softplus"), *_raw("sigmoid")),
        options=("gates",),
        long_sums={"shape": (33, 1023), "gates": ("affine",)},
    ),
)

_TAIL = "csrc/kernels/affine_autoregressive.h"
_TAIL_CPU = "csrc/cpu/affine_autoregressive.cpp"
_TAIL_CPP = "tests/test_contract.py -k affine_autoregressive/cpp"
_TAIL_TRITON = "hvae_kernels/ops/affine_autoregressive/triton.py"
_TAIL_TRITON_TESTS = "tests/test_contract.py -k affine_autoregressive/triton"
_TAIL_TESTS = "tests/test_affine_autoregressive.py"

MUTATIONS = (
    Mutation(_TAIL, "to[j] = p.scale * zs[j] + p.rest * bs[j];", "to[j] = p.scale * zs[j] + bs[j];", _TAIL_CPP),
    Mutation(_TAIL, "y = gate.kBlends ? zs[j] - bs[j] : zs[j];\n        dz[j] = g * p.scale;", "y = zs[j];\n        dz[j] = g * p.scale;", _TAIL_CPP),
    Mutation(_TAIL, "hy = gate.kBlends ? hz - hb : hz;", "hy = hz;", _TAIL_CPP),
    Mutation(_TAIL, "+ ls[j] * p.dd_log);", ");", _TAIL_CPP),
    Mutation(_TAIL, "near ? epsilon - p.rest : epsilon", "near ? epsilon : epsilon", _TAIL_CPP),
    Mutation(_TAIL, "scale * (d_log * d_log + dd_log), dd_log};", "scale * d_log * d_log, dd_log};", _TAIL_CPP),
    Mutation(_TAIL, "p.value, d_log, curve, curve * inverse - d_log * d_log};", "p.value, d_log, curve, curve * inverse};", _TAIL_CPP),
    Mutation(_TAIL, "const T above = s < low ? low : s,", "const T above = s,", _TAIL_TESTS),
    Mutation(_TAIL_CPU, ".grad = spare.in(gs, at),\n                        .grad_log = ls ? ls + first : nullptr,", ".grad = spare.in(gs, at),\n                        .grad_log = ls,", _TAIL_CPP),
    Mutation(_TAIL_TRITON, "+ rest * load(shift, at, mask, DTYPE), mask)", "+ load(shift, at, mask, DTYPE), mask)", _TAIL_TRITON_TESTS),
    Mutation("csrc/kernels/affine_autoregressive.h", "if (!given) {", "if (false) {", "tests/test_affine_autoregressive.py -k overflowing"),
    Mutation(_TAIL_TRITON, "by_scale + gl * d_log, mask)", "by_scale, mask)", _TAIL_TRITON_TESTS),
    Mutation(_TAIL_TRITON, "            hy = hz - hb\n", "", _TAIL_TRITON_TESTS),
    Mutation(_TAIL_TRITON, "logs += tl.where(mask, log, 0.0)", "logs += log", _TAIL_TRITON_TESTS),
    Mutation("hvae_kernels/ops/affine_autoregressive/gates.py", "s.clamp(low, high).detach() + (s - s.detach())", "s.clamp(low, high)", _TAIL_TESTS),
    Mutation("hvae_kernels/ops/affine_autoregressive/autograd.py", "shift if blends(ctx.call.options[0]) else None", "shift", _TAIL_TESTS),
)  # fmt: skip
