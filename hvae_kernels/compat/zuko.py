"""zuko: the lazy ``MaskedAutoregressiveTransform`` with the affine univariate map or a spline."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Size, Tensor, nn
from zuko.flows.autoregressive import MaskedAutoregressiveTransform
from zuko.nn import MaskedLinear, MaskedMLP, Residual
from zuko.transforms import AutoregressiveTransform, MonotonicAffineTransform, MonotonicRQSTransform

from hvae_kernels._torch import InverseTransform
from hvae_kernels.compat import _network
from hvae_kernels.compat._network import Layout, Part, Unfused
from hvae_kernels.ops.rational_quadratic_spline import Spline

SLOW = (MaskedAutoregressiveTransform,)


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
    univariate = layer.univariate
    settings: dict[str, Any] = {}
    if type(univariate) is functools.partial and not univariate.args:
        settings, univariate = univariate.keywords, univariate.func
    slope = settings.get("slope", 1e-3)
    if univariate is MonotonicAffineTransform and set(settings) <= {"slope"}:
        if not 0 < slope < 1:
            raise Unfused(f"slope = {slope} is not between 0 and 1")
        return _network.gate("soft-clipped", -math.log(slope))
    if univariate is MonotonicRQSTransform and set(settings) <= {"slope", "bound"}:
        bins = layer.shapes[0][0]
        if [tuple(shape) for shape in layer.shapes] != [(bins,), (bins,), (bins - 1,)]:
            raise Unfused(f"its splines have parameters of shapes {layer.shapes}")
        return _network.spline(bins, float(settings.get("bound", 5.0)), "linear", "zuko", min_derivative=slope)
    name = getattr(univariate, "__name__", type(univariate).__name__)
    raise Unfused(f"its univariate map is {name}, not MonotonicAffineTransform or MonotonicRQSTransform")


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


class FusedMaskedAutoregressiveTransform(MaskedAutoregressiveTransform, _network.Swapped):
    """The layer whose transforms run fused."""

    library_class = MaskedAutoregressiveTransform

    def forward(self, c: Tensor | None = None) -> FusedTransform:
        """The transform given the context."""
        return FusedTransform(self, c)


FUSED = {MaskedAutoregressiveTransform: FusedMaskedAutoregressiveTransform}


def swap(layer: nn.Module) -> None:
    """Swap in place."""
    layer.__class__ = FUSED[type(layer)]
