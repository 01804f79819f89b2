"""``leapfrog_update``."""

from __future__ import annotations

import torch
from torch import Tensor

from hvae_kernels.ops.leapfrog_update import autograd, leapfrog_update, reference
from ops._mutation import Mutation
from ops._spec import EXTREMES, SHAPES, OpSpec, RawOp, in_layout, state_cotangents, uniform


def update_inputs(
    dtype: torch.dtype, device: str, *, shape: tuple[int, ...], layout: str = "contiguous", scale: float = 1.0
) -> tuple[Tensor, ...]:
    """Inputs of ``leapfrog_update``."""
    kind = {"dtype": dtype, "device": device}
    state = [in_layout(scale * torch.randn(shape, **kind), layout) for _ in range(3)]
    kick, drift = (uniform(0.05, 0.5, shape[-1], **kind) for _ in range(2))
    return *state, uniform(0.7, 1.1, **kind), kick, drift


CASES = {**SHAPES, "momentum_stops": {"shape": (7, 5)}, "inverted": {"shape": (7, 5)}}
RAW = (
    RawOp(autograd.RAW_FORWARD, lambda x: x),
    RawOp(autograd.RAW_BACKWARD, lambda x: (*state_cotangents(x), *x[1:], 3)),
    RawOp(autograd.RAW_BACKWARD, lambda x: (None, torch.randn_like(x[1]), *x[1:], 1)),
    RawOp(
        autograd.RAW_DOUBLE_BACKWARD,
        lambda x: (*(torch.randn_like(t) for t in x[1:]), *state_cotangents(x), *x[1:], 7),
    ),
    RawOp(autograd.RAW_DOUBLE_BACKWARD, lambda x: (*(None,) * 5, *state_cotangents(x), *x[1:], 2)),
)

SPECS = (
    OpSpec(
        name="leapfrog_update",
        rows=(0, 1, 2),
        op=leapfrog_update,
        reference=reference.leapfrog_update,
        make=update_inputs,
        cases=CASES,
        interpreted={"many_rows": {"shape": (2_000, 7)}},
        small={"shape": (2, 3)},
        extremes=EXTREMES,
        same=(1, 2),
        raw=RAW,
    ),
)

_UPDATE = "csrc/kernels/leapfrog_update.h"
_UPDATE_CPP = "tests/test_contract.py -k leapfrog_update/cpp"
_UPDATE_TRITON = "hvae_kernels/ops/leapfrog_update/triton.py"
_UPDATE_TRITON_TESTS = "tests/test_contract.py -k leapfrog_update/triton"
_DENSE_TESTS = "tests/test_contract.py -k dense_gaussian_leapfrog/cpp"
_TRAJECTORY = "hvae_kernels/ops/leapfrog_update/trajectory.py"

MUTATIONS = (
    Mutation(_UPDATE, "to_z[j] = zi[j] + drift[j] * r;", "to_z[j] = zi[j] + drift[j] * ri[j];", _UPDATE_CPP),
    Mutation(_UPDATE, "stream_row<Set>(width, to_rho, rho_out + at);", "stream_row<Set>(width, to_z, rho_out + at);", "tests/test_cpu_sets.py -k past_the_caches"),
    Mutation(_UPDATE, "dg[j] = -kick[j] * w;", "dg[j] = kick[j] * w;", _UPDATE_CPP),
    Mutation(_UPDATE, "dr[j] = h.decay * w + c.decay * b;", "dr[j] = h.decay * w;", _UPDATE_CPP),
    Mutation(_UPDATE_TRITON, "_store(z_out, at, load(z, at, mask, DTYPE) + e * r, mask)", "_store(z_out, at, load(z, at, mask, DTYPE) - e * r, mask)", _UPDATE_TRITON_TESTS),
    Mutation(_UPDATE_TRITON, "            drift_sum += gz * (a * r - c * g)\n", "            drift_sum += gz * (a * r)\n", _UPDATE_TRITON_TESTS),
    Mutation(_UPDATE_TRITON, "for start in range(0, n_partial, PARTS):", "for start in range(0, 1, PARTS):", "tests/test_leapfrog_update.py"),
    Mutation(_UPDATE_TRITON, "_store(gg_z, at, e * q + he * (a * r - c * g), mask)", "_store(gg_z, at, e * q, mask)", _UPDATE_TRITON_TESTS),
    Mutation(_TRAJECTORY, "kick = (torch.cat([none, tempering[:, None] * steps]) + drift) / 2", "kick = (torch.cat([none, steps]) + drift) / 2", _DENSE_TESTS),
)  # fmt: skip
