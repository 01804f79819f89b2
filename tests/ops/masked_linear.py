"""``masked_linear``."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hvae_kernels import functional as F
from hvae_kernels.ops.masked_linear import autograd, reference
from ops._mutation import Mutation
from ops._spec import HIDDEN, OpSpec, RawOp, in_layout


def masked_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, ...],
    out: int,
    bias: bool = True,
    layout: str = "contiguous",
    weight_layout: str = "contiguous",
    scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """Inputs of ``masked_linear``: x of ``shape``, a weight for ``out`` outputs, and a bias."""
    kind = {"dtype": dtype, "device": device}
    x = in_layout(scale * torch.randn(shape, **kind), layout)
    weight = in_layout(torch.randn(out, shape[-1], **kind), weight_layout)
    return (x, weight, torch.randn(out, **kind)) if bias else (x, weight)


def degrees(pattern: str, n_in: int, n_out: int, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Degrees of inputs and outputs, by arithmetic alone, so that they may be made inside a compiled function."""
    ins, outs = (torch.arange(n, device=device) for n in (n_in, n_out))
    lowest, highest = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    return {
        "cyclic": lambda: (ins % 3, outs % 3),
        "sorted": lambda: (ins * n_out, outs * n_in),
        "reversed": lambda: ((n_in - ins) * n_out, (n_out - outs) * n_in),
        "shuffled": lambda: (ins * 7919 % 61 - 30, outs * 7927 % 59 - 30),
        "duplicated": lambda: (ins // 20 * n_out, outs // 20 * n_in),
        "dead_rows": lambda: (ins + 2, outs % 5 * n_in // 2),
        "dense": lambda: (ins * 0, outs * 0),
        "empty": lambda: (ins * 0, outs * 0 - 1),
        "limits": lambda: (lowest + ins % 2 * (highest - lowest), lowest + outs % 2 * (highest - lowest)),
    }[pattern]()


def masked_op(
    function: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pattern: str = "cyclic",
    strict: bool = False,
    **options: str,
) -> tuple[Tensor]:
    """``masked_linear`` or its reference on floating-point tensors alone."""
    n_out, n_in = weight.shape
    return (function(x, weight, bias, *degrees(pattern, n_in, n_out, x.device), strict=strict, **options),)


def _degrees(x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    return degrees("cyclic", x[0].shape[1], x[1].shape[0], x[0].device)


def _cotangent(x: tuple[Tensor, ...]) -> Tensor:
    return torch.randn_like(x[0] @ x[1].mT)


CASES = {
    "plain": {"shape": (7, 5), "out": 4},
    "strict": {"shape": (7, 5), "out": 4, "strict": True},
    "no_bias": {"shape": (7, 5), "out": 4, "bias": False},
    "no_rows": {"shape": (0, 5), "out": 4},
    "no_inputs": {"shape": (7, 0), "out": 4},
    "no_outputs": {"shape": (7, 5), "out": 0},
    "no_leading": {"shape": (5,), "out": 4},
    "leading_dims": {"shape": (2, 3, 4, 5), "out": 7},
    "leading_dims_no_rows": {"shape": (2, 0, 5), "out": 4},
    "one_element": {"shape": (1, 1), "out": 1},
    "one_element_strict": {"shape": (1, 1), "out": 1, "strict": True},
    "prime": {"shape": (13, 17), "out": 19},
    "below_power": {"shape": (15, 31), "out": 63, "pattern": "sorted"},
    "above_power": {"shape": (17, 33), "out": 65},
    "staircase": {"shape": (33, 65), "out": 129, "pattern": "sorted"},
    "staircase_strict": {"shape": (5, 129), "out": 65, "pattern": "sorted", "strict": True},
    "reversed": {"shape": (5, 67), "out": 65, "pattern": "reversed"},
    "duplicated": {"shape": (5, 67), "out": 65, "pattern": "duplicated", "strict": True},
    "shuffled": {"shape": (17, 67), "out": 35, "pattern": "shuffled", "strict": True},
    "dead_rows": {"shape": (5, 35), "out": 33, "pattern": "dead_rows"},
    "dense": {"shape": (5, 35), "out": 33, "pattern": "dense"},
    "empty": {"shape": (5, 35), "out": 33, "pattern": "empty"},
    "limits": {"shape": (7, 33), "out": 35, "pattern": "limits"},
    "many_rows": {"shape": (521, 3), "out": 5},
    "many_inputs": {"shape": (2, 521), "out": 3, "pattern": "sorted"},
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
        name="masked_linear",
        row_cases=({"out": 16}, {"out": 5}),
        defined_at_infinity={0: HIDDEN},
        op=functools.partial(masked_op, F.masked_linear),
        reference=functools.partial(masked_op, reference.masked_linear),
        make=masked_inputs,
        cases=CASES,
        small={"shape": (3, 4), "out": 3},
        extremes=EXTREMES,
        same=(0, 1),
        raw=(
            RawOp(autograd.RAW_FORWARD, lambda x: (*x, *_degrees(x), False)),
            RawOp(autograd.RAW_FORWARD, lambda x: (*x[:2], None, *_degrees(x), True)),
            RawOp(autograd.RAW_INPUT_GRAD, lambda x: (_cotangent(x), x[1], *_degrees(x), False)),
            RawOp(autograd.RAW_WEIGHT_GRAD, lambda x: (_cotangent(x), x[0], *_degrees(x), True)),
        ),
        options=("pattern", "strict"),
        summed_by_torch=("first/2",),  # the bias's gradient
        long_sums={"shape": (64, 8192), "out": 32, "pattern": "dense"},
    ),
)

_MASKED_TRITON = "hvae_kernels/ops/masked_linear/triton.py"
_MASKED_TRITON_TESTS = "tests/test_masked_linear.py tests/test_contract.py -k triton and masked"

MUTATIONS = (
    Mutation(_MASKED_TRITON, "return out_degree > in_degree", "return out_degree >= in_degree", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "last = tl.cdiv(last, BLOCK)", "last = last // BLOCK", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "complete = tl.minimum(last, terms // BLOCK)", "complete = last", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "tl.minimum(first_gap // BLOCK, complete)", "tl.minimum(tl.cdiv(first_gap, BLOCK), complete)", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "(last_gap + BLOCK) // BLOCK", "last_gap // BLOCK", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "tl.where(i < dense_begin, i, i + n_dense)", "i", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "b = tl.where(connected, b, tl.zeros_like(b))", "b = b", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "if tl.max(_sees(widest, degree, FORWARD, STRICT).to(tl.int32), 0) > 0:", "if True:", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "tl.minimum(at, size - 1)", "tl.minimum(at, size - 2)", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "sums += load(bias, column, column < columns, ACCUMULATOR)[None, :]", "sums += 0", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "if _connected(tl.max(out_degree, 0), tl.min(in_degree, 0), STRICT):", "if _connected(tl.min(out_degree, 0), tl.min(in_degree, 0), STRICT):", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "sums = tl.where(connected, sums, 0.0)", "sums = sums + 0.0", _MASKED_TRITON_TESTS),
    Mutation("hvae_kernels/ops/masked_linear/reference.py", "torch.where(connections(in_degrees, out_degrees, strict), weight, 0)", "weight * connections(in_degrees, out_degrees, strict)", "tests/test_masked_linear.py -k reference"),
    Mutation("hvae_kernels/ops/masked_linear/autograd.py", "a if wants_b else None, b if wants_a else None", "a, b", "tests/test_masked_linear.py -k saved and triton"),
)  # fmt: skip
