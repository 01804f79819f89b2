"""The table of ops. A new op is one row here; ``test_contract.py`` runs every check on every row."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hvae_kernels import _dispatch
from hvae_kernels import functional as F
from hvae_kernels.ops.autoregressive import autograd as autoregressive_autograd
from hvae_kernels.ops.autoregressive import gates as autoregressive_gates
from hvae_kernels.ops.autoregressive import reference as autoregressive_reference
from hvae_kernels.ops.leapfrog import autograd as leapfrog_autograd
from hvae_kernels.ops.leapfrog import reference as leapfrog_reference
from hvae_kernels.ops.leapfrog_update import autograd as update_autograd
from hvae_kernels.ops.leapfrog_update import leapfrog_update
from hvae_kernels.ops.leapfrog_update import reference as update_reference


@dataclass(frozen=True)
class RawOp:
    """A raw kernel for ``opcheck``: its overloads and how to call it on the op's inputs."""

    overloads: dict[str, Callable]
    arguments: Callable[[tuple[Tensor, ...]], tuple]


@dataclass(frozen=True)
class OpSpec:
    """One op of the contract.

    ``make(dtype, device, **case)`` makes inputs; ``cases`` are its sizes, ``small`` the one for finite differences;
    ``extremes`` are cases at the edge of the number range; ``same`` are pairs of arguments that may be one tensor;
    ``options`` names what a case may hold besides, keyword arguments of the op.
    """

    name: str
    op: Callable[..., tuple[Tensor, ...]]
    reference: Callable[..., tuple[Tensor, ...]]
    make: Callable[..., tuple[Tensor, ...]]
    cases: dict[str, dict[str, Any]]
    small: dict[str, Any]
    extremes: dict[str, dict[str, Any]]
    same: tuple[int, int]
    raw: tuple[RawOp, ...] = field(default=())
    options: tuple[str, ...] = ()

    def bound(self, case: dict[str, Any]) -> tuple[OpSpec, dict[str, Any]]:
        """The spec with the case's options bound to the op and its reference, and what is left for ``make``."""
        options = {name: value for name, value in case.items() if name in self.options}
        op, reference = (functools.partial(f, **options) for f in (self.op, self.reference))
        left = {name: value for name, value in case.items() if name not in options}
        return dataclasses.replace(self, op=op, reference=reference) if options else self, left

    @property
    def implementations(self) -> tuple[str, ...]:
        return _dispatch.OPS[self.name].implementations


def _uniform(low: float, high: float, *shape: int, **kind) -> Tensor:
    return low + (high - low) * torch.rand(shape, **kind)


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
    z, rho = (_in_layout(scale * torch.randn(shape, **kind), layout) for _ in range(2))
    precision, loc = curvature * _uniform(0.5, 2.0, *row, **kind), torch.randn(row, **kind)
    tempering = _uniform(0.7, 1.1, *((shape[0],) if replicas else ()), n_steps, **kind)
    if stops:
        tempering[..., 1] = 0.0
    return z, rho, precision, loc, _uniform(0.05, 0.5, *step_shape, **kind), tempering


def dense_inputs(dtype: torch.dtype, device: str, *, shape: tuple[int, ...], **options: Any) -> tuple[Tensor, ...]:
    """Inputs of ``dense_gaussian_leapfrog``; not quite symmetric, as its gradient steps are not."""
    z, rho, _, *rest = gaussian_inputs(dtype, device, shape=shape, **options)
    features = shape[-1]
    noise = torch.randn(features, features, dtype=dtype, device=device)
    precision = noise @ noise.mT / features + torch.eye(features, dtype=dtype, device=device)
    return z, rho, precision + 0.1 * noise, *rest


def update_inputs(
    dtype: torch.dtype, device: str, *, shape: tuple[int, ...], layout: str = "contiguous", scale: float = 1.0
) -> tuple[Tensor, ...]:
    """Inputs of ``leapfrog_update``."""
    kind = {"dtype": dtype, "device": device}
    state = [_in_layout(scale * torch.randn(shape, **kind), layout) for _ in range(3)]
    kick, drift = (_uniform(0.05, 0.5, shape[-1], **kind) for _ in range(2))
    return *state, _uniform(0.7, 1.1, **kind), kick, drift


def autoregressive_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, ...],
    layout: str = "contiguous",
    scale: float = 1.0,
    around: float | None = None,
) -> tuple[Tensor, ...]:
    """Inputs of ``affine_autoregressive``, whose raw scale is of size ``scale``, or all of it close to ``around``."""
    kind = {"dtype": dtype, "device": device}
    z, shift, log_scale = (torch.randn(shape, **kind) for _ in range(3))
    log_scale = scale * log_scale if around is None else around * _uniform(0.99, 1.0, *shape, **kind)
    return tuple(_in_layout(x, layout) for x in (z, shift, log_scale))


#: One gate with a straight-through gradient, one with a logarithm, one that blends; every gate has a case of its own.
TYPICAL_GATES = ("clipped", "softplus", "sigmoid")


def _gated(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    """The op for several gates at once, each with results of its own."""

    def gated(*inputs: Tensor, gates: tuple[str, ...] = TYPICAL_GATES) -> tuple[Tensor, ...]:
        return tuple(result for gate in gates for result in op(*inputs, autoregressive_gates.DEFAULTS[gate]))

    return gated


def _in_layout(tensor: Tensor, layout: str) -> Tensor:
    if layout == "strided":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor


def _ones_like_results(inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    return torch.randn_like(inputs[0]), torch.randn_like(inputs[1])


GAUSSIAN_CASES = {
    "plain": {"shape": (7, 5)},
    "scalar_step": {"shape": (7, 5), "step": "scalar"},
    "step_per_step": {"shape": (7, 5), "step": "steps"},
    "one_step": {"shape": (7, 5), "n_steps": 1},
    "no_steps": {"shape": (7, 5), "n_steps": 0},
    "many_steps": {"shape": (3, 2), "n_steps": 40},
    "no_rows": {"shape": (0, 5)},
    "no_leading": {"shape": (5,)},
    "one_element": {"shape": (1, 1)},
    "one_feature": {"shape": (33, 1)},
    "prime": {"shape": (13, 17)},
    "below_power": {"shape": (15, 31)},
    "above_power": {"shape": (17, 33)},
    "wide": {"shape": (2, 1031)},
    "leading_dims": {"shape": (2, 3, 4, 5)},
    "replicas": {"shape": (3, 4, 5), "replicas": True},
    "replicas_step_per_step": {"shape": (3, 4, 5), "replicas": True, "step": "steps"},
    "replicas_no_rows": {"shape": (3, 0, 5), "replicas": True},
    "no_features": {"shape": (3, 0)},
    "many_rows": {"shape": (12_000, 3)},
    "several_blocks": {"shape": (300, 129)},
    "long_chain": {"shape": (70, 130), "n_steps": 70, "step": "scalar"},
    "replicas_many_rows": {"shape": (2, 12_000, 3), "replicas": True},
    "momentum_stops": {"shape": (7, 5), "stops": True},
    "inverted": {"shape": (7, 5), "curvature": -1.0},
    "strided": {"shape": (7, 5), "layout": "strided"},
    "transposed": {"shape": (7, 5), "layout": "transposed"},
    "expanded": {"shape": (7, 5), "layout": "expanded"},
}

LARGE = ("wide", "several_blocks", "long_chain")
DENSE_CASES = {name: case for name, case in GAUSSIAN_CASES.items() if "replicas" not in case and name not in LARGE}
DENSE_CASES |= {
    "composed": {"shape": (64, 3), "n_steps": 10},
    "composed_step_per_step": {"shape": (8, 8, 3), "n_steps": 10, "step": "steps"},
    "stepped": {"shape": (3, 40), "n_steps": 10},
}
UPDATE_CASES = {
    name: {key: value for key, value in case.items() if key in ("shape", "layout")}
    for name, case in GAUSSIAN_CASES.items()
    if not {"replicas", "step", "n_steps"} & case.keys()
}
UPDATE_RAW = (
    RawOp(update_autograd.RAW_FORWARD, lambda x: x),
    RawOp(update_autograd.RAW_BACKWARD, lambda x: (*_ones_like_results(x), *x[1:], 3)),
    RawOp(update_autograd.RAW_BACKWARD, lambda x: (None, torch.randn_like(x[1]), *x[1:], 1)),
    RawOp(
        update_autograd.RAW_DOUBLE_BACKWARD,
        lambda x: (*(torch.randn_like(t) for t in x[1:]), *_ones_like_results(x), *x[1:], 7),
    ),
    RawOp(update_autograd.RAW_DOUBLE_BACKWARD, lambda x: (*(None,) * 5, *_ones_like_results(x), *x[1:], 2)),
)


def _update_within(dense: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Arguments of the update that a dense trajectory makes: its raw kernels are these."""
    z, rho, precision, loc, _, tempering = dense
    return z, rho, (z - loc) @ precision, tempering[0], loc.abs(), loc.abs()


GATED_CASES = {name: UPDATE_CASES[name] for name in ("plain", "no_rows", "prime", "above_power")}
GATED_CASES |= {
    **{
        name: {**case, "gates": ("sigmoid",)}
        for name, case in UPDATE_CASES.items()
        if name not in (*GATED_CASES, "momentum_stops", "inverted")
    },
    "many_rows": {"shape": (1500, 3), "gates": ("sigmoid",)},
    "several_blocks": {"shape": (9, 1000), "gates": ("sigmoid",)},
    **{gate: {"shape": (13, 17), "scale": 3.0, "gates": (gate,)} for gate in autoregressive_gates.NUMBERS},
}
GATED_EXTREMES = {
    f"{gate}_{around:g}": {"shape": (5, 17), "around": around, "gates": (gate,)}
    for gate in autoregressive_gates.NUMBERS
    for around in (80.0, -80.0, 1e4, -1e4)
    if (gate, around) != ("affine", 1e4)  # overflows in float64 too
}


def _gated_raw(gate: str) -> tuple[RawOp, ...]:
    """The raw kernels under one gate, with and without cotangents, directions and the shift."""
    numbers = (autoregressive_gates.CODES[gate], *dataclasses.astuple(autoregressive_gates.DEFAULTS[gate])[1:])
    forward, backward, double_backward = (
        autoregressive_autograd.RAW_FORWARD,
        autoregressive_autograd.RAW_BACKWARD,
        autoregressive_autograd.RAW_DOUBLE_BACKWARD,
    )

    def cotangents(x):
        return torch.randn_like(x[0]), torch.randn_like(x[0][..., 0])

    return (
        RawOp(forward, lambda x: (*x, *numbers)),
        RawOp(backward, lambda x: (*cotangents(x), *x, *numbers, 7)),
        RawOp(backward, lambda x: (None, cotangents(x)[1], x[0], None, x[2], *numbers, 4)),
        RawOp(double_backward, lambda x: (*(torch.randn_like(t) for t in x), *cotangents(x), *x, *numbers, 31)),
        RawOp(double_backward, lambda x: (*(None,) * 3, *cotangents(x), x[0], None, x[2], *numbers, 5)),
    )


EXTREMES = {"large": {"shape": (7, 5), "scale": 1e18}, "tiny": {"shape": (7, 5), "scale": 1e-18}}

OPSPECS = (
    OpSpec(
        name="gaussian_leapfrog",
        op=F.gaussian_leapfrog,
        reference=leapfrog_reference.gaussian_leapfrog,
        make=gaussian_inputs,
        cases=GAUSSIAN_CASES,
        small={"shape": (2, 3), "n_steps": 2, "step": "steps"},
        extremes=EXTREMES,
        same=(0, 1),
        raw=(
            RawOp(leapfrog_autograd.RAW_FORWARD, lambda x: x),
            RawOp(leapfrog_autograd.RAW_BACKWARD, lambda x: (*_ones_like_results(x), *x, 3)),
            RawOp(leapfrog_autograd.RAW_BACKWARD, lambda x: (None, torch.randn_like(x[1]), *x, 1)),
            RawOp(
                leapfrog_autograd.RAW_DOUBLE_BACKWARD,
                lambda x: (*(torch.randn_like(t) for t in x), *_ones_like_results(x), *x, 7),
            ),
            RawOp(leapfrog_autograd.RAW_DOUBLE_BACKWARD, lambda x: (*(None,) * 6, *_ones_like_results(x), *x, 2)),
        ),
    ),
    OpSpec(
        name="dense_gaussian_leapfrog",
        op=F.dense_gaussian_leapfrog,
        reference=leapfrog_reference.dense_gaussian_leapfrog,
        make=dense_inputs,
        cases=DENSE_CASES,
        small={"shape": (2, 3), "n_steps": 2, "step": "steps"},
        extremes=EXTREMES,
        same=(0, 1),
        raw=tuple(RawOp(raw.overloads, lambda x, raw=raw: raw.arguments(_update_within(x))) for raw in UPDATE_RAW),
    ),
    OpSpec(
        name="leapfrog_update",
        op=leapfrog_update,
        reference=update_reference.leapfrog_update,
        make=update_inputs,
        cases=UPDATE_CASES,
        small={"shape": (2, 3)},
        extremes=EXTREMES,
        same=(1, 2),
        raw=UPDATE_RAW,
    ),
    OpSpec(
        name="affine_autoregressive",
        op=_gated(lambda *x: F.affine_autoregressive(*x[:-1], gate=x[-1])),
        reference=_gated(autoregressive_reference.affine_autoregressive),
        make=autoregressive_inputs,
        cases=GATED_CASES,
        small={"shape": (2, 2)},
        extremes=GATED_EXTREMES,
        same=(0, 1),
        raw=(*_gated_raw("softplus"), *_gated_raw("sigmoid")),
        options=("gates",),
    ),
)
