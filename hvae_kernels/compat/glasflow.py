"""glasflow: its copy of nflows, where a scale's function may be given."""

from __future__ import annotations

import inspect

from glasflow.nflows.transforms.autoregressive import (
    AutoregressiveTransform,
    MaskedAffineAutoregressiveTransform,
    MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
)
from glasflow.nflows.transforms.coupling import (
    AdditiveCouplingTransform,
    AffineCouplingTransform,
    CouplingTransform,
    PiecewiseRationalQuadraticCouplingTransform,
)
from glasflow.nflows.transforms.made import MADE, MaskedFeedforwardBlock, MaskedLinear, MaskedResidualBlock
from glasflow.nflows.transforms.nonlinearities import PiecewiseRationalQuadraticCDF

from hvae_kernels.compat import _made, _network
from hvae_kernels.compat._network import Foreign, Unfused


def _gate(layer: Foreign) -> _network.Gate:
    own = getattr(layer.scale_activation, "__code__", layer)
    # The default one is written in its __init__, around which others may have put a decorator.
    if own not in inspect.unwrap(MaskedAffineAutoregressiveTransform.__init__).__code__.co_consts:
        raise Unfused("it has a scale_activation of its own")
    return _network.gate("softplus", layer._epsilon)


_ADAPTER = _made.Adapter(
    _made.Library(MADE, MaskedLinear, MaskedFeedforwardBlock, MaskedResidualBlock, gates=False, preactivates=True),
    MaskedAffineAutoregressiveTransform,
    MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
    (AffineCouplingTransform, AdditiveCouplingTransform),
    PiecewiseRationalQuadraticCouplingTransform,
    PiecewiseRationalQuadraticCDF,
    _gate,
)
SLOW = (AutoregressiveTransform, CouplingTransform, PiecewiseRationalQuadraticCDF)
FUSED = _ADAPTER.fused
sizes, twin, parallel = _ADAPTER.sizes, _ADAPTER.twin, _ADAPTER.parallel
lay_out, swap = _ADAPTER.lay_out, _ADAPTER.swap
