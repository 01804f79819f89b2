"""pyro: ``AffineAutoregressive``, ``SplineAutoregressive`` of quadratic order, and their conditional forms; splines.

A ``SplineCoupling`` is made of a ``Spline`` and a ``ConditionalSpline``, which are swapped one by one: what else it
does costs little.
"""

from __future__ import annotations

import copy
import functools
import sys
import types
from collections.abc import Callable
from dataclasses import replace

import torch
from pyro.distributions import transforms
from pyro.distributions.transforms import (
    AffineAutoregressive,
    ConditionalAffineAutoregressive,
    ConditionalSpline,
    ConditionalSplineAutoregressive,
    SplineAutoregressive,
)
from pyro.distributions.transforms import Spline as PyroSpline
from pyro.distributions.transforms.spline import ConditionedSpline
from pyro.nn import AutoRegressiveNN, ConditionalAutoRegressiveNN
from pyro.nn.auto_reg_nn import MaskedLinear
from torch import Size, Tensor

from hvae_kernels.compat import _coupling, _network
from hvae_kernels.compat._network import Foreign, Layout, Part, Unfused
from hvae_kernels.ops.rational_quadratic_spline import Spline, rational_quadratic_spline

_CONDITIONAL = (ConditionalAffineAutoregressive, ConditionalSplineAutoregressive)
_OTHERS = ("NeuralAutoregressive", "BlockAutoregressive", "ConditionalNeuralAutoregressive")
SLOW = (
    AffineAutoregressive,
    SplineAutoregressive,
    PyroSpline,
    ConditionalSpline,
    *_CONDITIONAL,
    *(getattr(transforms, name) for name in _OTHERS if hasattr(transforms, name)),
)


#: Its two slices, and an affine map of few operators, cost what the fused map does.
AS_FAST = (transforms.AffineCoupling, transforms.ConditionalAffineCoupling)
SLOW += AS_FAST


def guides() -> tuple[type, ...]:
    """Classes that make their ``transform`` at their first call; without an import, which nobody may need."""
    module = sys.modules.get("pyro.infer.autoguide")
    return () if module is None else (module.AutoNormalizingFlow,)


def inner(layer: Foreign) -> tuple[Foreign, ...]:
    """Parts that are swapped with it."""
    return (layer.spline,) if isinstance(layer, SplineAutoregressive) else ()


def sizes(layer: Foreign) -> tuple[int, int | None]:
    """Features and context features, None without."""
    if isinstance(layer, _CONDITIONAL):
        _network.require(layer.nn, ConditionalAutoRegressiveNN)
        return layer.nn.input_dim, layer.nn.context_dim
    net, context = _split(layer.arn)
    if context is not None:
        raise Unfused("it is what a conditional transform became given its context: accelerate that transform")
    return net.input_dim, None


def twin(layer: Foreign) -> Foreign:
    """A copy without the tensors of the last call, which a deep copy refuses."""
    if isinstance(layer, _CONDITIONAL):
        return copy.deepcopy(layer)
    net = copy.deepcopy(layer.arn)
    if isinstance(layer, SplineAutoregressive):
        spline = layer.spline
        return SplineAutoregressive(spline.input_dim, net, spline.count_bins, spline.bound, spline.order)
    clips = layer.log_scale_min_clip, layer.log_scale_max_clip
    return AffineAutoregressive(net, *clips, layer.sigmoid_bias, layer.stable)


def parallel(layer: Foreign, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """The library's own parallel direction."""
    transform = _conditioned(layer, context)
    y = transform(x)
    return y, transform.log_abs_det_jacobian(x, y)


def lay_out(layer: Foreign, batch: Size, context: Tensor | None = None) -> Layout:
    """The network of a transform; of a conditional one, of what it becomes given the context."""
    layer = _conditioned(layer, context)
    own, known = layer.__dict__, _stable(layer)
    _network.require_unchanged(layer, *(name for name in ("_call", "_inverse") if own.get(name) != known.get(name)))
    net, context = _split(layer.arn)
    tail = _spline(layer, net) if isinstance(layer, SplineAutoregressive) else _gate(layer, net)
    name = _network.activation(net.f)
    *hidden, last = net.layers
    parts = [Part(linear, place - 1, name) for place, linear in enumerate(hidden)]
    parts.append(Part(last, len(parts) - 1, skip=net.skip_layer))
    for part in parts:
        for linear in (part.linear, part.skip):
            if linear is not None:
                _network.require(linear, MaskedLinear)
    parts[0] = replace(parts[0], offset=_given(parts[0].linear, net, context, batch))
    parts[-1] = replace(parts[-1], offset=_given(net.skip_layer, net, context, batch))
    columns = slice(net.context_dim, None)
    degrees = functools.partial(_degrees, net, parts, columns)
    return Layout(net, parts, columns, degrees, tail, outputs=(0, 1, net.input_dim))


def _gate(layer: AffineAutoregressive, net: Foreign) -> _network.Gate:
    if list(net.param_dims) != [1, 1]:
        raise Unfused(f"param_dims is {net.param_dims}, not [1, 1]")
    if layer.stable:
        return _network.gate("sigmoid", layer.sigmoid_bias)
    return _network.gate("clipped", layer.log_scale_min_clip, layer.log_scale_max_clip)


def _spline(layer: SplineAutoregressive, net: Foreign) -> Spline:
    spline = layer.spline
    _network.require(spline, ConditionalSpline)
    _network.require_unchanged(spline, "condition", "_params")
    if spline.order != "quadratic":
        raise Unfused(f"its splines are of order {spline.order!r}: quadratic ones have kernels")
    if spline.nn is not layer.arn or spline.input_dim != net.input_dim:
        raise Unfused("its splines have a network of their own")
    bins = spline.count_bins
    if list(net.param_dims) != [bins, bins, bins - 1]:
        raise Unfused(f"param_dims is {net.param_dims}, not {[bins, bins, bins - 1]}")
    return _network.spline(bins, float(spline.bound), "linear", "pyro")


def _stable(layer: Foreign) -> dict[str, object]:
    """The methods that ``stable=True`` keeps in the instance."""
    if not getattr(layer, "stable", False):
        return {}
    return {"_call": layer._call_stable, "_inverse": layer._inverse_stable}


def _conditioned(layer: Foreign, context: Tensor | None) -> Foreign:
    """Of the library's class, also where that of ``layer`` is ours."""
    for kind in _CONDITIONAL:
        if isinstance(layer, kind):
            return kind.condition(layer, context)
    return layer


def _split(arn: Foreign) -> tuple[AutoRegressiveNN | ConditionalAutoRegressiveNN, Tensor | None]:
    """The network of a transform, and the context that it is bound to."""
    if type(arn) is AutoRegressiveNN:
        return arn, None
    if type(arn) is functools.partial and not arn.args and set(arn.keywords) == {"context"}:
        _network.require(arn.func, ConditionalAutoRegressiveNN)
        return arn.func, arn.keywords["context"]
    raise Unfused(f"its network is a {type(arn).__name__}, not an AutoRegressiveNN")


def _gains(layer: Foreign, x: Tensor) -> bool:
    try:
        return _network.gains(_split(layer.arn)[0], x, isinstance(layer, SplineAutoregressive))
    except Unfused:
        return False


def _given(linear: Foreign, net: Foreign, context: Tensor | None, batch: Size) -> Tensor | None:
    return _network.from_context(linear, slice(net.context_dim), context, batch)


def _degrees(net: Foreign, parts: list[Part], columns: slice) -> tuple[Tensor, list[Tensor]]:
    """Every unit's degree is the highest that it sees: hidden layers are wide enough to have all of them."""
    features = net.permutation.argsort() + 1
    below = features
    hidden: list[Tensor] = []
    for part in parts[:-1]:
        mask = part.linear.mask if hidden else part.linear.mask[:, columns]
        below = torch.where(mask != 0, below, 0).amax(1)
        hidden.append(below)
    return features, hidden


class FusedAffineAutoregressive(AffineAutoregressive, _network.Swapped):
    """The transform with both directions fused."""

    library_class = AffineAutoregressive

    def in_library(self) -> dict[str, object]:
        """Those methods, which would hide the ones below."""
        return _stable(self)

    def _call(self, x: Tensor) -> Tensor:
        network = _network.served(lay_out, self, x) if _gains(self, x) else None
        if network is None:
            return self._call_stable(x) if self.stable else super()._call(x)
        y, log_abs_det = _network.parallel(x, network)
        self._cached_log_scale = log_abs_det.unsqueeze(-1)  # whose sum is what log_abs_det_jacobian returns
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        network = _network.served(lay_out, self, y)
        if network is None:
            return self._inverse_stable(y) if self.stable else super()._inverse(y)
        try:
            x, minus = _network.sequential(y, network)
        except RuntimeError:
            if not self.stable:
                raise
            return self._inverse_stable(y)  # its scale may underflow, and pyro goes on with what is not finite then
        self._cached_log_scale = -minus.unsqueeze(-1)
        return x


class FusedSplineAutoregressive(SplineAutoregressive, _network.Swapped):
    """The transform with both directions fused."""

    library_class = SplineAutoregressive

    def _call(self, x: Tensor) -> Tensor:
        network = _network.served(lay_out, self, x) if _gains(self, x) else None
        if network is None:
            return super()._call(x)
        y, log_abs_det = _network.parallel(x, network)
        self._cache_log_detJ = log_abs_det.unsqueeze(-1)  # whose sum is what log_abs_det_jacobian returns
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        network = _network.served(lay_out, self, y)
        if network is None:
            return super()._inverse(y)
        x, minus = _network.sequential(y, network)
        self._cache_log_detJ = -minus.unsqueeze(-1)
        return x


class FusedConditionalAffineAutoregressive(ConditionalAffineAutoregressive, _network.Swapped):
    """The conditional transform, whose conditioned ones are fused."""

    library_class = ConditionalAffineAutoregressive

    def condition(self, context: Tensor) -> FusedAffineAutoregressive:
        """The transform given the context."""
        transform = super().condition(context)
        swap(transform)
        return transform


class FusedConditionalSplineAutoregressive(ConditionalSplineAutoregressive, _network.Swapped):
    """The conditional transform, whose conditioned ones are fused."""

    library_class = ConditionalSplineAutoregressive

    def condition(self, context: Tensor) -> FusedSplineAutoregressive:
        """The transform given the context."""
        transform = super().condition(context)
        swap(transform)
        return transform


# ---- Splines ----


class _Elementwise(_network.Swapped):
    """Splines of single features in one kernel, to stand before the library's class."""

    def raw_parameters(self) -> tuple[Tensor, Spline]:
        """``(..., d, P)``, and what they are of.

        Raises:
            Unfused: no kernel has such splines.
        """
        raise NotImplementedError

    def spline_op(self, x: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
        """``(y, log_abs_det)``, element by element."""
        if not _coupling.is_served(x, x) or not set(options) <= {"inverse"}:
            return super().spline_op(x, **options)
        try:
            parameters, spline = self.raw_parameters()
            if parameters.dtype != x.dtype or x.shape[-1:] != parameters.shape[-2:-1]:
                raise Unfused("x does not fit its parameters")
            parameters = _expanded(parameters, x.shape)
        except Unfused:
            return super().spline_op(x, **options)
        inverse = bool(options.get("inverse"))
        return rational_quadratic_spline(x, parameters, spline, inverse=inverse, event_ndims=0)


def _expanded(parameters: Tensor, shape: Size) -> Tensor:
    try:
        return parameters.expand(*shape, -1)
    except RuntimeError as error:
        raise Unfused("the context does not fit") from error


def _quadratic(layer: Foreign) -> Spline:
    if layer.order != "quadratic":
        raise Unfused(f"its splines are of order {layer.order!r}: quadratic ones have kernels")
    return _network.spline(layer.count_bins, float(layer.bound), "linear", "pyro")


class FusedSpline(_Elementwise, PyroSpline):
    """The transform with its splines in one kernel."""

    library_class = PyroSpline

    def raw_parameters(self) -> tuple[Tensor, Spline]:
        """Its own, for all rows the same."""
        spline = _own(self)
        raw = self.unnormalized_widths, self.unnormalized_heights, self.unnormalized_derivatives
        return torch.cat(raw, -1), spline

    @classmethod
    def prove(cls, layer: Foreign) -> str:
        """Require that the layer does what is known here, in both directions; says what it is."""
        _network.require_unchanged(layer, "_call", "_inverse", "spline_op")
        _own(layer)
        with torch.device("meta"):  # no draws: the global generator is the user's
            twin = PyroSpline(layer.input_dim, layer.count_bins, layer.bound, layer.order)
        twin = twin.to_empty(device="cpu").to(torch.float64)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        _agree(cls, twin, twin.input_dim, lambda twin: twin)
        return f"Spline, {layer.input_dim} features"


def _own(layer: Foreign) -> Spline:
    """Its splines, if their parameters are found by its class's method, which is kept in the instance."""
    if layer._params != types.MethodType(PyroSpline._params, layer):
        raise Unfused("it has a _params of its own, which may do something else")
    return _quadratic(layer)


class _FusedConditioned(_Elementwise, ConditionedSpline):
    """The transform that a conditional spline becomes given its context."""

    library_class = ConditionedSpline

    def __init__(self, layer: FusedConditionalSpline, context: Tensor) -> None:
        super().__init__(functools.partial(layer._params, context), bound=layer.bound, order=layer.order)
        self.layer, self.context = layer, context

    def raw_parameters(self) -> tuple[Tensor, Spline]:
        """Those of its network."""
        layer = self.layer
        spline = _quadratic(layer)
        parts = layer.nn(self.context)
        sizes = layer.count_bins, layer.count_bins, layer.count_bins - 1
        if parts[0].shape[-1] == layer.input_dim:  # of an autoregressive network
            parts = [part.transpose(-1, -2) for part in parts]
        else:
            pairs = zip(parts, sizes, strict=True)
            parts = [part.reshape(*part.shape[:-1], layer.input_dim, size) for part, size in pairs]
        return torch.cat(parts, -1), spline


class FusedConditionalSpline(ConditionalSpline, _network.Swapped):
    """The conditional transform, whose conditioned ones have their splines in one kernel."""

    library_class = ConditionalSpline

    def condition(self, context: Tensor) -> ConditionedSpline:
        """The transform given the context."""
        return super().condition(context) if _network.is_recorded() else _FusedConditioned(self, context)

    @classmethod
    def prove(cls, layer: Foreign) -> str:
        """Require that the layer does what is known here, in both directions; says what it is."""
        _network.require_unchanged(layer, "condition", "_params")
        _quadratic(layer)
        d, bins = layer.input_dim, layer.count_bins
        generator = torch.Generator().manual_seed(0)
        for is_autoregressive in (False, True):
            shapes = [(3, size, d) if is_autoregressive else (3, d * size) for size in (bins, bins, bins - 1)]
            parts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
            twin = ConditionalSpline(lambda _, parts=parts: parts, d, bins, layer.bound, layer.order)
            _agree(cls, twin, d, lambda twin: twin.condition(None))
        return f"ConditionalSpline, {d} features"


def _agree(kind: type[Foreign], twin: Foreign, d: int, conditioned: Callable[[Foreign], Foreign]) -> None:
    x = 2 * torch.randn(3, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        _coupling.agree(
            kind,
            twin,
            lambda twin: conditioned(twin).spline_op(x),
            lambda twin: conditioned(twin).spline_op(x, inverse=True),
        )


FUSED = {
    AffineAutoregressive: FusedAffineAutoregressive,
    SplineAutoregressive: FusedSplineAutoregressive,
    ConditionalAffineAutoregressive: FusedConditionalAffineAutoregressive,
    ConditionalSplineAutoregressive: FusedConditionalSplineAutoregressive,
    PyroSpline: FusedSpline,
    ConditionalSpline: FusedConditionalSpline,
}


def swap(layer: Foreign) -> None:
    """Swap in place."""
    layer.__class__ = FUSED[type(layer)]
    for name in layer.in_library():
        layer.__dict__.pop(name, None)
