"""nflows: ``MaskedAffineAutoregressiveTransform``."""

from __future__ import annotations

import copy

from nflows.transforms.autoregressive import AutoregressiveTransform, MaskedAffineAutoregressiveTransform
from nflows.transforms.made import MADE, MaskedFeedforwardBlock, MaskedLinear, MaskedResidualBlock
from torch import Size, Tensor, nn

from hvae_kernels.compat import _made, _network
from hvae_kernels.compat._network import Layout

SLOW = (AutoregressiveTransform,)

_LIBRARY = _made.Library(
    MADE, MaskedLinear, MaskedFeedforwardBlock, MaskedResidualBlock, gates=False, preactivates=True
)


def sizes(layer: MaskedAffineAutoregressiveTransform) -> tuple[int, int | None]:
    """Features and context features, None without."""
    return _made.sizes(layer, _LIBRARY)


twin = copy.deepcopy


def parallel(layer: MaskedAffineAutoregressiveTransform, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """The library's own parallel direction."""
    return layer(x, context)


def lay_out(layer: MaskedAffineAutoregressiveTransform, batch: Size, context: Tensor | None) -> Layout:
    """The layer's network."""
    return _made.lay_out(layer, batch, context, _LIBRARY, _network.gate("softplus", layer._epsilon))


class FusedMaskedAffineAutoregressiveTransform(_made.Fused, MaskedAffineAutoregressiveTransform):
    """The layer with both directions fused."""

    lay_out = staticmethod(lay_out)
    library_class = MaskedAffineAutoregressiveTransform


FUSED = {MaskedAffineAutoregressiveTransform: FusedMaskedAffineAutoregressiveTransform}


def swap(layer: nn.Module) -> None:
    """Swap in place."""
    layer.__class__ = FUSED[type(layer)]
