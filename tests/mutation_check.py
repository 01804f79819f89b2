"""Breaks each kernel on purpose, one line at a time, and expects the tests to go red: ``python tests/mutation_check.py``.

Works on a copy of the tree in a temporary folder. Add a row for every kernel that you write. ``--keep`` selects rows
whose file or text contains a word. Exits non-zero when a mutation survives, or its line no longer stands once.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutation:
    """Replace ``before`` (which must stand exactly once in ``path``) by ``after``; ``tests`` must then fail."""

    path: str
    before: str
    after: str
    tests: str

    def stands(self, tree: Path = ROOT) -> int:
        """How often ``before`` stands in the tree."""
        file = tree / self.path
        return file.read_text().count(self.before) if file.exists() else 0


_KERNEL = "csrc/kernels/gaussian_leapfrog.h"
_CPU = "csrc/cpu/gaussian_leapfrog.cpp"
_CPP = "tests/test_contract.py -k gaussian_leapfrog/cpp"
_TRITON = "hvae_kernels/ops/gaussian_leapfrog/triton.py"
_TRITON_TESTS = "tests/test_contract.py -k gaussian_leapfrog/triton"
_UPDATE = "csrc/kernels/leapfrog_update.h"
_UPDATE_CPP = "tests/test_contract.py -k leapfrog_update/cpp"
_UPDATE_TRITON = "hvae_kernels/ops/leapfrog_update/triton.py"
_UPDATE_TRITON_TESTS = "tests/test_contract.py -k leapfrog_update/triton"
_MASKED_TRITON = "hvae_kernels/ops/masked_linear/triton.py"
_MASKED_TRITON_TESTS = "tests/test_masked_linear.py tests/test_contract.py -k triton and masked"
_NETWORK_CPP = "tests/test_contract.py -k (autoregressive_forward or autoregressive_inverse) and cpp and budget"
_MASKED_CPP = "tests/test_contract.py -k masked_linear/cpp and budget"
_SWEEP = "hvae_kernels/ops/autoregressive_network/triton.py"
_SWEEP_TESTS = "tests/test_contract.py -k autoregressive_inverse/triton and budget"
_SMALL = "hvae_kernels/ops/autoregressive_network/triton_small.py"
_SMALL_TESTS = "tests/test_small_made.py"
_DENSE = "hvae_kernels/ops/gaussian_leapfrog/dense.py"
_DENSE_TESTS = "tests/test_contract.py -k dense_gaussian_leapfrog/cpp"
_TRAJECTORY = "hvae_kernels/ops/leapfrog_update/trajectory.py"
_OP = "hvae_kernels/_op.py"
_LEAP = "hvae_kernels/ops/leapfrog/autograd.py"
_FIELD = "hvae_kernels/ops/leapfrog/field.py"
_STATISTICS = "hvae_kernels/ops/leapfrog/statistics.py"
_LEAP_TESTS = "tests/test_leapfrog.py -k"
_STATE = "hvae_kernels/ops/leapfrog/state.py"
_STATE_TESTS = "tests/test_leapfrog_state.py -k"
_ROWS = "csrc/kernels/rows.h"
_TAIL = "csrc/kernels/affine_autoregressive.h"
_TAIL_CPU = "csrc/cpu/affine_autoregressive.cpp"
_TAIL_CPP = "tests/test_contract.py -k affine_autoregressive/cpp"
_TAIL_TRITON = "hvae_kernels/ops/affine_autoregressive/triton.py"
_TAIL_TRITON_TESTS = "tests/test_contract.py -k affine_autoregressive/triton"
_TAIL_TESTS = "tests/test_affine_autoregressive.py"
_RMSPROP = "csrc/kernels/rmsprop.h"
_RMSPROP_CPU = "csrc/cpu/rmsprop.cpp"
_RMSPROP_TESTS = "tests/test_rmsprop.py -k cpp or bits"
_PLANAR = "csrc/kernels/planar_flow.h"
_PLANAR_CPP = "tests/test_contract.py -k planar_flow/cpp"
_PLANAR_TESTS = "tests/test_planar_flow.py -k cpp"
_PLANAR_AUTOGRAD = "hvae_kernels/ops/planar_flow/autograd.py"
_PLANAR_TRITON = "hvae_kernels/ops/planar_flow/triton.py"
_PLANAR_TRITON_TESTS = "tests/test_contract.py -k planar_flow/triton"
_RADIAL = "csrc/kernels/radial_flow.h"
_RADIAL_CPP = "tests/test_contract.py -k radial_flow/cpp"
_RADIAL_TESTS = "tests/test_radial_flow.py -k cpp"
_RADIAL_TRITON = "hvae_kernels/ops/radial_flow/triton.py"
_RADIAL_TRITON_TESTS = "tests/test_contract.py -k radial_flow/triton"
_BERNOULLI = "csrc/kernels/bernoulli_log_prob.h"
_BERNOULLI_CPP = "tests/test_contract.py -k bernoulli_log_prob/cpp"
_BERNOULLI_TESTS = "tests/test_bernoulli_log_prob.py"
_BERNOULLI_AUTOGRAD = "hvae_kernels/ops/bernoulli_log_prob/autograd.py"
_BERNOULLI_TRITON = "hvae_kernels/ops/bernoulli_log_prob/triton.py"
_BERNOULLI_TRITON_TESTS = "tests/test_contract.py -k bernoulli_log_prob/triton"
_REPARAM = "csrc/kernels/local_reparam_linear.h"
_REPARAM_CPU = "csrc/cpu/local_reparam_linear.cpp"
_REPARAM_CPP = "tests/test_contract.py -k local_reparam_linear/cpp and budget"
_REPARAM_TRITON = "hvae_kernels/ops/local_reparam_linear/triton.py"
_REPARAM_TRITON_TESTS = "tests/test_contract.py -k local_reparam_linear/triton and budget"
_REPARAM_AUTOGRAD = "hvae_kernels/ops/local_reparam_linear/autograd.py"
_REPARAM_TESTS = "tests/test_local_reparam_linear.py"
_BLOCK_TESTS = "tests/test_package.py -k overlapping"
_ARGUMENT_TESTS = "tests/test_arguments.py"
_DEFERRED_TESTS = "tests/test_deferred.py"
_MIXTURE = "csrc/kernels/gaussian_mixture.h"
_MIXTURE_CPU = "csrc/cpu/gaussian_mixture.cpp"
_MIXTURE_CPP = "tests/test_contract.py -k gaussian_mixture and cpp and (budget or extremes)"
_MIXTURE_TESTS = "tests/test_gaussian_mixture.py -k cpp"
_MIXTURE_TRITON = "hvae_kernels/ops/gaussian_mixture/triton.py"
_MIXTURE_TRITON_TESTS = "tests/test_gaussian_mixture.py -k triton"
_IWAE = "csrc/kernels/iwae.h"
_IWAE_CPP = "tests/test_contract.py -k (iwae_bound or stl_surrogate or dreg_surrogate) and cpp"
_IWAE_TESTS = "tests/test_iwae.py"
_IWAE_TRITON = "hvae_kernels/ops/iwae/triton.py"
_IWAE_TRITON_TESTS = "tests/test_contract.py -k (iwae_bound or stl_surrogate or dreg_surrogate) and triton"
_ELEMENTARY = "csrc/kernels/elementary.h"
_ELEMENTARY_TESTS = "tests/test_elementary.py"
_COMPAT = "hvae_kernels/compat/_network.py"
_COMPAT_TESTS = "tests/test_accelerate.py"
_LIVE = "hvae_kernels/_live.py"
_FLOWS = "hvae_kernels/nn/autoregressive.py"
_FLOW = "hvae_kernels/nn/flow.py"
_STACK = "hvae_kernels/nn/stack.py"
_MADE = "hvae_kernels/nn/made.py"
_FLOWS_TESTS = "tests/test_autoregressive.py"

MUTATIONS = (
    Mutation(_KERNEL, "return {S(1) - S(2) * q, -(p * e) * (S(1) - q), e, p};", "return {S(1) - q, -(p * e) * (S(1) - q), e, p};", _CPP),
    Mutation(_KERNEL, "C[j] = alpha * (m.s * A[j] + m.c * C[j]);", "C[j] = m.s * A[j] + m.c * C[j];", _CPP),
    Mutation(_KERNEL, "      A[j] = a;\n", "      A[j] = a;\n      if constexpr (sizeof(S) == sizeof(double)) A[j] = static_cast<float>(a);\n", "tests/test_gaussian_leapfrog.py -k long_chain and cpp"),
    Mutation(_KERNEL, "to_z[j] = l[j] + (A[j] * y + B[j] * r);", "to_z[j] = A[j] * y + B[j] * r;", _CPP),
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
    Mutation("csrc/cpu/rows.h", "part < parts; ++part", "part < 1; ++part", _CPP),
    Mutation(_CPU, "shape = {d, K, shared ? 0 : d, step_dim == 0 ? 0 : 1};", "shape = {d, K, 0, step_dim == 0 ? 0 : 1};", _CPP),
    Mutation(_CPU, "bool fits = same_shape(rho, z) && (", "bool fits = (", "tests/test_gaussian_leapfrog.py -k bad_input"),
    Mutation(_CPU, "std::abs(values[i]) <= std::numeric_limits<T>::max()", "true", "tests/test_gaussian_leapfrog.py -k bad_input"),
    Mutation(_TRITON, "return 1.0 - 2.0 * q, -(p * e) * (1.0 - q)", "return 1.0 - q, -(p * e) * (1.0 - q)", _TRITON_TESTS),
    Mutation(_TRITON, "tl.store(rho_out + at, C * y + D * r, mask=inside)", "tl.store(rho_out + at, B * y + D * r, mask=inside)", _TRITON_TESTS),
    Mutation(_TRITON, "tl.store(d_rho + at, B * gz + D * gr, mask=inside)", "tl.store(d_rho + at, B * gz - D * gr, mask=inside)", _TRITON_TESTS),
    Mutation(_TRITON, "store(d_loc, here, (1.0 - A) * sum_z - C * sum_rho, mask)", "store(d_loc, here, sum_z - C * sum_rho, mask)", _TRITON_TESTS),
    Mutation(_TRITON, "tc_bar = m11 + alpha * m22, tm11 + alpha * tm22 + talpha * m22", "tc_bar = m11 + alpha * m22, tm11 + alpha * tm22", _TRITON_TESTS),
    Mutation(_TRITON, "third += load(partials, at + 2 * features", "third += load(partials, at + 3 * features", _TRITON_TESTS),
    Mutation(_TRITON, "            rv += gr * v\n", "            rv += gr * u\n", _TRITON_TESTS),
    Mutation(_UPDATE, "to_z[j] = zi[j] + drift[j] * r;", "to_z[j] = zi[j] + drift[j] * ri[j];", _UPDATE_CPP),
    Mutation(_UPDATE, "dg[j] = -kick[j] * w;", "dg[j] = kick[j] * w;", _UPDATE_CPP),
    Mutation(_UPDATE, "dr[j] = h.decay * w + c.decay * b;", "dr[j] = h.decay * w;", _UPDATE_CPP),
    Mutation(_UPDATE_TRITON, "_store(z_out, at, load(z, at, mask, DTYPE) + e * r, mask)", "_store(z_out, at, load(z, at, mask, DTYPE) - e * r, mask)", _UPDATE_TRITON_TESTS),
    Mutation(_UPDATE_TRITON, "            drift_sum += gz * (a * r - c * g)\n", "            drift_sum += gz * (a * r)\n", _UPDATE_TRITON_TESTS),
    Mutation(_UPDATE_TRITON, "_store(gg_z, at, e * q + he * (a * r - c * g), mask)", "_store(gg_z, at, e * q, mask)", _UPDATE_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "return out_degree > in_degree", "return out_degree >= in_degree", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "last = tl.cdiv(last, BLOCK)", "last = last // BLOCK", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "complete = tl.minimum(last, terms // BLOCK)", "complete = last", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "tl.minimum(first_hole // BLOCK, complete)", "tl.minimum(tl.cdiv(first_hole, BLOCK), complete)", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "(last_hole + BLOCK) // BLOCK", "last_hole // BLOCK", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "tl.where(i < whole, i, i + (hole - whole))", "i", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "b = tl.where(connected, b, tl.zeros_like(b))", "b = b", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "if tl.max(_sees(eager, degree, FORWARD, STRICT).to(tl.int32), 0) > 0:", "if True:", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "tl.minimum(at, size - 1)", "tl.minimum(at, size - 2)", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "sums += load(bias, column, column < columns, ACCUMULATOR)[None, :]", "sums += 0", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "if _connected(tl.max(out_degree, 0), tl.min(in_degree, 0), STRICT):", "if _connected(tl.min(out_degree, 0), tl.min(in_degree, 0), STRICT):", _MASKED_TRITON_TESTS),
    Mutation(_MASKED_TRITON, "sums = tl.where(connected, sums, 0.0)", "sums = sums + 0.0", _MASKED_TRITON_TESTS),
    Mutation("hvae_kernels/ops/masked_linear/reference.py", "torch.where(connections(in_degrees, out_degrees, strict), weight, 0)", "weight * connections(in_degrees, out_degrees, strict)", "tests/test_masked_linear.py -k reference"),
    Mutation("hvae_kernels/ops/masked_linear/autograd.py", "a if wants_b else None, b if wants_a else None", "a, b", "tests/test_masked_linear.py -k saved and triton"),
    Mutation(_TAIL, "to[j] = p.scale * zs[j] + p.rest * bs[j];", "to[j] = p.scale * zs[j] + bs[j];", _TAIL_CPP),
    Mutation("csrc/kernels/rows.h", "for (; j < width; ++j) rest += terms[j];", "", _TAIL_CPP),
    Mutation("csrc/kernels/rows.h", "const T value = values ? values[i] : T(0);", "const T value = values ? values[0] : T(0);", _TAIL_CPP),
    Mutation(_ROWS, "lanes[l] += terms[j + l];", "lanes[0] += terms[j + l];", _TAIL_CPP),
    Mutation(_ROWS, "constexpr int64_t kRun = 64;", "constexpr int64_t kRun = int64_t(1) << 40;", _MIXTURE_CPP),
    Mutation(_TAIL, "y = gate.kBlends ? zs[j] - bs[j] : zs[j];\n        dz[j] = g * p.scale;", "y = zs[j];\n        dz[j] = g * p.scale;", _TAIL_CPP),
    Mutation(_TAIL, "hy = gate.kBlends ? hz - hb : hz;", "hy = hz;", _TAIL_CPP),
    Mutation(_TAIL, "+ ls[j] * p.dd_log);", ");", _TAIL_CPP),
    Mutation(_TAIL, "near ? epsilon - p.rest : epsilon", "near ? epsilon : epsilon", _TAIL_CPP),
    Mutation(_TAIL, "scale * (d_log * d_log + dd_log), dd_log};", "scale * d_log * d_log, dd_log};", _TAIL_CPP),
    Mutation(_TAIL, "p.value, d_log, curve, curve * inverse - d_log * d_log};", "p.value, d_log, curve, curve * inverse};", _TAIL_CPP),
    Mutation(_TAIL, "const T above = s < low ? low : s,", "const T above = s,", _TAIL_TESTS),
    Mutation("csrc/cpu/rows.h", "std::min(kRowBlock, features - start)", "std::min(kRowBlock, features)", _TAIL_CPP),
    Mutation(_TAIL_CPU, ".grad = spare.in(gs, at),\n                        .grad_log = ls ? ls + first : nullptr,", ".grad = spare.in(gs, at),\n                        .grad_log = ls,", _TAIL_CPP),
    Mutation(_TAIL_TRITON, "+ rest * load(shift, at, mask, DTYPE), mask)", "+ load(shift, at, mask, DTYPE), mask)", _TAIL_TRITON_TESTS),
    Mutation(_TAIL_TRITON, "g * d_scale * y + gl * d_log, mask)", "g * d_scale * y, mask)", _TAIL_TRITON_TESTS),
    Mutation(_TAIL_TRITON, "            hy = hz - hb\n", "", _TAIL_TRITON_TESTS),
    Mutation(_TAIL_TRITON, "logs += tl.where(mask, log, 0.0)", "logs += log", _TAIL_TRITON_TESTS),
    Mutation("hvae_kernels/_triton/device.py", "n = tl.where(x == x, k, 0.0).to(tl.int32)", "n = k.to(tl.int32) + 1", _TAIL_TRITON_TESTS),
    Mutation("hvae_kernels/ops/affine_autoregressive/gates.py", "s.clamp(first, second).detach() + (s - s.detach())", "s.clamp(first, second)", _TAIL_TESTS),
    Mutation("hvae_kernels/ops/affine_autoregressive/autograd.py", "shift if blends(ctx.call.options[0]) else None", "shift", _TAIL_TESTS),
    Mutation(_OP, "tuple([needs & bit for bit in bits]) if bits[0] else", "", "tests/test_contract.py -k gaussian_mixture and cpp and double"),
    Mutation(_OP, "directions = only(directions, scheme.written(scheme.inputs, ctx.needs))", "pass", "tests/test_contract.py -k partial or third"),
    Mutation(_OP, "results = tuple([add(a, b) for a, b in zip(results, second, strict=True)])", "results = second", "tests/test_contract.py -k functional_gradients or forward_mode or per_sample"),
    Mutation(_OP, "results = tuple([x if w else x.new_empty(size, 0) for x, w in zip(results, written, strict=True)])", "pass", "tests/test_contract.py -k vmap or per_sample"),
    Mutation(_OP, "return raw(*cotangents, *inputs)", "return raw(cotangents[0], None, *inputs)", "tests/test_contract.py -k radial_flow and backward_budget"),
    Mutation(_PLANAR, "p = p * r + 8.3332841058e-3;", "p = p * r + 8.3e-3;", _PLANAR_TESTS),
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
    Mutation("csrc/cpu/rows.h", "std::fill(to + d, to + width, T(0));", "", "tests/test_contract.py -k rows_are_apart and radial_flow and cpp"),
    Mutation(_PLANAR_AUTOGRAD, "-2 * saved[3] * grad_slope", "2 * saved[3] * grad_slope", _PLANAR_CPP),
    Mutation("hvae_kernels/ops/planar_flow/algebra.py", "product + x[..., whole:] @ y[..., whole:, :]", "product", _PLANAR_TRITON_TESTS),
    Mutation(_PLANAR_AUTOGRAD, "d_constant * (forth @ x)", "d_constant * (back @ x)", _PLANAR_CPP),
    Mutation(_PLANAR_TRITON, "logs += tl.log(tl.abs(_determinant(value, rest, s)))", "logs += tl.log(tl.abs(_determinant(value, rest, s) + 1e-5))", _PLANAR_TRITON_TESTS),
    Mutation(_PLANAR_TRITON, "tl.store(terms + i * stride + at, rest * weight, mask=inside)", "tl.store(terms + i * stride + at, weight, mask=inside)", _PLANAR_TRITON_TESTS),
    Mutation(_PLANAR_TRITON, "total *= load(slope, i * stride + at, inside, tl.float64)", "total *= 1.0", _PLANAR_TRITON_TESTS),
    Mutation("csrc/kernels/sets.h", "for (int64_t width = kHalf / 2; width; width /= 2)", "for (int64_t width = kHalf / 2; width > 1; width /= 2)", _RADIAL_CPP),
    Mutation(_RADIAL, "*vectors<Set>(sums + i) -= moved_rows;", "*vectors<Set>(sums + i) = -moved_rows;", _RADIAL_CPP),
    Mutation(_RADIAL, "y, y - R * n, grads, sums, projected);", "y, y, grads, sums, projected);", _RADIAL_CPP),
    Mutation(_RADIAL, "d_alpha[k] += square * (b * along - d_h);", "d_alpha[k] -= square * d_h;", _RADIAL_CPP),
    Mutation(_RADIAL, "d_alpha[k] += square * (b * along - d_h);", "d_alpha[k] = T(d_alpha[k] + square * (b * along - d_h));", _RADIAL_CPP + " and extremes"),
    Mutation(_RADIAL, "!(size > 1e-100 && size < 1e100)", "false", _RADIAL_TESTS),
    Mutation(_RADIAL, "p.radius > 0 ? -square * d_h / p.radius : 0", "-square * d_h / p.radius", _RADIAL_TESTS),
    Mutation("csrc/cpu/radial_flow.cpp", "chunk < sizes.chunks; ++chunk)", "chunk < 1; ++chunk)", _RADIAL_CPP),
    Mutation("csrc/kernels/radial_flow.h", "grad_log ? grad_log + r : nullptr", "grad_log", _RADIAL_CPP),
    Mutation(_RADIAL_TRITON, "tl.store(ys + k * plane + at, moved, mask=mask)", "tl.store(ys + k * plane + at, moved - g, mask=mask)", _RADIAL_TRITON_TESTS),
    Mutation(_RADIAL_TRITON, "h * (projected + across) + alpha * h * h * along", "h * (projected + across)", _RADIAL_TRITON_TESTS),
    Mutation("hvae_kernels/nn/radial.py", "softplus(self.raw_beta) - alpha", "softplus(self.raw_beta)", "tests/test_forward_flows.py -k radial_module"),
    Mutation(_BERNOULLI, "to[j] = w == T(0) ? T(0) : w * std::abs(logit);", "to[j] = w * std::abs(logit);", _BERNOULLI_TESTS),
    Mutation(_BERNOULLI, "return product * (T(1) + q) + q;", "return product * (T(1) + q) + q * T(1.0001);", _BERNOULLI_CPP),
    Mutation(_BERNOULLI, "rest_q = times(rest_q, e[j]);", "rest_q = e[j];", _BERNOULLI_CPP),
    Mutation(_BERNOULLI, "kLanes = 32, kLogs = 16;", "kLanes = 32, kLogs = 2;", _BERNOULLI_TESTS),
    Mutation(_BERNOULLI, "return logit > T(0) ? difference : -difference;", "return difference;", _BERNOULLI_CPP),
    Mutation(_BERNOULLI, "-gs[j] * hs[j] * (small * large);", "-gs[j] * hs[j] * small;", _BERNOULLI_CPP),
    Mutation("csrc/cpu/bernoulli_log_prob.cpp", "return at - (replica - replica / samples_) * plane;", "return at;", _BERNOULLI_CPP),
    Mutation("csrc/cpu/rows.h", "std::fill_n(sums, n, 0.0);", "std::fill_n(sums, 1, 0.0);", _BERNOULLI_CPP),
    Mutation(_BERNOULLI, "most = std::max(most, std::bit_cast<Bits>(xs[j]));", "most = std::bit_cast<Bits>(xs[j]);", _BERNOULLI_TESTS + " -k refused"),
    Mutation("csrc/cpu/bernoulli_log_prob.cpp", "% samples_ == 0; }", "% samples_ == samples_; }", _BERNOULLI_TESTS + " -k refused"),
    Mutation("hvae_kernels/ops/bernoulli_log_prob/api.py", "(broadcast[stop] or leading[stop] == 1)", "broadcast[stop]", _BERNOULLI_TESTS),
    Mutation(_BERNOULLI_AUTOGRAD, "d_logits = -grad.unsqueeze(-1) * h", "d_logits = grad.unsqueeze(-1) * h", _BERNOULLI_CPP),
    Mutation(_BERNOULLI_TRITON, "row // (outer * rows) * rows + row % rows", "row % rows", _BERNOULLI_TRITON_TESTS),
    Mutation(_BERNOULLI_TRITON, "tl.where(mask, linear + log1p_unit(decay(logit)), 0.0)", "linear + log1p_unit(decay(logit))", _BERNOULLI_TRITON_TESTS),
    Mutation(_BERNOULLI_TRITON, "small - wrong, wrong - small)", "small - wrong, small - wrong)", _BERNOULLI_TRITON_TESTS),
    Mutation(_BERNOULLI_TRITON, "-g * direction * (small * large)", "-g * direction * small", _BERNOULLI_TRITON_TESTS),
    Mutation(_IWAE, "std::abs(top) < std::numeric_limits<T>::infinity() ? top : T(0)", "top", _IWAE_TESTS),
    Mutation(_IWAE, "more.top[j] == top[j] ? T(1) : exponential(more.top[j] - top[j])", "T(1)", _IWAE_TESTS),
    Mutation(_IWAE, "more.top[j] == top[j] ? T(1) : exponential(more.top[j] - top[j])", "exponential(more.top[j] - top[j])", _IWAE_TESTS),
    Mutation(_IWAE, "(power == 2 ? factor * factor : factor)", "factor", _IWAE_TESTS),
    Mutation(_IWAE, "std::copy_n(top, n, sums.top);", "", _IWAE_TESTS),
    Mutation(_IWAE, "powered == 0 ? 0 : powered * row[j]", "powered * row[j]", _IWAE_TESTS),
    Mutation(_IWAE, "sums.weighted[j] / (divisor * divisor)", "sums.weighted[j] / divisor", _IWAE_CPP),
    Mutation(_IWAE, "total[j] += (scaled", "total[j] = (scaled", _IWAE_CPP),
    Mutation(_IWAE, "total[j] += scaled", "total[j] = scaled", _IWAE_CPP),
    Mutation(_IWAE, "total[j] += (scaled", "total[j] = T(total[j]) + (scaled", _IWAE_CPP + " and (budget or extremes)"),
    Mutation(_IWAE, "total[j] += weight;", "total[j] = T(total[j] + weight);", _IWAE_CPP + " and (budget or extremes)"),
    Mutation(_IWAE, "return !infinite;", "return true;", _IWAE_TESTS),
    Mutation(_IWAE, "sums.total[j] == 0 ? 1 : 1 / sums.total[j]", "1 / sums.total[j]", _IWAE_TESTS),
    Mutation("csrc/cpu/iwae.cpp", "inverse + column, gs + column", "inverse, gs + column", _IWAE_TESTS),
    Mutation("csrc/cpu/iwae.cpp", "inverse + column, gs + column", "inverse + column, gs", _IWAE_TESTS),
    Mutation("csrc/cpu/iwae.cpp", "length, n_, std::min(columns_, n_ - column)", "length, n_, std::min(columns_, n_)", _IWAE_TESTS),
    Mutation("hvae_kernels/ops/iwae/reference.py", "weights = normalized(log_weights.detach(), dim) ** power", "weights = normalized(log_weights, dim) ** power", _IWAE_CPP),
    Mutation("hvae_kernels/ops/iwae/autograd.py", "return reference.normalized(log_weights.detach(), 0) ** power", "return reference.normalized(log_weights.detach(), 0)", _IWAE_CPP),
    Mutation(_IWAE_TRITON, "tl.where(mask, load(log_weights, at, mask, DTYPE), float(\"-inf\"))", "load(log_weights, at, mask, DTYPE)", _IWAE_TRITON_TESTS),
    Mutation(_IWAE_TRITON, "tl.where(tl.abs(largest) == float(\"inf\"), 0.0, largest)", "largest", _IWAE_TESTS),
    Mutation(_IWAE, "(powered < kNegligible<T> ? T(0) : powered)", "powered", _IWAE_TESTS),
    Mutation(_IWAE_TRITON, "tl.where(weight < negligible, 0.0, weight)", "weight", _IWAE_TESTS),
    Mutation(_IWAE_TRITON, "(tl.log(total) - log_samples)", "tl.log(total)", _IWAE_TRITON_TESTS),
    Mutation(_IWAE_TRITON, "tl.where(weight == 0, 0.0, weight * values)", "weight * values", _IWAE_TESTS),
    Mutation(_ELEMENTARY, "two_to(n + 64) * 0x1p-64f", "two_to(n)", _ELEMENTARY_TESTS),
    Mutation(_ELEMENTARY, "log_of_normal(sum) + lost / sum;\n  return x", "log_of_normal(sum);\n  return x", _ELEMENTARY_TESTS),
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
    Mutation("hvae_kernels/_library.py", "if not torch.is_autocast_enabled(device):", "if True:", _REPARAM_TESTS + " -k autocast"),
    Mutation(_REPARAM_AUTOGRAD, "grad_std = grad * noise if grad_std is None else torch.addcmul(grad_std, grad, noise)", "grad_std = grad * noise", _REPARAM_CPP),
    Mutation(_REPARAM_AUTOGRAD, "d_x if grad is None else d_x + grad @ weight_loc", "d_x", _REPARAM_TRITON_TESTS),
    Mutation("hvae_kernels/ops/local_reparam_linear/reference.py", "torch.where(certain, 1, variance).sqrt()", "variance.sqrt()", _REPARAM_TESTS + " -k reference"),
    Mutation("hvae_kernels/nn/local_reparam.py", "- log_ratio.sum()", "+ log_ratio.sum()", _REPARAM_TESTS + " -k kl"),
    Mutation("hvae_kernels/nn/local_reparam.py", "noise = torch.randn(*x.shape[:-1], self.out_features,", "noise = torch.randn(self.out_features,", _REPARAM_TESTS),
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
    Mutation(_MIXTURE_CPU, "if (!std::isfinite(shift)) shift = 0;", "shift = 0;", _MIXTURE_TESTS),
    Mutation(_MIXTURE_CPU, "chunk < sizes.chunks; ++chunk)", "chunk < 1; ++chunk)", _MIXTURE_CPP),
    Mutation(_MIXTURE_TRITON, "total *= exponential(top - finite)", "total *= 1.0", _MIXTURE_TRITON_TESTS),
    Mutation(_MIXTURE_TRITON, "weight * (t * t - 1.0)", "weight * t * t", _MIXTURE_TRITON_TESTS),
    Mutation(_MIXTURE_TRITON, "pull += slope_weight * (turned - widened)", "pull += slope_weight * turned", _MIXTURE_TRITON_TESTS),
    Mutation(_MIXTURE_TRITON, "d_weight += weights.sum(1", "d_weight = weights.sum(1", _MIXTURE_TRITON_TESTS),
    Mutation(_ELEMENTARY, "p = p * r + 8.3332841058e-3f;", "p = p * r + 8.3e-3f;", _ELEMENTARY_TESTS),
    Mutation(_ELEMENTARY, "p = p * q + 1.4296405296e-1f;", "p = p * q + 1.44e-1f;", _ELEMENTARY_TESTS),
    Mutation(_ELEMENTARY, "lost / sum;\n  return x < std::numeric_limits<float>::infinity() ? result : x;", "lost / sum;\n  return result;", _ELEMENTARY_TESTS),
    Mutation(_ELEMENTARY, "return s.value + x * s.value * s.rest;", "return s.value + x * s.value;", _ELEMENTARY_TESTS),
    Mutation(_SWEEP, "mask=step > 0, other=0)", "mask=step > 0, other=1)", _SWEEP_TESTS),
    Mutation(_SWEEP, "end = tl.minimum(end, begin)", "end = end + 0", _SWEEP_TESTS),
    Mutation(_SWEEP, "end = tl.load(upto + last)", "end = tl.load(upto + last) - 1", _SWEEP_TESTS),
    Mutation(_SWEEP, "(rank[None, :] >= low[:, None]) & (rank[None, :] < high[:, None])", "(rank[None, :] >= low[:, None])", _SWEEP_TESTS),
    Mutation(_SWEEP, "mask=inside[:, None], other=0.0)\n        sums += tl.dot", "mask=(rank >= 0)[:, None], other=0.0)\n        sums += tl.dot", "tests/test_contract.py -k autoregressive_inverse/triton and budget"),
    Mutation(_SWEEP, "raw += _read(tile, net.stages[WIRES[S][_RESIDUAL]].raw, group)", "raw += 0.0", _SWEEP_TESTS),
    Mutation(_SWEEP, "raw *= _context(stage.gate, layer.size, tile, group)", "raw *= 1.0", _SWEEP_TESTS),
    Mutation(_SWEEP, "sums += load(stage.bias, unit, inside, sums.dtype)[:, None]", "sums += 0.0", _SWEEP_TESTS),
    Mutation(_SWEEP, "        log_det -= _invert_feature(", "        log_det += _invert_feature(", _SWEEP_TESTS),
    Mutation(_SWEEP, "begin, end = tl.maximum(begin, end), reader.size", "begin, end = tl.maximum(begin, end) + 1, reader.size", _SWEEP_TESTS),
    Mutation(_SWEEP, "grad += _read(tile, net.stages[READER].raw, group)", "grad += 0.0", _SWEEP_TESTS),
    Mutation(_SWEEP, "weighted = grad * _context(stage.gate, layer.size, tile, group)", "weighted = grad * 1.0", _SWEEP_TESTS),
    Mutation(_SWEEP, "slope -= tl.load(raws + shift_unit * lane.shape[0])", "slope -= 0.0", _SWEEP_TESTS),
    Mutation(_SWEEP, "value * d_scale * slope + gl * d_log", "value * d_scale * slope", _SWEEP_TESTS),
    Mutation(_SWEEP, "t0 = tl.maximum(t1 - steps, 0)", "t0 = tl.maximum(t1 - steps, 1)", _SWEEP_TESTS),
    Mutation(_SWEEP, "return p + x * p * rest", "return p", _SWEEP_TESTS),
    Mutation("csrc/cpu/sweep.h", "std::fill_n(raw(s, layer.down[i]), lanes_, T(0));", "", "tests/test_autoregressive_network.py -k units_that_no_output_uses"),
    Mutation(_SMALL, "(term < terms)[:, None] & inside[None, :] & (out_degree[None, :] >= in_degree[:, None])", "(term < terms)[:, None] & inside[None, :]", _SMALL_TESTS),
    Mutation(_SMALL, "        connected = (term < terms)[:, None] & inside[None, :]", "        connected = inside[None, :]", _SMALL_TESTS),
    Mutation(_SMALL, "== at // _TERMS", "== 0", _SMALL_TESTS),
    Mutation(_SMALL, "scale_first + scale_step * feature", "scale_first + 2 * feature", _SMALL_TESTS),
    Mutation(_SMALL, "tl.where(mask, log, 0.0)", "log", _SMALL_TESTS),
    Mutation("csrc/cpu/sweep.h", "term.counts, before ? 0 : known, before ? known : kAll,", "term.counts, 0, before ? known : kAll,", _NETWORK_CPP),
    Mutation("csrc/cpu/sweep.h", "if (stage.residual != kNone) accumulate", "if (false) accumulate", _NETWORK_CPP),
    Mutation("csrc/cpu/sweep.h", "if (net_.stages[reader].residual == s) accumulate(raw(reader, unit), c);", "", _NETWORK_CPP),
    Mutation("csrc/cpu/sweep.h", "for (int64_t s = last(); s > source; --s) {", "for (int64_t s = source + 1; s == source + 1; ++s) {", _NETWORK_CPP),
    Mutation("csrc/cpu/autoregressive_network_backward.cpp", "const T sign = inverse ? T(-1) : T(1);\n  const bool in_tiles", "const T sign = T(1);\n  const bool in_tiles", _NETWORK_CPP),
    Mutation("csrc/cpu/autoregressive_network_backward.cpp", "sweep.raw(s, unit)[i] * sweep.ungated(s, unit)[i]", "sweep.raw(s, unit)[i]", _NETWORK_CPP),
    Mutation("csrc/kernels/autoregressive_network.h", "raw[i] = v * p.d_scale * blend + h[i] * p.d_log;\n        shift[i] = v * p.rest;\n        g[i] = v * p.scale;", "raw[i] = v * p.d_scale * blend;\n        shift[i] = v * p.rest;\n        g[i] = v * p.scale;", _NETWORK_CPP),
    Mutation("csrc/kernels/autoregressive_network.h", "x[i] = (y[i] - p.rest * shift[i]) / p.scale;", "x[i] = (y[i] - shift[i]) / p.scale;", _NETWORK_CPP),
    Mutation("csrc/kernels/autoregressive_network.h", "double sum = sums[r];", "T sum = sums[r];", "tests/test_contract.py -k autoregressive and cpp and long_sums"),
    Mutation("csrc/kernels/tile.h", "return i < ends[u]; });", "return i <= ends[u]; });", _MASKED_CPP),
    Mutation("csrc/kernels/tile.h", "return at + i < limits[u]; });", "return at + i <= limits[u]; });", _MASKED_CPP),
    Mutation("csrc/kernels/tile.h", "ascending &= index[at + i] == index[at] + i;", "ascending &= true;", _MASKED_CPP),
    Mutation("csrc/kernels/gaussian_leapfrog.h", "stream<Set>(*vectors<Set>(map.C + j) * y", "stream<Set>(*vectors<Set>(map.B + j) * y", "tests/test_cpu_sets.py -k past_the_caches"),
    Mutation("csrc/kernels/sets.h", "for (; i < n; ++i) to[i] = from[i];\n}", "}", "tests/test_cpu_sets.py -k past_the_caches"),
    Mutation("csrc/cpu/autoregressive_network_backward.cpp", "blind / kMostUnits * kMostUnits", "blind / kMostUnits * kMostUnits + kMostUnits", "tests/test_cpu_sets.py -k narrow"),
    Mutation("csrc/cpu/autoregressive_network_backward.cpp", "for (const auto& part : all) total += part->biases_[s][unit];", "total += all[0]->biases_[s][unit];", "tests/test_cpu_sets.py -k narrow"),
    Mutation("csrc/kernels/planar_flow.h", "x + j * kColumns + l + v * kWidth", "x + j * kColumns + v * kWidth", "tests/test_contract.py -k planar_flow/cpp and budget"),
    Mutation("csrc/kernels/tile.h", "(kFirst + kIndex / 2 + kIndex % 2 * n)", "(kFirst + kIndex / 2 + kIndex % 2 * (n - 1))", _MASKED_CPP),
    Mutation("csrc/cpu/tile.h", "d = ~d;", "d = -d;", _MASKED_CPP),
    Mutation("csrc/kernels/tile.h", "kCopied = 128;", "kCopied = 1 << 12;", "tests/test_contract.py -k masked_linear/cpp and extremes"),
    Mutation("csrc/cpu/weight_grad.h", "std::min(lanes, counts[u] - p * lanes)", "lanes", _MASKED_CPP),
    Mutation(_SWEEP, "_write(tile, net.stages[S].raw, group, zeros)", "pass", "tests/test_autoregressive_network.py -k units_that_no_output_uses"),
    Mutation(_DENSE, "return product + product.mT", "return 2 * product", _DENSE_TESTS),
    Mutation("csrc/cpu/weight_grad.h", "counts[last - 1] - p * lanes + kGroupLanes<T> - 1", "counts[first] - p * lanes + kGroupLanes<T> - 1", _MASKED_CPP),
    Mutation("python/hvae/runs.py", 'if state.pop("sha256") != _checksum(state):', 'if state.pop("sha256") == "":', "tests/test_runs.py -k flipped"),
    Mutation("python/hvae/runs.py", "partial.unlink(missing_ok=True)", "pass", "tests/test_runs.py -k full_disk"),
    Mutation("python/hvae/runs.py", "if before != value:", "if False:", "tests/test_runs.py -k another"),
    Mutation("python/hvae/data/mnist.py", "stream.read(size + 1)", "stream.read()", "tests/test_runs.py -k unzipped"),
    Mutation(_DENSE, "state @ displacement + z, state @ map_rho", "state @ displacement, state @ map_rho", _DENSE_TESTS),
    Mutation(_TRAJECTORY, "kick = (torch.cat([none, tempering[:, None] * steps]) + drift) / 2", "kick = (torch.cat([none, steps]) + drift) / 2", _DENSE_TESTS),
    Mutation(_LEAP, "1 / decay[k], -kick[k] / decay[k]", "1 / decay[k], -kick[k]", f"{_LEAP_TESTS} equals_autograd"),
    Mutation(_LEAP, "grad_z + products[0]", "grad_z", f"{_LEAP_TESTS} equals_autograd"),
    Mutation(_LEAP, "total += product", "total = product", f"{_LEAP_TESTS} equals_autograd"),
    Mutation(_LEAP, "-arrivals[k]", "-drift[k]", f"{_LEAP_TESTS} equals_autograd"),
    Mutation(_LEAP, "if torch.is_grad_enabled():", "if False:", f"{_LEAP_TESTS} second_derivative"),
    Mutation(_LEAP, "z if on_drift else None, *params)", "z if on_drift else None)", f"{_LEAP_TESTS} changes_before"),
    Mutation(_STATISTICS, "module.track_running_stats = False", "pass", f"{_LEAP_TESTS} updated_once"),
    Mutation(_STATISTICS, "_CHANGED.wait_for(lambda: module not in _HELD and module not in _UPDATING)", "pass", f"{_LEAP_TESTS} several_threads"),
    Mutation(_STATISTICS, "        _CHANGED.wait_for(lambda: all(", "        (lambda: all(", f"{_LEAP_TESTS} several_threads"),
    Mutation(_STATISTICS, "if module not in _HELD:", "if True:", f"{_LEAP_TESTS} several_threads"),
    Mutation(_FIELD, "with self.context.again(), self.snapshot", "with self.snapshot", f"{_LEAP_TESTS} autocast"),
    Mutation(_FIELD, "return all(map(torch.equal, before, after))", "return True", f"{_LEAP_TESTS} random"),
    Mutation(_FIELD, "self.shared = _refuse_missing(", "_refuse_missing(", f"{_STATE_TESTS} hypernetwork"),
    Mutation(_STATE, "_write(entry, entry[2])", "pass", f"{_STATE_TESTS} those_of_the_forward"),
    Mutation(_STATE, "if (version is not None and value._version != version) if same else registered:", "if False:", f"{_STATE_TESTS} moves"),
    Mutation(_STATE, "put(then)", "pass", f"{_STATE_TESTS} those_of_the_forward"),
    Mutation(_FIELD, 'if hasattr(node, "variable"):', "if False:", f"{_LEAP_TESTS} params"),
    Mutation("hvae_kernels/_library.py", "not torch.is_grad_enabled()", "not torch.is_inference_mode_enabled()", _CPP),
    Mutation("hvae_kernels/nn/hamiltonian.py", "temperature[..., 1:] / temperature[..., :-1]", "temperature[..., :-1] / temperature[..., 1:]", "tests/test_gaussian_leapfrog.py"),
    Mutation("hvae_kernels/ops/gaussian_leapfrog/reference.py", "rho = alpha * (rho - step / 2 * grad)", "rho = alpha * (rho - step * grad)", "tests/test_gaussian_leapfrog.py"),
    Mutation("python/hvae/regression.py", "layer.weight_loc + layer.weight_log_scale.exp() * noise", "layer.weight_loc", "tests/test_regression.py"),
    Mutation("python/hvae/regression.py", "precision.diagonal().rsqrt()", "torch.linalg.inv(precision).diagonal().sqrt()", "tests/test_regression.py"),
    Mutation(_COMPAT, "if seen is None or not seen.again(masks):", "if seen is None:", _COMPAT_TESTS + " -k copies"),
    Mutation(_COMPAT, "with torch.inference_mode(False):", "with torch.no_grad():", _COMPAT_TESTS + " -k first_call"),
    Mutation(_COMPAT, "degrees.clone(memory_format=torch.contiguous_format)", "degrees.contiguous()", _COMPAT_TESTS + " -k degrees"),
    Mutation(_COMPAT, "or torch.jit.is_tracing()", "", _COMPAT_TESTS + " -k traces"),
    Mutation(_COMPAT, "if _live.hooked_everywhere():", "if False:", _COMPAT_TESTS + " -k more_than"),
    Mutation(_LIVE, "own is None or (", "True or (", _COMPAT_TESTS + " -k more_than"),
    Mutation(_LIVE, "if tensor.is_inference():\n        return tensor.clone()", "if tensor.is_inference():\n        return 0, 0, False", _COMPAT_TESTS + " -k masks_that"),
    Mutation(_COMPAT, "if not torch.equal(mask, expected):", "if False:", _COMPAT_TESTS + " -k left_alone"),
    Mutation(_COMPAT, "(units < found[part.residual + 1]).any()", "False", _COMPAT_TESTS + " -k left_alone"),
    Mutation(_COMPAT, "if not all(map(_live.untouched, layout.net.modules())):", "if False:", _COMPAT_TESTS + " -k hooks"),
    Mutation(_COMPAT, "if recorded and weights < least.weights:", "if False:", _COMPAT_TESTS + " -k small_parallel"),
    Mutation(_RMSPROP, "(std::sqrt(v) + eps)", "std::sqrt(v + eps)", _RMSPROP_TESTS),
    Mutation(_RMSPROP, "(1 - alpha) * g * g", "(1 - alpha) * gs[i] * gs[i]", _RMSPROP_TESTS),
    Mutation(_RMSPROP, "sums[i % kSums] +=", "sums[0] =", _RMSPROP_TESTS),
    Mutation(_RMSPROP_CPU, "norms[item / chunks.a_row] +=", "norms[0] +=", _RMSPROP_TESTS),
    Mutation(_RMSPROP_CPU, "if (!*finite) return;", "", _RMSPROP_TESTS),
    Mutation(_COMPAT, "rtol=1e-8, atol=1e-8", "rtol=1e8, atol=1e8", _COMPAT_TESTS + " -k proves"),
    Mutation("hvae_kernels/compat/zuko.py", "return self._inv.inverse_and_ladj(y)", "return super().call_and_ladj(y)", _COMPAT_TESTS + " -k density_in_one"),
    Mutation("hvae_kernels/compat/pyro.py", "self._cached_log_scale = -minus.unsqueeze(-1)", "self._cached_log_scale = minus.unsqueeze(-1)", _COMPAT_TESTS + " -k pyro"),
    Mutation(_MIXTURE_CPU, "    this->repeat_last(sizes.components, d);", "", "tests/test_contract.py -k mixture and cpp and infinite"),
    Mutation("hvae_kernels/_blocks.py", "before = self._before if self._open else self._read()", "before = self._read()", _BLOCK_TESTS),
    Mutation("hvae_kernels/_dispatch.py", "_State.choices.remove(choice)", "_State.choices.pop()", _BLOCK_TESTS),
    Mutation("hvae_kernels/_checks.py", "if first.layout is not torch.strided:", "if False:", _ARGUMENT_TESTS),
    Mutation("hvae_kernels/_library.py", "if not isinstance(tensor, Tensor):", "if False:", _ARGUMENT_TESTS),
    Mutation(_MADE, 'getattr(self, name).copy_(torch.tensor(degrees, device="cpu"))', "pass", _DEFERRED_TESTS),
    Mutation(_MADE, "self._given = {name: getattr(self, name).tolist() for name in self._given}", "pass", _DEFERRED_TESTS),
    Mutation("hvae_kernels/nn/hamiltonian.py", "nn.init.constant_(getattr(self, name), value)", "pass", _DEFERRED_TESTS),
    Mutation("hvae_kernels/compat/pyro.py", "layer.__dict__.pop(name, None)", "pass", _COMPAT_TESTS + " -k no_pass"),
    Mutation(_COMPAT, "or torch._C._len_torch_dispatch_stack() > 0", "", _COMPAT_TESTS + " -k exported"),
    Mutation(_COMPAT, "return copyreg._reconstructor, (self.library_class,", "return copyreg._reconstructor, (type(self),", _COMPAT_TESTS + " -k pickle"),
    Mutation(_COMPAT, "        self.__dict__.update(self.in_library() | self.__dict__)\n", "", _COMPAT_TESTS + " -k restored"),
    Mutation(_LIVE, "kind.forward is forward and kind.__call__ is nn.Module.__call__", "kind.forward is forward", _FLOWS_TESTS + " -k more_than"),
    Mutation(_LIVE, "kind.forward is forward and kind.__call__ is nn.Module.__call__", "kind.__call__ is nn.Module.__call__", _FLOWS_TESTS + " -k more_than"),
    Mutation(_LIVE, "    hook.only_looks = True\n", "", _LEAP_TESTS + " looking"),
    Mutation(_LIVE, 'or owner.__module__ == "torch.utils.module_tracker"', "", "tests/test_flops.py -k inverse"),
    Mutation("hvae_kernels/_flops.py", "sys.meta_path.insert(0, _WhenImported())", "pass", "tests/test_flops.py -k either_order"),
    Mutation("hvae_kernels/_flops.py", "(int(not math.prod(tape)) + 1 + needs_parameters)", "2", "tests/test_flops.py"),
    Mutation("hvae_kernels/compat/__init__.py", "and layer.transform is None:", "and False:", _COMPAT_TESTS + " -k guide"),
    Mutation(_MADE, "and not _live.hooked_everywhere()", "", _FLOWS_TESTS + " -k all_modules"),
    Mutation(_FLOWS, "for _ in range(self.features + 1):", "for _ in range(self.features):", _FLOWS_TESTS + " -k more_than"),
    Mutation(_STACK, "[(flow, flow) for flow in self.flows]", "[(flow, flow.forward) for flow in self.flows]", _FLOWS_TESTS + " -k every_level"),
    Mutation(_STACK, 'context if context is not None and getattr(flow, "is_conditional", True) else None', "context", _FLOWS_TESTS + " -k stack_hands"),
    Mutation(_FLOWS, "return not ours or self.made.context is not None", "return self.made.context is not None", _FLOWS_TESTS + " -k stack_hands"),
    Mutation(_FLOW, "usable = self._is_recorded or not torch.is_grad_enabled()", "usable = True", _FLOWS_TESTS + " -k gradients_that"),
    Mutation(_FLOW, "kept._is_recorded = False", "pass", _FLOWS_TESTS + " -k gradients_that"),
    Mutation(_FLOW, "and self._seen.again(self._read())", "", _FLOWS_TESTS + " -k cached_pair"),
    Mutation("hvae_kernels/nn/hamiltonian.py", "and _live.runs_only(potential, GaussianPotential.forward)", "", "tests/test_gaussian_leapfrog.py -k more_than"),
    Mutation("hvae_kernels/compat/_made.py", "(dropout.p and dropout.training)", "False", _COMPAT_TESTS + " -k dropout"),
)  # fmt: skip


def survives(mutation: Mutation, tree: Path) -> bool:
    """Apply one mutation to the copy, build, test, and put the line and the sound extension back."""
    file = tree / mutation.path
    text = file.read_text()
    compiled = mutation.path.startswith("csrc")
    (extension,) = (tree / "hvae_kernels").glob("_C*.so")
    sound = extension.read_bytes()
    file.write_text(text.replace(mutation.before, mutation.after))
    try:
        if compiled:
            build(tree)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests.split(" ", 2)]
        result = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True)
    finally:
        file.write_text(text)
        if compiled:
            extension.write_bytes(sound)
    if result.returncode > 1:  # a negative one is a crash, as red as any
        sys.exit(f"pytest could not run:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return result.returncode == 0


def build(tree: Path) -> None:
    """Build the extension inside the copy; by force, because only ninja knows which sources a header is in."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    result = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"the mutated tree does not build:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")


def environment(tree: Path) -> dict[str, str]:
    """The copy first on the path, before any installed package."""
    return {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'python'}"}


def main() -> None:
    """Run all selected mutations and report survivors."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", default="", help="only rows whose file or text contains this word")
    keep = parser.parse_args().keep
    rows = [m for m in MUTATIONS if keep in m.path + m.before + m.tests]
    survivors, misplaced = 0, []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".venv", ".git", "build", "runs", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, tree, ignore=ignored)
        build(tree)
        for number, mutation in enumerate(rows, 1):
            if mutation.stands(tree) != 1:
                misplaced.append(mutation)
                continue
            alive = survives(mutation, tree)
            survivors += alive
            print(
                f"{'SURVIVED' if alive else 'red':<8} {number}/{len(rows)} {mutation.path}: {mutation.after}",
                flush=True,
            )
    for mutation in misplaced:
        print(f"stands {mutation.stands()} times, not once, in {mutation.path}: {mutation.before}")
    sys.exit(1 if survivors or misplaced else 0)


if __name__ == "__main__":
    main()
