"""``radial_flow``."""

from __future__ import annotations

import torch
from torch import Tensor

from hvae_kernels import functional as F
from hvae_kernels.ops.radial_flow import autograd, reference
from ops._mutation import Mutation
from ops._spec import EXTREMES, SHAPES, OpSpec, RawOp, in_layout, uniform


def radial_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, ...],
    n_layers: int = 3,
    layout: str = "contiguous",
    scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """Inputs of ``radial_flow``: z of size ``scale``, invertible layers that stretch and that shrink."""
    kind = {"dtype": dtype, "device": device}
    z = in_layout(scale * torch.randn(shape, **kind), layout)
    center = in_layout(torch.randn(n_layers, shape[-1], **kind), layout)
    alpha = uniform(0.5, 2.0, n_layers, **kind)
    return z, center, alpha, alpha * uniform(-0.5, 1.5, n_layers, **kind)


CASES = {
    **{name: case for name, case in SHAPES.items() if name != "no_features"},
    "one_layer": {"shape": (33, 6), "n_layers": 1},
    "many_layers": {"shape": (9, 11), "n_layers": 13},
    "several_blocks": {"shape": (37, 129)},
    "many_rows": {"shape": (2100, 3)},
}

SPECS = (
    OpSpec(
        name="radial_flow",
        op=F.radial_flow,
        reference=reference.radial_flow,
        make=radial_inputs,
        cases=CASES,
        small={"shape": (3, 4), "n_layers": 2},
        extremes=EXTREMES,
        same=(2, 3),
        raw=(
            RawOp(autograd.RAW_FORWARD, lambda x: x),
            RawOp(autograd.RAW_BACKWARD, lambda x: (x[0].cos(), x[0][..., 0].cos(), *x)),
            RawOp(autograd.RAW_BACKWARD, lambda x: (None, x[0][..., 0].cos(), *x)),
        ),
        summed_by_torch=("second",),  # the reference's
        long_sums={"shape": (200_000, 1), "n_layers": 8},
    ),
)

_RADIAL = "csrc/kernels/radial_flow.h"
_RADIAL_CPP = "tests/test_contract.py -k radial_flow/cpp"
_RADIAL_TESTS = "tests/test_radial_flow.py -k cpp"
_RADIAL_TRITON = "hvae_kernels/ops/radial_flow/triton.py"
_RADIAL_TRITON_TESTS = "tests/test_contract.py -k radial_flow/triton"

MUTATIONS = (
    Mutation("hvae_kernels/ops/radial_flow/autograd.py", "[ctx.implementation](*cotangents, *inputs))", "[ctx.implementation](cotangents[0], None, *inputs))", _RADIAL_CPP),
    Mutation(_RADIAL, "*vectors<Set>(sums + i) -= moved_rows;", "*vectors<Set>(sums + i) = -moved_rows;", _RADIAL_CPP),
    Mutation(_RADIAL, "y, y - R * n, grads, sums, projected);", "y, y, grads, sums, projected);", _RADIAL_CPP),
    Mutation(_RADIAL, "d_alpha[k] += square * (b * along - d_h);", "d_alpha[k] -= square * d_h;", _RADIAL_CPP),
    Mutation(_RADIAL, "d_alpha[k] += square * (b * along - d_h);", "d_alpha[k] = T(d_alpha[k] + square * (b * along - d_h));", _RADIAL_CPP + " and extremes"),
    Mutation(_RADIAL, "!(size > 1e-100 && size < 1e100)", "false", _RADIAL_TESTS),
    Mutation(_RADIAL, "p.radius > 0 ? -square * d_h / p.radius : 0", "-square * d_h / p.radius", _RADIAL_TESTS),
    Mutation("csrc/cpu/radial_flow.cpp", "chunk < sizes.chunks; ++chunk)", "chunk < 1; ++chunk)", _RADIAL_CPP),
    Mutation("csrc/kernels/radial_flow.h", "grad_log ? grad_log + r : nullptr", "grad_log", _RADIAL_CPP),
    Mutation("csrc/kernels/radial_flow.h", "across = log == 0 ? 0 : double", "across = double", "tests/test_radial_flow.py -k singular"),
    Mutation(_RADIAL_TRITON, "tl.store(ys + k * plane + at, moved, mask=mask)", "tl.store(ys + k * plane + at, moved - g, mask=mask)", _RADIAL_TRITON_TESTS),
    Mutation(_RADIAL_TRITON, "h * (projected + across) + alpha * h * h * along", "h * (projected + across)", _RADIAL_TRITON_TESTS),
)  # fmt: skip
