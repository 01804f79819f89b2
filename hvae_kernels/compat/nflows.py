"""nflows: ``MaskedAffineAutoregressiveTransform`` and ``MaskedPiecewiseRationalQuadraticAutoregressiveTransform``."""

from __future__ import annotations

import copy

from nflows.transforms.autoregressive import (
    AutoregressiveTransform,
    MaskedAffineAutoregressiveTransform,
    MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
)
from nflows.transforms.coupling import CouplingTransform, PiecewiseRationalQuadraticCouplingTransform
from nflows.transforms.made import MADE, MaskedFeedforwardBlock, MaskedLinear, MaskedResidualBlock
from torch import Size, Tensor, nn

from hvae_kernels.compat import _coupling, _made, _network
from hvae_kernels.compat._network import Foreign, Layout

SLOW = (AutoregressiveTransform, CouplingTransform)

_LIBRARY = _made.Library(
    MADE, MaskedLinear, MaskedFeedforwardBlock, MaskedResidualBlock, gates=False, preactivates=True
)


def sizes(layer: Foreign) -> tuple[int, int | None]:
    """Features and context features, None without."""
    is_spline = isinstance(layer, MaskedPiecewiseRationalQuadraticAutoregressiveTransform)
    return _made.sizes(layer, _LIBRARY, layer._output_dim_multiplier() if is_spline else 2)


twin = copy.deepcopy


def parallel(layer: Foreign, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """The library's own parallel direction."""
    return layer(x, context)


def lay_out(layer: Foreign, batch: Size, context: Tensor | None) -> Layout:
    """The layer's network."""
    is_spline = isinstance(layer, MaskedPiecewiseRationalQuadraticAutoregressiveTransform)
    tail = _made.spline_of(layer) if is_spline else _network.gate("softplus", layer._epsilon)
    return _made.lay_out(layer, batch, context, _LIBRARY, tail)


class FusedMaskedAffineAutoregressiveTransform(_made.Fused, MaskedAffineAutoregressiveTransform):
    """The layer with both directions fused."""

    lay_out = staticmethod(lay_out)
    library_class = MaskedAffineAutoregressiveTransform


class FusedMaskedPiecewiseRationalQuadraticAutoregressiveTransform(
    _made.Fused, MaskedPiecewiseRationalQuadraticAutoregressiveTransform
):
    """The layer with both directions fused."""

    lay_out = staticmethod(lay_out)
    library_class = MaskedPiecewiseRationalQuadraticAutoregressiveTransform


class FusedPiecewiseRationalQuadraticCouplingTransform(_coupling.Fused, PiecewiseRationalQuadraticCouplingTransform):
    """The layer with its splines fused."""

    library_class = PiecewiseRationalQuadraticCouplingTransform


FUSED = {
    kind.library_class: kind
    for kind in (
        FusedMaskedAffineAutoregressiveTransform,
        FusedMaskedPiecewiseRationalQuadraticAutoregressiveTransform,
        FusedPiecewiseRationalQuadraticCouplingTransform,
    )
}


def swap(layer: nn.Module) -> None:
    """Swap in place."""
    layer.__class__ = FUSED[type(layer)]
