"""The table of ops. A new op is one row here; ``test_contract.py`` runs every check on every row."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from networks import network
from torch import Tensor

from hvae_kernels import _dispatch
from hvae_kernels import functional as F
from hvae_kernels.ops import autoregressive_network
from hvae_kernels.ops.affine_autoregressive import autograd as autoregressive_autograd
from hvae_kernels.ops.affine_autoregressive import gates as autoregressive_gates
from hvae_kernels.ops.affine_autoregressive import reference as autoregressive_reference
from hvae_kernels.ops.autoregressive_network import autograd as network_autograd
from hvae_kernels.ops.autoregressive_network import reference as network_reference
from hvae_kernels.ops.autoregressive_network.network import flattened
from hvae_kernels.ops.bernoulli_log_prob import autograd as bernoulli_autograd
from hvae_kernels.ops.bernoulli_log_prob import reference as bernoulli_reference
from hvae_kernels.ops.gaussian_leapfrog import autograd as leapfrog_autograd
from hvae_kernels.ops.gaussian_leapfrog import reference as leapfrog_reference
from hvae_kernels.ops.gaussian_mixture import autograd as mixture_autograd
from hvae_kernels.ops.gaussian_mixture import reference as mixture_reference
from hvae_kernels.ops.iwae import autograd as iwae_autograd
from hvae_kernels.ops.iwae import reference as iwae_reference
from hvae_kernels.ops.leapfrog_update import autograd as update_autograd
from hvae_kernels.ops.leapfrog_update import leapfrog_update
from hvae_kernels.ops.leapfrog_update import reference as update_reference
from hvae_kernels.ops.local_reparam_linear import autograd as local_reparam_autograd
from hvae_kernels.ops.local_reparam_linear import reference as local_reparam_reference
from hvae_kernels.ops.masked_linear import autograd as masked_autograd
from hvae_kernels.ops.masked_linear import reference as masked_reference
from hvae_kernels.ops.planar_flow import autograd as planar_autograd
from hvae_kernels.ops.planar_flow import reference as planar_reference
from hvae_kernels.ops.radial_flow import autograd as radial_autograd
from hvae_kernels.ops.radial_flow import reference as radial_reference


@dataclass(frozen=True)
class RawOp:
    """A raw kernel for ``opcheck``: its overloads and how to call it on the op's inputs."""

    overloads: dict[str, Callable]
    arguments: Callable[[tuple[Tensor, ...]], tuple]


@dataclass(frozen=True)
class OpSpec:
    """One op of the contract.

    ``make(dtype, device, **case)`` makes inputs; ``cases`` are its sizes, ``small`` the one for finite differences;
    ``extremes`` are cases at the edge of the number range; ``same`` are pairs of arguments that may be one tensor.
    ``options`` names what in a case belongs to the op and its reference, not to the inputs, ``shared`` what belongs to
    both: see :meth:`at`. Of an op that differentiates part of its value as a constant, ``held(point)`` is the op with
    that part held at ``point``, for finite differences.

    ``summed_by_torch`` are the results that torch's own products or sums have a part in, whose bits may depend on the
    number of threads; all others promise not to. Results are called ``values/i``, ``first/i`` (the gradient of input i)
    and ``second/i`` (of the cotangents, then of the inputs), and ``values``, ``first`` and ``second`` are all of an
    order. ``long_sums`` is a case, for the kernels of CPUs alone, whose sums are so long that it shows how they are
    added up, with work for several threads.

    ``interpreted`` replaces cases in Triton's interpreter; ``composed`` says that derivatives of the Triton
    implementation are plain PyTorch around its kernels, so that a compiler sees more than their names.

    ``rows`` are the arguments with a row for each row of the batch, along their first dimension in ``row_cases``, which
    are cases but for their shape. Where an argument is infinite, kernels are NaN where the plain formula is, and
    nowhere else; but for the arguments ``defined_at_infinity``, where they may have a value, and
    ``undefined_at_infinity``, where they may have none, each with the reason.
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
    shared: tuple[str, ...] = ()
    held: Callable[[tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]] | None = None
    summed_by_torch: tuple[str, ...] = ()
    long_sums: dict[str, Any] | None = None
    rows: tuple[int, ...] = (0,)
    row_cases: tuple[dict[str, Any], ...] = ({},)
    interpreted: dict[str, dict[str, Any]] = field(default_factory=dict)
    composed: bool = False
    defined_at_infinity: dict[int, str] = field(default_factory=dict)
    undefined_at_infinity: dict[int, str] = field(default_factory=dict)

    def at(self, case: dict[str, Any]) -> OpSpec:
        """The spec of one case: its options bound to the op and the reference, and kept from ``make``."""
        bound = {name: case[name] for name in (*self.options, *self.shared) if name in case}
        if not bound:
            return self
        op, reference = (functools.partial(function, **bound) for function in (self.op, self.reference))

        def make(*args: Any, **case: Any) -> tuple[Tensor, ...]:
            return self.make(*args, **{name: value for name, value in case.items() if name not in self.options})

        return dataclasses.replace(self, op=op, reference=reference, make=make)

    @property
    def implementations(self) -> tuple[str, ...]:
        return _dispatch.OPS[self.name].implementations

    def is_summed_by_torch(self, result: str) -> bool:
        return bool({result, result.partition("/")[0]} & set(self.summed_by_torch))


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


def masked_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, ...],
    out: int,
    bias: bool = True,
    layout: str = "contiguous",
    weight_layout: str = "contiguous",
    scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """Inputs of ``masked_linear``: x of ``shape``, a weight for ``out`` outputs, and a bias."""
    kind = {"dtype": dtype, "device": device}
    x = _in_layout(scale * torch.randn(shape, **kind), layout)
    weight = _in_layout(torch.randn(out, shape[-1], **kind), weight_layout)
    return (x, weight, torch.randn(out, **kind)) if bias else (x, weight)


def local_reparam_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, ...],
    out: int,
    bias: bool = True,
    layout: str = "contiguous",
    weight_layout: str = "contiguous",
    scale: float = 1.0,
    log_scale: float = 0.0,
) -> tuple[Tensor, ...]:
    """Inputs of ``local_reparam_linear``: x and the noise, a weight for ``out`` outputs, and biases."""
    kind = {"dtype": dtype, "device": device}
    x = _in_layout(scale * torch.randn(shape, **kind), layout)
    loc = _in_layout(torch.randn(out, shape[-1], **kind), weight_layout)
    weight_log_scale = _in_layout(log_scale + 0.5 * torch.randn(out, shape[-1], **kind), weight_layout)
    noise = _in_layout(torch.randn(*shape[:-1], out, **kind), layout)
    biases = (torch.randn(out, **kind), log_scale + 0.5 * torch.randn(out, **kind)) if bias else ()
    return x, loc, weight_log_scale, noise, *biases


def local_reparam_op(function: Callable[..., Tensor], x: Tensor, *rest: Tensor) -> tuple[Tensor]:
    """``local_reparam_linear`` or its reference with the optional biases last."""
    loc, log_scale, noise, *biases = rest
    return (function(x, loc, log_scale, *(biases or (None, None)), noise),)


def degrees(pattern: str, n_in: int, n_out: int, device: str | torch.device) -> tuple[Tensor, Tensor]:
    """Degrees of inputs and outputs, by arithmetic alone, so that they may be made inside a compiled function."""
    ins, outs = (torch.arange(n, device=device) for n in (n_in, n_out))
    lowest, highest = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    return {
        "cyclic": lambda: (ins % 3, outs % 3),
        "sorted": lambda: (ins * n_out, outs * n_in),
        "reversed": lambda: ((n_in - ins) * n_out, (n_out - outs) * n_in),
        "shuffled": lambda: (ins * 7919 % 61 - 30, outs * 7927 % 59 - 30),
        "duplicated": lambda: (ins // 20 * n_out, outs // 20 * n_in),
        "dead_rows": lambda: (ins + 2, outs % 5 * n_in // 2),
        "dense": lambda: (ins * 0, outs * 0),
        "empty": lambda: (ins * 0, outs * 0 - 1),
        "limits": lambda: (lowest + ins % 2 * (highest - lowest), lowest + outs % 2 * (highest - lowest)),
    }[pattern]()


def masked_op(
    function: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pattern: str = "cyclic",
    strict: bool = False,
) -> tuple[Tensor]:
    """``masked_linear`` or its reference on floating-point tensors alone."""
    n_out, n_in = weight.shape
    return (function(x, weight, bias, *degrees(pattern, n_in, n_out, x.device), strict=strict),)


def network_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, int],
    hidden: int = 6,
    scale: float = 1.0,
    layout: str = "contiguous",
    kind: str = "one_hidden",
) -> tuple[Tensor, ...]:
    """Features and the network's floating tensors."""
    rows, features = shape
    x = _in_layout(scale * torch.randn(shape, dtype=dtype, device=device), layout)
    return x, *network(kind, features, hidden, rows, dtype=dtype, device=device).tensors()


def network_op(function: Callable[..., tuple[Tensor, ...]], x: Tensor, *tensors: Tensor, **structure) -> tuple:
    """An op on a network as a function of its floating tensors."""
    return function(x, _network_of(x, *tensors, **structure))


def _network_of(x: Tensor, *tensors: Tensor, kind: str = "one_hidden", **structure):
    hidden = 0 if kind == "linear" else tensors[0].shape[0]
    empty = network(kind, x.shape[1], hidden, x.shape[0], device=x.device, **structure)
    return empty.with_tensors(tensors)


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


def planar_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, ...],
    n_layers: int = 3,
    replicas: bool = False,
    layout: str = "contiguous",
    scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """Inputs of ``planar_flow``: z of size ``scale``, and layers that are invertible as they are."""
    kind = {"dtype": dtype, "device": device}
    z = _in_layout(scale * torch.randn(shape, **kind), layout)
    layers = (shape[0], n_layers) if replicas else (n_layers,)
    u, w = (torch.randn(*layers, shape[-1], **kind) for _ in range(2))
    u, w = (x / x.norm(dim=-1, keepdim=True) * _uniform(0.7, 1.3, *layers, 1, **kind) for x in (u, w))
    product = (u * w).sum(-1, keepdim=True)
    u = u + (product.abs() - product) / w.square().sum(-1, keepdim=True) * w  # u.w >= 0: invertible, well-conditioned
    u, w = (_in_layout(x, layout) for x in (u, w))
    return z, u, w, 0.5 * torch.randn(layers, **kind)


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
    z = _in_layout(scale * torch.randn(shape, **kind), layout)
    center = _in_layout(torch.randn(n_layers, shape[-1], **kind), layout)
    alpha = _uniform(0.5, 2.0, n_layers, **kind)
    return z, center, alpha, alpha * _uniform(-0.5, 1.5, n_layers, **kind)


def bernoulli_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, ...],
    value_shape: tuple[int, ...] | None = None,
    layout: str = "contiguous",
    scale: float = 1.0,
    around: float | None = None,
) -> tuple[Tensor, ...]:
    """Logits, and a value in [0, 1] of ``value_shape`` or theirs."""
    kind = {"dtype": dtype, "device": device}
    logits = scale * torch.randn(shape, **kind) if around is None else around * _uniform(0.99, 1.0, *shape, **kind)
    value = torch.rand(shape if value_shape is None else value_shape, **kind)
    return _in_layout(logits, layout), _in_layout(value, layout if value_shape is None else "contiguous")


def bernoulli_op(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    """``bernoulli_log_prob`` or its reference; with ``bits``, a dtype, the value becomes bits."""

    def log_prob(*inputs: Tensor, event_ndims: int = 1, bits: torch.dtype | None = None) -> tuple[Tensor]:
        logits, value = inputs  # so written because make_fx counts arguments
        return (function(logits, value if bits is None else (value > 0.5).to(bits), event_ndims),)

    return log_prob


def mixture_inputs(
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, ...],
    components: int = 4,
    layout: str = "contiguous",
    scale: float = 1.0,
    spread: float = 1.0,
) -> tuple[Tensor, ...]:
    """Inputs of Gaussian mixtures whose components overlap, however many features; ``spread`` takes them apart."""
    kind = {"dtype": dtype, "device": device}
    typical = shape[-1] ** -0.5
    loc = spread * typical * torch.randn(components, shape[-1], **kind)
    log_scale = math.log(scale) + typical * _uniform(-0.5, 0.5, components, shape[-1], **kind)
    nearest = torch.randint(components, shape[:-1], device=device)
    value = loc[nearest] + scale * torch.randn(shape, **kind)
    value, log_scale = (_in_layout(x, layout) for x in (value, log_scale))
    return value, torch.randn(components, **kind), loc if layout == "expanded" else _in_layout(loc, layout), log_scale


def iwae_inputs(
    dtype: torch.dtype, device: str, *, shape: tuple[int, ...], layout: str = "contiguous", scale: float = 1.0
) -> tuple[Tensor, ...]:
    """The two log-densities whose difference are the log-weights."""
    kind = {"dtype": dtype, "device": device}
    return tuple(_in_layout(scale * torch.randn(shape, **kind), layout) for _ in range(2))


def kept(log_weights: Tensor) -> Tensor:
    """What the forward kernels of ``iwae_bound`` keep of each column."""
    top = log_weights.amax(0)
    return torch.stack([top, 1 / (log_weights - top).exp().sum(0)])


def iwae_op(function: Callable[..., Tensor], *arguments: int) -> Callable[..., tuple[Tensor]]:
    """The bound or a surrogate, times a sine: a surrogate alone has no second derivative that could be wrong."""

    def bound(*inputs: Tensor, dim: int = 0) -> tuple[Tensor]:
        log_p, log_q = inputs
        return (function(log_p - log_q, dim, *arguments) * log_q.select(dim, 0).sin(),)

    return bound


def held_surrogate(function: Callable[..., Tensor], power: int, point: tuple[Tensor, ...]) -> Callable:
    """The surrogate with its weights held at ``point``: the value moves by the formula, the gradient is its own."""
    log_p, log_q = point
    held = (log_p - log_q).detach()
    weights = iwae_reference.normalized(held, 0) ** power

    def surrogate(log_weights: Tensor, dim: int) -> Tensor:
        change = (weights * (log_weights - held)).sum(dim).detach()
        return function(held + (log_weights - log_weights.detach()), dim) + change

    return iwae_op(surrogate)


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
    "many_rows": {"shape": (12_000, 7)},
    "several_blocks": {"shape": (300, 129)},
    "long_chain": {"shape": (70, 130), "n_steps": 70, "step": "scalar"},
    "replicas_many_rows": {"shape": (2, 12_000, 3), "replicas": True},
    "momentum_stops": {"shape": (7, 5), "stops": True},
    "inverted": {"shape": (7, 5), "curvature": -1.0},
    "strided": {"shape": (7, 5), "layout": "strided"},
    "transposed": {"shape": (7, 5), "layout": "transposed"},
    "expanded": {"shape": (7, 5), "layout": "expanded"},
}

#: In Triton's interpreter: still several chunks of rows, and as long a chain.
GAUSSIAN_INTERPRETED = {
    "many_rows": {"shape": (2_000, 7)},
    "replicas_many_rows": {"shape": (2, 1_500, 3), "replicas": True},
    "long_chain": {"shape": (9, 33), "n_steps": 70, "step": "scalar"},
}
LARGE = ("wide", "several_blocks", "long_chain")
DENSE_CASES = {name: case for name, case in GAUSSIAN_CASES.items() if "replicas" not in case and name not in LARGE}
DENSE_CASES |= {
    "many_rows": {"shape": (12_000, 3)},
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


MASKED_CASES = {
    "plain": {"shape": (7, 5), "out": 4},
    "strict": {"shape": (7, 5), "out": 4, "strict": True},
    "no_bias": {"shape": (7, 5), "out": 4, "bias": False},
    "no_rows": {"shape": (0, 5), "out": 4},
    "no_inputs": {"shape": (7, 0), "out": 4},
    "no_outputs": {"shape": (7, 5), "out": 0},
    "no_leading": {"shape": (5,), "out": 4},
    "leading_dims": {"shape": (2, 3, 4, 5), "out": 7},
    "leading_dims_no_rows": {"shape": (2, 0, 5), "out": 4},
    "one_element": {"shape": (1, 1), "out": 1},
    "one_element_strict": {"shape": (1, 1), "out": 1, "strict": True},
    "prime": {"shape": (13, 17), "out": 19},
    "below_power": {"shape": (15, 31), "out": 63, "pattern": "sorted"},
    "above_power": {"shape": (17, 33), "out": 65},
    "staircase": {"shape": (33, 65), "out": 129, "pattern": "sorted"},
    "staircase_strict": {"shape": (5, 129), "out": 65, "pattern": "sorted", "strict": True},
    "reversed": {"shape": (5, 67), "out": 65, "pattern": "reversed"},
    "duplicated": {"shape": (5, 67), "out": 65, "pattern": "duplicated", "strict": True},
    "shuffled": {"shape": (17, 67), "out": 35, "pattern": "shuffled", "strict": True},
    "dead_rows": {"shape": (5, 35), "out": 33, "pattern": "dead_rows"},
    "dense": {"shape": (5, 35), "out": 33, "pattern": "dense"},
    "empty": {"shape": (5, 35), "out": 33, "pattern": "empty"},
    "limits": {"shape": (7, 33), "out": 35, "pattern": "limits"},
    "many_rows": {"shape": (521, 3), "out": 5},
    "many_inputs": {"shape": (2, 521), "out": 3, "pattern": "sorted"},
    "strided": {"shape": (7, 5), "out": 4, "layout": "strided", "weight_layout": "strided"},
    "transposed": {"shape": (7, 5), "out": 4, "layout": "transposed", "weight_layout": "transposed"},
    "expanded": {"shape": (7, 5), "out": 4, "layout": "expanded", "weight_layout": "expanded"},
}
MASKED_EXTREMES = {
    "large": {"shape": (7, 5), "out": 4, "scale": 1e18},
    "tiny": {"shape": (7, 5), "out": 4, "scale": 1e-18},
}


def _masked_degrees(x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    return degrees("cyclic", x[0].shape[1], x[1].shape[0], x[0].device)


def _masked_cotangent(x: tuple[Tensor, ...]) -> Tensor:
    return torch.randn_like(x[0] @ x[1].mT)


LOCAL_REPARAM_CASES = {
    "plain": {"shape": (7, 5), "out": 4},
    "no_bias": {"shape": (7, 5), "out": 4, "bias": False},
    "no_rows": {"shape": (0, 5), "out": 4},
    "no_inputs": {"shape": (7, 0), "out": 4},
    "no_inputs_no_bias": {"shape": (7, 0), "out": 4, "bias": False},
    "no_outputs": {"shape": (7, 5), "out": 0},
    "no_leading": {"shape": (5,), "out": 4},
    "leading_dims": {"shape": (2, 3, 4, 5), "out": 7},
    "leading_dims_no_rows": {"shape": (2, 0, 5), "out": 4},
    "one_element": {"shape": (1, 1), "out": 1},
    "prime": {"shape": (13, 17), "out": 19},
    "below_power": {"shape": (15, 31), "out": 63},
    "above_power": {"shape": (17, 33), "out": 65},
    "many_inputs": {"shape": (5, 261), "out": 51},
    "many_rows": {"shape": (1091, 3), "out": 5},
    "small_scales": {"shape": (7, 5), "out": 4, "log_scale": -12.0},
    "strided": {"shape": (7, 5), "out": 4, "layout": "strided", "weight_layout": "strided"},
    "transposed": {"shape": (7, 5), "out": 4, "layout": "transposed", "weight_layout": "transposed"},
    "expanded": {"shape": (7, 5), "out": 4, "layout": "expanded", "weight_layout": "expanded"},
}
LOCAL_REPARAM_EXTREMES = {
    "large": {"shape": (7, 5), "out": 4, "scale": 1e18},
    "tiny": {"shape": (7, 5), "out": 4, "scale": 1e-18},
}


def _raw_local_reparam(x: tuple[Tensor, ...], *, bias: bool) -> tuple[Tensor | None, ...]:
    x, loc, log_scale, noise, *biases = x
    return x, loc, log_scale, *(biases if bias else (None, None)), noise


NETWORK_CASES = {
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
NETWORK_EXTREMES = {
    "large": {"shape": (7, 5), "scale": 1e6, "gate": "softplus"},
    "tiny": {"shape": (7, 5), "scale": 1e-18},
}


def _raw_network(x: tuple[Tensor, ...], *known: Tensor) -> tuple:
    counts, (program, *rest), tensors = flattened(_network_of(*x))
    remaining = iter(tensors)
    return (*known, *([next(remaining) for _ in range(count)] for count in counts), list(program), *rest)


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


PLANAR_CASES = {
    name: {key: value for key, value in case.items() if key in ("shape", "layout")}
    for name, case in GAUSSIAN_CASES.items()
    if not {"replicas", "step", "n_steps", "stops", "curvature"} & case.keys() and name != "many_rows"
}
PLANAR_CASES |= {
    **{f"constrained_{name}": {**PLANAR_CASES[name], "constrain": True} for name in ("plain", "no_rows", "prime")},
    "one_layer": {"shape": (33, 6), "n_layers": 1, "constrain": True},
    "many_layers": {"shape": (70, 11), "n_layers": 13, "constrain": True},
    "several_blocks": {"shape": (70, 129)},
    "many_rows": {"shape": (300, 3)},
    "replicas": {"shape": (3, 21, 6), "replicas": True},
    "constrained_replicas": {"shape": (2, 33, 5), "replicas": True, "constrain": True},
}
PLANAR_EXTREMES = {
    "large": {"shape": (7, 5), "scale": 1e18},
    "large_constrained": {"shape": (7, 5), "scale": 1e18, "constrain": True},
    "tiny": {"shape": (7, 5), "scale": 1e-18},
}


def _planar(op: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The op with tensors alone in its signature, as ``make_fx`` counts arguments."""

    def planar(*inputs: Tensor, constrain: bool = False) -> tuple[Tensor, Tensor]:
        return op(*inputs, constrain=constrain)

    return planar


def _planar_state(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``(z, u, w, h, slope)``"""
    z, u, w, b = x
    h = (w @ z.mT + b[:, None]).tanh()
    return z, u, w, h, 1 - h * h


def _planar_system(x: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """``(constant, slope, table)`` of the linear recursion."""
    _, u, w, h, slope = _planar_state(x)
    return h.sin(), slope, w @ u.mT


def _replicas(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.stack([t, 2 * t]) for t in x)


RADIAL_CASES = {
    name: {key: value for key, value in case.items() if key in ("shape", "layout")}
    for name, case in GAUSSIAN_CASES.items()
    if not {"replicas", "step", "n_steps", "stops", "curvature"} & case.keys()
    and name not in ("many_rows", "no_features")
}
RADIAL_CASES |= {
    "one_layer": {"shape": (33, 6), "n_layers": 1},
    "many_layers": {"shape": (9, 11), "n_layers": 13},
    "several_blocks": {"shape": (37, 129)},
    "many_rows": {"shape": (2100, 3)},
}


_UINT8, _BOOL = {"bits": torch.uint8}, {"bits": torch.bool}
BERNOULLI_CASES = {name: case for name, case in UPDATE_CASES.items() if name != "several_blocks"}
BERNOULLI_CASES |= {
    "samples": {"shape": (4, 3, 5), "value_shape": (3, 5)},
    "samples_uint8": {"shape": (4, 3, 5), "value_shape": (3, 5), **_UINT8},
    "samples_inside": {"shape": (3, 4, 5), "value_shape": (3, 1, 5), **_BOOL},
    "samples_inside_rows": {"shape": (2, 3, 4, 5), "value_shape": (2, 1, 4, 5)},
    "samples_apart": {"shape": (2, 3, 4, 5), "value_shape": (3, 1, 5)},
    "samples_outside": {"shape": (2, 3, 4, 5), "value_shape": (1, 1, 4, 5), **_UINT8},
    "one_value": {"shape": (4, 3, 5), "value_shape": (5,)},
    "no_samples": {"shape": (0, 3, 5), "value_shape": (3, 5)},
    "image": {"shape": (4, 3, 2, 7), "value_shape": (3, 2, 7), "event_ndims": 2, **_BOOL},
    "no_event": {"shape": (4, 33), "value_shape": (33,), "event_ndims": 0},
    "several_blocks": {"shape": (2, 3, 1100), "value_shape": (3, 1100)},
    "many_samples": {"shape": (9, 401, 7), "value_shape": (401, 7), **_UINT8},
    "sure": {"shape": (13, 17), "scale": 12.0},
}
BERNOULLI_EXTREMES = {
    f"{kind}_{around:g}": {"shape": (5, 17), "around": around, **bits}
    for kind, bits in {"soft": {}, "bool": _BOOL}.items()
    for around in (80.0, -80.0, 1e4, -1e4, 1e-18)
}


MIXTURE_CASES = {name: case for name, case in RADIAL_CASES.items() if "n_layers" not in case}
MIXTURE_CASES |= {
    # of 1031 features log joints are about -1500, and 1e-12 is below what float64 rounds off their exponentials
    "wide": {"shape": (2, 257)},
    "expanded": {"shape": (9, 5), "layout": "expanded"},
    "one_component": {"shape": (33, 6), "components": 1},
    "several_vectors": {"shape": (37, 5), "components": 67},
    "many_rows": {"shape": (2100, 3), "components": 18},
}
MIXTURE_EXTREMES = {
    "narrow": {"shape": (7, 5), "scale": 1e-3},
    "far": {"shape": (7, 5), "spread": 1e3},
    "narrow_and_far": {"shape": (7, 5), "scale": 1e-3, "spread": 1e3},
    "wide": {"shape": (7, 5), "scale": 1e18, "spread": 1e18},
    "tiny": {"shape": (7, 5), "scale": 1e-18, "spread": 1e-18},
}


def _single(op: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    """An op with one result as one with a tuple of them."""
    return lambda *inputs: (op(*inputs),)


def _mixture_raw(responsibilities: bool) -> tuple[RawOp, ...]:
    def output(x: tuple[Tensor, ...]) -> Tensor:
        return torch.randn_like(mixture_autograd._forward_fake(*x, responsibilities))

    return (
        RawOp(mixture_autograd.RAW_FORWARD, lambda x: (*x, responsibilities)),
        RawOp(mixture_autograd.RAW_BACKWARD, lambda x: (output(x), *x, responsibilities)),
        RawOp(
            mixture_autograd.RAW_DOUBLE_BACKWARD,
            lambda x: (*(torch.randn_like(t) for t in x), output(x), *x, responsibilities),
        ),
        RawOp(mixture_autograd.RAW_DOUBLE_BACKWARD, lambda x: (*(None,) * 4, output(x), *x, responsibilities)),
    )


IWAE_CASES = {name: case for name, case in UPDATE_CASES.items() if 0 not in case["shape"]}
IWAE_CASES |= {
    "no_rows": {"shape": (5, 0)},
    "many_samples": {"shape": (2000, 3), "scale": 3.0},
    "last_dim": {"shape": (7, 5), "dim": -1},
    "inner_dim": {"shape": (2, 3, 4), "dim": 1},
    "spread": {"shape": (13, 70), "scale": 60.0},
}


def _iwae_spec(name: str, reference: Callable[..., tuple[Tensor]], power: int) -> OpSpec:
    function = getattr(F, name)
    return OpSpec(
        name=name,
        op=iwae_op(function),
        rows=(0, 1),
        row_cases=({"dim": -1}, {"dim": 0}),
        reference=reference,
        make=iwae_inputs,
        cases=IWAE_CASES,
        small={"shape": (3, 2)},
        extremes=EXTREMES,
        same=(0, 1),
        raw=(
            RawOp(iwae_autograd.RAW_FORWARD, lambda x: (x[0], power, False)),
            RawOp(iwae_autograd.RAW_FORWARD, lambda x: (x[0], power, True)),
            RawOp(iwae_autograd.RAW_BACKWARD, lambda x: (x[1][0], x[0], kept(x[0]), max(1, power))),
        ),
        options=("dim",),
        held=functools.partial(held_surrogate, function, power) if power else None,
        summed_by_torch=("second",),  # plain PyTorch
        long_sums={"shape": (40_000, 5)},
    )


_HIDDEN = "what a mask hides is not read, and not multiplied by 0"
_LAYERS = [{"out": 16}, {"out": 5}]
_ACTIVATED = {"softplus": "elu", "affine": "relu", "sigmoid": "tanh", "clipped": "gelu", "soft-clipped": "silu"}
_NETWORKS = [{"hidden": 13, "gate": gate, "activation": activation} for gate, activation in _ACTIVATED.items()]

EXTREMES = {"large": {"shape": (7, 5), "scale": 1e18}, "tiny": {"shape": (7, 5), "scale": 1e-18}}
ALL_RESULTS = ("values", "first", "second")

OPSPECS = (
    OpSpec(
        name="gaussian_leapfrog",
        rows=(0, 1),
        row_cases=({}, {"step": "scalar"}, {"step": "steps"}),
        defined_at_infinity=dict.fromkeys((0, 1, 3), "steps composed to one affine map subtract no infinities"),
        undefined_at_infinity={2: "composing steps subtracts infinities"},
        op=F.gaussian_leapfrog,
        reference=leapfrog_reference.gaussian_leapfrog,
        make=gaussian_inputs,
        cases=GAUSSIAN_CASES,
        interpreted=GAUSSIAN_INTERPRETED,
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
        rows=(0, 1),
        op=F.dense_gaussian_leapfrog,
        reference=leapfrog_reference.dense_gaussian_leapfrog,
        make=dense_inputs,
        cases=DENSE_CASES,
        interpreted={"many_rows": {"shape": (1_500, 3)}, "many_steps": {"shape": (3, 2), "n_steps": 15}},
        small={"shape": (2, 3), "n_steps": 2, "step": "steps"},
        extremes=EXTREMES,
        same=(0, 1),
        raw=tuple(RawOp(raw.overloads, lambda x, raw=raw: raw.arguments(_update_within(x))) for raw in UPDATE_RAW),
        summed_by_torch=ALL_RESULTS,
    ),
    OpSpec(
        name="leapfrog_update",
        rows=(0, 1, 2),
        op=leapfrog_update,
        reference=update_reference.leapfrog_update,
        make=update_inputs,
        cases=UPDATE_CASES,
        interpreted={"many_rows": {"shape": (2_000, 7)}},
        small={"shape": (2, 3)},
        extremes=EXTREMES,
        same=(1, 2),
        raw=UPDATE_RAW,
    ),
    OpSpec(
        name="masked_linear",
        row_cases=tuple(_LAYERS),
        defined_at_infinity={0: _HIDDEN},
        op=functools.partial(masked_op, F.masked_linear),
        reference=functools.partial(masked_op, masked_reference.masked_linear),
        make=masked_inputs,
        cases=MASKED_CASES,
        small={"shape": (3, 4), "out": 3},
        extremes=MASKED_EXTREMES,
        same=(0, 1),
        raw=(
            RawOp(masked_autograd.RAW_FORWARD, lambda x: (*x, *_masked_degrees(x), False)),
            RawOp(masked_autograd.RAW_FORWARD, lambda x: (*x[:2], None, *_masked_degrees(x), True)),
            RawOp(masked_autograd.RAW_INPUT_GRAD, lambda x: (_masked_cotangent(x), x[1], *_masked_degrees(x), False)),
            RawOp(masked_autograd.RAW_WEIGHT_GRAD, lambda x: (_masked_cotangent(x), x[0], *_masked_degrees(x), True)),
        ),
        options=("pattern", "strict"),
        summed_by_torch=("first/2",),  # the bias's gradient
        long_sums={"shape": (64, 8192), "out": 32, "pattern": "dense"},
    ),
    OpSpec(
        name="local_reparam_linear",
        composed=True,
        rows=(0, 3),
        row_cases=tuple(_LAYERS),
        op=functools.partial(local_reparam_op, F.local_reparam_linear),
        reference=functools.partial(local_reparam_op, local_reparam_reference.local_reparam_linear),
        make=local_reparam_inputs,
        cases=LOCAL_REPARAM_CASES,
        small={"shape": (3, 4), "out": 3},
        extremes=LOCAL_REPARAM_EXTREMES,
        same=(1, 2),
        raw=(
            RawOp(local_reparam_autograd.RAW_FORWARD, lambda x: _raw_local_reparam(x, bias=True)),
            RawOp(local_reparam_autograd.RAW_FORWARD, lambda x: _raw_local_reparam(x, bias=False)),
            RawOp(local_reparam_autograd.RAW_BACKWARD, lambda x: (x[3].cos(), *x[:4], x[3].exp(), True, True)),
            RawOp(local_reparam_autograd.RAW_BACKWARD, lambda x: (x[3].cos(), *x[:4], x[3].exp(), False, False)),
        ),
        summed_by_torch=ALL_RESULTS,
    ),
    OpSpec(
        name="autoregressive_forward",
        composed=True,
        row_cases=tuple(_NETWORKS),
        defined_at_infinity=dict.fromkeys(range(5), _HIDDEN),
        op=functools.partial(network_op, autoregressive_network.autoregressive_forward),
        reference=functools.partial(network_op, network_reference.autoregressive_forward),
        make=network_inputs,
        cases=NETWORK_CASES,
        small={"shape": (4, 3), "hidden": 4},
        extremes=NETWORK_EXTREMES,
        same=(0, 1),
        raw=(
            RawOp(network_autograd.RAW_FORWARD, lambda x: _raw_network(x, x[0])),
            RawOp(network_autograd.RAW_TRAINING, lambda x: _raw_network(x, x[0])),
            RawOp(
                network_autograd.RAW_BACKWARD,
                lambda x: _raw_network(x, x[0].cos(), None, x[0], x[0].new_empty(0), False, True, True),
            ),
        ),
        options=("activation", "gate", "order", "halves"),
        shared=("kind",),
        summed_by_torch=("second",),  # composed of masked_linear and others
        long_sums={"shape": (60_000, 2), "hidden": 64},
    ),
    OpSpec(
        name="autoregressive_inverse",
        composed=True,
        row_cases=tuple(_NETWORKS),
        defined_at_infinity=dict.fromkeys(range(5), _HIDDEN),
        op=functools.partial(network_op, autoregressive_network.autoregressive_inverse),
        reference=functools.partial(network_op, network_reference.autoregressive_inverse),
        make=network_inputs,
        cases=NETWORK_CASES,
        small={"shape": (4, 3), "hidden": 4},
        extremes=NETWORK_EXTREMES,
        same=(0, 1),
        raw=(
            RawOp(network_autograd.RAW_INVERSE, lambda x: _raw_network(x, x[0])),
            RawOp(network_autograd.RAW_SOLVE, lambda x: _raw_network(x, x[0].cos(), x[0][:, 0].cos(), x[0])),
            RawOp(
                network_autograd.RAW_BACKWARD,
                lambda x: _raw_network(x, x[0].cos(), x[0][:, 0].cos(), x[0], x[0].new_empty(0), True, True, True),
            ),
            RawOp(
                network_autograd.RAW_BACKWARD,
                lambda x: _raw_network(x, x[0].cos(), None, x[0], x[0].new_empty(0), False, True, False),
            ),
        ),
        options=("activation", "gate", "order", "halves"),
        shared=("kind",),
        summed_by_torch=("second",),  # the reference's
        long_sums={"shape": (60_000, 2), "hidden": 64},
    ),
    OpSpec(
        name="affine_autoregressive",
        rows=(0, 1, 2),
        row_cases=tuple({"gates": (gate,)} for gate in autoregressive_gates.NUMBERS),
        defined_at_infinity={2: "the clamp's straight-through formula subtracts infinities"},
        op=_gated(lambda *x: F.affine_autoregressive(*x[:-1], gate=x[-1])),
        reference=_gated(autoregressive_reference.affine_autoregressive),
        make=autoregressive_inputs,
        cases=GATED_CASES,
        small={"shape": (2, 2)},
        extremes=GATED_EXTREMES,
        same=(0, 1),
        raw=(*_gated_raw("softplus"), *_gated_raw("sigmoid")),
        options=("gates",),
        long_sums={"shape": (33, 1023), "gates": ("affine",)},
    ),
    OpSpec(
        name="bernoulli_log_prob",
        rows=(0, 1),
        defined_at_infinity={1: "outside of [0, 1], and linear"},
        op=bernoulli_op(F.bernoulli_log_prob),
        reference=bernoulli_op(bernoulli_reference.bernoulli_log_prob),
        make=bernoulli_inputs,
        cases=BERNOULLI_CASES,
        small={"shape": (2, 3), "value_shape": (3,)},
        extremes=BERNOULLI_EXTREMES,
        same=(1, 0),
        raw=(
            RawOp(bernoulli_autograd.RAW_FORWARD, lambda x: (x[0][None, None], x[1][None, None].expand(1, 2, 3))),
            RawOp(bernoulli_autograd.RAW_FORWARD, lambda x: (x[0][None, :, None], x[1][None, None] > 0.5)),
            RawOp(
                bernoulli_autograd.RAW_BACKWARD,
                lambda x: (x[0][None, :, None, 0], x[0][None, :, None], x[1][None, None]),
            ),
            RawOp(
                bernoulli_autograd.RAW_DOUBLE_BACKWARD,
                lambda x: (x[0].cos()[None, :, None], x[0][None, :, None, 0], x[0][None, :, None], x[1][None, None]),
            ),
        ),
        options=("event_ndims", "bits"),
        summed_by_torch=("first/1", "second/0", "second/2"),  # what the samples of a value pull back to it
    ),
    _iwae_spec("iwae_bound", iwae_op(iwae_reference.iwae_bound), 0),
    _iwae_spec("stl_surrogate", iwae_op(iwae_reference.surrogate, 1), 1),
    _iwae_spec("dreg_surrogate", iwae_op(iwae_reference.surrogate, 2), 2),
    OpSpec(
        name="planar_flow",
        composed=True,
        row_cases=({}, {"constrain": True}),
        defined_at_infinity={1: "the constraint subtracts no infinities", 2: "as u"},
        undefined_at_infinity={2: "w.z is added up from its layers' parts"},
        op=_planar(F.planar_flow),
        reference=_planar(planar_reference.planar_flow),
        make=planar_inputs,
        cases=PLANAR_CASES,
        small={"shape": (2, 3), "n_layers": 2},
        extremes=PLANAR_EXTREMES,
        same=(1, 2),
        raw=(
            RawOp(planar_autograd.RAW_FORWARD, lambda x: (*x, False, True)),
            RawOp(planar_autograd.RAW_FORWARD, lambda x: (*_replicas(x), True, False)),
            RawOp(
                planar_autograd.RAW_BACKWARD,
                lambda x: (x[0].cos(), x[0][:, 0], None, *_planar_state(x), False, 3),
            ),
            RawOp(
                planar_autograd.RAW_BACKWARD,
                lambda x: (None, None, *_replicas((_planar_state(x)[3], *_planar_state(x))), True, 1),
            ),
            RawOp(planar_autograd.RAW_SOLVE, lambda x: (*_planar_system(x), True)),
            RawOp(planar_autograd.RAW_SOLVE, lambda x: (*_replicas(_planar_system(x)), False)),
        ),
        options=("constrain",),
        summed_by_torch=("second",),  # plain PyTorch
    ),
    OpSpec(
        name="radial_flow",
        op=F.radial_flow,
        reference=radial_reference.radial_flow,
        make=radial_inputs,
        cases=RADIAL_CASES,
        small={"shape": (3, 4), "n_layers": 2},
        extremes=EXTREMES,
        same=(2, 3),
        raw=(
            RawOp(radial_autograd.RAW_FORWARD, lambda x: x),
            RawOp(radial_autograd.RAW_BACKWARD, lambda x: (x[0].cos(), x[0][..., 0].cos(), *x)),
            RawOp(radial_autograd.RAW_BACKWARD, lambda x: (None, x[0][..., 0].cos(), *x)),
        ),
        summed_by_torch=("second",),  # the reference's
        long_sums={"shape": (200_000, 1), "n_layers": 8},
    ),
    OpSpec(
        name="gaussian_mixture_log_prob",
        row_cases=({"components": 16}, {"components": 15}, {"components": 3}),
        op=_single(F.gaussian_mixture_log_prob),
        reference=_single(mixture_reference.gaussian_mixture_log_prob),
        make=mixture_inputs,
        cases=MIXTURE_CASES,
        interpreted={"many_rows": {"shape": (600, 3), "components": 18}},
        small={"shape": (2, 3), "components": 2},
        extremes=MIXTURE_EXTREMES,
        same=(2, 3),
        raw=_mixture_raw(responsibilities=False),
        long_sums={"shape": (60_000, 4)},
    ),
    OpSpec(
        name="gaussian_mixture_responsibilities",
        row_cases=({"components": 16}, {"components": 15}, {"components": 3}),
        op=_single(F.gaussian_mixture_responsibilities),
        reference=_single(mixture_reference.gaussian_mixture_responsibilities),
        make=mixture_inputs,
        cases=MIXTURE_CASES,
        interpreted={"many_rows": {"shape": (600, 3), "components": 18}},
        small={"shape": (2, 3), "components": 2},
        extremes=MIXTURE_EXTREMES,
        same=(2, 3),
        raw=_mixture_raw(responsibilities=True),
        long_sums={"shape": (300, 257)},
    ),
)
