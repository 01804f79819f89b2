"""``rational_quadratic_spline``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvae_kernels import functional as F
from hvae_kernels.ops.rational_quadratic_spline import autograd, reference
from ops._mutation import Mutation
from ops._spec import SHAPES, OpSpec, RawOp, in_layout

#: By name: every style, every kind of tails, both directions somewhere, and numbers that are nobody's default.
SPLINES = {
    "linear": F.Spline(8),
    "circular": F.Spline(5, bound=2.0, tails="circular", logit_scale=0.5),
    "none": F.Spline(4, bound=(-3.0, 3.0, -1.0, 4.0), tails=None, min_width=1e-2, min_height=2e-2),
    "zuko": F.Spline(6, bound=5.0, style="zuko"),
    "zuko_circular": F.Spline(3, style="zuko", tails="circular", logit_scale=0.7),
    "pyro": F.Spline(7, style="pyro", min_derivative=1e-2),
    "two": F.Spline(2),
    "few": F.Spline(3),
    "many": F.Spline(40, bound=4.0),
}


def spline_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, ...],
    layout: str = "contiguous",
    spline: str = "linear",
    scale: float = 1.0,
    spread: float = 1.5,
) -> tuple[Tensor, ...]:
    """x, some of it outside where the tails allow that, and raw parameters of size ``scale``."""
    made = SPLINES[spline]
    kind = {"dtype": dtype, "device": device}
    left, right, bottom, top = made.interval
    low, high = max(left, bottom), min(right, top)  # inside for either direction
    if made.tails is None:
        x = low + (high - low) * (0.02 + 0.96 * torch.rand(shape, **kind))
    else:
        x = high * spread * (2 * torch.rand(shape, **kind) - 1)
    parameters = scale * torch.randn(*shape, made.parameters, **kind)
    if layout == "planes":
        return x, parameters.mT.contiguous().mT
    return in_layout(x, layout), in_layout(parameters, layout)


def _both(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    """The op in both directions, each with results of its own."""

    def both(
        *inputs: Tensor,
        spline: str = "linear",
        event_ndims: int = 1,
        directions: tuple[bool, ...] = (False, True),
        **options: str,
    ) -> tuple[Tensor, ...]:
        made, options = SPLINES[spline], {"event_ndims": event_ndims, **options}
        return tuple(result for inverse in directions for result in op(*inputs, made, inverse=inverse, **options))

    return both


def _raw(spline: str, inverse: bool) -> tuple[RawOp, ...]:
    """The raw kernels of one spline, with and without cotangents, directions."""
    options = autograd.options_of(SPLINES[spline], inverse, 1)
    forward, backward, double = autograd.RAW_FORWARD, autograd.RAW_BACKWARD, autograd.RAW_DOUBLE_BACKWARD

    def of(x):
        return x[0], torch.randn(*x[0].shape, SPLINES[spline].parameters)

    def cotangents(x):
        return torch.randn_like(x[0]), torch.randn_like(x[0][..., 0])

    def directions(x):
        return tuple(map(torch.randn_like, of(x)))

    return (
        RawOp(forward, lambda x: (*of(x), *options)),
        RawOp(backward, lambda x: (*cotangents(x), *of(x), *options, 3)),
        RawOp(backward, lambda x: (None, cotangents(x)[1], x[0], of(x)[1].mT.contiguous().mT, *options, 2)),
        RawOp(double, lambda x: (*directions(x), *cotangents(x), *of(x), *options, 15)),
        RawOp(double, lambda x: (None, directions(x)[1], None, cotangents(x)[1], *of(x), *options, 9)),
    )


#: Sizes under one direction alone.
_LARGE = {"many_rows": {"shape": (1500, 3)}, "several_blocks": {"shape": (5, 300)}, "wide": {"shape": (2, 1031)}}
CASES = {
    **SHAPES,
    **{name: {**case, "directions": (False,)} for name, case in _LARGE.items()},
    "planes": {"shape": (7, 5), "layout": "planes"},
    "planes_leading": {"shape": (2, 3, 17), "layout": "planes"},
    "element_wise": {"shape": (5, 3), "event_ndims": 0},
    "two_event_dims": {"shape": (4, 3, 5), "event_ndims": 2},
    **{name: {"shape": (13, 17), "spline": name} for name in SPLINES},
    "flat": {"shape": (13, 17), "scale": 0.0},
    "steep": {"shape": (13, 17), "scale": 4.0},
}
#: zuko's splines of tiny parameters are the identity, whose log-determinant is all rounding.
EXTREMES = {
    f"{spline}_{scale:g}": {"shape": (13, 17), "spline": spline, "scale": scale}
    for spline, scale in (("linear", 10.0), ("linear", 1e-9), ("circular", 10.0), ("circular", 1e-9), ("zuko", 10.0))
} | {
    "huge": {"shape": (13, 17), "scale": 1e9, "spread": 0.9, "directions": (False,)},
    "far": {"shape": (13, 17), "spread": 1e30},
}
#: An operator of the interpreter takes as long for a block as for an element: fewer bins and blocks, but two of each kind.
INTERPRETED = {
    **{name: {**case, "spline": "few"} for name, case in SHAPES.items() if name != "plain"},
    **{name: {"shape": (4, 17), "spline": name} for name in SPLINES},
    **{name: {**CASES[name], "spline": "few"} for name in ("planes_leading", "element_wise", "two_event_dims")},
    "below_power": {"shape": (5, 31), "spline": "few"},
    "above_power": {"shape": (5, 33), "spline": "few"},
    "many_rows": {"shape": (60, 3), "spline": "two", "directions": (False,)},
    "several_blocks": {"shape": (2, 300), "spline": "two", "directions": (True,)},
    "wide": {"shape": (1, 1031), "spline": "two", "directions": (False,)},
    "many": {"shape": (1, 17), "spline": "many", "directions": (True,)},
    "flat": {"shape": (4, 17), "scale": 0.0},
    "steep": {"shape": (4, 17), "scale": 4.0},
}

SPECS = (
    OpSpec(
        name="rational_quadratic_spline",
        rows=(0, 1),
        row_cases=tuple({"spline": spline, "directions": (d,)} for spline in ("linear", "zuko") for d in (False, True)),
        op=_both(F.rational_quadratic_spline),
        reference=_both(reference.rational_quadratic_spline),
        make=spline_inputs,
        cases=CASES,
        small={"shape": (2, 2), "spread": 0.95},
        extremes=EXTREMES,
        same=(0, 0),
        raw=(*_raw("linear", False), *_raw("zuko", True), *_raw("circular", True)),
        options=("event_ndims", "directions"),
        shared=("spline",),
        long_sums={"shape": (33, 1023), "directions": (False,)},
        interpreted=INTERPRETED,
    ),
)

_SPLINE = "csrc/kernels/rational_quadratic_spline.h"
_CPU = "csrc/cpu/rational_quadratic_spline.cpp"
_BINS = "hvae_kernels/ops/rational_quadratic_spline/triton/bins.py"
_KERNELS = "hvae_kernels/ops/rational_quadratic_spline/triton/kernels.py"
_CONTRACT = "tests/test_contract.py -k rational_quadratic_spline/"
_BUDGET = _CONTRACT + "cpp and budget and"
_INTERPRETED = _CONTRACT + "triton and budget and"
_TESTS = "tests/test_rational_quadratic_spline.py -k"

MUTATIONS = (
    Mutation(_SPLINE, "      if (P % W) columns(P - W);", "", _BUDGET + " (linear or two)"),
    Mutation(_SPLINE, "    for (; v < n; ++v)\n      for (int64_t p = 0; p < P; ++p) base", "    for (; v < 0; ++v)\n      for (int64_t p = 0; p < P; ++p) base", _BUDGET + " plain"),
    Mutation(_SPLINE, "hi += part, lo += e - part;", "hi += part;", _TESTS + " cpp and small_bins"),
    Mutation(_SPLINE, "      limit -= step;\n", "", _BUDGET + " none"),
    Mutation(_SPLINE, "if (s.tails == kCircular) upper_at = upper_at == static_cast<T>(bins) ? V{} : upper_at;", "", _BUDGET + " circular"),
    Mutation(_SPLINE, "side.knot[i] = low + (step * b.index[i] + size * below);", "side.knot[i] = static_cast<T>(low + (step * b.index[i] + size * below));", _TESTS + " cpp and far_from"),
    Mutation(_SPLINE, "far = (u < T(0) ? -u : u) + r;", "far = u + r;", _BUDGET + " steep"),
    Mutation(_SPLINE, "const bool outside = (b.x[i] < low) | (b.x[i] > high);", "const bool outside = b.x[i] > high;", _TESTS + " cpp and identity"),
    Mutation(_SPLINE, "y_h = p.f + rise;", "y_h = p.f;", _BUDGET + " backward and plain"),
    Mutation(_SPLINE, "l_d0 = p.inverse_d * (zc * zc * inverse_nu - (q + q))", "l_d0 = p.inverse_d * (zc * zc * inverse_nu - q)", _BUDGET + " backward and plain"),
    Mutation(_SPLINE, "g = -g, l = -l;", "g = -g;", _BUDGET + " backward and plain"),
    Mutation(_SPLINE, "in = length * (below_share + above_share) - knot * below_share;", "in = length * (below_share + above_share);", _BUDGET + " backward and plain"),
    Mutation(_SPLINE, "solves ? pull(Of::solve)", "solves ? pull(Of::map)", "tests/test_contract.py -k autoregressive_spline_inverse/cpp and backward_budget and plain"),
    Mutation(_SPLINE, "tangent * c.first + value * c.second * direction[at]", "tangent * c.first", _BUDGET + " double_backward and zuko"),
    Mutation(_SPLINE, "pulled.d0.value * curve_lower[i] * t_lower[i]", "T(0)", _BUDGET + " double_backward and plain"),
    Mutation(_CPU, "rows_of[(first + i) / features]", "rows_of[first / features]", _BUDGET + " backward and plain"),
    Mutation(_CPU, "tensor = torch::stable::contiguous(given), laid_out();", "laid_out();", _TESTS + " cpp and any_strides"),
    Mutation(_CPU, "if (parameters.stride(dim - 2) >= parameters.stride(dim - 1)) return", "return", _TESTS + " as_they_lie"),
    Mutation(_BINS, "        limit -= step\n", "", _INTERPRETED + " forward and none"),
    Mutation(_BINS, "tl.abs(u) + r", "u + r", _INTERPRETED + " forward and steep"),
    Mutation(_BINS, "following = tl.where(following == BINS, 0, following)", "pass", _INTERPRETED + " backward and /circular"),
    Mutation(_KERNELS, "            t_log = -t_log\n", "            pass\n", _CONTRACT + "triton and forward_mode"),
    Mutation(_KERNELS, "d = (value * (direction * first - mean) + e * bent) * first + value * second * direction", "d = (value * (direction * first - mean) + e * bent) * first", _INTERPRETED + " double_backward and /zuko"),
    Mutation("hvae_kernels/ops/rational_quadratic_spline/autograd.py", "return parameters.new_empty((*leading, p, d)).mT", "return parameters.new_empty((*leading, d, p))", _CONTRACT + "cpp and opcheck"),
    Mutation("hvae_kernels/ops/rational_quadratic_spline/reference.py", "at = torch.where(outside, 0.5 * (low + high), x)", "at = x", _TESTS + " reference and far_outside"),
    Mutation("hvae_kernels/ops/rational_quadratic_spline/reference.py", "(2 / math.log(spline.min_derivative) * raw)", "(1 / math.log(spline.min_derivative) * raw)", _TESTS + " reference and libraries"),
    Mutation("hvae_kernels/ops/rational_quadratic_spline/spline.py", 'return 1 - self.min_derivative if self.style == "pyro" else 1.0', "return 1.0", _TESTS + " reference and libraries"),
)  # fmt: skip
