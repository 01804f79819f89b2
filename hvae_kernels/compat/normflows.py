"""normflows: ``MaskedAffineAutoregressive``."""

from __future__ import annotations

import copy

from normflows.flows.affine.autoregressive import Autoregressive, MaskedAffineAutoregressive
from normflows.nets.made import MADE, MaskedFeedforwardBlock, MaskedLinear, MaskedResidualBlock
from torch import Size, Tensor, nn

from hvae_kernels.compat import _made, _network
from hvae_kernels.compat._network import Layout

SLOW = (Autoregressive,)

_LIBRARY = _made.Library(
    MADE, MaskedLinear, MaskedFeedforwardBlock, MaskedResidualBlock, gates=True, preactivates=False
)


def sizes(layer: MaskedAffineAutoregressive) -> tuple[int, int | None]:
    """Features and context features, None without."""
    return _made.sizes(layer, _LIBRARY)


twin = copy.deepcopy


def parallel(layer: MaskedAffineAutoregressive, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """The library's own parallel direction."""
    return layer(x, context)


def lay_out(layer: MaskedAffineAutoregressive, batch: Size, context: Tensor | None) -> Layout:
    """The layer's network."""
    return _made.lay_out(layer, batch, context, _LIBRARY, _network.gate("shifted-sigmoid", 2.0, 1e-3))


class FusedMaskedAffineAutoregressive(_made.Fused, MaskedAffineAutoregressive):
    """The layer with both directions fused."""

    lay_out = staticmethod(lay_out)
    library_class = MaskedAffineAutoregressive


FUSED = {MaskedAffineAutoregressive: FusedMaskedAffineAutoregressive}


def swap(layer: nn.Module) -> None:
    """Swap in place."""
    layer.__class__ = FUSED[type(layer)]
