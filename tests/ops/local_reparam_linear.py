"""``local_reparam_linear``."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hvae_kernels import functional as F
from hvae_kernels.ops.local_reparam_linear import autograd, reference
from ops._mutation import Mutation
from ops._spec import ALL_RESULTS, OpSpec, RawOp, in_layout


def local_reparam_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, ...],
    out: int,
    bias: bool = True,
    layout: str = "contiguous",
    weight_layout: str = "contiguous",
    scale: float = 1.0,
    log_scale: float = 0.0,
) -> tuple[Tensor, ...]:
    """Inputs of ``local_reparam_linear``: x and the noise, a weight for ``out`` outputs, and biases."""
    kind = {"dtype": dtype, "device": device}
    x = in_layout(scale * torch.randn(shape, **kind), layout)
    loc = in_layout(torch.randn(out, shape[-1], **kind), weight_layout)
    weight_log_scale = in_layout(log_scale + 0.5 * torch.randn(out, shape[-1], **kind), weight_layout)
    noise = in_layout(torch.randn(*shape[:-1], out, **kind), layout)
    biases = (torch.randn(out, **kind), log_scale + 0.5 * torch.randn(out, **kind)) if bias else ()
    return x, loc, weight_log_scale, noise, *biases


def local_reparam_op(function: Callable[..., Tensor], x: Tensor, *rest: Tensor, **options: str) -> tuple[Tensor]:
    """``local_reparam_linear`` or its reference with the optional biases last."""
    loc, log_scale, noise, *biases = rest
    return (function(x, loc, log_scale, *(biases or (None, None)), noise, **options),)


def _raw(x: tuple[Tensor, ...], *, bias: bool) -> tuple[Tensor | None, ...]:
    x, loc, log_scale, noise, *biases = x
    return x, loc, log_scale, *(biases if bias else (None, None)), noise


CASES = {
    "plain": {"shape": (7, 5), "out": 4},
    "no_bias": {"shape": (7, 5), "out": 4, "bias": False},
    "no_rows": {"shape": (0, 5), "out": 4},
    "no_inputs": {"shape": (7, 0), "out": 4},
    "no_inputs_no_bias": {"shape": (7, 0), "out": 4, "bias": False},
    "no_outputs": {"shape": (7, 5), "out": 0},
    "no_leading": {"shape": (5,), "out": 4},
    "leading_dims": {"shape": (2, 3, 4, 5), "out": 7},
    "leading_dims_no_rows": {"shape": (2, 0, 5), "out": 4},
    "one_element": {"shape": (1, 1), "out": 1},
    "prime": {"shape": (13, 17), "out": 19},
    "below_power": {"shape": (15, 31), "out": 63},
    "above_power": {"shape": (17, 33), "out": 65},
    "many_inputs": {"shape": (5, 261), "out": 51},
    "many_rows": {"shape": (1091, 3), "out": 5},
    "small_scales": {"shape": (7, 5), "out": 4, "log_scale": -12.0},
    "strided": {"shape": (7, 5), "out": 4, "layout": "strided", "weight_layout": "strided"},
    "transposed": {"shape": (7, 5), "out": 4, "layout": "transposed", "weight_layout": "transposed"},
    "expanded": {"shape": (7, 5), "out": 4, "layout": "expanded", "weight_layout": "expanded"},
}
EXTREMES = {
    "large": {"shape": (7, 5), "out": 4, "scale": 1e18},
    "tiny": {"shape": (7, 5), "out": 4, "scale": 1e-18},
}

SPECS = (
    OpSpec(
        name="local_reparam_linear",
        rows=(0, 3),
        row_cases=({"out": 16}, {"out": 5}),
        op=functools.partial(local_reparam_op, F.local_reparam_linear),
        reference=functools.partial(local_reparam_op, reference.local_reparam_linear),
        make=local_reparam_inputs,
        cases=CASES,
        small={"shape": (3, 4), "out": 3},
        extremes=EXTREMES,
        same=(1, 2),
        raw=(
            RawOp(autograd.RAW_FORWARD, lambda x: _raw(x, bias=True)),
            RawOp(autograd.RAW_FORWARD, lambda x: _raw(x, bias=False)),
            RawOp(autograd.RAW_BACKWARD, lambda x: (x[3].cos(), *x[:4], x[3].exp(), True, True)),
            RawOp(autograd.RAW_BACKWARD, lambda x: (x[3].cos(), *x[:4], x[3].exp(), False, False)),
        ),
        summed_by_torch=ALL_RESULTS,
    ),
)

_REPARAM = "csrc/kernels/local_reparam_linear.h"
_REPARAM_CPU = "csrc/cpu/local_reparam_linear.cpp"
_REPARAM_CPP = "tests/test_contract.py -k local_reparam_linear/cpp and budget"
_REPARAM_TRITON = "hvae_kernels/ops/local_reparam_linear/triton.py"
_REPARAM_TRITON_TESTS = "tests/test_contract.py -k local_reparam_linear/triton and budget"
_REPARAM_AUTOGRAD = "hvae_kernels/ops/local_reparam_linear/autograd.py"
_REPARAM_TESTS = "tests/test_local_reparam_linear.py"

MUTATIONS = (
    Mutation(_REPARAM, "to[i] = x[i] * x[i];", "to[i] = x[i];", _REPARAM_CPP),
    Mutation(_REPARAM, "exponential(log_scale[i] + log_scale[i])", "exponential(log_scale[i])", _REPARAM_CPP),
    Mutation(_REPARAM, "std::sqrt(std[i] + bias_variance[i])", "std::sqrt(std[i])", _REPARAM_CPP),
    Mutation(_REPARAM, "y[i] = y[i] + bias_loc[i] + std[i] * noise[i];", "y[i] = y[i] + std[i] * noise[i];", _REPARAM_CPP),
    Mutation(_REPARAM, "(std[i] == T(0) ? kInfinity : std[i])", "std[i]", _REPARAM_TESTS + " -k cpp"),
    Mutation(_REPARAM, "to[i] += a[i] * b[i];", "to[i] = a[i] * b[i];", _REPARAM_CPP),
    Mutation(_REPARAM, "to[i] *= by[i];", "to[i] += by[i];", _REPARAM_CPP),
    Mutation(_REPARAM_CPU, "in + begin..., out + begin", "in..., out + begin", _REPARAM_TESTS + " -k threads"),
    Mutation(_REPARAM_CPU, "draws + i, deviations + i, samples + i", "draws, deviations + i, samples + i", _REPARAM_CPP),
    Mutation(_REPARAM_TRITON, "left.to(VARIANCE) * left.to(VARIANCE)", "left.to(VARIANCE)", _REPARAM_TRITON_TESTS),
    Mutation(_REPARAM_TRITON, "variances += exponential(2.0 * load(bias_log_scale, ", "variances += exponential(1.0 * load(bias_log_scale, ", _REPARAM_TRITON_TESTS),
    Mutation(_REPARAM_TRITON, "means += load(bias, column, column < columns, VARIANCE)[None, :]", "means += 0.0", _REPARAM_TRITON_TESTS),
    Mutation(_REPARAM_TRITON, "term = start + tl.arange", "term = 0 * start + tl.arange", _REPARAM_TRITON_TESTS),
    Mutation(_REPARAM_AUTOGRAD, "numerator / std.masked_fill(std == 0, math.inf)", "numerator / std", _REPARAM_TESTS),
    Mutation(_REPARAM_AUTOGRAD, "grad_std = grad * noise if grad_std is None else torch.addcmul(grad_std, grad, noise)", "grad_std = grad * noise", "tests/test_contract.py -k local_reparam_linear/cpp and per_sample"),
    Mutation(_REPARAM_AUTOGRAD, "d_x if grad is None else d_x + grad @ weight_loc", "d_x", _REPARAM_TRITON_TESTS),
    Mutation("hvae_kernels/ops/local_reparam_linear/reference.py", "torch.where(certain, 1, variance).sqrt()", "variance.sqrt()", _REPARAM_TESTS + " -k reference"),
)  # fmt: skip
