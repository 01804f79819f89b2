"""``gaussian_mixture_log_prob`` and ``gaussian_mixture_responsibilities``."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hvae_kernels import functional as F
from hvae_kernels.ops.gaussian_mixture import autograd, reference
from ops._mutation import Mutation
from ops._spec import SHAPES, OpSpec, RawOp, in_layout, uniform


def mixture_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, ...],
    components: int = 4,
    layout: str = "contiguous",
    scale: float = 1.0,
    spread: float = 1.0,
) -> tuple[Tensor, ...]:
    """Inputs of Gaussian mixtures whose components overlap, however many features; ``spread`` takes them apart."""
    kind = {"dtype": dtype, "device": device}
    typical = shape[-1] ** -0.5
    loc = spread * typical * torch.randn(components, shape[-1], **kind)
    log_scale = math.log(scale) + typical * uniform(-0.5, 0.5, components, shape[-1], **kind)
    nearest = torch.randint(components, shape[:-1], device=device)
    value = loc[nearest] + scale * torch.randn(shape, **kind)
    value, log_scale = (in_layout(x, layout) for x in (value, log_scale))
    return value, torch.randn(components, **kind), loc if layout == "expanded" else in_layout(loc, layout), log_scale


def _single(op: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    """An op with one result as one with a tuple of them."""
    return lambda *inputs, **options: (op(*inputs, **options),)


def _raw(responsibilities: bool) -> tuple[RawOp, ...]:
    def output(x: tuple[Tensor, ...]) -> Tensor:
        return torch.randn_like(autograd._forward_fake(*x, responsibilities))

    return (
        RawOp(autograd.RAW_FORWARD, lambda x: (*x, responsibilities)),
        RawOp(autograd.RAW_BACKWARD, lambda x: (output(x), *x, responsibilities)),
        RawOp(
            autograd.RAW_DOUBLE_BACKWARD,
            lambda x: (*(torch.randn_like(t) for t in x), output(x), *x, responsibilities),
        ),
        RawOp(autograd.RAW_DOUBLE_BACKWARD, lambda x: (*(None,) * 4, output(x), *x, responsibilities)),
    )


CASES = {
    **{name: case for name, case in SHAPES.items() if name != "no_features"},
    # of 1031 features log joints are about -1500, and 1e-12 is below what float64 rounds off their exponentials
    "wide": {"shape": (2, 257)},
    "several_blocks": {"shape": (37, 129)},
    "expanded": {"shape": (9, 5), "layout": "expanded"},
    "one_component": {"shape": (33, 6), "components": 1},
    "several_vectors": {"shape": (37, 5), "components": 67},
    "many_rows": {"shape": (2100, 3), "components": 18},
}
EXTREMES = {
    "narrow": {"shape": (7, 5), "scale": 1e-3},
    "far": {"shape": (7, 5), "spread": 1e3},
    "narrow_and_far": {"shape": (7, 5), "scale": 1e-3, "spread": 1e3},
    "wide": {"shape": (7, 5), "scale": 1e18, "spread": 1e18},
    "tiny": {"shape": (7, 5), "scale": 1e-18, "spread": 1e-18},
}

SPECS = (
    OpSpec(
        name="gaussian_mixture_log_prob",
        row_cases=({"components": 16}, {"components": 15}, {"components": 3}),
        op=_single(F.gaussian_mixture_log_prob),
        reference=_single(reference.gaussian_mixture_log_prob),
        make=mixture_inputs,
        cases=CASES,
        interpreted={"many_rows": {"shape": (600, 3), "components": 18}},
        small={"shape": (2, 3), "components": 2},
        extremes=EXTREMES,
        same=(2, 3),
        raw=_raw(responsibilities=False),
        long_sums={"shape": (60_000, 4)},
    ),
    OpSpec(
        name="gaussian_mixture_responsibilities",
        row_cases=({"components": 16}, {"components": 15}, {"components": 3}),
        op=_single(F.gaussian_mixture_responsibilities),
        reference=_single(reference.gaussian_mixture_responsibilities),
        make=mixture_inputs,
        cases=CASES,
        interpreted={"many_rows": {"shape": (600, 3), "components": 18}},
        small={"shape": (2, 3), "components": 2},
        extremes=EXTREMES,
        same=(2, 3),
        raw=_raw(responsibilities=True),
        long_sums={"shape": (300, 257)},
    ),
)

_MIXTURE = "csrc/kernels/gaussian_mixture.h"
_MIXTURE_CPU = "csrc/cpu/gaussian_mixture.cpp"
_MIXTURE_CPP = "tests/test_contract.py -k gaussian_mixture and cpp and (budget or extremes)"
_MIXTURE_TESTS = "tests/test_gaussian_mixture.py -k cpp"
_MIXTURE_TRITON = "hvae_kernels/ops/gaussian_mixture/triton.py"
_MIXTURE_TRITON_TESTS = "tests/test_gaussian_mixture.py -k triton"

MUTATIONS = (
    Mutation(_MIXTURE, "base - T(0.5) * total;", "base - T(0.51) * total;", _MIXTURE_CPP),
    Mutation(_MIXTURE, "constexpr int64_t kTerms = 16;", "constexpr int64_t kTerms = 1 << 12;", _MIXTURE_CPP),
    Mutation(_MIXTURE, "if (top == -std::numeric_limits<T>::infinity()) top = 0;", "", _MIXTURE_TESTS),
    Mutation(_MIXTURE, "c.shift + shares<Set>", "shares<Set>", _MIXTURE_CPP),
    Mutation(_MIXTURE, "values[i] -= top;", "values[i] -= T(0) * top;", _MIXTURE_TESTS),
    Mutation(_MIXTURE, "across[0][f][k] = -weight[k];", "across[0][f][k] = Lanes{};", _MIXTURE_CPP),
    Mutation(_MIXTURE, "first == 0 && k < V; ++k)", "k < V; ++k)", _MIXTURE_CPP),
    Mutation(_MIXTURE, "slopes[i] = row[i] * (slopes[i] * g[i] - covariance);", "slopes[i] = row[i] * (slopes[i] * g[i]);", _MIXTURE_CPP),
    Mutation(_MIXTURE, "across[chain][f][k] += T(2) * weighted * t;", "across[chain][f][k] += weighted * t;", _MIXTURE_CPP),
    Mutation(_MIXTURE, "pull += weighted - slope", "pull += weighted + slope", _MIXTURE_CPP),
    Mutation(_MIXTURE_CPU, "from[std::min(r, n - 1) * d + j]", "r < n ? from[r * d + j] : T(0)", _MIXTURE_TESTS),
    Mutation(_MIXTURE_CPU, "if (std::isfinite(bases[i])) {", "{", _MIXTURE_TESTS),
    Mutation(_MIXTURE_CPU, ">= total / 2", "> total", _MIXTURE_TESTS),
    Mutation(_MIXTURE, "j == 0 || j < c.features", "j < c.features", _MIXTURE_TESTS),
    Mutation(_MIXTURE_TRITON, "(below < 0.5).sum()", "(below < 2).sum()", _MIXTURE_TRITON_TESTS),
    Mutation(_MIXTURE_CPU, "chunk < sizes.chunks; ++chunk)", "chunk < 1; ++chunk)", _MIXTURE_CPP),
    Mutation(_MIXTURE_TRITON, "total *= exponential(top - finite)", "total *= 1.0", _MIXTURE_TRITON_TESTS),
    Mutation(_MIXTURE_TRITON, "along_run += tl.where", "along_run = tl.where", _MIXTURE_TRITON_TESTS),
    Mutation(_MIXTURE_TRITON, "tl.program_id(2) * tl.num_programs(0) * features + of", "of", _MIXTURE_TRITON_TESTS),
    Mutation(_MIXTURE_TRITON, "weight * (t * t - 1.0)", "weight * t * t", _MIXTURE_TRITON_TESTS),
    Mutation(_MIXTURE_TRITON, "pull += slope_weight * (turned - widened)", "pull += slope_weight * turned", _MIXTURE_TRITON_TESTS),
    Mutation(_MIXTURE_TRITON, "d_weight += weights.sum(1", "d_weight = weights.sum(1", _MIXTURE_TRITON_TESTS),
    Mutation(_MIXTURE_CPU, "    this->repeat_last(sizes.components, d);", "", "tests/test_contract.py -k mixture and cpp and infinite"),
)  # fmt: skip
