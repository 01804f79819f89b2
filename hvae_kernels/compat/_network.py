"""What the adapters share: from a live layer of another library to a ``Network``, at every call.

Nothing of a layer is kept but the degrees found from its masks, and these only as long as the masks stay as they are.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from hvae_kernels import _checks, _dispatch, _extension, _library, _live, _torch
from hvae_kernels.ops.affine_autoregressive import Gate
from hvae_kernels.ops.autoregressive_network import (
    FEATURES,
    NONE,
    Network,
    Stage,
    autoregressive_forward,
    autoregressive_inverse,
)
from hvae_kernels.ops.autoregressive_network.api import INVERSE, SPLINE_INVERSE
from hvae_kernels.ops.rational_quadratic_spline import Spline

#: Of another library, whose types are not looked at: a layer, its network, a part of that.
Foreign: TypeAlias = Any
if TYPE_CHECKING:
    _Library = Any  # the class behind ``Swapped`` in what is swapped
else:
    _Library = object


class Unfused(Exception):
    """A layer, or a call of it, that the kernels do not serve; the message is the reason."""


@dataclass(frozen=True)
class Part:
    """A stage of the network as its library holds it: see ``Stage``."""

    linear: Foreign
    source: int
    activation: str = "identity"
    residual: int = NONE
    skip: Foreign | None = None
    offset: Tensor | None = None
    gate: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """A whole network as its library holds it.

    Attributes:
        net: what owns the parts.
        parts: in the order of evaluation, the last one being the output layer.
        columns: which columns of a weight that reads the input are features; the others read the context.
        degrees: finds candidates for the degrees of the features and of every part but the last, from the live buffers.
        tail: as in ``Network``.
        outputs: where they lie, as there.
    """

    net: nn.Module
    parts: Sequence[Part]
    columns: slice
    degrees: Callable[[], tuple[Tensor, list[Tensor]]]
    tail: Gate | Spline
    outputs: tuple[int, int, int]

    @property
    def parameters(self) -> int:
        """How many a feature has."""
        return self.tail.parameters if isinstance(self.tail, Spline) else 2


class Swapped(_Library):
    """Stands before the library's class in what is swapped: copies are swapped too, pickles name the library's class.

    So a pickle loads where this package is not, as what it was before the swap.

    Attributes:
        library_class: the library's.
    """

    library_class: type[Any]

    def in_library(self) -> dict[str, object]:
        """What the library's class keeps in the instance and the swap took out."""
        return {}

    def restore(self) -> None:
        """Undo the swap, in place."""
        self.__dict__.update(self.in_library() | self.__dict__)
        self.__class__ = self.library_class

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        state = self.in_library() | self._state()
        return copyreg._reconstructor, (self.library_class, object, None), state  # type: ignore[attr-defined]

    def __copy__(self) -> Swapped:
        return self._with(self._state(), {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Swapped:
        return self._with(self._state(), memo, copy.deepcopy)

    def _state(self) -> dict[str, object]:
        return super().__reduce_ex__(2)[2]

    def _with(
        self,
        state: dict[str, object],
        memo: dict[int, Any],
        copier: Callable[..., dict[str, object]] = lambda state, memo: state,
    ) -> Swapped:
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copier(state, memo))
        return twin


# ---- Pieces ----

_FUNCTIONS: dict[object, str] = {
    torch.relu: "relu",
    torch.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    functional.relu: "relu",
    functional.tanh: "tanh",
    functional.sigmoid: "sigmoid",
    functional.elu: "elu",
    functional.softplus: "softplus",
    functional.gelu: "gelu",
    functional.silu: "silu",
}
#: Modules, and the settings without which they are another function.
_MODULES: dict[type[nn.Module], tuple[str, dict[str, object]]] = {
    nn.Identity: ("identity", {}),
    nn.ReLU: ("relu", {"inplace": False}),
    nn.ELU: ("elu", {"alpha": 1.0, "inplace": False}),
    nn.Tanh: ("tanh", {}),
    nn.Softplus: ("softplus", {"beta": 1.0, "threshold": 20.0}),
    nn.Sigmoid: ("sigmoid", {}),
    nn.GELU: ("gelu", {"approximate": "none"}),
    nn.SiLU: ("silu", {"inplace": False}),
}


def activation(function: Callable[[Tensor], Tensor]) -> str:
    """The name in ``ACTIVATIONS`` of a module or function."""
    if not isinstance(function, nn.Module):
        name = _FUNCTIONS.get(function)
        if name is None:
            raise Unfused(f"the activation {getattr(function, '__name__', function)} has no kernel")
        return name
    name, settings = _MODULES.get(type(function), (None, {}))
    if name is None or any(getattr(function, key) != value for key, value in settings.items()):
        raise Unfused(f"the activation {function} has no kernel")
    return name


@functools.lru_cache(maxsize=256)
def gate(name: str, *numbers: float) -> Gate:
    """The tail with these settings of a library."""
    try:
        return Gate(name, numbers)
    except (TypeError, ValueError) as error:
        raise Unfused(str(error)) from error


@functools.lru_cache(maxsize=256)
def spline(bins: int, bound: float, tails: str | None, style: str, **numbers: float) -> Spline:
    """The spline with these settings of a library."""
    if tails not in ("linear", "circular"):
        raise Unfused(f"its splines have the tails {tails!r}: linear and circular ones have kernels")
    try:
        return Spline(bins, bound, tails=tails, style=style, **numbers)
    except (TypeError, ValueError) as error:
        raise Unfused(str(error)) from error


def require_unchanged(layer: nn.Module, *methods: str) -> None:
    """Refuse a layer with one of these methods in its instance, where it hides that of its class."""
    for name in methods:
        if name in layer.__dict__:
            raise Unfused(f"it has a {name} of its own, which may do something else")


def require(part: object, kind: type) -> None:
    """Refuse what is not exactly of this class: a subclass, a parametrised layer, or something quite different."""
    if type(part) is not kind:
        raise Unfused(f"a {type(part).__name__} where {kind.__module__.partition('.')[0]} has a {kind.__name__}")


def spread(context: Tensor | None, batch: torch.Size) -> Tensor | None:
    """What a context adds or multiplies, ``(..., units)``, as ``(rows, units)`` for features ``(*batch, d)``."""
    if context is None:
        return None
    try:
        return context.expand(*batch, context.shape[-1]).reshape(-1, context.shape[-1])
    except RuntimeError as error:
        raise Unfused("the context does not fit") from error


def total(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum of what may be absent."""
    return b if a is None else a if b is None else a + b


def from_context(linear: Foreign | None, columns: slice, context: Tensor | None, batch: torch.Size) -> Tensor | None:
    """What the context's columns of a weight add to its units."""
    if context is None or linear is None:
        return None
    return spread(functional.linear(context, linear.weight[:, columns]), batch)


# ---- Degrees ----

#: Of each network the masks that its degrees were found from, and the degrees or why there are none.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[_live.Seen, list[Tensor] | str]] = weakref.WeakKeyDictionary()


def _degrees(layout: Layout) -> list[Tensor]:
    """Degrees of the features and of every part, which have to reproduce every mask."""
    masks = [linear.mask for part in layout.parts for linear in (part.linear, part.skip) if linear is not None]
    seen, found = _KNOWN.get(layout.net, (None, ""))
    if seen is None or not seen.again(masks):
        try:
            with torch.inference_mode(False):  # what is found is saved for backward passes to come
                found = _search(layout)
        except Unfused as reason:
            found = str(reason)
        _KNOWN[layout.net] = _live.Seen(masks), found
    if isinstance(found, str):
        raise Unfused(found)
    return found


def _search(layout: Layout) -> list[Tensor]:
    features, hidden = layout.degrees()
    last = features.new_empty(layout.parameters * len(features))
    first, step, stride = layout.outputs
    for p in range(layout.parameters):
        begin = first + stride * p
        last[begin : begin + step * (len(features) - 1) + 1 : step] = features - 1
    found = [features, *hidden, last]
    for part, units in zip(layout.parts, found[1:], strict=True):
        _verify(part.linear.mask, units, found[part.source + 1], layout.columns if part.source == FEATURES else None)
        if part.skip is not None:
            _verify(part.skip.mask, units, features, layout.columns)
        if part.residual != NONE and (units < found[part.residual + 1]).any():
            raise Unfused("a residual connection to units of lower degree")
    return [degrees.clone(memory_format=torch.contiguous_format) for degrees in found]  # some are live buffers


def _verify(mask: Tensor, units: Tensor, sources: Tensor, columns: slice | None) -> None:
    """Require the staircase ``units >= sources``, and that every unit sees the whole context."""
    expected = torch.ones_like(mask)
    staircase = (units[:, None] >= sources).to(mask.dtype)
    if columns is None:
        expected = staircase
    elif expected[:, columns].shape == staircase.shape:
        expected[:, columns] = staircase
    if not torch.equal(mask, expected):
        raise Unfused("its masks are no staircase in any order of the features that is known of it")


# ---- Calls ----


def network(layout: Layout) -> Network:
    """The network on the live parameters."""
    features, *units = _degrees(layout)

    def weight(linear: Foreign, source: int) -> Tensor:
        return linear.weight[:, layout.columns] if source == FEATURES else linear.weight

    stages = tuple(
        Stage(
            weight=weight(part.linear, part.source),
            bias=part.linear.bias,
            degrees=degrees,
            source=part.source,
            activation=part.activation,
            residual=part.residual,
            skip=None if part.skip is None else weight(part.skip, FEATURES),
            offset=part.offset,
            gate=part.gate,
        )
        for part, degrees in zip(layout.parts, units, strict=True)
    )
    return Network(features, stages, layout.tail, layout.outputs)


@dataclass(frozen=True)
class Least:
    """Below these the library's own parallel direction is as fast, where its tail is affine.

    Attributes:
        work: multiply-adds of a call without gradients.
        weights: of a network with gradients, where a call is many small ops.
        recorded: multiply-adds of such a call.
    """

    work: int
    weights: int
    recorded: int = 0


#: For each instruction set of the CPU kernels, measured with all four libraries on 2 threads: of AVX-512 from 2 to 784
#: features, of AVX2 (AMD Zen 3) from 4 to 256, for 64 to 1,024 rows. The baseline has AVX2's, unmeasured.
LEAST = {
    "baseline": Least(1 << 22, 1 << 13, 1 << 22),
    "avx2": Least(1 << 22, 1 << 13, 1 << 22),
    "avx512": Least(1 << 22, 1 << 13),
}
#: A library's splines cost so much more than ours that fusing pays at any size, but with gradients not beyond so many
#: weights a feature, where all is matrix products. Measured on AVX2 from 2 to 64 features, for 1 to 1,024 rows.
MOST_WEIGHTS = 1 << 18
_WEIGHTS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


def is_recorded() -> bool:
    """Whether the call is compiled, traced, counted or faked: whoever does that knows the library's code, not ours."""
    return (
        torch.compiler.is_compiling()  # first: Dynamo must meet neither the others nor the weak dictionaries
        or torch.jit.is_tracing()
        or _torch.n_dispatch_modes() > 0
    )


def gains(net: nn.Module, x: Tensor, spline: bool = False) -> bool:
    """Whether a parallel call is worth fusing; asked before anything else, as small calls cost microseconds."""
    if is_recorded():
        return False
    if _dispatch.requested() != "auto":
        return True
    weights = _WEIGHTS.get(net)
    if weights is None:
        weights = _WEIGHTS[net] = sum(parameter.numel() for parameter in net.parameters() if parameter.dim() == 2)
    recorded = torch.is_grad_enabled()
    if spline:
        return not recorded or weights <= MOST_WEIGHTS * x.shape[-1]
    least = LEAST[_extension.cpu_set() or "baseline"]
    if recorded and weights < least.weights:
        return False
    return weights * x.numel() >= (least.recorded if recorded else least.work) * x.shape[-1]


def served(
    adapter_lay_out: Callable[..., Layout], layer: nn.Module, x: Tensor, *context: Tensor | None
) -> Network | None:
    """The network for one call of a swapped layer, or None where the library's own code has to run."""
    if is_recorded() or _torch.functorch_is_active():
        return None
    try:
        layout = adapter_lay_out(layer, x.shape[:-1], *context)
        _require_kernel(x, layout)
        return network(layout)
    except Unfused:
        return None


def _require_kernel(x: Tensor, layout: Layout) -> None:
    """Refuse what the kernels do not take: the cheap questions first, as they are asked at every call."""
    weight = layout.parts[0].linear.weight
    if weight.dtype not in _checks.FULL_PRECISION:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise Unfused(f"its parameters are {dtype}: the kernels take float32 and float64")
    if (
        x.dtype != weight.dtype
        or x.device != weight.device
        or layout.parameters * x.shape[-1] != layout.parts[-1].linear.out_features
    ):
        raise Unfused("x does not fit its parameters")
    if _library.autocasts(x):
        raise Unfused("autocast is on")
    inverse = SPLINE_INVERSE if isinstance(layout.tail, Spline) else INVERSE
    if _dispatch.requested() == "auto" and _dispatch.resolve(inverse, x) == "reference":
        why = _extension.why_absent() or "the kernels run on the CPU"
        raise Unfused(f"its parameters are on {x.device.type}: {why}")
    if _live.hooked_everywhere():
        raise Unfused("there are hooks on all modules")
    if not all(map(_live.untouched, layout.net.modules())):
        raise Unfused("there are hooks inside its network, or a module there has a forward of its own")


def parallel(x: Tensor, network: Network) -> tuple[Tensor, Tensor]:
    """``autoregressive_forward`` of ``x (..., d)``."""
    return _along(autoregressive_forward, x, network)


def sequential(y: Tensor, network: Network) -> tuple[Tensor, Tensor]:
    """``autoregressive_inverse`` of ``y (..., d)``."""
    return _along(autoregressive_inverse, y, network)


def _along(
    direction: Callable[[Tensor, Network], tuple[Tensor, Tensor]], x: Tensor, network: Network
) -> tuple[Tensor, Tensor]:
    if x.dim() == 2:
        return direction(x, network)
    image, log_abs_det = direction(x.reshape(-1, x.shape[-1]), network)
    return image.reshape(x.shape), log_abs_det.reshape(x.shape[:-1])


# ---- Before a layer is swapped ----


def prove(layer: nn.Module, adapter: Foreign) -> str:
    """Require that the layer can be served, and that a copy of it agrees with its fused self; says what it is.

    The copy has random parameters in float64: fresh networks are often zero in their last layer, where every mistake
    would pass. It also guards against versions of a library that compute something else than the one known here.
    """
    features, context_features = adapter.sizes(layer)
    live = next(layer.parameters())

    def inputs(like: Tensor, *sizes: int | None) -> list[Any]:
        return [None if size is None else like.new_zeros(3, size) for size in sizes]

    x, context = inputs(live, features, context_features)
    layout = adapter.lay_out(layer, x.shape[:-1], context)
    _require_kernel(x, layout)
    network(layout)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    twin = adapter.twin(layer).to("cpu", torch.float64)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(normal(*parameter.shape) / max(1, parameter.shape[-1]) ** 0.5)
        drawn: list[Any] = [None if size is None else normal(3, size) for size in (features, context_features)]
        x, context = drawn
        expected = adapter.parallel(twin, x, context)
        results = parallel(x, network(adapter.lay_out(twin, x.shape[:-1], context)))
    for result, value in zip(results, expected, strict=True):
        if result.shape != value.shape or not torch.allclose(result, value, rtol=1e-8, atol=1e-8):
            raise Unfused("it computes something else than the version of its library that is known here")
    return f"{type(layer).__name__}, {features} features" + (
        f", {context_features} of context" if context_features else ""
    )
