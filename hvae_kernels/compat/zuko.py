"""zuko: lazy autoregressive and coupling transforms with the affine univariate map, a spline or a circular spline.

A coupling transform picks features and puts them back by one operator each instead of advanced indexing, and finds the
log-determinant of its inverse on the way. Its network, and its affine map, stay the library's. Of circular splines (a
shift and a spline) the splines alone are fused: the autoregressive kernels know no shift of a feature.
"""

from __future__ import annotations

import copy
import functools
import math
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform, constraints
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.flows.coupling import GeneralCouplingTransform
from zuko.flows.spline import CircularRQSTransform
from zuko.nn import MLP, MaskedLinear, MaskedMLP, Residual
from zuko.transforms import (
    AutoregressiveTransform,
    CouplingTransform,
    DependentTransform,
    MonotonicAffineTransform,
    MonotonicRQSTransform,
)
from zuko.utils import broadcast, unpack

from hvae_kernels import _live
from hvae_kernels._torch import InverseTransform
from hvae_kernels.compat import _coupling, _network
from hvae_kernels.compat._network import Foreign, Layout, Part, Unfused
from hvae_kernels.ops.rational_quadratic_spline import Spline, rational_quadratic_spline

SLOW = (MaskedAutoregressiveTransform, GeneralCouplingTransform)


def sizes(layer: MaskedAutoregressiveTransform) -> tuple[int, int | None]:
    """Features and context features, None without."""
    _network.require(layer.hyper, MaskedMLP)
    features = layer.hyper.out_features // max(1, layer.total)
    return features, layer.hyper.in_features - features or None


twin = copy.deepcopy


def parallel(layer: MaskedAutoregressiveTransform, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """The library's own parallel direction."""
    return layer(context).call_and_ladj(x)


def lay_out(layer: MaskedAutoregressiveTransform, batch: Size, context: Tensor | None) -> Layout:
    """The layer's network."""
    _network.require_unchanged(layer, "meta")
    net = layer.hyper
    _network.require(net, MaskedMLP)
    tail = _tail(layer)
    parts: list[Part] = []
    for module in net:
        if type(module) is MaskedLinear:
            parts.append(Part(module, len(parts) - 1))  # the first one reads the features
        elif not parts:
            raise Unfused(f"its network begins with a {type(module).__name__}")
        elif type(module) is Residual:
            parts += _residual(module, parts)
        else:
            parts[-1] = replace(parts[-1], activation=_network.activation(module))
    features = net.out_features // layer.total
    context_features = net.in_features - features
    if context_features:
        if context is None:
            raise Unfused("it needs a context")
        first = _network.from_context(parts[0].linear, slice(features, None), context, batch)
        parts[0] = replace(parts[0], offset=first)
    elif context is not None:
        raise Unfused("it takes no context")
    degrees = functools.partial(_degrees, layer, parts, features, bool(context_features))
    return Layout(net, parts, slice(features), degrees, tail, outputs=(0, layer.total, 1))


def _tail(layer: MaskedAutoregressiveTransform) -> _network.Gate | Spline:
    tail, circular = _univariate(layer)
    if circular:
        raise Unfused("its splines are circular")
    return tail


def _univariate(layer: Foreign) -> tuple[_network.Gate | Spline, bool]:
    """The map of a feature, and whether the feature is shifted by half a turn first."""
    univariate = layer.univariate
    settings: dict[str, Any] = {}
    if type(univariate) is functools.partial and not univariate.args:
        settings, univariate = univariate.keywords, univariate.func
    slope = settings.get("slope", 1e-3)
    if univariate is MonotonicAffineTransform and set(settings) <= {"slope"}:
        if not 0 < slope < 1:
            raise Unfused(f"slope = {slope} is not between 0 and 1")
        return _network.gate("soft-clipped", -math.log(slope)), False
    circular = univariate is CircularRQSTransform and set(settings) <= {"slope"}
    if circular or (univariate is MonotonicRQSTransform and set(settings) <= {"slope", "bound"}):
        bins = layer.shapes[0][0]
        if [tuple(shape) for shape in layer.shapes] != [(bins,), (bins,), (bins - 1,)]:
            raise Unfused(f"its splines have parameters of shapes {layer.shapes}")
        bound = math.pi if circular else float(settings.get("bound", 5.0))
        return _network.spline(bins, bound, "linear", "zuko", min_derivative=slope), circular
    name = getattr(univariate, "__name__", type(univariate).__name__)
    known = "MonotonicAffineTransform, MonotonicRQSTransform or CircularRQSTransform"
    raise Unfused(f"its univariate map is {name}, not {known}")


def _splines(layer: Foreign) -> tuple[Spline | None, bool]:
    """The same, None where it is no spline, or not known any more."""
    try:
        tail, circular = _univariate(layer)
    except Unfused:
        return None, False
    return (tail, circular) if isinstance(tail, Spline) else (None, False)


def _residual(block: Residual, before: list[Part]) -> list[Part]:
    if len(block) != 3 or before[-1].activation != "identity":
        raise Unfused("a residual block of a shape that is not known")
    first, function, second = block
    for linear in (first, second):
        _network.require(linear, MaskedLinear)
    stream = len(before) - 1
    name = _network.activation(function)
    return [Part(first, stream, name), Part(second, stream + 1, residual=stream)]


def _degrees(
    layer: MaskedAutoregressiveTransform, parts: list[Part], features: int, with_context: bool
) -> tuple[Tensor, list[Tensor]]:
    """Levels of dependence are dealt out to the hidden units like cards; level 0 sees the context alone."""
    order = layer.order
    if order is None:  # an adjacency was given: count what every feature depends on
        seen = torch.eye(features, dtype=torch.float32, device=parts[0].linear.weight.device)
        for part in parts:
            mask = part.linear.mask.float()
            seen = ((mask[:, :features] if part is parts[0] else mask) @ seen).clamp(max=1)
        order = seen[:: layer.total].sum(1)
    levels, place = order.unique(return_inverse=True)
    lowest = 0 if with_context else 1
    many = max(1, len(levels) - lowest)
    hidden = [torch.arange(part.linear.out_features, device=place.device) % many + lowest for part in parts[:-1]]
    return place + 1, hidden


class _Inverse(InverseTransform, _network.Swapped):
    """The inverse, which finds its log-determinant on the way."""

    library_class = InverseTransform
    _inv: FusedTransform

    def call_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, log_abs_det)`` of the inverse map."""
        return self._inv.inverse_and_ladj(y)


class FusedTransform(AutoregressiveTransform, _network.Swapped):
    """The transform that a fused layer builds from its context."""

    library_class = AutoregressiveTransform
    _inv: _Inverse | None

    def __init__(self, layer: FusedMaskedAutoregressiveTransform, context: Tensor | None) -> None:
        super().__init__(functools.partial(layer.meta, context), layer.passes)
        self.layer, self.context = layer, context

    @property
    def inv(self) -> _Inverse:
        """The inverse."""
        if self._inv is None:
            self._inv = _Inverse(self)
        return self._inv

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log_abs_det)``."""
        if not _network.gains(self.layer.hyper, x, spline=self.layer.total > 2):
            return super().call_and_ladj(x)
        x, network = self._served(x)
        return super().call_and_ladj(x) if network is None else _network.parallel(x, network)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, log_abs_det)`` of the inverse map, in one pass of work."""
        y, network = self._served(y)
        if network is not None:
            return _network.sequential(y, network)
        x = super()._inverse(y)
        return x, -super().log_abs_det_jacobian(x, y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Of the map at ``x``."""
        return self.call_and_ladj(x)[1]

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        y, network = self._served(y)
        return super()._inverse(y) if network is None else _network.sequential(y, network)[0]

    def _served(self, x: Tensor) -> tuple[Tensor, _network.Network | None]:
        """Features with the context's batch dimensions too, and the network where it serves them."""
        wide = x
        if self.context is not None and not torch.jit.is_tracing():  # which would keep what becomes of it
            try:
                batch = torch.broadcast_shapes(x.shape[:-1], self.context.shape[:-1])
            except RuntimeError:
                return x, None
            wide = x.expand(*batch, x.shape[-1])
        network = _network.served(lay_out, self.layer, wide, self.context)
        return (x, None) if network is None else (wide, network)


class _Splines(Transform):
    """Splines of the features by raw ``parameters (..., d, P)``, with the log-determinant's sum."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, parameters: Tensor, spline: Spline, circular: bool) -> None:
        super().__init__()
        self.parameters, self.spline, self.circular = parameters, spline, circular

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log_abs_det)``."""
        return self._along(self._shifted(x), inverse=False)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, log_abs_det)`` of the inverse map."""
        x, ladj = self._along(y, inverse=True)
        if not self.circular:
            return x, ladj
        x = self._shifted(x)
        return x, -self.call_and_ladj(x)[1]  # outside the interval, where the shift goes into it, they are no inverses

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Of the map at ``x``."""
        return self.call_and_ladj(x)[1]

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_ladj(y)[0]

    def _shifted(self, x: Tensor) -> Tensor:
        return torch.remainder(x, 2 * math.pi) - math.pi if self.circular else x

    def _along(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        x = x.expand(self.parameters.shape[:-1])  # to the context's rows; the network has read those of x
        return rational_quadratic_spline(x, self.parameters, self.spline, inverse=inverse)


def _mapped(layer: Foreign, context: Tensor | None, x: Tensor, spline: Spline, circular: bool) -> Transform:
    """The layer's splines, given what its network reads."""
    if context is not None:
        x = torch.cat(broadcast(x, context, ignore=1), -1)
    parameters = layer.hyper(x).unflatten(-1, (-1, layer.total))
    if _coupling.is_served(x, parameters):
        return _Splines(parameters, spline, circular)
    return DependentTransform(layer.univariate(*unpack(parameters, layer.shapes)), 1)


def _prove(kind: type[Any], layer: Foreign, features: int, context_features: int) -> str:
    """As :func:`_network.prove`, of a layer that keeps its network, in both directions."""
    twin = copy.deepcopy(layer).to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(normal(*parameter.shape) / max(1, parameter.shape[-1]) ** 0.5)
        x, context = normal(3, features), normal(3, context_features) if context_features else None
        _coupling.agree(
            kind,
            twin,
            lambda twin: twin(context).call_and_ladj(x),
            lambda twin: twin(context).inv.call_and_ladj(x),
        )
    of_context = f", {context_features} of context" if context_features else ""
    return f"{kind.library_class.__name__}, {features} features{of_context}"


class FusedMaskedAutoregressiveTransform(MaskedAutoregressiveTransform, _network.Swapped):
    """The layer whose transforms run fused."""

    library_class = MaskedAutoregressiveTransform

    def forward(self, c: Tensor | None = None) -> FusedTransform:
        """The transform given the context."""
        return FusedTransform(self, c)

    def meta(self, c: Tensor | None, x: Tensor) -> Transform:
        """The map of the features, where the library's own code has to run: circular splines are fused in it."""
        spline, circular = _splines(self)
        if spline is None or not circular or _network.is_recorded():
            return MaskedAutoregressiveTransform.meta(self, c, x)  # restored since, it is no instance any more
        return _mapped(self, c, x, spline, circular)

    @classmethod
    def prove(cls, layer: Foreign) -> str:
        """Require that the layer does what is known here; says what it is."""
        _network.require_unchanged(layer, "meta")
        if not _univariate(layer)[1]:
            return _network.prove(layer, sys.modules[__name__])
        features, context_features = sizes(layer)
        return f"{_prove(cls, layer, features, context_features or 0)}, their splines alone"


_PLACES: weakref.WeakKeyDictionary[nn.Module, tuple[_live.Seen, Tensor, Tensor]] = weakref.WeakKeyDictionary()


def _places(layer: Foreign) -> tuple[Tensor, Tensor]:
    """Of a coupling layer the features that pass, and those that are transformed."""
    known = _PLACES.get(layer)
    if known is None or not known[0].again([layer.mask]):
        with torch.inference_mode(False):  # backward passes to come keep them
            passing, moved = layer.mask.nonzero().squeeze(-1), (~layer.mask).nonzero().squeeze(-1)
        known = _PLACES[layer] = _live.Seen([layer.mask]), passing, moved
    return known[1:]


class FusedCoupling(CouplingTransform, _network.Swapped):
    """The transform that a coupling layer builds from its context."""

    library_class = CouplingTransform
    meta: Callable[[Tensor], Any]
    _inv: _Inverse | None

    def __init__(self, layer: FusedGeneralCouplingTransform, context: Tensor | None) -> None:
        Transform.__init__(self)  # the library's looks for the places anew
        self.meta = functools.partial(layer.meta, context)
        self.idx_a, self.idx_b = _places(layer)

    @property
    def inv(self) -> _Inverse:
        """The inverse."""
        if self._inv is None:
            self._inv = _Inverse(self)
        return self._inv

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The features that pass, and those that are transformed."""
        return x.index_select(-1, self.idx_a), x.index_select(-1, self.idx_b)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(y, log_abs_det)``."""
        x_a, x_b = self.split(x)
        y_b, ladj = self.meta(x_a).call_and_ladj(x_b)
        return self._put(x, x_a, y_b), ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, log_abs_det)`` of the inverse map, by one pass through the network."""
        y_a, y_b = self.split(y)
        transform = self.meta(y_a)
        if isinstance(transform, _Splines):
            x_b, ladj = transform.inverse_and_ladj(y_b)
        else:
            x_b = transform.inv(y_b)
            ladj = -transform.log_abs_det_jacobian(x_b, y_b)
        return self._put(y, y_a, x_b), ladj

    def _call(self, x: Tensor) -> Tensor:
        x_a, x_b = self.split(x)
        return self._put(x, x_a, self.meta(x_a)(x_b))

    def _inverse(self, y: Tensor) -> Tensor:
        y_a, y_b = self.split(y)
        return self._put(y, y_a, self.meta(y_a).inv(y_b))

    def _put(self, x: Tensor, x_a: Tensor, y_b: Tensor) -> Tensor:
        """The transformed features in their places; in the library's way where they have not the others' rows."""
        if x_a.shape[:-1] != y_b.shape[:-1]:
            return self.merge(x_a, y_b, x.shape)
        return x.index_copy(-1, self.idx_b, y_b)


class FusedGeneralCouplingTransform(GeneralCouplingTransform, _network.Swapped):
    """The layer whose transforms pick features and put them back by one operator each."""

    library_class = GeneralCouplingTransform

    def forward(self, c: Tensor | None = None) -> CouplingTransform:
        """The transform given the context."""
        return super().forward(c) if _network.is_recorded() else FusedCoupling(self, c)

    def meta(self, c: Tensor | None, x: Tensor) -> Transform:
        """The map of the transformed features, splines in one kernel."""
        spline, circular = _splines(self)
        if spline is None or _network.is_recorded():
            return GeneralCouplingTransform.meta(self, c, x)  # restored since, it is no instance any more
        return _mapped(self, c, x, spline, circular)

    @classmethod
    def prove(cls, layer: Foreign) -> str:
        """Require that the layer does what is known here, in both directions; says what it is."""
        _network.require_unchanged(layer, "meta", "forward")
        _network.require(layer.hyper, MLP)
        _univariate(layer)
        return _prove(cls, layer, len(layer.mask), layer.hyper.in_features - int(layer.mask.sum()))


FUSED = {
    MaskedAutoregressiveTransform: FusedMaskedAutoregressiveTransform,
    GeneralCouplingTransform: FusedGeneralCouplingTransform,
}


def swap(layer: nn.Module) -> None:
    """Swap in place."""
    layer.__class__ = FUSED[type(layer)]
