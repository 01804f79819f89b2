"""Breaks each kernel on purpose, one line at a time, and expects the tests to go red: ``python tests/mutation_check.py``.

Works on a copy of the tree in a temporary folder. The rows of an op's own files stand in ``ops/<op>.py``, here those of
what several ops share and of what is no op. ``--keep`` selects rows whose file or text contains a word. ``--journal``
names a file of outcomes, and a folder of objects beside it: rows that it has are not run again while their file and
their tests' files keep their text. Exits non-zero when a mutation survives, its line no longer stands once, or it does
not build or leaves no test to run, and when a test that went red is red without a mutation too.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from ops import collected  # noqa: E402 - on the path now, and the package that it imports is this tree's
from ops._mutation import Mutation  # noqa: E402
from torch.utils import cpp_extension  # noqa: E402

_CPP = "tests/test_contract.py -k gaussian_leapfrog/cpp"
_MASKED_CPP = "tests/test_contract.py -k masked_linear/cpp and budget"
_OP = "hvae_kernels/_op.py"
_LEAP_TESTS = "tests/test_leapfrog.py -k"
_ROWS = "csrc/kernels/rows.h"
_TAIL_CPP = "tests/test_contract.py -k affine_autoregressive/cpp"
_TAIL_TRITON_TESTS = "tests/test_contract.py -k affine_autoregressive/triton"
_RADIAL_CPP = "tests/test_contract.py -k radial_flow/cpp"
_BERNOULLI_CPP = "tests/test_contract.py -k bernoulli_log_prob/cpp"
_REPARAM_TESTS = "tests/test_local_reparam_linear.py"
_BLOCK_TESTS = "tests/test_package.py -k overlapping"
_ARGUMENT_TESTS = "tests/test_arguments.py"
_DEFERRED_TESTS = "tests/test_deferred.py"
_TERMINAL_TESTS = "tests/test_terminal.py"
_MIXTURE_CPP = "tests/test_contract.py -k gaussian_mixture and cpp and (budget or extremes)"
_ELEMENTARY = "csrc/kernels/elementary.h"
_ELEMENTARY_TESTS = "tests/test_elementary.py"
_COMPAT = "hvae_kernels/compat/_network.py"
_COMPAT_TESTS = "tests/test_accelerate.py"
_SBI = "hvae_kernels/compat/sbi.py"
_SBI_TESTS = "tests/test_accelerate_sbi.py"
_PYRO = "hvae_kernels/compat/pyro.py"
_ZUKO = "hvae_kernels/compat/zuko.py"
_COUPLING = "hvae_kernels/compat/_coupling.py"
_COUPLING_TESTS = "tests/test_accelerate_coupling.py"
_LIVE = "hvae_kernels/_live.py"
_FLOWS = "hvae_kernels/nn/autoregressive.py"
_FLOW = "hvae_kernels/nn/flow.py"
_STACK = "hvae_kernels/nn/stack.py"
_MADE = "hvae_kernels/nn/made.py"
_FLOWS_TESTS = "tests/test_autoregressive.py"

MUTATIONS: tuple[Mutation, ...] = (
    *collected("MUTATIONS"),
    Mutation("hvae_kernels/_triton/dual.py", "a.tangent + b.value * c.tangent + b.tangent * c.value", "a.tangent + b.value * c.tangent", "tests/test_contract.py -k gaussian_leapfrog/triton"),
    Mutation("csrc/cpu/rows.h", "part < parts; ++part", "part < 1; ++part", _CPP, ("gaussian_leapfrog",)),
    Mutation("csrc/kernels/rows.h", "for (; j < width; ++j) rest += terms[j];", "", _TAIL_CPP, ("affine_autoregressive",)),
    Mutation("csrc/kernels/rows.h", "rest = halves[0];", "rest = halves[1];", _TAIL_CPP, ("affine_autoregressive",)),
    Mutation("csrc/kernels/rows.h", "const T value = values ? values[i] : T(0);", "const T value = values ? values[0] : T(0);", _TAIL_CPP, ("affine_autoregressive",)),
    Mutation(_ROWS, "lanes[l] += terms[j + l];", "lanes[0] += terms[j + l];", _TAIL_CPP, ("affine_autoregressive",)),
    Mutation(_ROWS, "constexpr int64_t kRun = 64;", "constexpr int64_t kRun = int64_t(1) << 40;", _MIXTURE_CPP, ("gaussian_mixture",)),
    Mutation("csrc/cpu/rows.h", "std::min(kRowBlock, features - start)", "std::min(kRowBlock, features)", _TAIL_CPP, ("affine_autoregressive",)),
    Mutation("hvae_kernels/_triton/device.py", "n = tl.where(x == x, k, 0.0).to(tl.int32)", "n = k.to(tl.int32) + 1", _TAIL_TRITON_TESTS),
    Mutation(_OP, "tuple([needs & bit for bit in bits]) if bits[0] else", "", "tests/test_contract.py -k cpp and per_sample"),
    Mutation(_OP, "results = tuple([add(a, b) for a, b in zip(results, second, strict=True)])", "results = second", "tests/test_contract.py -k functional_gradients or forward_mode or per_sample"),
    Mutation(_OP, "[x if w else x.new_empty(size, 0) for x, w in zip(results, written, strict=True)]", "results", "tests/test_contract.py -k forward_mode and affine and cpp"),
    Mutation("csrc/cpu/rows.h", "std::fill(to + d, to + width, T(0));", "", "tests/test_contract.py -k rows_are_apart and radial_flow and cpp", ("radial_flow",)),
    Mutation("csrc/kernels/sets.h", "const int64_t place = lane % kBlock, unit = place / kUnit;", "const int64_t place = lane % kBlock, unit = 0;", "tests/test_contract.py -k planar_flow_amortised/cpp", ("planar_flow_amortised",)),
    Mutation("csrc/kernels/sets.h", "for (int64_t width = kHalf / 2; width; width /= 2)", "for (int64_t width = kHalf / 2; width > 1; width /= 2)", _RADIAL_CPP, ("radial_flow",)),
    Mutation("hvae_kernels/nn/radial.py", "softplus(self.raw_beta) - alpha", "softplus(self.raw_beta)", "tests/test_forward_flows.py -k radial_module"),
    Mutation("csrc/cpu/rows.h", "std::fill_n(sums, n, 0.0);", "std::fill_n(sums, 1, 0.0);", _BERNOULLI_CPP, ("bernoulli_log_prob",)),
    Mutation(_ELEMENTARY, "p = p * r + 8.3332841058e-3;", "p = p * r + 8.3e-3;", "tests/test_planar_flow.py -k cpp", ("planar_flow",)),
    Mutation(_ELEMENTARY, "two_to(n + 64) * 0x1p-64f", "two_to(n)", _ELEMENTARY_TESTS, ()),
    Mutation(_ELEMENTARY, "log_of_normal(sum) + lost / sum;\n  return x", "log_of_normal(sum);\n  return x", _ELEMENTARY_TESTS, ()),
    Mutation("hvae_kernels/_library.py", "if not torch.is_autocast_enabled(device):", "if True:", _REPARAM_TESTS + " -k autocast"),
    Mutation("hvae_kernels/nn/local_reparam.py", "- log_ratio.sum()", "+ log_ratio.sum()", _REPARAM_TESTS + " -k kl"),
    Mutation("hvae_kernels/nn/local_reparam.py", "noise = torch.randn(*x.shape[:-1], self.out_features,", "noise = torch.randn(self.out_features,", _REPARAM_TESTS),
    Mutation(_ELEMENTARY, "p = p * r + 8.3332841058e-3f;", "p = p * r + 8.3e-3f;", _ELEMENTARY_TESTS, ()),
    Mutation(_ELEMENTARY, "p = p * q + 1.4296405296e-1f;", "p = p * q + 1.44e-1f;", _ELEMENTARY_TESTS, ()),
    Mutation(_ELEMENTARY, "lost / sum;\n  return x < std::numeric_limits<float>::infinity() ? result : x;", "lost / sum;\n  return result;", _ELEMENTARY_TESTS, ()),
    Mutation(_ELEMENTARY, "return s.value + x * s.value * s.rest;", "return s.value + x * s.value;", _ELEMENTARY_TESTS, ()),
    Mutation("csrc/kernels/tile.h", "return i < ends[u]; });", "return i <= ends[u]; });", _MASKED_CPP, ("masked_linear",)),
    Mutation("csrc/kernels/tile.h", "return at + i < limits[u]; });", "return at + i <= limits[u]; });", _MASKED_CPP, ("masked_linear",)),
    Mutation("csrc/kernels/tile.h", "ascending &= index[at + i] == index[at] + i;", "ascending &= true;", _MASKED_CPP, ("masked_linear",)),
    Mutation("csrc/kernels/sets.h", "for (; i < n; ++i) to[i] = from[i];\n}", "}", "tests/test_cpu_sets.py -k past_the_caches", ("gaussian_leapfrog", "planar_flow")),
    Mutation("csrc/kernels/tile.h", "(kFirst + kIndex / 2 + kIndex % 2 * n)", "(kFirst + kIndex / 2 + kIndex % 2 * (n - 1))", _MASKED_CPP, ("masked_linear",)),
    Mutation("csrc/cpu/tile.h", "d = ~d;", "d = -d;", _MASKED_CPP, ("masked_linear",)),
    Mutation("csrc/kernels/tile.h", "kCopied = 128;", "kCopied = 1 << 12;", "tests/test_contract.py -k masked_linear/cpp and extremes", ("masked_linear",)),
    Mutation("csrc/cpu/weight_grad.h", "std::min(lanes, counts[u] - p * lanes)", "lanes", _MASKED_CPP, ("masked_linear",)),
    Mutation("csrc/cpu/weight_grad.h", "counts[last - 1] - p * lanes + kGroupLanes<T> - 1", "counts[first] - p * lanes + kGroupLanes<T> - 1", _MASKED_CPP, ("masked_linear",)),
    Mutation("python/hvae/runs.py", 'if state.pop("sha256") != checksum(state):', 'if state.pop("sha256") == "":', "tests/test_runs.py -k flipped"),
    Mutation("python/hvae/runs.py", "partial.unlink(missing_ok=True)", "pass", "tests/test_runs.py -k full_disk"),
    Mutation("python/hvae/runs.py", "if before != value:", "if False:", "tests/test_runs.py -k another"),
    Mutation("python/hvae/runs.py", '("experiment", *fixed, *made)', '("experiment", *fixed)', "tests/test_runs.py -k told"),
    Mutation("hvae_kernels/_dispatch.py", "if not _torch.forward_within_forward():", "if True:", "tests/test_contract.py -k forward_mode_of_forward_mode and (iwae_bound or masked_linear)"),
    Mutation(_OP, "return tuple([x if w else x.new_empty(0) for x, w in zip(results, written, strict=True)])\n\n    @staticmethod\n    def _plain", "return results\n\n    @staticmethod\n    def _plain", "tests/test_contract.py -k forward_mode_of_second and affine"),
    Mutation("hvae_kernels/_library.py", "if _torch.forward_within_forward():", "if False:", "tests/test_contract.py -k pulled_back and bernoulli"),
    Mutation("hvae_kernels/_library.py", "return torch.func.jvp(double_backward, variables, tangents)[1]", "return double_backward(*tangents)", "tests/test_contract.py -k forward_mode_of_second and spline"),
    Mutation("hvae_kernels/_checks.py", "any(x.shape == shape for shape in shapes)", "x.shape in shapes", "tests/test_gaussian_leapfrog.py -k learned_step_sizes"),
    Mutation("hvae_kernels/nn/local_reparam.py", "if generator is not None:", "if True:", "tests/test_local_reparam_linear.py -k short_batch"),
    Mutation("python/hvae/runs.py", "if not path.stem.endswith(PARTIAL)", "", "tests/test_runs.py -k half_written"),
    Mutation("python/hvae/runs.py", 'map_location="cpu", ', "", "tests/test_runs.py -k gpu"),
    Mutation("python/hvae/experiment.py", 'if keys <= {job.key for job, _ in jobs}:', "if True:", "tests/test_reports.py -k draw"),
    Mutation("python/hvae/mnist/train.py", "return None if annealed else mean", "return mean", "tests/test_deep_models.py -k called_no_bound"),
    Mutation("python/hvae/annealed.py", "-iwae_bound(-backward)", "iwae_bound(backward)", "tests/test_priors.py -k sandwich"),
    Mutation("python/hvae/mnist/models.py", "self.decoder.train(mode and not self.frozen)", "self.decoder.train(mode)", "tests/test_mnist_annealed.py -k decoder_is_kept and conv"),
    Mutation("python/hvae/mnist/deep.py", "(self.first + STEP * code.context", "(self.first + code.context", "tests/test_deep_models.py -k planar_layers_by_a_tenth"),
    Mutation("python/hvae/mnist/deep.py", "(STEP * self.layers(", "(self.layers(", "tests/test_deep_models.py -k by_its_formula"),
    Mutation("python/hvae/mnist/train.py", "            self.bound_gradients(step)\n", "", "tests/test_mnist_annealed.py -k every_update_is_clipped"),
    Mutation("python/hvae/mnist/command.py", "clip_norm=args.clip_norm,", "", "tests/test_mnist_annealed.py -k command_clips"),
    Mutation("python/hvae/mnist/train.py", "if not self.job.clip_norm:", "if False:", "tests/test_mnist_annealed.py -k overflows"),
    Mutation("python/hvae/mnist/train.py", "(self.model.parameters(), self.job.clip_norm, norm)", "([], self.job.clip_norm, norm)", "tests/test_mnist_annealed.py -k clipped"),
    Mutation("python/hvae/mnist/models.py", "self.decoder.requires_grad_(False)", "self.decoder", "tests/test_mnist_annealed.py -k decoder_is_kept and mlp"),
    Mutation("python/hvae/mnist/study.py", "(self.n_steps + 1) if self.n_steps", "self.n_steps if self.n_steps", "tests/test_mnist_annealed.py -k passes"),
    Mutation("python/hvae/draw/models.py", "gates = held + F.linear(", "gates = F.linear(", "tests/test_draw_study.py -k formulas"),
    Mutation("python/hvae/priors/likelihood.py", "log_weight + density", "density", "tests/test_priors.py -k quadrature"),
    Mutation("python/hvae/priors/train.py", "range(state.sandwich.shape[1], n_points", "range(0, n_points", "tests/test_priors.py -k kill"),
    Mutation("python/hvae/experiment.py", "setattr(self.state, name, part.state_dict())", "pass", "tests/test_priors.py -k killed"),
    Mutation("python/hvae/experiment.py", '"job" in row and row["job"] not in keys', "False", "tests/test_gaussian_command.py -k without_states"),
    Mutation("python/hvae/terminal.py", "room = max(1, max(len(line[0]) for line in body) - excess)", "room = WIDTH", _TERMINAL_TESTS + " -k fit"),
    Mutation("python/hvae/terminal.py", "zip(heads, map(max, longest, _widths(*body)), strict=True)", "()", _TERMINAL_TESTS + " -k broken"),
    Mutation("python/hvae/terminal.py", "stream.isatty() and not", "not", _TERMINAL_TESTS + " -k colours"),
    Mutation("python/hvae/terminal.py", "self._bar(1 + place, what", "self._bar(1, what", _TERMINAL_TESTS + " -k above"),
    Mutation("python/hvae/terminal.py", "0.3 if position else 0", "0.3", _TERMINAL_TESTS + " -k above"),
    Mutation("python/hvae/terminal.py", "tqdm.write(text, file=sys.stderr)", "print(text, file=sys.stderr)", _TERMINAL_TESTS + " -k above"),
    Mutation("python/hvae/terminal.py", "update(key not in self._finished)", "update(1)", _TERMINAL_TESTS + " -k above"),
    Mutation("python/hvae/runs.py", 'UNTOLD = ("run", "command", "quiet")', 'UNTOLD = ("run", "command")', _TERMINAL_TESTS + " -k quiet"),
    Mutation("python/hvae/data/mnist.py", "stream.read(size + 1)", "stream.read()", "tests/test_runs.py -k unzipped"),
    Mutation("hvae_kernels/_library.py", "if torch.is_grad_enabled():", "if not torch.is_inference_mode_enabled():", _CPP),
    Mutation("hvae_kernels/_library.py", "if tensor is not None and _torch.unwrap_if_dead(tensor).requires_grad:", "if tensor is not None:", _CPP),
    Mutation("hvae_kernels/_library.py", "_torch.unwrap_if_dead(tensor).requires_grad", "tensor.requires_grad", "tests/test_package.py -k foreign"),
    Mutation("hvae_kernels/_library.py", "_torch.unwrap_if_dead(x) if isinstance(x, Tensor) else x", "x", "tests/test_contract.py -k pull_back_after and cpp"),
    Mutation("hvae_kernels/nn/hamiltonian.py", "temperature[..., 1:] / temperature[..., :-1]", "temperature[..., :-1] / temperature[..., 1:]", "tests/test_gaussian_leapfrog.py"),
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
    Mutation(_COMPAT, "rtol=1e-8, atol=1e-8", "rtol=1e8, atol=1e8", _COMPAT_TESTS + " -k proves"),
    Mutation("hvae_kernels/compat/zuko.py", "return self._inv.inverse_and_ladj(y)", "return super().call_and_ladj(y)", _COMPAT_TESTS + " -k density_in_one"),
    Mutation(_PYRO, "if parts[0].shape[-1] == layer.input_dim:", "if False:", _COUPLING_TESTS + " -k pyro_runs"),
    Mutation(_PYRO, 'inverse = bool(options.get("inverse"))', "inverse = False", _COUPLING_TESTS + " -k pyro_runs"),
    Mutation(_PYRO, "if layer._params != types.MethodType(PyroSpline._params, layer):", "if False:", _COUPLING_TESTS + " -k pyro_splines or set_afterwards"),
    Mutation(_PYRO, "_coupling.is_served(x, x)", "True", _COUPLING_TESTS + " -k pyro_runs"),
    Mutation(_PYRO, 'require_unchanged(layer, "condition", "_params")', 'require_unchanged(layer, "_params")', _COUPLING_TESTS + " -k pyro_splines"),
    Mutation(_PYRO, "return (layer.spline,) if isinstance(layer, SplineAutoregressive) else ()", "return ()", _COUPLING_TESTS + " -k parts_of"),
    Mutation("hvae_kernels/compat/__init__.py", "and id(layer) not in parts", "", _COUPLING_TESTS + " -k parts_of"),
    Mutation("hvae_kernels/compat/__init__.py", 'if isinstance(layer, getattr(adapter, "AS_FAST", ())):', "if False:", _COUPLING_TESTS + " -k left_alone"),
    Mutation("hvae_kernels/compat/normflows.py", "and split.mode == merge.mode", "", _COUPLING_TESTS + " -k blocks_parts"),
    Mutation("hvae_kernels/compat/normflows.py", "all(_live.untouched(part) and", "all(", _COUPLING_TESTS + " -k blocks_parts"),
    Mutation("hvae_kernels/compat/normflows.py", 'halves if layer.flows[0].mode == "channel" else halves[::-1]', "halves", _COUPLING_TESTS + " -k same_bits"),
    Mutation(_ZUKO, "x_b, ladj = transform.inverse_and_ladj(y_b)", "x_b, ladj = transform._inverse(y_b), -self.meta(y_a).log_abs_det_jacobian(transform._inverse(y_b), y_b)", _COMPAT_TESTS + " -k coupling_samples and spline"),
    Mutation(_ZUKO, "ladj = -transform.log_abs_det_jacobian(x_b, y_b)", "ladj = -self.meta(y_a).log_abs_det_jacobian(x_b, y_b)", _COMPAT_TESTS + " -k coupling_samples"),
    Mutation(_ZUKO, "return x, -self.call_and_ladj(x)[1]", "return x, ladj", _COMPAT_TESTS + " -k points_outside"),
    Mutation(_ZUKO, "x = x.expand(self.parameters.shape[:-1])", "pass", _COMPAT_TESTS + " -k broadcasts_the_context"),
    Mutation(_ZUKO, "return torch.remainder(x, 2 * math.pi) - math.pi if self.circular else x", "return x", _COMPAT_TESTS + " -k log_determinant and circular"),
    Mutation(_ZUKO, "if known is None or not known[0].again([layer.mask]):", "if known is None:", _COMPAT_TESTS + " -k takes_the_mask"),
    Mutation(_ZUKO, "        with torch.inference_mode(False):", "        with torch.no_grad():", _COMPAT_TESTS + " -k first_call and coupling"),
    Mutation(_ZUKO, "return super().forward(c) if _network.is_recorded() else FusedCoupling(self, c)", "return FusedCoupling(self, c)", _COMPAT_TESTS + " -k coupling_runs"),
    Mutation("hvae_kernels/compat/pyro.py", "self._cached_log_scale = -minus.unsqueeze(-1)", "self._cached_log_scale = minus.unsqueeze(-1)", _COMPAT_TESTS + " -k pyro"),
    Mutation("hvae_kernels/_blocks.py", "before = self._before if self._open else self._read()", "before = self._read()", _BLOCK_TESTS),
    Mutation("hvae_kernels/_dispatch.py", "_State.choices.remove(choice)", "_State.choices.pop()", _BLOCK_TESTS),
    Mutation("hvae_kernels/_dispatch.py", "_State.choices[-1].implementation if implementation is None else validate(implementation, name)", "requested()", "tests/test_contract.py -k implementation_of and radial_flow"),
    Mutation("hvae_kernels/_checks.py", "if first.layout is not torch.strided:", "if False:", _ARGUMENT_TESTS),
    Mutation("hvae_kernels/_library.py", "if not isinstance(tensor, Tensor):", "if False:", _ARGUMENT_TESTS),
    Mutation(_MADE, 'getattr(self, name).copy_(torch.tensor(degrees, device="cpu"))', "pass", _DEFERRED_TESTS),
    Mutation(_MADE, "self._given = {name: getattr(self, name).tolist() for name in self._given}", "pass", _DEFERRED_TESTS),
    Mutation("hvae_kernels/nn/hamiltonian.py", "nn.init.constant_(getattr(self, name), value)", "pass", _DEFERRED_TESTS),
    Mutation("hvae_kernels/compat/pyro.py", "layer.__dict__.pop(name, None)", "pass", _COMPAT_TESTS + " -k no_pass"),
    Mutation(_COMPAT, "or _torch.n_dispatch_modes() > 0", "", _COMPAT_TESTS + " -k exported"),
    Mutation(_COMPAT, "return copyreg._reconstructor, (self.library_class,", "return copyreg._reconstructor, (type(self),", _COMPAT_TESTS + " -k pickle"),
    Mutation(_COMPAT, "        self.__dict__.update(self.in_library() | self.__dict__)\n", "", _COMPAT_TESTS + " -k restored"),
    Mutation(_LIVE, "kind.forward is forward and kind.__call__ is nn.Module.__call__", "kind.forward is forward", _FLOWS_TESTS + " -k more_than"),
    Mutation(_LIVE, "kind.forward is forward and kind.__call__ is nn.Module.__call__", "kind.__call__ is nn.Module.__call__", _FLOWS_TESTS + " -k more_than"),
    Mutation(_LIVE, "    hook.only_looks = True\n", "", _LEAP_TESTS + " looking"),
    Mutation(_LIVE, 'or owner.__module__ == "torch.utils.module_tracker"', "", "tests/test_flops.py -k inverse"),
    Mutation("hvae_kernels/_flops.py", "sys.meta_path.insert(0, _WhenImported())", "pass", "tests/test_flops.py -k whatever_comes"),
    Mutation("hvae_kernels/_flops.py", "(int(not math.prod(tape)) + 1 + needs_parameters)", "2", "tests/test_flops.py"),
    Mutation("hvae_kernels/compat/__init__.py", "and layer.transform is None:", "and False:", _COMPAT_TESTS + " -k guide"),
    Mutation(_MADE, "and not _live.hooked_everywhere()", "", _FLOWS_TESTS + " -k all_modules"),
    Mutation(_FLOWS, "for _ in range(self.features + 1):", "for _ in range(self.features):", _FLOWS_TESTS + " -k more_than"),
    Mutation(_STACK, "[(flow, flow) for flow in self.flows]", "[(flow, flow.forward) for flow in self.flows]", _FLOWS_TESTS + " -k every_level"),
    Mutation(_STACK, 'context if context is not None and getattr(flow, "is_conditional", True) else None', "context", _FLOWS_TESTS + " -k stack_hands"),
    Mutation(_FLOWS, "return not ours or type(self.made) is not MADE or self.made.context is not None", "return self.made.context is not None", _FLOWS_TESTS + " -k stack_hands"),
    Mutation(_FLOW, "usable = self._is_recorded or not torch.is_grad_enabled()", "usable = True", _FLOWS_TESTS + " -k gradients_that"),
    Mutation(_FLOW, "kept._is_recorded = False", "pass", _FLOWS_TESTS + " -k gradients_that"),
    Mutation(_FLOW, "and self._seen.again(self._read())", "", _FLOWS_TESTS + " -k cached_pair"),
    Mutation("hvae_kernels/nn/hamiltonian.py", "and _live.runs_only(potential, GaussianPotential.forward)", "", "tests/test_gaussian_leapfrog.py -k more_than"),
    Mutation(_SBI, 'cls.__module__.partition(".")[0] == "sbi"', "False", _SBI_TESTS + " -k names_are_those"),
    Mutation(_SBI, "seen.add(id(thing))", "", _SBI_TESTS + " -k direct"),
    Mutation(_SBI, "isinstance(thing, list | tuple)", "isinstance(thing, tuple)", _SBI_TESTS + " -k other_posteriors"),
    Mutation(_SBI, 'names(holder) and getattr(holder, "_neural_net", holder) is None', "False", _SBI_TESTS + " -k untrained"),
    Mutation(_SBI, '"RatioEstimator" in kinds', "False", _SBI_TESTS + " -k ratio"),
    Mutation(_SBI, '"ConditionalVectorFieldEstimator" in kinds', "False", _SBI_TESTS + " -k other_estimators"),
    Mutation("hvae_kernels/compat/__init__.py", "name = _join(prefix, inner)", "name = inner", _SBI_TESTS + " -k names_are_those"),
    Mutation("hvae_kernels/compat/__init__.py", "return list(sbi.modules(module))", 'return [] if function == "restore" else list(sbi.modules(module))', _SBI_TESTS + " -k pickles"),
    Mutation("hvae_kernels/compat/_made.py", "if torch.is_grad_enabled() or context.device", "if context.device", _SBI_TESTS + " -k activated_once"),
    Mutation("hvae_kernels/compat/_made.py", "    edges[-1] = len(context)\n", "", _SBI_TESTS + " -k runs_of_rows"),
    Mutation("hvae_kernels/compat/_made.py", "if 4 * len(begins) > len(context):", "if False:", _SBI_TESTS + " -k runs_of_rows"),
    Mutation("hvae_kernels/compat/_made.py", "return function(layer.context_layer(rows)).repeat_interleave(counts, 0)", "return function(layer.context_layer(rows).repeat_interleave(counts, 0) + 1)", _SBI_TESTS + " -k activated_once"),
    Mutation(_COUPLING, "outputs = inputs.index_copy(1, self.transform_features, moved)", "outputs = inputs.clone()", _COUPLING_TESTS + " -k same_numbers"),
    Mutation(_COUPLING, "outputs, log_abs_det = outputs.index_copy(1, self.identity_features, passing), log_abs_det + more", "log_abs_det = log_abs_det + more", _COUPLING_TESTS + " -k same_numbers"),
    Mutation(_COUPLING, "more if log_abs_det is None else log_abs_det + more", "more", _COUPLING_TESTS + " -k same_numbers"),
    Mutation(_COUPLING, "inputs.dim() in (2, 4) and", "", _COUPLING_TESTS + " -k refuses"),
    Mutation(_COUPLING, "and inputs.shape[1] == self.features", "", _COUPLING_TESTS + " -k refuses"),
    Mutation(_COUPLING, "self.features and not _network.is_recorded()", "self.features", _COUPLING_TESTS + " -k compiled"),
    Mutation(_COUPLING, 'layer, "forward", "inverse")\n        n =', 'layer)\n        n =', _COUPLING_TESTS + " -k what_is_set"),
    Mutation(_COUPLING, "rtol=1e-8, atol=1e-8", "rtol=1e8, atol=1e8", _COUPLING_TESTS + " -k proves"),
    Mutation(_COUPLING, "torch.where(inside, y, 0.0)", "y", _COUPLING_TESTS + " -k same_numbers"),
    Mutation(_COUPLING, "torch.where(inside, logs, 0.0)", "logs", _COUPLING_TESTS + " -k same_numbers"),
    Mutation(_COUPLING, "torch.where(inside, y * bound, x)", "y * bound", _COUPLING_TESTS + " -k outside"),
    Mutation(_COUPLING, "torch.cat((lengths, outer, inner, outer), -1)", "torch.cat((lengths, first, inner, outer), -1)", _COUPLING_TESTS + " -k same_numbers"),
    Mutation("hvae_kernels/compat/_made.py", "self.num_bins, width, bool(inverse))", "self.num_bins, width, False)", _COUPLING_TESTS + " -k Autoregressive"),
    Mutation("hvae_kernels/compat/_made.py", "(dropout.p and dropout.training)", "False", _COMPAT_TESTS + " -k dropout"),
)  # fmt: skip


#: A mutated loop may never end: after these it is red.
SECONDS = 900


class Broken(Exception):
    """A row that says nothing: its text does not compile, or pytest cannot run its tests."""


class Extension:
    """The copy's extension, linked from objects that are kept by the digest of all they are made of."""

    def __init__(self, tree: Path, objects: Path) -> None:
        self.tree, self.objects = tree, objects
        self.file = tree / "hvae_kernels" / "_C.abi3.so"
        self.sources = sorted((tree / "csrc").rglob("*.cpp"))
        setup = runpy.run_path(str(tree / "setup.py"), run_name="flags")
        self.compiler = os.environ.get("CXX", "c++").split()
        macros = {"TORCH_TARGET_VERSION": setup["TARGET_VERSION"], "Py_LIMITED_API": "0x030A0000"}
        macros |= {"TORCH_EXTENSION_NAME": "_C", "TORCH_API_INCLUDE_EXTENSION_H": "1"}
        folders = [*cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
        self.flags = [*sysconfig.get_config_var("CFLAGS").split(), "-fPIC", *setup["FLAGS"]]
        self.flags += [f"-D{name}={value}" for name, value in macros.items()] + [f"-I{folder}" for folder in folders]
        objects.mkdir(parents=True, exist_ok=True)
        self.sets = tree / "csrc" / "kernels" / "sets.h"
        self.every_set = self.sets.read_text()
        # bodies are the same for all sets: half the time
        for name in ("Baseline", "Avx512") if torch.backends.cpu.get_cpu_capability().startswith("AVX") else ():
            self.sets.write_text(self.sets.read_text().replace(f"return kernel({name}{{}});", "return avx2(kernel);"))
        self.sound = {source: self._object(source) for source in self.sources}

    def build(self, changed: Path | None = None, only: tuple[str, ...] | None = None, every_set: bool = False) -> None:
        """Compile what includes the changed file, of these names only, and link it with sound objects of the rest."""
        one_set = self.sets.read_text()
        if every_set:
            self.sets.write_text(self.every_set)
        try:
            self._build(changed, only)
        finally:
            self.sets.write_text(one_set)

    def _build(self, changed: Path | None, only: tuple[str, ...] | None) -> None:
        anew = [source for source in self.sources if changed in _included(source)]
        only = only or {source.stem for source in anew if source.stem == changed.stem}
        anew = [source for source in anew if source.stem in only] if only else anew
        if changed is not None and not anew:
            raise Broken(f"of {only or 'all sources'} none includes it")
        built = self.sound | {source: self._object(source) for source in anew}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self._compile, built, built.values()))
        # of what two objects define alike the linker takes the first one's
        linked = [str(built[source]) for source in (*anew, *(source for source in built if source not in anew))]
        libraries = [f"-L{folder}" for folder in cpp_extension.library_paths()] + ["-lc10", "-ltorch", "-ltorch_cpu"]
        self.file.unlink(missing_ok=True)
        _run([*self.compiler, "-shared", *linked, *libraries, "-o", str(self.file)])

    def _object(self, source: Path) -> Path:
        """Where the object of a source as it stands now belongs."""
        texts = [file.read_text() for file in sorted(_included(source))]
        made_of = [torch.__version__, *self.compiler, *self.flags, str(source.relative_to(self.tree)), *texts]
        return self.objects / f"{source.stem}-{_digest(*made_of)}.o"

    def _compile(self, source: Path, target: Path) -> None:
        if not target.exists():
            partial = target.with_suffix(".partial")
            _run([*self.compiler, *self.flags, "-c", str(source), "-o", str(partial)])
            partial.rename(target)


def _included(file: Path) -> set[Path]:
    """The file and what of the tree it includes, directly or not."""
    names = re.findall(r'^#include "(.+)"', file.read_text(), re.MULTILINE)
    return {file}.union(*(_included((file.parent / name).resolve()) for name in names))


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise Broken(f"does not build:\n{result.stderr[-2000:]}")


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def red_by(mutation: Mutation, tree: Path, extension: Extension, pytest: Pytest) -> str | None:
    """Apply one mutation to the copy, test, and put line and sound extension back; the first red test, None if none."""
    file = tree / mutation.path
    text = file.read_text()
    sound = extension.file.read_bytes()
    compiled = mutation.path.startswith("csrc") and mutation.sources != ()
    _write(file, text.replace(mutation.before, mutation.after))
    try:
        if compiled:
            extension.build(file, mutation.sources, mutation.every_set)
        return pytest.red_test(mutation.arguments)
    finally:
        _write(file, text)
        if compiled:
            extension.file.write_bytes(sound)


def _write(file: Path, text: str) -> None:
    """Without its bytecode, which is told apart by size and seconds alone."""
    file.write_text(text)
    Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)


class Pytest:
    """Runs tests of the copy, in forks of a process that has imported torch."""

    def __init__(self, tree: Path) -> None:
        self.output = tree.with_name("output")
        command = [sys.executable, str(tree / "tests" / "warm_pytest.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.server = subprocess.Popen(command, cwd=tree, env=environment(tree), **pipes)

    def red_test(self, arguments: list[str]) -> str | None:
        """The first that fails, None if none does."""
        options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider"]
        self.server.stdin.write(json.dumps([[*options, *arguments], str(self.output), SECONDS]) + "\n")
        self.server.stdin.flush()
        code = int(self.server.stdout.readline())
        text = self.output.read_text()
        if code > 1:
            raise Broken(f"pytest could not run:\n{text[-2000:]}")
        if code < 0:
            return f"signal {-code}"
        found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |$)", text, re.MULTILINE)
        return (found[1] if found else "unnamed") if code else None


def environment(tree: Path) -> dict[str, str]:
    """The copy first on the path, before any installed package; of pytest's plugins none; bytecode is kept."""
    own = {"PYTHONPATH": f"{tree}{os.pathsep}{tree / 'python'}", "PYTHONDONTWRITEBYTECODE": ""}
    return os.environ | own | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


def key(mutation: Mutation, tree: Path) -> str:
    """Of the row, of the file that it changes and of its tests' files as they stand."""
    texts = ((tree / file).read_text() for file in (mutation.path, *mutation.files))
    return _digest(repr(mutation), *texts)


class Journal:
    """A line of JSON a row that was run: its key, its name, the red test or null, and the seconds it took."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file and file.exists() else []
        self.lines = {line["key"]: line for line in map(json.loads, lines)}

    def add(self, **line) -> None:
        self.lines[line["key"]] = line
        if self.file:
            with self.file.open("a") as stream:
                stream.write(json.dumps(line) + "\n")


def main() -> None:
    """Run all selected mutations and report what is not red."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", default="", help="only rows whose file or text contains this word")
    parser.add_argument("--journal", type=Path, help="file of outcomes, kept from run to run")
    arguments = parser.parse_args()
    rows = [m for m in MUTATIONS if arguments.keep in m.path + m.before + m.tests]
    journal, faults, red = Journal(arguments.journal), [], set()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the copy goes with a run that is killed
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "tree"
        ignored = shutil.ignore_patterns(".venv", ".git", "build", "runs", "*.egg-info", "__pycache__", "_C.*")
        shutil.copytree(ROOT, tree, ignore=ignored)
        objects = (journal.file or Path(folder) / "tree").resolve().with_suffix(".objects")
        extension = Extension(tree, objects)
        extension.build()
        pytest = Pytest(tree)
        for number, mutation in enumerate(rows, 1):
            name = f"{number}/{len(rows)} {mutation.path}: {mutation.after}"
            stands = mutation.stands(tree)
            if stands != 1:
                faults.append(f"stands {stands} times, not once, in {mutation.path}: {mutation.before}")
                continue
            known = key(mutation, tree)
            if known not in journal.lines:
                start = time.monotonic()
                try:
                    test = red_by(mutation, tree, extension, pytest)
                except Broken as reason:
                    faults.append(f"BROKEN   {name}\n{reason}")
                    print(faults[-1], flush=True)
                    continue
                journal.add(key=known, row=name, red_by=test, seconds=round(time.monotonic() - start, 1))
            line = journal.lines[known]
            red.add(line["red_by"])
            if line["red_by"] is None:
                faults.append(f"SURVIVED {name}")
            print(f"{'red' if line['red_by'] else 'SURVIVED':<8} {line['seconds']:4.0f} s  {name}", flush=True)
        tests = sorted(test for test in red if test and "::" in test)
        if tests and (test := pytest.red_test(tests)):
            faults.append(f"red without any mutation: {test}")
    print(f"{len(rows) - len(faults)} of {len(rows)} rows are red", *faults, sep="\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
