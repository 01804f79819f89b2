"""``gaussian_leapfrog`` and ``dense_gaussian_leapfrog``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvae_kernels import functional as F
from hvae_kernels.ops.gaussian_leapfrog import autograd, reference
from ops._mutation import Mutation
from ops._spec import ALL_RESULTS, EXTREMES, SHAPES, OpSpec, RawOp, in_layout, state_cotangents, uniform
from ops.leapfrog_update import RAW as UPDATE_RAW


def gaussian_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, ...],
    n_steps: int = 3,
    step: str = "features",
    replicas: bool = False,
    layout: str = "contiguous",
    scale: float = 1.0,
    curvature: float = 1.0,
    stops: bool = False,
) -> tuple[Tensor, ...]:
    """Inputs of ``gaussian_leapfrog``; ``step`` is scalar, features or steps, ``layout`` the memory of z and rho."""
    kind = {"dtype": dtype, "device": device}
    features = shape[-1]
    row = (shape[0], 1, features) if replicas else (features,)
    step_shape = {
        "scalar": (),
        "features": row,
        "steps": (shape[0], n_steps, features) if replicas else (n_steps, features),
    }[step]
    z, rho = (in_layout(scale * torch.randn(shape, **kind), layout) for _ in range(2))
    precision, loc = curvature * uniform(0.5, 2.0, *row, **kind), torch.randn(row, **kind)
    tempering = uniform(0.7, 1.1, *((shape[0],) if replicas else ()), n_steps, **kind)
    if stops:
        tempering[..., 1] = 0.0
    return z, rho, precision, loc, uniform(0.05, 0.5, *step_shape, **kind), tempering


def dense_inputs(dtype: torch.dtype, device: str, *, shape: tuple[int, ...], **options: Any) -> tuple[Tensor, ...]:
    """Inputs of ``dense_gaussian_leapfrog``; not quite symmetric, as its gradient steps are not."""
    z, rho, _, *rest = gaussian_inputs(dtype, device, shape=shape, **options)
    features = shape[-1]
    noise = torch.randn(features, features, dtype=dtype, device=device)
    precision = noise @ noise.mT / features + torch.eye(features, dtype=dtype, device=device)
    return z, rho, precision + 0.1 * noise, *rest


CASES = {
    **SHAPES,
    "scalar_step": {"shape": (7, 5), "step": "scalar"},
    "step_per_step": {"shape": (7, 5), "step": "steps"},
    "one_step": {"shape": (7, 5), "n_steps": 1},
    "no_steps": {"shape": (7, 5), "n_steps": 0},
    "many_steps": {"shape": (3, 2), "n_steps": 40},
    "replicas": {"shape": (3, 4, 5), "replicas": True},
    "replicas_step_per_step": {"shape": (3, 4, 5), "replicas": True, "step": "steps"},
    "replicas_no_rows": {"shape": (3, 0, 5), "replicas": True},
    "long_chain": {"shape": (70, 130), "n_steps": 70, "step": "scalar"},
    "replicas_many_rows": {"shape": (2, 12_000, 3), "replicas": True},
    "momentum_stops": {"shape": (7, 5), "stops": True},
    "inverted": {"shape": (7, 5), "curvature": -1.0},
    "wide_scalar_step": {"shape": (2, 521), "step": "scalar"},
}
#: In Triton's interpreter: still several chunks of rows, and as long a chain.
INTERPRETED = {
    "many_rows": {"shape": (2_000, 7)},
    "replicas_many_rows": {"shape": (2, 1_500, 3), "replicas": True},
    "long_chain": {"shape": (9, 33), "n_steps": 70, "step": "scalar"},
}
LARGE = ("wide", "wide_scalar_step", "several_blocks", "long_chain")
DENSE_CASES = {name: case for name, case in CASES.items() if "replicas" not in case and name not in LARGE}
DENSE_CASES |= {
    "many_rows": {"shape": (12_000, 3)},
    "composed": {"shape": (64, 3), "n_steps": 10},
    "composed_step_per_step": {"shape": (8, 8, 3), "n_steps": 10, "step": "steps"},
    "stepped": {"shape": (3, 40), "n_steps": 10},
}


def _update_within(dense: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Arguments of the update that a dense trajectory makes: its raw kernels are these."""
    z, rho, precision, loc, _, tempering = dense
    return z, rho, (z - loc) @ precision, tempering[0], loc.abs(), loc.abs()


SPECS = (
    OpSpec(
        name="gaussian_leapfrog",
        rows=(0, 1),
        row_cases=({}, {"step": "scalar"}, {"step": "steps"}),
        defined_at_infinity=dict.fromkeys((0, 1, 3), "steps composed to one affine map subtract no infinities"),
        undefined_at_infinity={2: "composing steps subtracts infinities"},
        op=F.gaussian_leapfrog,
        reference=reference.gaussian_leapfrog,
        make=gaussian_inputs,
        cases=CASES,
        interpreted=INTERPRETED,
        small={"shape": (2, 3), "n_steps": 2, "step": "steps"},
        extremes=EXTREMES,
        same=(0, 1),
        raw=(
            RawOp(autograd.RAW_FORWARD, lambda x: x),
            RawOp(autograd.RAW_BACKWARD, lambda x: (*state_cotangents(x), *x, 3)),
            RawOp(autograd.RAW_BACKWARD, lambda x: (None, torch.randn_like(x[1]), *x, 1)),
            RawOp(
                autograd.RAW_DOUBLE_BACKWARD,
                lambda x: (*(torch.randn_like(t) for t in x), *state_cotangents(x), *x, 7),
            ),
            RawOp(autograd.RAW_DOUBLE_BACKWARD, lambda x: (*(None,) * 6, *state_cotangents(x), *x, 2)),
        ),
    ),
    OpSpec(
        name="dense_gaussian_leapfrog",
        rows=(0, 1),
        op=F.dense_gaussian_leapfrog,
        reference=reference.dense_gaussian_leapfrog,
        make=dense_inputs,
        cases=DENSE_CASES,
        interpreted={"many_rows": {"shape": (1_500, 3)}, "many_steps": {"shape": (3, 2), "n_steps": 15}},
        small={"shape": (2, 3), "n_steps": 2, "step": "steps"},
        extremes=EXTREMES,
        same=(0, 1),
        raw=tuple(RawOp(raw.overloads, lambda x, raw=raw: raw.arguments(_update_within(x))) for raw in UPDATE_RAW),
        summed_by_torch=ALL_RESULTS,
    ),
)

_KERNEL = "csrc/kernels/gaussian_leapfrog.h"
_CPU = "csrc/cpu/gaussian_leapfrog.cpp"
_CPP = "tests/test_contract.py -k gaussian_leapfrog/cpp"
_TRITON = "hvae_kernels/ops/gaussian_leapfrog/triton"
_TRITON_TESTS = "tests/test_contract.py -k gaussian_leapfrog/triton"
_DENSE = "hvae_kernels/ops/gaussian_leapfrog/dense.py"
_DENSE_TESTS = "tests/test_contract.py -k dense_gaussian_leapfrog/cpp"

MUTATIONS = (
    Mutation(_KERNEL, "return {S(1) - S(2) * q, -(p * e) * (S(1) - q), e, p};", "return {S(1) - q, -(p * e) * (S(1) - q), e, p};", _CPP),
    Mutation(_KERNEL, "C[j] = alpha * (m.s * A[j] + m.c * C[j]);", "C[j] = m.s * A[j] + m.c * C[j];", _CPP),
    Mutation(_KERNEL, "      A[j] = a;\n", "      A[j] = a;\n      if constexpr (sizeof(S) == sizeof(double)) A[j] = static_cast<float>(a);\n", "tests/test_gaussian_leapfrog.py -k long_chain and cpp"),
    Mutation(_KERNEL, "to_z[j] = zi[j] + (A[j] * y + B[j] * r);", "to_z[j] = A[j] * y + B[j] * r;", _CPP),
    Mutation(_KERNEL, "to_rho[j] = C[j] * y + D[j] * r;", "to_rho[j] = B[j] * y + D[j] * r;", _CPP),
    Mutation(_KERNEL, "dr[j] = B[j] * a + D[j] * b;", "dr[j] = B[j] * a - D[j] * b;", _CPP),
    Mutation(_KERNEL, "to[2 * n + j] += b * y;", "to[2 * n + j] += b * r;", _CPP),
    Mutation(_KERNEL, "const T a = gz[j], b = gr[j], y = zi[j] - l[j], r = ri[j];\n        dz[j]", "const T a = gz[j], b = gr[j], y = zi[j], r = ri[j];\n        dz[j]", _CPP),
    Mutation(_KERNEL, "derivative_part(m.s * m21 + m.c * m22)", "derivative_part(m.s * m21)", _CPP),
    Mutation(_KERNEL, "(S(0.75) * pe * m.e - S(1))", "(S(0.5) * pe * m.e - S(1))", _CPP),
    Mutation(_KERNEL, "ggr[j] = C[j] * u + D[j] * v + tC[j] * y + tD[j] * r;", "ggr[j] = C[j] * u + D[j] * v + tC[j] * y;", _CPP),
    Mutation(_KERNEL, "a, b, a * u, a * v, b * u, b * v};", "a, b, a * u, a * v, b * u, b * u};", _CPP),
    Mutation(_CPU, "d_loc[r * d + j] = (1 - map[j]) * s[4 * d + j]", "d_loc[r * d + j] = s[4 * d + j]", _CPP),
    Mutation(_CPU, "d_loc[r * d + j] = -(tangent[j] * s[4 * d + j]", "d_loc[r * d + j] = (tangent[j] * s[4 * d + j]", _CPP),
    Mutation(_CPU, "shape = {d, K, shared ? 0 : d, step_dim == 0 ? 0 : 1};", "shape = {d, K, 0, step_dim == 0 ? 0 : 1};", _CPP),
    Mutation(_CPU, "bool fits = same_shape(rho, z) && (", "bool fits = (", "tests/test_gaussian_leapfrog.py -k bad_input"),
    Mutation(_CPU, "std::abs(values[i]) <= std::numeric_limits<T>::max()", "true", "tests/test_gaussian_leapfrog.py -k bad_input"),
    Mutation(f"{_TRITON}/chain.py", "return affine(-0.5, pee, 1.0), mul", "return affine(-0.25, pee, 1.0), mul", _TRITON_TESTS),
    Mutation(f"{_TRITON}/chain.py", "alpha_s, alpha_c = mul(alpha, s), mul(alpha, c)\n        A, C", "alpha_s, alpha_c = s, c\n        A, C", _TRITON_TESTS),
    Mutation(f"{_TRITON}/chain.py", "d_loc = derivative_part(affine(-1.0, A, 1.0)) * sum_z", "d_loc = sum_z", _TRITON_TESTS),
    Mutation(f"{_TRITON}/kernels.py", "tl.store(rho_out + at, dot(C, y, D, r).value, mask=inside)", "tl.store(rho_out + at, dot(B, y, D, r).value, mask=inside)", _TRITON_TESTS),
    Mutation(f"{_TRITON}/kernels.py", "derivative_part(B) * gz + derivative_part(D) * gr", "derivative_part(B) * gz - derivative_part(D) * gr", _TRITON_TESTS),
    Mutation(f"{_TRITON}/kernels.py", "third += load(partials, at + 2 * features", "third += load(partials, at + 3 * features", _TRITON_TESTS),
    Mutation(f"{_TRITON}/kernels.py", "sums.tangent + g * x.tangent.to", "sums.tangent + g * x.value.to", _TRITON_TESTS),
    Mutation(f"{_TRITON}/launch.py", "totals[..., :-1], totals[..., -1]", "totals[..., :-1], totals[..., 0]", f"{_TRITON_TESTS} and wide_scalar_step"),
    Mutation(_CPU, "if (!grad_rho) maps.drop(2);", "", "tests/test_gaussian_leapfrog.py -k absent"),
    Mutation(_CPU, "    std::copy_n(data<T>(z), z.numel(), written<T>(z_out));\n    std::copy_n(data<T>(rho), rho.numel(), written<T>(rho_out));\n    return;\n", "", "tests/test_gaussian_leapfrog.py -k copies"),
    Mutation("csrc/kernels/gaussian_leapfrog.h", "stream<Set>(*vectors<Set>(map.C + j) * y", "stream<Set>(*vectors<Set>(map.B + j) * y", "tests/test_cpu_sets.py -k past_the_caches"),
    Mutation(_DENSE, "return product + product.mT", "return 2 * product", _DENSE_TESTS),
    Mutation(_DENSE, "state @ displacement + z, state @ map_rho", "state @ displacement, state @ map_rho", _DENSE_TESTS),
    Mutation("hvae_kernels/ops/gaussian_leapfrog/reference.py", "rho = alpha * (rho - step / 2 * grad)", "rho = alpha * (rho - step * grad)", "tests/test_gaussian_leapfrog.py"),
)  # fmt: skip
