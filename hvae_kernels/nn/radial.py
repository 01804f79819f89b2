"""Radial flows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from hvae_kernels import _checks, _live
from hvae_kernels.nn.flow import ForwardFlow
from hvae_kernels.ops.radial_flow import radial_flow


class RadialFlow(ForwardFlow):
    r"""K radial layers, :math:`f(z) = z + \beta (z - c) / (\alpha + |z - c|)`, invertible by construction.

    :math:`\alpha` is the softplus of ``raw_alpha`` and :math:`\beta = -\alpha` plus that of ``raw_beta``. The centres
    begin as standard normal draws, alpha and beta's softplus as 1: so the flow begins as the identity.

    Args:
        features: d.
        n_layers: K.
        device: of the parameters and buffers.
        dtype: of the parameters.

    Raises:
        TypeError: an argument is nothing of its kind.
        ValueError: no features, or a negative number of layers.

    References:
        Rezende and Mohamed, Variational inference with normalizing flows, 2015.

    Equivalent to:
        >>> import torch, hvae_kernels as hk
        >>> flow, z = hk.nn.RadialFlow(5, n_layers=3), torch.randn(8, 5)
        >>> alpha, total = (torch.nn.functional.softplus(x) for x in (flow.raw_alpha, flow.raw_beta))
        >>> expected = hk.functional.radial_flow(z, flow.center, alpha, total - alpha)
        >>> torch.testing.assert_close(flow(z), expected)
    """

    def __init__(
        self,
        features: int,
        n_layers: int,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(features, n_layers)
        kind = _checks.factory("RadialFlow", device, dtype)
        self.center = nn.Parameter(torch.empty(n_layers, features, **kind))
        self.raw_alpha, self.raw_beta = (nn.Parameter(torch.empty(n_layers, **kind)) for _ in range(2))
        self.reset_parameters()

    @property
    def is_conditional(self) -> bool:
        """False, but for code that is not ours."""
        return type(self) is not RadialFlow or not _live.untouched(self)

    def reset_parameters(self) -> None:
        """Centres from a standard normal, layers the identity."""
        nn.init.normal_(self.center)
        for raw in (self.raw_alpha, self.raw_beta):
            nn.init.constant_(raw, 0.5413248546129181)  # its softplus is 1

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``z (..., d)`` to ``(z', log_abs_det)``; there is no context."""
        self._check(z, context)
        alpha = softplus(self.raw_alpha)
        return radial_flow(z, self.center, alpha, softplus(self.raw_beta) - alpha)
