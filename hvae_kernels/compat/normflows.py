"""normflows: ``MaskedAffineAutoregressive`` and ``MaskedPiecewiseRationalQuadraticAutoregressive``."""

from __future__ import annotations

from normflows.flows.affine.autoregressive import Autoregressive, MaskedAffineAutoregressive
from normflows.flows.affine.coupling import AffineCouplingBlock, MaskedAffineFlow
from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive
from normflows.flows.neural_spline.coupling import (
    Coupling,
    PiecewiseRationalQuadraticCDF,
    PiecewiseRationalQuadraticCoupling,
)
from normflows.nets.made import MADE, MaskedFeedforwardBlock, MaskedLinear, MaskedResidualBlock

from hvae_kernels.compat import _made, _network

_ADAPTER = _made.Adapter(
    _made.Library(MADE, MaskedLinear, MaskedFeedforwardBlock, MaskedResidualBlock, gates=True, preactivates=False),
    MaskedAffineAutoregressive,
    MaskedPiecewiseRationalQuadraticAutoregressive,
    (),
    PiecewiseRationalQuadraticCoupling,
    PiecewiseRationalQuadraticCDF,
    lambda layer: _network.gate("shifted-sigmoid", 2.0, 1e-3),
)
#: Halves by slices, or a mask that multiplies: with gradients the fused map is as slow.
AS_FAST = (AffineCouplingBlock, MaskedAffineFlow)
SLOW = (Autoregressive, Coupling, PiecewiseRationalQuadraticCDF, *AS_FAST)
FUSED = _ADAPTER.fused
sizes, twin, parallel = _ADAPTER.sizes, _ADAPTER.twin, _ADAPTER.parallel
lay_out, swap = _ADAPTER.lay_out, _ADAPTER.swap
