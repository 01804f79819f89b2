"""Planar flows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvae_kernels import _checks, _live
from hvae_kernels.nn.flow import ForwardFlow
from hvae_kernels.ops.planar_flow import planar_flow


class PlanarFlow(ForwardFlow):
    r"""K planar layers, :math:`f(z) = z + \hat u \tanh(w \cdot z + b)`, invertible by construction.

    The parameter ``u`` is free; :func:`~hvae_kernels.functional.constrain_planar` of it is used. The initial values are
    those of the Gaussian study: ``u`` and ``w`` are 0.1 times a standard normal truncated to [-2, 2], drawn layer by
    layer, u first, and ``b`` is 0.1.

    Args:
        features: d.
        n_layers: K.
        shared: one layer, applied K times.
        device: of the parameters and buffers.
        dtype: of the parameters.

    Raises:
        TypeError: an argument is nothing of its kind.
        ValueError: no features, or a negative number of layers.

    References:
        Rezende and Mohamed, Variational inference with normalizing flows, 2015.

    Equivalent to:
        >>> import torch, hvae_kernels as hk
        >>> flow, z = hk.nn.PlanarFlow(5, n_layers=3), torch.randn(8, 5)
        >>> expected = hk.functional.planar_flow(z, flow.u, flow.w, flow.b, constrain=True)
        >>> torch.testing.assert_close(flow(z), expected)
    """

    def __init__(
        self,
        features: int,
        n_layers: int,
        shared: bool = False,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, n_layers)
        kind = _checks.factory("PlanarFlow", device, dtype)
        _checks.flag("PlanarFlow", "shared", shared)
        self.shared = shared
        distinct = min(n_layers, 1) if shared else n_layers
        self.u, self.w = (nn.Parameter(torch.empty(distinct, features, **kind)) for _ in range(2))
        self.b = nn.Parameter(torch.empty(distinct, **kind))
        self.reset_parameters()

    @property
    def is_conditional(self) -> bool:
        """False, but for code that is not ours."""
        return type(self) is not PlanarFlow or not _live.untouched(self)

    def reset_parameters(self) -> None:
        """The Gaussian study's initial values."""
        for u, w in zip(self.u, self.w, strict=True):
            for row in (u, w):
                nn.init.trunc_normal_(row, std=0.1, a=-0.2, b=0.2)
        nn.init.constant_(self.b, 0.1)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``z (..., d)`` to ``(z', log_abs_det)``; there is no context."""
        self._check(z, context)
        u, w, b = self.u, self.w, self.b
        if self.shared:
            n = self.n_layers
            return planar_flow(z, u.expand(n, -1), w.expand(n, -1), b.expand(n), constrain=True)
        return planar_flow(z, u, w, b, constrain=True)

    def extra_repr(self) -> str:
        """Sizes, and whether the layers share their parameters."""
        return super().extra_repr() + (", shared=True" if self.shared else "")
