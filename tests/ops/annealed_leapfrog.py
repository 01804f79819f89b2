"""``annealed_leapfrog_update``."""

from __future__ import annotations

import torch
from torch import Tensor

from hvae_kernels.ops.annealed_leapfrog import annealed_leapfrog_update, autograd, reference
from ops._mutation import Mutation
from ops._spec import EXTREMES, SHAPES, OpSpec, RawOp, in_layout, uniform


def inputs(
    dtype: torch.dtype, device: str, *, shape: tuple[int, ...], layout: str = "contiguous", scale: float = 1.0
) -> tuple[Tensor, ...]:
    """Inputs of ``annealed_leapfrog_update``."""
    kind = {"dtype": dtype, "device": device}
    state = [in_layout(scale * torch.randn(shape, **kind), layout) for _ in range(5)]
    eta = uniform(0.3, 0.95, 1, **kind)
    return *state, uniform(0.05, 0.5, 5, shape[-1], **kind), torch.cat([eta, (1 - eta**2).sqrt()])


def cotangents(x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the op's results."""
    return torch.randn_like(x[0]), torch.randn_like(x[0]), torch.randn_like(x[0][..., 0])


SPECS = (
    OpSpec(
        name="annealed_leapfrog_update",
        rows=(0, 1, 2, 3, 4),
        op=annealed_leapfrog_update,
        reference=reference.annealed_leapfrog_update,
        make=inputs,
        cases={**SHAPES, "wide_rows": {"shape": (40, 700)}},
        interpreted={"many_rows": {"shape": (2_000, 7)}},
        small={"shape": (2, 3)},
        extremes=EXTREMES,
        same=(1, 2),
        summed_by_torch=("second",),
        raw=(
            RawOp(autograd.RAW_FORWARD, lambda x: x),
            RawOp(autograd.RAW_BACKWARD, lambda x: (*cotangents(x), *x[1:], 3)),
            RawOp(autograd.RAW_BACKWARD, lambda x: (None, torch.randn_like(x[1]), None, *x[1:], 1)),
            RawOp(autograd.RAW_BACKWARD, lambda x: (None, None, torch.randn_like(x[1][..., 0]), *x[1:], 2)),
        ),
    ),
)

_KERNEL = "csrc/kernels/annealed_leapfrog.h"
_GLUE = "csrc/cpu/annealed_leapfrog.cpp"
_CPP = "tests/test_contract.py -k annealed_leapfrog_update/cpp"
_TRITON = "hvae_kernels/ops/annealed_leapfrog/triton.py"
_TRITON_TESTS = "tests/test_contract.py -k annealed_leapfrog_update/triton"
_REFERENCE = "hvae_kernels/ops/annealed_leapfrog/reference.py"
_TRAJECTORY = "hvae_kernels/ops/annealed_leapfrog/trajectory.py"
_API = "hvae_kernels/ops/annealed_leapfrog/api.py"
_FLOW = "tests/test_annealed_leapfrog.py"

MUTATIONS = (
    Mutation(_KERNEL, "term[j] = T(0.5) * (p - q) * (p + q);", "term[j] = T(0.5) * (p - q) * p;", _CPP),
    Mutation(_KERNEL, "to_z[j] = zi[j] + e[j] * r;", "to_z[j] = zi[j] + e[j] * p;", _CPP),
    Mutation(_KERNEL, "dp = v + gw[j] * p, dq = c.eta * dp - gw[j] * q;", "dp = v + gw[j] * p, dq = c.eta * dp;", _CPP),
    Mutation(_KERNEL, "to[6 * n + j] += dp * xi[j];", "to[6 * n + j] += v * xi[j];", _CPP),
    Mutation(_KERNEL, "if (i % kRun == kRun - 1 || i == rows - 1) flush(sums, to, kSums * n);", "if (i % kRun == kRun - 1) flush(sums, to, kSums * n);", _CPP),
    Mutation(_KERNEL, "return T(0.5) * (p - q) * (p + q);", "return T(0.5) * (p - q) * p;", _CPP),
    Mutation(_KERNEL, "sums[0] += counts > Lanes{} ? terms : Lanes{};", "sums[0] += terms;", _CPP),
    Mutation(_KERNEL, "first < width; first += kRowBlock)", "first < 1; first += kRowBlock)", _CPP),
    Mutation(_KERNEL, "stream<Set>(moved, z_out + i);", "", "tests/test_cpu_sets.py -k annealed"),
    Mutation(_GLUE, ".repeat = tiling.repeat,", ".repeat = 1,", _CPP),
    Mutation(_TRITON, "terms += tl.where(mask, 0.5 * (p - q) * (p + q), 0.0)", "terms = tl.where(mask, 0.5 * (p - q) * (p + q), 0.0)", _TRITON_TESTS),
    Mutation(_TRITON, "dq = eta * dp - gw * q", "dq = eta * dp", _TRITON_TESTS),
    Mutation(_TRITON, "of_sigma += dp * xi", "of_sigma = dp * xi", _FLOW + " -k several_tiles"),
    Mutation(_TRITON, "for start in range(0, n_programs, PARTS):", "for start in range(0, 1, PARTS):", _FLOW + " -k several_tiles"),
    Mutation(_TRITON, "entry % groups * WIDTH", "entry % groups", _FLOW + " -k several_tiles"),
    Mutation(_REFERENCE, "kicks = torch.cat([torch.cat([none, half]), torch.cat([half, none])", "kicks = torch.cat([torch.cat([half, none]), torch.cat([half, none])", _FLOW),
    Mutation(_TRAJECTORY, "return (refreshed - sigma * self._noise(point)) / eta +", "return refreshed - sigma * self._noise(point) / eta +", _FLOW),
    Mutation(_TRAJECTORY, "self.d_noise[0] += d_rho", "self.d_noise[0] = d_rho * 0", _FLOW),
    Mutation(_REFERENCE, "(ended - eta * refreshed) * shift - rest / 2 * shift", "(ended - eta * refreshed) * shift - rest * shift", f"{_FLOW} -k formulas"),
    Mutation(_REFERENCE, "((ended - eta * refreshed) * shift", "((ended - refreshed) * shift", f"{_FLOW} -k formulas"),
    Mutation(_TRAJECTORY, "beta = betas[point // self.leapfrog_steps]", "beta = betas[0]", f"{_FLOW} -k formulas"),
    Mutation(_TRAJECTORY, "self.score, beta, eta, sigma.square())", "self.score, beta, eta, sigma)", f"{_FLOW} -k formulas"),
    Mutation(_TRAJECTORY, "self.fields[1].again(), score:", "self.fields[1].again():", f"{_FLOW} -k score"),
    Mutation(_TRAJECTORY, "for x in (z, rho, beta))).to(z.dtype)", "for x in (z, rho, beta)))", f"{_FLOW} -k squared"),
    Mutation(_TRAJECTORY, "self._check_start(after[1], end)", "pass", f"{_FLOW} -k come_back"),
    Mutation(_TRAJECTORY, "self.shared = any(x.grad_fn for x in watched)", "pass", f"{_FLOW} -k functional_call"),
    Mutation(_API, "elif dependent(watched) is not None:", "elif False:", f"{_FLOW} -k one_another"),
    Mutation(_API, "return z, total + ((noise[0] - rho) * (noise[0] + rho)).sum(-1) / 2", "return z, total", _FLOW),
)  # fmt: skip
