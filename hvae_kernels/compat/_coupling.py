"""Spline coupling layers of nflows, and of normflows, its port: the layer's own code, but for the splines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvae_kernels import _checks, _dispatch, _library
from hvae_kernels.compat import _network
from hvae_kernels.compat._network import Foreign, Unfused
from hvae_kernels.ops.rational_quadratic_spline import Spline, rational_quadratic_spline


def spline_of(layer: Foreign, net: Foreign) -> Spline:
    """The splines of a piecewise rational-quadratic layer, whose logits the width of its network scales."""
    if not isinstance(layer.tails, str | None) or isinstance(layer.tail_bound, Tensor):
        raise Unfused("its features have tails or bounds of their own")
    width = getattr(net, "hidden_features", None) or getattr(net, "hidden_channels", None)
    return _network.spline(
        layer.num_bins,
        float(layer.tail_bound),
        layer.tails,
        "nflows",
        min_width=layer.min_bin_width,
        min_height=layer.min_bin_height,
        min_derivative=layer.min_derivative,
        logit_scale=1.0 if width is None else width**-0.5,
    )


class Fused(_network.Swapped):
    """The splines in one kernel, to stand before the library's class."""

    def _piecewise_cdf(self, inputs: Tensor, transform_params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Element by element: ``(outputs, log_abs_det)``."""
        try:
            spline = spline_of(self, self.transform_net)
        except Unfused:
            spline = None
        if spline is None or not _is_served(inputs, transform_params):
            return super()._piecewise_cdf(inputs, transform_params, inverse)
        return rational_quadratic_spline(inputs, transform_params, spline, inverse=bool(inverse), event_ndims=0)

    @classmethod
    def prove(cls, layer: Foreign) -> str:
        """Require that the layer's splines are those known here; says what it is."""
        _network.require_unchanged(
            layer, "_piecewise_cdf", "_coupling_transform", "_coupling_transform_forward", "_coupling_transform_inverse"
        )
        spline, n = spline_of(layer, layer.transform_net), layer.num_transform_features
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        x, parameters = 2 * normal(3, n), normal(3, n, spline.parameters)
        library: Any = cls.library_class
        for inverse in (False, True):
            expected = library._piecewise_cdf(layer, x, parameters.clone(), inverse)
            results = rational_quadratic_spline(x, parameters, spline, inverse=inverse, event_ndims=0)
            for result, value in zip(results, expected, strict=True):
                if result.shape != value.shape or not torch.allclose(result, value, rtol=1e-8, atol=1e-8):
                    raise Unfused("its splines are not those of the version of its library that is known here")
        return f"{library.__name__}, {n} of {layer.features} features"


def fused(kind: type[Any]) -> type:
    """The class to stand in for ``kind``."""
    return type(f"Fused{kind.__name__}", (Fused, kind), {"library_class": kind})


def _is_served(x: Tensor, parameters: Tensor) -> bool:
    if _network.is_recorded() or x.dtype != parameters.dtype or x.dtype not in _checks.FULL_PRECISION:
        return False
    if _library.autocasts(x):
        return False
    return _dispatch.requested() != "auto" or _dispatch.resolve("rational_quadratic_spline", x) != "reference"
