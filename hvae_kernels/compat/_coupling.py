"""Coupling layers of nflows, and of normflows, its port: features picked and put back at once, splines in one kernel.

The libraries pick features by advanced indexing and put them back by assignment, which costs more than what an affine
layer computes: ``index_select`` and ``index_copy`` of the same values take a third to two thirds of it. What is between
them stays the library's, but for splines.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hvae_kernels import _checks, _dispatch, _library
from hvae_kernels.compat import _network
from hvae_kernels.compat._network import Foreign, Unfused
from hvae_kernels.ops.rational_quadratic_spline import Spline, rational_quadratic_spline

OP = "rational_quadratic_spline"


# ---- Splines, element by element ----


def width_of(net: Foreign) -> int | None:
    """What the libraries divide the logits by, squared: the width that a network says it has."""
    return getattr(net, "hidden_features", None) or getattr(net, "hidden_channels", None)


def are_alike(layer: Foreign) -> bool:
    """Whether all features have the same splines, apart from their parameters."""
    return isinstance(layer.tails, str | None) and not isinstance(layer.tail_bound, Tensor)


def spline_of(layer: Foreign, bins: int, width: int | None) -> Spline:
    """The splines of a piecewise rational-quadratic layer, all of them alike."""
    if not are_alike(layer):
        raise Unfused("its features have tails or bounds of their own")
    return _spline(layer, bins, width, float(layer.tail_bound), layer.tails)


def _spline(layer: Foreign, bins: int, width: int | None, bound: float, tails: str | None) -> Spline:
    return _network.spline(
        bins,
        bound,
        tails,
        "nflows",
        min_width=layer.min_bin_width,
        min_height=layer.min_bin_height,
        min_derivative=layer.min_derivative,
        logit_scale=1.0 if width is None else width**-0.5,
    )


def elementwise(
    layer: Foreign, x: Tensor, parameters: Tensor, bins: int, width: int | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """``x (...)`` by raw ``parameters (..., P)`` to ``(y, log_abs_det)``, both ``(...)``.

    Raises:
        Unfused: splines that no kernel has.
    """
    tails, bound = layer.tails, layer.tail_bound
    if are_alike(layer):
        spline = spline_of(layer, bins, width)
        return rational_quadratic_spline(x, parameters, spline, inverse=inverse, event_ndims=0)
    if isinstance(bound, Tensor) and (bound.shape != x.shape[-1:] or bound.dtype != x.dtype):
        raise Unfused(f"its bounds are of shape {tuple(bound.shape)} and {bound.dtype}: the kernels take one a feature")
    if isinstance(tails, str | None):
        unit = _spline(layer, bins, width, 1.0, tails)
        y, logs = rational_quadratic_spline(x / bound, parameters, unit, inverse=inverse, event_ndims=0)
        inside = (x >= -bound) & (x <= bound)  # what is outside must stay as it is to the bit
        return torch.where(inside, y * bound, x), logs
    return _by_feature(layer, x, parameters, bins, width, inverse)


def _by_feature(
    layer: Foreign, x: Tensor, parameters: Tensor, bins: int, width: int | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Each feature has tails of its own: K + 1 raw slopes, of which linear ones do not read the outer two.

    Outside the interval the library returns zeros, whatever x is.
    """
    tails, bound = layer.tails, layer.tail_bound
    if x.shape[-1] != len(tails) or not set(tails) <= {"linear", "circular"}:
        raise Unfused("its features have other tails than linear and circular ones, or not one each")
    inside, unit = (x >= -bound) & (x <= bound), bound
    if isinstance(bound, Tensor):
        x, unit = x / bound, 1.0
    lengths, first, inner, _ = parameters.split((2 * bins, 1, bins - 1, 1), -1)
    if "linear" not in tails:
        spline, parameters = _spline(layer, bins, width, unit, "circular"), parameters[..., :-1]
    elif "circular" not in tails:
        spline, parameters = _spline(layer, bins, width, unit, "linear"), torch.cat((lengths, inner), -1)
    else:
        spline = _open(_spline(layer, bins, width, unit, "linear"))
        slope = 1 - spline.min_derivative
        if slope <= 0:
            raise Unfused(f"min_derivative = {spline.min_derivative} is above the outer slope, 1")
        outer = torch.where(_circular(tuple(tails), x.device), first, math.log(math.expm1(slope)))
        parameters = torch.cat((lengths, outer, inner, outer), -1)
    y, logs = rational_quadratic_spline(x, parameters, spline, inverse=inverse, event_ndims=0)
    if isinstance(bound, Tensor):
        y = y * bound
    return torch.where(inside, y, 0.0), torch.where(inside, logs, 0.0)


@functools.lru_cache(maxsize=256)
def _circular(tails: tuple[str, ...], device: torch.device) -> Tensor:
    """Which features are, ``(d, 1)``."""
    with torch.inference_mode(False):  # backward passes to come keep it
        return torch.tensor([[kind == "circular"] for kind in tails], device=device)


def _open(spline: Spline) -> Spline:
    """With all K + 1 slopes given."""
    floors = spline.min_width, spline.min_height, spline.min_derivative
    return Spline(spline.bins, spline.bound, None, spline.style, *floors, logit_scale=spline.logit_scale)


def is_served(x: Tensor, parameters: Tensor) -> bool:
    """Whether the kernel takes these."""
    if _network.is_recorded() or x.dtype != parameters.dtype or x.dtype not in _checks.FULL_PRECISION:
        return False
    if _library.autocasts(x):
        return False
    return _dispatch.requested() != "auto" or _dispatch.resolve(OP, x) != "reference"


class FusedCDF(_network.Swapped):
    """Splines whose parameters are the layer's own, for all rows the same; to stand before the library's class."""

    def _spline(self, inputs: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """``(outputs, log_abs_det)``."""
        widths = self.unnormalized_widths
        if not is_served(inputs, widths) or inputs.shape[1:] != widths.shape[:-1]:
            return super()._spline(inputs, inverse)
        parameters = torch.cat((widths, self.unnormalized_heights, self.unnormalized_derivatives), -1)
        try:
            parameters = parameters.expand(*inputs.shape, -1)
            outputs, logs = elementwise(self, inputs, parameters, widths.shape[-1], None, bool(inverse))
        except Unfused:
            return super()._spline(inputs, inverse)
        return outputs, logs.flatten(1).sum(-1)

    @classmethod
    def prove(cls, layer: Foreign) -> str:
        """Require that the layer does what is known here, in both directions; says what it is."""
        _network.require_unchanged(layer, "_spline", "forward", "inverse")
        twin = copy.deepcopy(layer).to("cpu", torch.float64)
        *shape, bins = twin.unnormalized_widths.shape
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            x = 2 * torch.randn(3, *shape, generator=generator, dtype=torch.float64)
            parameters = x.new_zeros(*x.shape, sum(parameter.shape[-1] for parameter in twin.parameters()))
            elementwise(twin, x, parameters, bins, None, False)
            agree(cls, twin, lambda twin: twin.forward(x), lambda twin: twin.inverse(x))
        return f"{cls.library_class.__name__}, {math.prod(shape)} features"


def agree(kind: type[Any], twin: Foreign, *calls: Callable[[Foreign], tuple[Tensor, Tensor]]) -> None:
    """Require of ``twin`` the library's results of these calls as an instance of ``kind``."""
    for call in calls:
        found = []
        for cls in (kind.library_class, kind):
            twin.__class__ = cls
            found.append(call(twin))
        for value, result in zip(*found, strict=True):
            if result.shape != value.shape or not torch.allclose(result, value, rtol=1e-8, atol=1e-8):
                raise Unfused("it computes something else than the version of its library that is known here")


def prove_elementwise(kind: type[Any], layer: Foreign, d: int, outputs: int, width: int | None) -> None:
    """Require that an autoregressive layer's splines are those known here, in both directions."""
    generator = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(3, d, generator=generator, dtype=torch.float64)
    parameters = torch.randn(3, d * outputs, generator=generator, dtype=torch.float64)
    twin = stand_in(layer)
    elementwise(twin, x, parameters.unflatten(-1, (d, -1)), layer.num_bins, width, False)
    agree(
        kind, twin, *(lambda twin, i=inverse: twin._elementwise(x, parameters.clone(), i) for inverse in (False, True))
    )


# ---- Coupling layers ----


class Fused(_network.Swapped):
    """The features picked and put back by one operator each, to stand before the library's class."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(outputs, log_abs_det)``."""
        if not self._fits(inputs):
            return super().forward(inputs, context)
        passing = inputs.index_select(1, self.identity_features)
        moved = inputs.index_select(1, self.transform_features)
        parameters = self.transform_net(passing, context)
        moved, log_abs_det = self._coupling_transform_forward(inputs=moved, transform_params=parameters)
        outputs = inputs.index_copy(1, self.transform_features, moved)
        if self.unconditional_transform is not None:
            passing, more = self.unconditional_transform(passing, context)
            outputs, log_abs_det = outputs.index_copy(1, self.identity_features, passing), log_abs_det + more
        return outputs, log_abs_det

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(outputs, log_abs_det)`` of the inverse map."""
        if not self._fits(inputs):
            return super().inverse(inputs, context)
        passing = inputs.index_select(1, self.identity_features)
        moved = inputs.index_select(1, self.transform_features)
        outputs, log_abs_det = inputs, None
        if self.unconditional_transform is not None:
            passing, log_abs_det = self.unconditional_transform.inverse(passing, context)
            outputs = outputs.index_copy(1, self.identity_features, passing)
        parameters = self.transform_net(passing, context)
        moved, more = self._coupling_transform_inverse(inputs=moved, transform_params=parameters)
        outputs = outputs.index_copy(1, self.transform_features, moved)
        return outputs, more if log_abs_det is None else log_abs_det + more

    def _fits(self, inputs: Tensor) -> bool:
        """The library refuses other inputs, and knows its own code."""
        return inputs.dim() in (2, 4) and inputs.shape[1] == self.features and not _network.is_recorded()

    @classmethod
    def prove(cls, layer: Foreign) -> str:
        """Require that the layer does what is known here, in both directions; says what it is."""
        _network.require_unchanged(layer, "forward", "inverse")
        n = layer.num_transform_features
        generator = torch.Generator().manual_seed(0)
        net = _Net(layer.transform_net, n * layer._transform_dim_multiplier(), generator)
        x = 2 * torch.randn(3, layer.features, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            twin = stand_in(layer, transform_net=net)
            agree(cls, twin, lambda twin: twin.forward(x), lambda twin: twin.inverse(x))
        return f"{cls.library_class.__name__}, {n} of {layer.features} features"


class FusedSplines(Fused):
    """With the splines in one kernel."""

    def _piecewise_cdf(self, inputs: Tensor, transform_params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Element by element: ``(outputs, log_abs_det)``."""
        if not is_served(inputs, transform_params):
            return super()._piecewise_cdf(inputs, transform_params, inverse)
        try:
            width = width_of(self.transform_net)
            return elementwise(self, inputs, transform_params, self.num_bins, width, bool(inverse))
        except Unfused:
            return super()._piecewise_cdf(inputs, transform_params, inverse)

    @classmethod
    def prove(cls, layer: Foreign) -> str:
        """Require that the layer's splines, too, are those known here."""
        _network.require_unchanged(
            layer, "_piecewise_cdf", "_coupling_transform", "_coupling_transform_forward", "_coupling_transform_inverse"
        )
        n = layer.num_transform_features
        x = torch.zeros(1, n, dtype=torch.float64)
        parameters = x.new_zeros(1, n, layer._transform_dim_multiplier())
        elementwise(stand_in(layer), x, parameters, layer.num_bins, width_of(layer.transform_net), False)
        return super().prove(layer)


class _Net(nn.Module):
    """Some network, of the size that ``net`` says it has."""

    def __init__(self, net: Foreign, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        for name in ("hidden_features", "hidden_channels"):
            if hasattr(net, name):
                setattr(self, name, getattr(net, name))
        self.outputs = torch.randn(outputs, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``(rows, outputs)``."""
        return self.outputs * (1 + x.sum(-1, keepdim=True).sin())


class _Twice(nn.Module):
    """What is done to the features that pass."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Twice as much."""
        return 2 * x, torch.full_like(x[:, 0], x.shape[-1] * math.log(2.0))

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Half as much."""
        return x / 2, torch.full_like(x[:, 0], -x.shape[-1] * math.log(2.0))


def stand_in(layer: Foreign, **modules: nn.Module) -> Foreign:
    """The layer in float64, with these modules in it, and a simple map of the features that pass."""
    twin = copy.copy(layer)
    twin.__dict__["_buffers"] = {
        name: x.detach().to("cpu", torch.float64 if x.is_floating_point() else x.dtype)
        for name, x in layer._buffers.items()
    }
    if getattr(layer, "unconditional_transform", None) is not None:
        modules["unconditional_transform"] = _Twice()
    twin.__dict__["_modules"] = {**layer._modules, **modules}
    return twin


def fused(kind: type[Any], base: type[Any]) -> type:
    """The class to stand in for ``kind``, with the code of ``base``."""
    return type(f"Fused{kind.__name__}", (base, kind), {"library_class": kind})
