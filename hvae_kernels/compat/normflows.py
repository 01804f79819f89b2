"""normflows: affine and spline layers, autoregressive and coupling, and the block of an affine coupling layer."""

from __future__ import annotations

import copy

import torch
from normflows.flows.affine.autoregressive import Autoregressive, MaskedAffineAutoregressive
from normflows.flows.affine.coupling import AffineCouplingBlock, MaskedAffineFlow
from normflows.flows.neural_spline.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressive
from normflows.flows.neural_spline.coupling import (
    Coupling,
    PiecewiseRationalQuadraticCDF,
    PiecewiseRationalQuadraticCoupling,
)
from normflows.flows.reshape import Merge, Split
from normflows.nets.made import MADE, MaskedFeedforwardBlock, MaskedLinear, MaskedResidualBlock
from torch import Tensor, nn

from hvae_kernels import _live
from hvae_kernels.compat import _coupling, _made, _network
from hvae_kernels.compat._network import Foreign, Unfused

_ADAPTER = _made.Adapter(
    _made.Library(MADE, MaskedLinear, MaskedFeedforwardBlock, MaskedResidualBlock, gates=True, preactivates=False),
    MaskedAffineAutoregressive,
    MaskedPiecewiseRationalQuadraticAutoregressive,
    (),
    PiecewiseRationalQuadraticCoupling,
    PiecewiseRationalQuadraticCDF,
    lambda layer: _network.gate("shifted-sigmoid", 2.0, 1e-3),
)


class FusedAffineCouplingBlock(_network.Swapped, AffineCouplingBlock):
    """The block with its affine coupling alone: no zeros to add up, no modules that take and join halves."""

    library_class = AffineCouplingBlock

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``(z', log_abs_det)``."""
        if _network.is_recorded() or not _takes_halves(self):
            return super().forward(z)
        halves, log_abs_det = self.flows[1](_halves(self, z))
        return _joined(self, halves), _of_rows(log_abs_det, z)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """``(z, log_abs_det)`` of the inverse map."""
        if _network.is_recorded() or not _takes_halves(self):
            return super().inverse(z)
        halves, log_abs_det = self.flows[1].inverse(_halves(self, z))
        return _joined(self, halves), _of_rows(log_abs_det, z)

    @classmethod
    def prove(cls, layer: Foreign) -> str:
        """Require that the layer does what is known here, in both directions; says what it is."""
        _network.require_unchanged(layer, "forward", "inverse")
        if not _takes_halves(layer):
            raise Unfused("it splits in another way than by halves of the channels")
        twin, x = copy.copy(layer), torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
        twin.__dict__["_modules"] = {"flows": nn.ModuleList([layer.flows[0], _Some(), layer.flows[2]])}
        _coupling.agree(cls, twin, lambda twin: twin.forward(x), lambda twin: twin.inverse(x))
        return "AffineCouplingBlock"


class _Some(nn.Module):
    """Some map of two halves."""

    def forward(self, halves: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The second one, changed."""
        a, b = halves
        return [a, 2 * b + a], a.sum(1)

    def inverse(self, halves: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The second one as it was."""
        a, b = halves
        return [a, (b - a) / 2], -a.sum(1)


def _takes_halves(layer: Foreign) -> bool:
    """Whether the parts before and after the coupling take and join halves, and do nothing else."""
    if len(layer.flows) != 3 or _live.hooked_everywhere():
        return False
    split, _, merge = layer.flows
    return (
        type(split) is Split
        and type(merge) is Merge
        and split.mode == merge.mode
        and split.mode in ("channel", "channel_inv")
        and all(_live.untouched(part) and "inverse" not in part.__dict__ for part in (split, merge))
    )


def _halves(layer: Foreign, z: Tensor) -> list[Tensor]:
    halves = z.chunk(2, 1)
    return list(halves if layer.flows[0].mode == "channel" else reversed(halves))


def _joined(layer: Foreign, halves: list[Tensor]) -> Tensor:
    return torch.cat(halves if layer.flows[0].mode == "channel" else halves[::-1], 1)


def _of_rows(log_abs_det: Tensor, z: Tensor) -> Tensor:
    """With the shape and dtype of the library's sum."""
    if log_abs_det.shape == z.shape[:1] and log_abs_det.dtype == z.dtype:
        return log_abs_det
    return z.new_zeros(len(z)) + log_abs_det.to(z.dtype)


#: Its mask multiplies what two whole networks give: with gradients the fused map is as slow.
AS_FAST = (MaskedAffineFlow,)
SLOW = (Autoregressive, Coupling, PiecewiseRationalQuadraticCDF, AffineCouplingBlock, *AS_FAST)
FUSED = {**_ADAPTER.fused, AffineCouplingBlock: FusedAffineCouplingBlock}
sizes, twin, parallel = _ADAPTER.sizes, _ADAPTER.twin, _ADAPTER.parallel
lay_out = _ADAPTER.lay_out


def swap(layer: nn.Module) -> None:
    """Swap in place."""
    layer.__class__ = FUSED[type(layer)]
