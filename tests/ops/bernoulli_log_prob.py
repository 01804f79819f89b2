"""``bernoulli_log_prob``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvae_kernels import functional as F
from hvae_kernels.ops.bernoulli_log_prob import autograd, reference
from ops._mutation import Mutation
from ops._spec import OpSpec, RawOp, in_layout, uniform
from ops.leapfrog_update import CASES as UPDATE_CASES


def bernoulli_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, ...],
    value_shape: tuple[int, ...] | None = None,
    layout: str = "contiguous",
    scale: float = 1.0,
    around: float | None = None,
) -> tuple[Tensor, ...]:
    """Logits, and a value in [0, 1] of ``value_shape`` or theirs."""
    kind = {"dtype": dtype, "device": device}
    logits = scale * torch.randn(shape, **kind) if around is None else around * uniform(0.99, 1.0, *shape, **kind)
    value = torch.rand(shape if value_shape is None else value_shape, **kind)
    return in_layout(logits, layout), in_layout(value, layout if value_shape is None else "contiguous")


def bernoulli_op(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    """``bernoulli_log_prob`` or its reference; with ``bits``, a dtype, the value becomes bits."""

    def log_prob(
        *inputs: Tensor, event_ndims: int = 1, bits: torch.dtype | None = None, **options: str
    ) -> tuple[Tensor]:
        logits, value = inputs  # so written because make_fx counts arguments
        return (function(logits, value if bits is None else (value > 0.5).to(bits), event_ndims, **options),)

    return log_prob


_UINT8, _BOOL = {"bits": torch.uint8}, {"bits": torch.bool}
CASES = {name: case for name, case in UPDATE_CASES.items() if name != "several_blocks"}
CASES |= {
    "samples": {"shape": (4, 3, 5), "value_shape": (3, 5)},
    "samples_uint8": {"shape": (4, 3, 5), "value_shape": (3, 5), **_UINT8},
    "samples_inside": {"shape": (3, 4, 5), "value_shape": (3, 1, 5), **_BOOL},
    "samples_inside_rows": {"shape": (2, 3, 4, 5), "value_shape": (2, 1, 4, 5)},
    "samples_apart": {"shape": (2, 3, 4, 5), "value_shape": (3, 1, 5)},
    "samples_outside": {"shape": (2, 3, 4, 5), "value_shape": (1, 1, 4, 5), **_UINT8},
    "one_value": {"shape": (4, 3, 5), "value_shape": (5,)},
    "no_samples": {"shape": (0, 3, 5), "value_shape": (3, 5)},
    "image": {"shape": (4, 3, 2, 7), "value_shape": (3, 2, 7), "event_ndims": 2, **_BOOL},
    "no_event": {"shape": (4, 33), "value_shape": (33,), "event_ndims": 0},
    "several_blocks": {"shape": (2, 3, 1100), "value_shape": (3, 1100)},
    "many_samples": {"shape": (9, 401, 7), "value_shape": (401, 7), **_UINT8},
    "sure": {"shape": (13, 17), "scale": 12.0},
}
EXTREMES = {
    f"{kind}_{around:g}": {"shape": (5, 17), "around": around, **bits}
    for kind, bits in {"soft": {}, "bool": _BOOL}.items()
    for around in (80.0, -80.0, 1e4, -1e4, 1e-18)
}

SPECS = (
    OpSpec(
        name="bernoulli_log_prob",
        rows=(0, 1),
        defined_at_infinity={1: "outside of [0, 1], and linear"},
        op=bernoulli_op(F.bernoulli_log_prob),
        reference=bernoulli_op(reference.bernoulli_log_prob),
        make=bernoulli_inputs,
        cases=CASES,
        small={"shape": (2, 3), "value_shape": (3,)},
        extremes=EXTREMES,
        same=(1, 0),
        raw=(
            RawOp(autograd.RAW_FORWARD, lambda x: (x[0][None, None], x[1][None, None].expand(1, 2, 3))),
            RawOp(autograd.RAW_FORWARD, lambda x: (x[0][None, :, None], x[1][None, None] > 0.5)),
            RawOp(
                autograd.RAW_BACKWARD,
                lambda x: (x[0][None, :, None, 0], x[0][None, :, None], x[1][None, None]),
            ),
            RawOp(
                autograd.RAW_DOUBLE_BACKWARD,
                lambda x: (x[0].cos()[None, :, None], x[0][None, :, None, 0], x[0][None, :, None], x[1][None, None]),
            ),
        ),
        options=("event_ndims", "bits"),
        summed_by_torch=("first/1", "second/0", "second/2"),  # what the samples of a value pull back to it
    ),
)

_BERNOULLI = "csrc/kernels/bernoulli_log_prob.h"
_BERNOULLI_CPP = "tests/test_contract.py -k bernoulli_log_prob/cpp"
_BERNOULLI_TESTS = "tests/test_bernoulli_log_prob.py"
_BERNOULLI_AUTOGRAD = "hvae_kernels/ops/bernoulli_log_prob/autograd.py"
_BERNOULLI_TRITON = "hvae_kernels/ops/bernoulli_log_prob/triton.py"
_BERNOULLI_TRITON_TESTS = "tests/test_contract.py -k bernoulli_log_prob/triton"

MUTATIONS = (
    Mutation(_BERNOULLI, "to[j] = w == T(0) ? T(0) : w * std::abs(logit);", "to[j] = w * std::abs(logit);", _BERNOULLI_TESTS),
    Mutation(_BERNOULLI, "return product * (T(1) + q) + q;", "return product * (T(1) + q) + q * T(1.0001);", _BERNOULLI_CPP),
    Mutation(_BERNOULLI, "rest_q = times(rest_q, e[j]);", "rest_q = e[j];", _BERNOULLI_CPP),
    Mutation(_BERNOULLI, "kLanes = 32, kLogs = 16;", "kLanes = 32, kLogs = 2;", _BERNOULLI_TESTS),
    Mutation(_BERNOULLI, "return logit > T(0) ? difference : -difference;", "return difference;", _BERNOULLI_CPP),
    Mutation(_BERNOULLI, "-gs[j] * hs[j] * (small * large);", "-gs[j] * hs[j] * small;", _BERNOULLI_CPP),
    Mutation("csrc/cpu/bernoulli_log_prob.cpp", "return at - (replica - replica / samples_) * plane;", "return at;", _BERNOULLI_CPP),
    Mutation(_BERNOULLI, "most = std::max(most, std::bit_cast<Bits>(xs[j]));", "most = std::bit_cast<Bits>(xs[j]);", _BERNOULLI_TESTS + " -k refused"),
    Mutation("csrc/cpu/bernoulli_log_prob.cpp", "% samples_ == 0; }", "% samples_ == samples_; }", _BERNOULLI_TESTS + " -k refused"),
    Mutation("hvae_kernels/ops/bernoulli_log_prob/api.py", "(broadcast[stop] or leading[stop] == 1)", "broadcast[stop]", _BERNOULLI_TESTS),
    Mutation(_BERNOULLI_AUTOGRAD, "d_logits = -grad.unsqueeze(-1) * h", "d_logits = grad.unsqueeze(-1) * h", _BERNOULLI_CPP),
    Mutation(_BERNOULLI_TRITON, "row // events * rows + row % rows", "row % rows", _BERNOULLI_TRITON_TESTS),
    Mutation(_BERNOULLI_TRITON, "tl.where(mask, linear + log1p_unit(decay(logit)), 0.0)", "linear + log1p_unit(decay(logit))", _BERNOULLI_TRITON_TESTS),
    Mutation(_BERNOULLI_TRITON, "small - wrong, wrong - small)", "small - wrong, small - wrong)", _BERNOULLI_TRITON_TESTS),
    Mutation(_BERNOULLI_TRITON, "-g * direction * (small * large)", "-g * direction * small", _BERNOULLI_TRITON_TESTS),
)  # fmt: skip
