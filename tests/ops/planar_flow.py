"""``planar_flow``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvae_kernels import functional as F
from hvae_kernels.ops.planar_flow import amortised, autograd, reference
from ops._mutation import Mutation
from ops._spec import SHAPES, OpSpec, RawOp, in_layout, uniform


def planar_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, ...],
    n_layers: int = 3,
    replicas: bool = False,
    amortised: bool = False,
    layout: str = "contiguous",
    scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """Inputs of ``planar_flow``: z of size ``scale``, and layers that are invertible as they are."""
    kind = {"dtype": dtype, "device": device}
    z = in_layout(scale * torch.randn(shape, **kind), layout)
    layers = (*(shape[:-1] if amortised else shape[:1] if replicas else ()), n_layers)
    u, w = (torch.randn(*layers, shape[-1], **kind) for _ in range(2))
    u, w = (x / x.norm(dim=-1, keepdim=True) * uniform(0.7, 1.3, *layers, 1, **kind) for x in (u, w))
    product = (u * w).sum(-1, keepdim=True)
    u = u + (product.abs() - product) / w.square().sum(-1, keepdim=True) * w  # u.w >= 0: invertible, well-conditioned
    u, w = (in_layout(x, layout) for x in (u, w))
    return z, u, w, 0.5 * torch.randn(layers, **kind)


def _planar(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The op with tensors alone in its signature, as ``make_fx`` counts arguments."""

    def planar(*inputs: Tensor, constrain: bool = False, **options: str) -> tuple[Tensor, Tensor]:
        return op(*inputs, constrain=constrain, **options)

    return planar


def _state(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``(z, u, w, h, slope)``"""
    z, u, w, b = x
    h = (w @ z.mT + b[:, None]).tanh()
    return z, u, w, h, 1 - h * h


def _system(x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """``(constant, slope, table)`` of the linear recursion."""
    _, u, w, h, slope = _state(x)
    return h.sin(), slope, w @ u.mT


def _amortised_inputs(*args: Any, **case: Any) -> tuple[Tensor, ...]:
    return planar_inputs(*args, amortised=True, **case)


def _replicas(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.stack([t, 2 * t]) for t in x)


CASES = {
    **SHAPES,
    **{f"constrained_{name}": {**SHAPES[name], "constrain": True} for name in ("plain", "no_rows", "prime")},
    "one_layer": {"shape": (33, 6), "n_layers": 1, "constrain": True},
    "many_layers": {"shape": (70, 11), "n_layers": 13, "constrain": True},
    "several_blocks": {"shape": (70, 129)},
    "many_rows": {"shape": (300, 3)},
    "replicas": {"shape": (3, 21, 6), "replicas": True},
    "constrained_replicas": {"shape": (2, 33, 5), "replicas": True, "constrain": True},
}
#: Layers of each row take more memory than rows.
AMORTISED_CASES = {
    **{name: case for name, case in CASES.items() if "replicas" not in name and name != "many_rows"},
    "many_layers": {"shape": (19, 11), "n_layers": 13, "constrain": True},
    "several_blocks": {"shape": (300, 41), "n_layers": 10, "constrain": True},
    "eighty_layers": {"shape": (9, 40), "n_layers": 80},
    "wide_constrained": {"shape": (2, 1031), "constrain": True},
    "constrained_no_features": {"shape": (3, 0), "constrain": True},
}
EXTREMES = {
    "large": {"shape": (7, 5), "scale": 1e18},
    "large_constrained": {"shape": (7, 5), "scale": 1e18, "constrain": True},
    "tiny": {"shape": (7, 5), "scale": 1e-18},
}

SPECS = (
    OpSpec(
        name="planar_flow",
        row_cases=({}, {"constrain": True}),
        defined_at_infinity={1: "the constraint subtracts no infinities", 2: "as u"},
        undefined_at_infinity={2: "w.z is added up from its layers' parts"},
        op=_planar(F.planar_flow),
        reference=_planar(reference.planar_flow),
        make=planar_inputs,
        cases=CASES,
        small={"shape": (2, 3), "n_layers": 2},
        extremes=EXTREMES,
        same=(1, 2),
        raw=(
            RawOp(autograd.RAW_FORWARD, lambda x: (*x, False, True)),
            RawOp(autograd.RAW_FORWARD, lambda x: (*_replicas(x), True, False)),
            RawOp(
                autograd.RAW_BACKWARD,
                lambda x: (x[0].cos(), x[0][:, 0], None, *_state(x), False, 3),
            ),
            RawOp(
                autograd.RAW_BACKWARD,
                lambda x: (None, None, *_replicas((_state(x)[3], *_state(x))), True, 1),
            ),
            RawOp(autograd.RAW_SOLVE, lambda x: (*_system(x), True)),
            RawOp(autograd.RAW_SOLVE, lambda x: (*_replicas(_system(x)), False)),
        ),
        options=("constrain",),
        summed_by_torch=("second",),  # plain PyTorch
    ),
    OpSpec(
        name="planar_flow_amortised",
        rows=(0, 1, 2, 3),
        row_cases=({}, {"constrain": True}),
        defined_at_infinity={1: "the constraint subtracts no infinities", 2: "as u"},
        op=_planar(F.planar_flow),
        reference=_planar(reference.planar_flow),
        make=_amortised_inputs,
        cases=AMORTISED_CASES,
        small={"shape": (2, 3), "n_layers": 2},
        extremes=EXTREMES,
        same=(1, 2),
        raw=(
            RawOp(amortised.RAW_FORWARD, lambda x: (*x, False, True)),
            RawOp(amortised.RAW_FORWARD, lambda x: (*x, True, False)),
            RawOp(amortised.RAW_BACKWARD, lambda x: (x[0].cos(), x[0][:, 0], *x, False)),
            RawOp(amortised.RAW_BACKWARD, lambda x: (None, x[0][:, 0], *x, True)),
        ),
        options=("constrain",),
        summed_by_torch=("second",),  # the reference's
    ),
)

_PLANAR = "csrc/kernels/planar_flow.h"
_PLANAR_CPP = "tests/test_contract.py -k planar_flow/cpp"
_PLANAR_TESTS = "tests/test_planar_flow.py -k cpp"
_PLANAR_AUTOGRAD = "hvae_kernels/ops/planar_flow/autograd.py"
_PLANAR_TRITON = "hvae_kernels/ops/planar_flow/triton.py"
_PLANAR_TRITON_TESTS = "tests/test_contract.py -k planar_flow/triton"

_AMORTISED = "csrc/kernels/planar_flow_amortised.h"
_AMORTISED_CPU = "csrc/cpu/planar_flow_amortised.cpp"
_AMORTISED_CPP = "tests/test_contract.py -k planar_flow_amortised/cpp"
_AMORTISED_TRITON_TESTS = "tests/test_contract.py -k planar_flow_amortised/triton"

MUTATIONS = (
    Mutation(_PLANAR, "return s < 0.5 ? h * h + slope * s : 1 + slope * (s - 1);", "return 1 + slope * (s - 1);", _PLANAR_TESTS),
    Mutation(_PLANAR, "to[l] = slopes[l] * (to[l] + 2 * at[l] * (1 - s) * weight);", "to[l] = slopes[l] * (to[l] + at[l] * (1 - s) * weight);", _PLANAR_CPP),
    Mutation(_PLANAR, "for (int64_t l = rows; l < lanes; ++l) terms[l] = to[l] = 0;", "for (int64_t l = rows; l < lanes; ++l) terms[l] = to[l] = 1;", _PLANAR_CPP),
    Mutation(_PLANAR, "add_coupled<Set>(i + 1, layers, lanes, table + i, layers, x, sum);", "add_coupled<Set>(i + 1, layers, lanes, table + i * layers, 1, x, sum);", _PLANAR_CPP),
    Mutation(_PLANAR, "const double s = couplings.diagonal[i], *at", "const double s = couplings.diagonal[0], *at", _PLANAR_CPP),
    Mutation(_PLANAR, "begin < width; begin += kPiece<T>)\n      for (int64_t r = 0;", "begin < kPiece<T>; begin += kPiece<T>)\n      for (int64_t r = 0;", _PLANAR_CPP),
    Mutation(_PLANAR, "to[n * kLanes<T, Set> + i] += sum[l][n][i]", "to[n * kLanes<T, Set> + i] = sum[l][n][i]", _PLANAR_CPP),
    Mutation(_PLANAR, "target = p < 0 ? rest : p + rest;", "target = rest;", _PLANAR_CPP),
    Mutation(_PLANAR, "by_u[j] - 2 * along * across[j]", "by_u[j] - along * across[j]", _PLANAR_CPP),
    Mutation(_PLANAR, "add(d_table[i * layers + k], w + i * width, by_u);", "add(d_table[i * layers + k], u + i * width, by_u);", _PLANAR_CPP),
    Mutation("csrc/cpu/planar_flow.cpp", "us.data() + replica * stride * width", "us.data()", _PLANAR_CPP),
    Mutation("csrc/cpu/planar_flow.cpp", ".element = replica * layers * rows + row,", ".element = row,", _PLANAR_CPP),
    Mutation(_PLANAR_AUTOGRAD, "-2 * saved[3] * grad_slope", "2 * saved[3] * grad_slope", _PLANAR_CPP),
    Mutation("hvae_kernels/ops/planar_flow/algebra.py", "product + x[..., whole:] @ y[..., whole:, :]", "product", _PLANAR_TRITON_TESTS),
    Mutation(_PLANAR_AUTOGRAD, "d_constant * (forth @ x)", "d_constant * (back @ x)", _PLANAR_CPP),
    Mutation("csrc/kernels/planar_flow.h", "j < d; ++j) along[j] =", "j < width; ++j) along[j] =", "tests/test_planar_flow.py -k without_features"),
    Mutation("csrc/kernels/planar_flow.h", "x < -700 ? -700 : x", "x < -80 ? -80 : x", "tests/test_planar_flow.py -k saturated"),
    Mutation("csrc/kernels/planar_flow.h", "weight = log == 0 ? 0 : log /", "weight = log /", "tests/test_planar_flow.py -k singular"),
    Mutation("csrc/kernels/planar_flow_amortised.h", "log[r] == 0 ? 0 : log[r] /", "log[r] /", "tests/test_planar_flow.py -k singular"),
    Mutation(_PLANAR_TRITON, "logs += tl.log(tl.abs(_determinant(value, rest, s)))", "logs += tl.log(tl.abs(_determinant(value, rest, s) + 1e-5))", _PLANAR_TRITON_TESTS),
    Mutation(_PLANAR_TRITON, "tl.store(terms + i * stride + at, rest * weight, mask=inside)", "tl.store(terms + i * stride + at, weight, mask=inside)", _PLANAR_TRITON_TESTS),
    Mutation(_PLANAR_TRITON, "total *= load(slope, i * stride + at, inside, tl.float64)", "total *= 1.0", _PLANAR_TRITON_TESTS),
    Mutation(_AMORTISED, "l < n ? p[l] : T(0)", "p[l]", _AMORTISED_CPP + " and rows_are_apart", every_set=True),
    Mutation(_AMORTISED, "lanes < static_cast<Index>(n)", "lanes < static_cast<Index>(n - 1)", _AMORTISED_CPP),
    Mutation(_AMORTISED, "if (l < n) p[l] = value[l];", "p[l] = value[l];", _AMORTISED_CPP),
    Mutation(_AMORTISED, "begin < d; begin += kShort", "begin < kShort; begin += kShort", _AMORTISED_CPP),
    Mutation(_AMORTISED, "+ (e - (size - 1.0)) / size);", ");", _PLANAR_TESTS),
    Mutation(_AMORTISED_CPU, ".from = work.d_w.data(), .to = d_w + offset,", ".from = work.d_w.data(), .to = d_w,", "tests/test_cpu_sets.py -k amortised"),
    Mutation(_AMORTISED_CPU, "numbers = n * layers * d;", "numbers = layers * d;", "tests/test_cpu_sets.py -k amortised"),
    Mutation(_AMORTISED, "x < -700 ? -700 : x", "x < -50 ? -50 : x", _PLANAR_TESTS),
    Mutation(_AMORTISED, "a[r * row.layers + k] = static_cast<T>(project[r]);", "a[r * row.layers + k] = static_cast<T>(project[r] - b[r * row.layers + k]);", _AMORTISED_CPP),
    Mutation(_AMORTISED, "term[r] = 2 * p.value", "term[r] = p.value", _AMORTISED_CPP),
    Mutation(_AMORTISED, "weight[r] * sigmoid[r] + along * (sigmoid[r] - 1)", "weight[r] * sigmoid[r] + along * sigmoid[r]", _AMORTISED_CPP),
    Mutation(_AMORTISED, "static_cast<T>(-2 * ratio[r] * along)", "static_cast<T>(-ratio[r] * along)", _AMORTISED_CPP),
    Mutation(_AMORTISED, "by_u[r] += row.d ? ratio[r] * by_w[r] : 0;", "by_u[r] += 0;", _AMORTISED_CPP),
    Mutation(_AMORTISED, "by_u[r] += row.d ? ratio[r] * by_w[r] : 0;", "by_u[r] += ratio[r] * by_w[r];", _AMORTISED_CPP),
    Mutation(_AMORTISED, "*vectors<Set>(here + i) = at + y * across;", "*vectors<Set>(here + i) = at;", _AMORTISED_CPP),
    Mutation(_AMORTISED_CPU, "u + offset, .w = w + offset", "u + offset, .w = w", _AMORTISED_CPP),
    Mutation(_AMORTISED_CPU, "else std::fill_n(work.g.data(), n * width, T(0));", "", _PLANAR_TESTS),
    Mutation("hvae_kernels/ops/planar_flow/amortised.py", "raw(*cotangents, z, u", "raw(cotangents[0], None, z, u", _AMORTISED_CPP),
    Mutation(_PLANAR_TRITON, "kernel[(cdiv(rows, BLOCK) * replicas,)]", "kernel[(cdiv(rows, BLOCK), replicas)]", _PLANAR_TRITON_TESTS),
    Mutation(_PLANAR_TRITON, "turn = value * tl.sum", "turn = tl.sum", _AMORTISED_TRITON_TESTS),
    Mutation(_PLANAR_TRITON, "tl.where(inside & (features > 0), tl.sum(across * across, 1).to(tl.float64), 1.0)", "tl.sum(across * across, 1).to(tl.float64) + 1e-3", _AMORTISED_TRITON_TESTS),
    Mutation(_PLANAR_TRITON, "here += value.to(DTYPE)[:, None] * along\n    tl.debug", "here += along\n    tl.debug", _AMORTISED_TRITON_TESTS),
    Mutation("csrc/kernels/planar_flow.h", "x + j * kColumns + l + v * kWidth", "x + j * kColumns + v * kWidth", "tests/test_contract.py -k planar_flow/cpp and budget"),
)  # fmt: skip
