"""``iwae_bound``, ``stl_surrogate`` and ``dreg_surrogate``."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hvae_kernels import functional as F
from hvae_kernels.ops.iwae import autograd, reference
from ops._mutation import Mutation
from ops._spec import EXTREMES, OpSpec, RawOp, in_layout
from ops.leapfrog_update import CASES as UPDATE_CASES


def iwae_inputs(
    dtype: torch.dtype, device: str, *, shape: tuple[int, ...], layout: str = "contiguous", scale: float = 1.0
) -> tuple[Tensor, ...]:
    """The two log-densities whose difference are the log-weights."""
    kind = {"dtype": dtype, "device": device}
    return tuple(in_layout(scale * torch.randn(shape, **kind), layout) for _ in range(2))


def kept(log_weights: Tensor) -> Tensor:
    """What the forward kernels of ``iwae_bound`` keep of each column."""
    top = log_weights.amax(0)
    return torch.stack([top, 1 / (log_weights - top).exp().sum(0)])


def iwae_op(function: Callable[..., Tensor], *arguments: int) -> Callable[..., tuple[Tensor]]:
    """The bound or a surrogate, times a sine: a surrogate alone has no second derivative that could be wrong."""

    def bound(*inputs: Tensor, dim: int = 0, **options: str) -> tuple[Tensor]:
        log_p, log_q = inputs
        return (function(log_p - log_q, dim, *arguments, **options) * log_q.select(dim, 0).sin(),)

    return bound


def held_surrogate(function: Callable[..., Tensor], power: int, point: tuple[Tensor, ...]) -> Callable:
    """The surrogate with its weights held at ``point``: the value moves by the formula, the gradient is its own."""
    log_p, log_q = point
    held = (log_p - log_q).detach()
    weights = reference.normalized(held, 0) ** power

    def surrogate(log_weights: Tensor, dim: int) -> Tensor:
        change = (weights * (log_weights - held)).sum(dim).detach()
        return function(held + (log_weights - log_weights.detach()), dim) + change

    return iwae_op(surrogate)


CASES = {name: case for name, case in UPDATE_CASES.items() if 0 not in case["shape"]}
CASES |= {
    "no_rows": {"shape": (5, 0)},
    "many_samples": {"shape": (2000, 3), "scale": 3.0},
    "last_dim": {"shape": (7, 5), "dim": -1},
    "inner_dim": {"shape": (2, 3, 4), "dim": 1},
    "spread": {"shape": (13, 70), "scale": 60.0},
}


def _spec(name: str, plain: Callable[..., tuple[Tensor]], power: int) -> OpSpec:
    function = getattr(F, name)
    return OpSpec(
        name=name,
        op=iwae_op(function),
        rows=(0, 1),
        row_cases=({"dim": -1}, {"dim": 0}),
        reference=plain,
        make=iwae_inputs,
        cases=CASES,
        small={"shape": (3, 2)},
        extremes=EXTREMES,
        same=(0, 1),
        raw=(
            RawOp(autograd.RAW_FORWARD, lambda x: (x[0], power, False)),
            RawOp(autograd.RAW_FORWARD, lambda x: (x[0], power, True)),
            RawOp(autograd.RAW_BACKWARD, lambda x: (x[1][0], x[0], kept(x[0]), max(1, power))),
        ),
        options=("dim",),
        held=functools.partial(held_surrogate, function, power) if power else None,
        summed_by_torch=("second",),  # plain PyTorch
        long_sums={"shape": (40_000, 5)},
    )


SPECS = (
    _spec("iwae_bound", iwae_op(reference.iwae_bound), 0),
    _spec("stl_surrogate", iwae_op(reference.surrogate, 1), 1),
    _spec("dreg_surrogate", iwae_op(reference.surrogate, 2), 2),
)

_IWAE = "csrc/kernels/iwae.h"
_IWAE_CPP = "tests/test_contract.py -k (iwae_bound or stl_surrogate or dreg_surrogate) and cpp"
_IWAE_TESTS = "tests/test_iwae.py"
_IWAE_TRITON = "hvae_kernels/ops/iwae/triton.py"
_IWAE_TRITON_TESTS = "tests/test_contract.py -k (iwae_bound or stl_surrogate or dreg_surrogate) and triton"

MUTATIONS = (
    Mutation(_IWAE, "std::abs(top) < std::numeric_limits<T>::infinity() ? top : T(0)", "top", _IWAE_TESTS + " -k cpp"),
    Mutation(_IWAE, "more.top[j] == top[j] ? T(1) : exponential(more.top[j] - top[j])", "T(1)", _IWAE_TESTS + " -k cpp"),
    Mutation(_IWAE, "more.top[j] == top[j] ? T(1) : exponential(more.top[j] - top[j])", "exponential(more.top[j] - top[j])", _IWAE_TESTS + " -k cpp"),
    Mutation(_IWAE, "(power == 2 ? factor * factor : factor)", "factor", _IWAE_TESTS + " -k cpp"),
    Mutation(_IWAE, "std::copy_n(top, n, sums.top);", "", _IWAE_TESTS + " -k cpp"),
    Mutation(_IWAE, "powered == 0 ? 0 : powered * row[j]", "powered * row[j]", _IWAE_TESTS + " -k cpp"),
    Mutation(_IWAE, "sums.weighted[j] / (divisor * divisor)", "sums.weighted[j] / divisor", _IWAE_CPP),
    Mutation(_IWAE, "total[j] += (scaled", "total[j] = (scaled", _IWAE_CPP),
    Mutation(_IWAE, "total[j] += scaled", "total[j] = scaled", _IWAE_CPP),
    Mutation(_IWAE, "total[j] += (scaled", "total[j] = T(total[j]) + (scaled", _IWAE_CPP + " and (budget or extremes)"),
    Mutation(_IWAE, "total[j] += weight;", "total[j] = T(total[j] + weight);", _IWAE_CPP + " and (budget or extremes)"),
    Mutation(_IWAE, "return !infinite;", "return true;", _IWAE_TESTS + " -k cpp"),
    Mutation(_IWAE, "sums.total[j] == 0 ? 1 : 1 / sums.total[j]", "1 / sums.total[j]", _IWAE_TESTS + " -k cpp"),
    Mutation("csrc/cpu/iwae.cpp", "inverse + column, gs + column", "inverse, gs + column", _IWAE_TESTS + " -k cpp"),
    Mutation("csrc/cpu/iwae.cpp", "inverse + column, gs + column", "inverse + column, gs", _IWAE_TESTS + " -k cpp"),
    Mutation("csrc/cpu/iwae.cpp", "length, n_, std::min(columns_, n_ - column)", "length, n_, std::min(columns_, n_)", _IWAE_TESTS + " -k cpp"),
    Mutation("hvae_kernels/ops/iwae/reference.py", "weights = normalized(log_weights.detach(), dim) ** power", "weights = normalized(log_weights, dim) ** power", _IWAE_CPP),
    Mutation("hvae_kernels/ops/iwae/autograd.py", "return reference.normalized(log_weights.detach(), 0) ** power", "return reference.normalized(log_weights.detach(), 0)", _IWAE_CPP),
    Mutation(_IWAE_TRITON, "tl.where(mask, load(log_weights, at, mask, DTYPE), float(\"-inf\"))", "load(log_weights, at, mask, DTYPE)", _IWAE_TRITON_TESTS),
    Mutation(_IWAE_TRITON, "tl.where(tl.abs(largest) == float(\"inf\"), 0.0, largest)", "largest", _IWAE_TESTS + " -k triton"),
    Mutation(_IWAE, "(powered < kNegligible<T> ? T(0) : powered)", "powered", _IWAE_TESTS + " -k cpp"),
    Mutation(_IWAE_TRITON, "tl.where(weight < negligible, 0.0, weight)", "weight", _IWAE_TESTS + " -k triton"),
    Mutation(_IWAE_TRITON, "(tl.log(total) - tl.log(count))", "tl.log(total)", _IWAE_TRITON_TESTS),
    Mutation(_IWAE_TRITON, "tl.where(weight == 0, 0.0, weight * values)", "weight * values", _IWAE_TESTS + " -k triton"),
)  # fmt: skip
