"""normflows: ``MaskedAffineAutoregressive`` and ``MaskedPiecewiseRationalQuadraticAutoregressive``."""

from __future__ import annotations

import copy

from normflows.flows.affine.autoregressive import Autoregressive, MaskedAffineAutoregressive
from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive
from normflows.flows.neural_spline.coupling import Coupling, PiecewiseRationalQuadraticCoupling
from normflows.nets.made import MADE, MaskedFeedforwardBlock, MaskedLinear, MaskedResidualBlock
from torch import Size, Tensor, nn

from hvae_kernels.compat import _coupling, _made, _network
from hvae_kernels.compat._network import Foreign, Layout

SLOW = (Autoregressive, Coupling)

_LIBRARY = _made.Library(
    MADE, MaskedLinear, MaskedFeedforwardBlock, MaskedResidualBlock, gates=True, preactivates=False
)


def sizes(layer: Foreign) -> tuple[int, int | None]:
    """Features and context features, None without."""
    is_spline = isinstance(layer, MaskedPiecewiseRationalQuadraticAutoregressive)
    return _made.sizes(layer, _LIBRARY, layer._output_dim_multiplier() if is_spline else 2)


twin = copy.deepcopy


def parallel(layer: Foreign, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """The library's own parallel direction."""
    return layer(x, context)


def lay_out(layer: Foreign, batch: Size, context: Tensor | None) -> Layout:
    """The layer's network."""
    is_spline = isinstance(layer, MaskedPiecewiseRationalQuadraticAutoregressive)
    tail = _made.spline_of(layer) if is_spline else _network.gate("shifted-sigmoid", 2.0, 1e-3)
    return _made.lay_out(layer, batch, context, _LIBRARY, tail)


class FusedMaskedAffineAutoregressive(_made.Fused, MaskedAffineAutoregressive):
    """The layer with both directions fused."""

    lay_out = staticmethod(lay_out)
    library_class = MaskedAffineAutoregressive


class FusedMaskedPiecewiseRationalQuadraticAutoregressive(_made.Fused, MaskedPiecewiseRationalQuadraticAutoregressive):
    """The layer with both directions fused."""

    lay_out = staticmethod(lay_out)
    library_class = MaskedPiecewiseRationalQuadraticAutoregressive


class FusedPiecewiseRationalQuadraticCoupling(_coupling.Fused, PiecewiseRationalQuadraticCoupling):
    """The layer with its splines fused."""

    library_class = PiecewiseRationalQuadraticCoupling


FUSED = {
    kind.library_class: kind
    for kind in (
        FusedMaskedAffineAutoregressive,
        FusedMaskedPiecewiseRationalQuadraticAutoregressive,
        FusedPiecewiseRationalQuadraticCoupling,
    )
}


def swap(layer: nn.Module) -> None:
    """Swap in place."""
    layer.__class__ = FUSED[type(layer)]
