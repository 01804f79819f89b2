"""nflows: ``MaskedAffineAutoregressiveTransform`` and ``MaskedPiecewiseRationalQuadraticAutoregressiveTransform``."""

from __future__ import annotations

from nflows.transforms.autoregressive import (
    AutoregressiveTransform,
    MaskedAffineAutoregressiveTransform,
    MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
)
from nflows.transforms.coupling import (
    AdditiveCouplingTransform,
    AffineCouplingTransform,
    CouplingTransform,
    PiecewiseRationalQuadraticCouplingTransform,
)
from nflows.transforms.made import MADE, MaskedFeedforwardBlock, MaskedLinear, MaskedResidualBlock
from nflows.transforms.nonlinearities import PiecewiseRationalQuadraticCDF

from hvae_kernels.compat import _made, _network

_ADAPTER = _made.Adapter(
    _made.Library(MADE, MaskedLinear, MaskedFeedforwardBlock, MaskedResidualBlock, gates=False, preactivates=True),
    MaskedAffineAutoregressiveTransform,
    MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
    (AffineCouplingTransform, AdditiveCouplingTransform),
    PiecewiseRationalQuadraticCouplingTransform,
    PiecewiseRationalQuadraticCDF,
    lambda layer: _network.gate("softplus", layer._epsilon),
)
SLOW = (AutoregressiveTransform, CouplingTransform, PiecewiseRationalQuadraticCDF)
FUSED = _ADAPTER.fused
sizes, twin, parallel = _ADAPTER.sizes, _ADAPTER.twin, _ADAPTER.parallel
lay_out, swap = _ADAPTER.lay_out, _ADAPTER.swap
