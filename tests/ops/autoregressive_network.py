"""``autoregressive_forward`` and ``autoregressive_inverse``."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from networks import network
from torch import Tensor

from hvae_kernels.functional import Spline
from hvae_kernels.ops.autoregressive_network import autograd, autoregressive_forward, autoregressive_inverse, reference
from hvae_kernels.ops.autoregressive_network.network import flattened
from ops._mutation import Mutation
from ops._spec import HIDDEN, OpSpec, RawOp, in_layout


def network_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, int],
    hidden: int = 6,
    scale: float = 1.0,
    layout: str = "contiguous",
    kind: str = "one_hidden",
    tail: Spline | None = None,
) -> tuple[Tensor, ...]:
    """Features and the network's floating tensors."""
    rows, features = shape
    x = in_layout(scale * torch.randn(shape, dtype=dtype, device=device), layout)
    return x, *network(kind, features, hidden, rows, dtype=dtype, device=device, tail=tail).tensors()


def network_op(function: Callable[..., tuple[Tensor, ...]], x: Tensor, *tensors: Tensor, **structure) -> tuple:
    """An op on a network as a function of its floating tensors."""
    return function(x, _network_of(x, *tensors, **structure))


def _network_of(x: Tensor, *tensors: Tensor, kind: str = "one_hidden", **structure):
    hidden = 0 if kind == "linear" else tensors[0].shape[0]
    empty = network(kind, x.shape[1], hidden, x.shape[0], device=x.device, **structure)
    return empty.with_tensors(tensors)


def _raw(x: tuple[Tensor, ...], *known: Tensor, **structure) -> tuple:
    counts, (program, *rest), tensors = flattened(_network_of(*x, **structure))
    remaining = iter(tensors)
    return (*known, *([next(remaining) for _ in range(count)] for count in counts), list(program), *rest)


_SPLINE = Spline(2)
_spline_inputs = functools.partial(network_inputs, tail=_SPLINE)


def _splined(
    function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor, tail: Spline = _SPLINE, **structure
) -> tuple:
    """:func:`network_op` with a spline for a tail."""
    return network_op(function, *tensors, tail=tail, **structure)


CASES = {
    "plain": {"shape": (7, 5)},
    "linear": {"shape": (7, 5), "kind": "linear"},
    "two_hidden": {"shape": (5, 6), "kind": "two_hidden", "activation": "elu"},
    "three_hidden": {"shape": (5, 6), "kind": "three_hidden", "activation": "silu", "order": "shuffled"},
    "residual": {"shape": (7, 5), "kind": "residual", "activation": "softplus", "gate": "softplus"},
    "gated": {"shape": (7, 5), "kind": "gated", "activation": "sigmoid", "gate": "shifted-sigmoid"},
    "skip": {"shape": (7, 5), "kind": "skip", "gate": "clipped", "halves": True},
    "context": {"shape": (7, 5), "kind": "context", "gate": "soft-clipped", "activation": "gelu"},
    "blend": {"shape": (7, 5), "gate": "sigmoid", "activation": "relu"},
    "levels": {"shape": (7, 6), "order": "levels", "halves": True},
    "no_rows": {"shape": (0, 5)},
    "no_features": {"shape": (3, 0)},
    "one_element": {"shape": (1, 1)},
    "prime": {"shape": (13, 17), "hidden": 31},
    "shuffled": {"shape": (5, 9), "order": "shuffled"},
    "several_blocks": {"shape": (16, 9), "hidden": 131},
    "several_tiles": {"shape": (67, 3), "hidden": 5},
    "above_power": {"shape": (17, 9), "hidden": 17},
    "strided": {"shape": (7, 5), "layout": "strided"},
    "transposed": {"shape": (7, 5), "layout": "transposed"},
}
#: Through splines: of every style and kind of tails, in either layout of the outputs.
SPLINE_CASES = {
    "spline": {"shape": (7, 5), "tail": Spline(8)},
    "spline_halves": {"shape": (7, 5), "tail": Spline(4, style="pyro"), "halves": True, "order": "shuffled"},
    "spline_circular": {"shape": (67, 3), "tail": Spline(5, tails="circular", logit_scale=0.5), "kind": "residual"},
    "spline_zuko": {"shape": (13, 17), "tail": Spline(8, bound=5.0, style="zuko"), "hidden": 31, "kind": "context"},
    "spline_levels": {"shape": (16, 6), "tail": Spline(3), "order": "levels", "kind": "skip"},
    "spline_none": {"shape": (9, 5), "tail": Spline(4, (-6.0, 6.0, -5.0, 8.0), tails=None), "kind": "gated"},
}
#: An operator of the interpreter takes as long for a block as for an element: fewer bins and features.
_INTERPRETED_SPLINES = {
    "spline": {"shape": (7, 3), "tail": Spline(8)},
    "spline_halves": {"shape": (7, 3), "tail": Spline(3, style="pyro"), "halves": True, "order": "shuffled"},
    "spline_circular": {"shape": (19, 2), "tail": Spline(3, tails="circular", logit_scale=0.5), "kind": "residual"},
    "spline_zuko": {"shape": (13, 5), "tail": Spline(4, bound=5.0, style="zuko"), "hidden": 31, "kind": "context"},
    "spline_levels": {"shape": (5, 4), "tail": Spline(2), "order": "levels", "kind": "skip"},
}
EXTREMES = {
    "large": {"shape": (7, 5), "scale": 1e6, "gate": "softplus"},
    "tiny": {"shape": (7, 5), "scale": 1e-18},
}
_ACTIVATED = {"softplus": "elu", "affine": "relu", "sigmoid": "tanh", "clipped": "gelu", "soft-clipped": "silu"}
_NETWORKS = [{"hidden": 13, "gate": gate, "activation": activation} for gate, activation in _ACTIVATED.items()]

SPECS = (
    OpSpec(
        name="autoregressive_forward",
        row_cases=tuple(_NETWORKS),
        defined_at_infinity=dict.fromkeys(range(5), HIDDEN),
        op=functools.partial(network_op, autoregressive_forward),
        reference=functools.partial(network_op, reference.autoregressive_forward),
        make=network_inputs,
        cases=CASES | SPLINE_CASES,
        small={"shape": (4, 3), "hidden": 4},
        extremes=EXTREMES,
        same=(0, 1),
        raw=(
            RawOp(autograd.RAW_FORWARD, lambda x: _raw(x, x[0])),
            RawOp(autograd.RAW_TRAINING, lambda x: _raw(x, x[0])),
            RawOp(
                autograd.RAW_BACKWARD,
                lambda x: _raw(x, x[0].cos(), None, x[0], x[0].new_empty(0), False, True, True),
            ),
        ),
        options=("activation", "gate", "order", "halves"),
        shared=("kind", "tail"),
        summed_by_torch=("second",),  # composed of masked_linear and others
        long_sums={"shape": (60_000, 2), "hidden": 64},
    ),
    OpSpec(
        name="autoregressive_inverse",
        composed=True,
        row_cases=tuple(_NETWORKS),
        defined_at_infinity=dict.fromkeys(range(5), HIDDEN),
        op=functools.partial(network_op, autoregressive_inverse),
        reference=functools.partial(network_op, reference.autoregressive_inverse),
        make=network_inputs,
        cases=CASES,
        small={"shape": (4, 3), "hidden": 4},
        extremes=EXTREMES,
        same=(0, 1),
        raw=(
            RawOp(autograd.RAW_INVERSE, lambda x: _raw(x, x[0])),
            RawOp(autograd.RAW_SOLVE, lambda x: _raw(x, x[0].cos(), x[0][:, 0].cos(), x[0])),
            RawOp(
                autograd.RAW_BACKWARD,
                lambda x: _raw(x, x[0].cos(), x[0][:, 0].cos(), x[0], x[0].new_empty(0), True, True, True),
            ),
            RawOp(
                autograd.RAW_BACKWARD,
                lambda x: _raw(x, x[0].cos(), None, x[0], x[0].new_empty(0), False, True, False),
            ),
        ),
        options=("activation", "gate", "order", "halves"),
        shared=("kind",),
        summed_by_torch=("second",),  # the reference's
        long_sums={"shape": (60_000, 2), "hidden": 64},
    ),
    OpSpec(
        name="autoregressive_spline_inverse",
        row_cases=({"hidden": 13, "activation": "relu"},),
        defined_at_infinity=dict.fromkeys(range(5), HIDDEN),
        op=functools.partial(_splined, autoregressive_inverse),
        reference=functools.partial(_splined, reference.autoregressive_inverse),
        make=_spline_inputs,
        # The reference goes through the features one by one, so that its derivatives and graphs grow with their number.
        cases={
            "plain": {"shape": (7, 3)},
            "prime": {"shape": (13, 5), "hidden": 31},
            "above_power": {"shape": (17, 3), "hidden": 17},
            "no_rows": {"shape": (0, 3)},
            "one_element": {"shape": (1, 1)},
        }
        | SPLINE_CASES,
        small={"shape": (3, 2), "hidden": 3},
        extremes={"far": {"shape": (7, 5), "scale": 1e6}, "tiny": {"shape": (7, 5), "scale": 1e-18}},
        same=(0, 0),
        raw=(
            RawOp(autograd.RAW_INVERSE, lambda x: _raw(x, x[0], tail=_SPLINE)),
            RawOp(autograd.RAW_SOLVE, lambda x: _raw(x, x[0].cos(), x[0][:, 0].cos(), x[0], tail=_SPLINE)),
            RawOp(
                autograd.RAW_BACKWARD,
                lambda x: _raw(
                    x, x[0].cos(), x[0][:, 0].cos(), x[0], x[0].new_empty(0), True, True, True, tail=_SPLINE
                ),
            ),
        ),
        options=("activation", "order", "halves"),
        shared=("kind", "tail"),
        summed_by_torch=("second",),  # the reference's
        interpreted=_INTERPRETED_SPLINES,
    ),
)

_FORWARD = ("autoregressive_network",)
_BACKWARD = ("autoregressive_network_backward",)
_NETWORK_CPP = "tests/test_contract.py -k (autoregressive_forward or autoregressive_inverse) and cpp and budget"
_SPLINE_INVERSE = "tests/test_contract.py -k autoregressive_spline_inverse/cpp and "
_SWEEP = "hvae_kernels/ops/autoregressive_network/triton/sweep.py"
_GROUPS = "hvae_kernels/ops/autoregressive_network/triton/groups.py"
_TAIL = "hvae_kernels/ops/autoregressive_network/triton/tail.py"
_PARTS = "hvae_kernels/ops/autoregressive_network/triton/network.py"
_SWEEP_TESTS = "tests/test_contract.py -k autoregressive_inverse/triton and budget"
_SWEEP_BACKWARD_TESTS = "tests/test_contract.py -k autoregressive_inverse/triton and test_backward_budget"
_SPLINE_SWEEP = "tests/test_contract.py -k autoregressive_spline_inverse/triton and "
_SMALL = "hvae_kernels/ops/autoregressive_network/triton/small.py"
_SMALL_TESTS = "tests/test_small_made.py"

MUTATIONS = (
    Mutation(_GROUPS, "mask=step > 0, other=0)", "mask=step > 0, other=1)", _SWEEP_TESTS),
    Mutation(_GROUPS, "end = tl.minimum(end, begin)", "end = end + 0", _SWEEP_TESTS),
    Mutation(_GROUPS, "end = tl.load(upto + last)", "end = tl.load(upto + last) - 1", _SWEEP_TESTS),
    Mutation(_GROUPS, "(rank[None, :] >= low[:, None]) & (rank[None, :] < high[:, None])", "(rank[None, :] >= low[:, None])", _SWEEP_BACKWARD_TESTS),
    Mutation(_GROUPS, "mask=inside[:, None], other=0.0)\n        sums += tl.dot", "mask=(rank >= 0)[:, None], other=0.0)\n        sums += tl.dot", "tests/test_contract.py -k autoregressive_inverse/triton and budget"),
    Mutation(_GROUPS, "raw += read(tile, net.stages[WIRES[S][_RESIDUAL]].raw, group)", "raw += 0.0", _SWEEP_TESTS),
    Mutation(_GROUPS, "raw *= context(stage.gate, layer.size, tile, group)", "raw *= 1.0", _SWEEP_TESTS),
    Mutation(_GROUPS, "sums += load(stage.bias, unit, inside, sums.dtype)[:, None]", "sums += 0.0", _SWEEP_TESTS),
    Mutation(_SWEEP, "        log_det -= _invert_feature(", "        log_det += _invert_feature(", _SWEEP_TESTS),
    Mutation(_GROUPS, "begin, end = tl.maximum(begin, end), reader.size", "begin, end = tl.maximum(begin, end) + 1, reader.size", _SWEEP_BACKWARD_TESTS),
    Mutation(_GROUPS, "grad += read(tile, net.stages[READER].raw, group)", "grad += 0.0", _SWEEP_BACKWARD_TESTS),
    Mutation(_GROUPS, "weighted = grad * context(stage.gate, layer.size, tile, group)", "weighted = grad * 1.0", _SWEEP_BACKWARD_TESTS),
    Mutation(_TAIL, "slope -= tl.load(work + at)", "slope -= 0.0", _SWEEP_BACKWARD_TESTS),
    Mutation(_TAIL, "value * d_scale * slope + grad_log * d_log", "value * d_scale * slope", _SWEEP_BACKWARD_TESTS),
    Mutation(_TAIL, "-tl.reshape(log, y.shape)", "tl.reshape(log, y.shape)", _SPLINE_SWEEP + "forward_budget and plain"),
    Mutation(_TAIL, "TAIL[1], TAIL[2], True, DTYPE", "TAIL[1], TAIL[2], False, DTYPE", _SPLINE_SWEEP + "forward_budget and plain"),
    Mutation(_TAIL, "TAIL[1], SOLVE)", "TAIL[1], SOLVE - 2)", _SPLINE_SWEEP + "test_backward_budget and plain"),
    Mutation(_TAIL, "grad_log[None, :]", "0.0 * grad_log[None, :]", _SPLINE_SWEEP + "test_backward_budget and plain"),
    Mutation(_TAIL, "            work, there, stride, by, b,", "            work, here, stride, by, b,", _SPLINE_SWEEP + "test_backward_budget and plain"),
    Mutation(_TAIL, "3 * bins + MORE_SLOPES.value[tails]", "3 * bins - 1", _SPLINE_SWEEP + "forward_budget and circular"),
    Mutation(_SWEEP, "row[None, :] * layer.size + unit[:, None], read(", "row[None, :] * layer.size + 0 * unit[:, None], read(", _SPLINE_SWEEP + "test_backward_budget and plain"),
    Mutation(_PARTS, "(second - first) * (parameters - 1)", "0 * (second - first)", "tests/test_autoregressive_network.py -k bad_input"),
    Mutation(_SWEEP, "t0 = tl.maximum(t1 - steps, 0)", "t0 = tl.maximum(t1 - steps, 1)", _SWEEP_BACKWARD_TESTS),
    Mutation(_PARTS, "return p + x * p * rest", "return p", _SWEEP_TESTS),
    Mutation("csrc/cpu/sweep.h", "std::fill_n(raw(s, layer.down[i]), lanes_, T(0));", ";", "tests/test_autoregressive_network.py -k units_that_no_output_uses", _BACKWARD),
    Mutation("csrc/cpu/sweep.h", "spline.inverse = inverse;", "spline.inverse = false;", _SPLINE_INVERSE + "forward_budget and plain"),
    Mutation("csrc/cpu/sweep.h", "log_det_.data()[i] += logs[i];", "log_det_.data()[i] = logs[i];", _SPLINE_INVERSE + "forward_budget and plain"),
    Mutation("csrc/cpu/sweep.h", "i < lanes_ && solves; ++i) g[i] -= through(j)[i];", "i < lanes_ && solves; ++i) g[i] -= T(0);", _SPLINE_INVERSE + "backward_budget and plain"),
    Mutation("csrc/cpu/sweep.h", ".d_parameters = output(j, 0), .solves = solves", ".d_parameters = output(j, 0), .solves = false", _SPLINE_INVERSE + "backward_budget and plain"),
    Mutation(_SMALL, "(term < terms)[:, None] & inside[None, :] & (out_degree[None, :] >= in_degree[:, None])", "(term < terms)[:, None] & inside[None, :]", _SMALL_TESTS),
    Mutation(_SMALL, "        connected = (term < terms)[:, None] & inside[None, :]", "        connected = inside[None, :]", _SMALL_TESTS),
    Mutation(_SMALL, "== at // _TERMS", "== 0", _SMALL_TESTS),
    Mutation(_SMALL, "scale_first + scale_step * feature", "scale_first + 2 * feature", _SMALL_TESTS),
    Mutation(_SMALL, "tl.where(mask, log, 0.0)", "log", _SMALL_TESTS),
    Mutation("csrc/cpu/sweep.h", "term.counts, before ? 0 : known, before ? known : kAll,", "term.counts, 0, before ? known : kAll,", _NETWORK_CPP, _FORWARD),
    Mutation("csrc/cpu/sweep.h", "if (stage.residual != kNone) accumulate", "if (false) accumulate", _NETWORK_CPP, _FORWARD),
    Mutation("csrc/cpu/sweep.h", "if (net_.stages[reader].residual == s) accumulate(raw(reader, unit), c);", "", _NETWORK_CPP, _BACKWARD),
    Mutation("csrc/cpu/sweep.h", "for (int64_t s = last(); s > source; --s) {", "for (int64_t s = source + 1; s == source + 1; ++s) {", _NETWORK_CPP, _BACKWARD),
    Mutation("csrc/cpu/autoregressive_network_backward.cpp", "const T sign = inverse ? T(-1) : T(1);\n  const bool in_tiles", "const T sign = T(1);\n  const bool in_tiles", _NETWORK_CPP),
    Mutation("csrc/cpu/autoregressive_network_backward.cpp", "sweep.raw(s, unit)[i] * sweep.ungated(s, unit)[i]", "sweep.raw(s, unit)[i]", _NETWORK_CPP),
    Mutation("csrc/kernels/autoregressive_network.h", "blend) + h[i] * p.d_log;", "blend);", _NETWORK_CPP, _BACKWARD),
    Mutation("csrc/kernels/autoregressive_network.h", "x[i] = (y[i] - p.rest * shift[i]) / p.scale;", "x[i] = (y[i] - shift[i]) / p.scale;", _NETWORK_CPP, _FORWARD),
    Mutation("csrc/kernels/autoregressive_network.h", "double sum = sums[r];", "T sum = sums[r];", "tests/test_contract.py -k autoregressive and cpp and long_sums", _BACKWARD),
    Mutation("csrc/cpu/autoregressive_network_backward.cpp", "blind / kMostUnits * kMostUnits", "blind / kMostUnits * kMostUnits + kMostUnits", "tests/test_cpu_sets.py -k narrow"),
    Mutation("csrc/cpu/autoregressive_network_backward.cpp", "for (const auto& part : all) total += part->biases_[s][unit];", "total += all[0]->biases_[s][unit];", "tests/test_cpu_sets.py -k narrow"),
    Mutation(_SWEEP, "write(tile, net.stages[S].raw, group, zeros)", "pass", "tests/test_autoregressive_network.py -k units_that_no_output_uses"),
)  # fmt: skip
