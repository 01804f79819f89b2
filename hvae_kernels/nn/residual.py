"""Planar and radial flows: invertible layers whose inverse has no formula."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from hvae_kernels import _checks
from hvae_kernels.nn.autoregressive import _Flow
from hvae_kernels.ops.planar_flow import planar_flow
from hvae_kernels.ops.radial_flow import radial_flow


class _ForwardFlow(_Flow):
    """A flow that goes one way only.

    ``as_transform()`` is a bijection to ``torch.distributions``, as it is one in mathematics and as
    ``TransformedDistribution.log_prob`` asks for ``log_abs_det_jacobian``. Samples drawn with ``cache_size=1`` can be
    scored, as the point that they came from is remembered as long as :class:`FlowTransform` keeps the pair; anything
    else needs the inverse, and raises.
    """

    def __init__(self, features: int, n_layers: int):
        super().__init__()
        for argument, value, least in (("features", features, 1), ("n_layers", n_layers, 0)):
            _checks.integer(type(self).__name__, argument, value, least)
        self.features, self.n_layers = features, n_layers

    @property
    def is_conditional(self) -> bool:
        """False, but for code of a subclass."""
        return type(self) not in (PlanarFlow, RadialFlow)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """There is no formula for it: raises ``NotImplementedError``."""
        raise NotImplementedError(
            f"{type(self).__name__}: the inverse has no closed form; score samples as they are drawn, with the "
            "log_abs_det of forward, or with as_transform(cache_size=1) before anything changes: rsample where "
            "gradients are wanted, or log_prob under torch.no_grad()"
        )

    def _check(self, z: Tensor, context: Tensor | None) -> None:
        name = type(self).__name__
        _checks.features(name, "z", z, self.features)
        if context is not None:
            raise _checks.fail(name, "context", "None, as the layers take none", context)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"features={self.features}, n_layers={self.n_layers}"


class PlanarFlow(_ForwardFlow):
    r"""K planar layers, :math:`f(z) = z + \hat u \tanh(w \cdot z + b)`, invertible by construction.

    The parameter ``u`` is free; :func:`~hvae_kernels.functional.constrain_planar` of it is used. The initial values are
    those of the Gaussian study: ``u`` and ``w`` are 0.1 times a standard normal truncated to [-2, 2], drawn layer by
    layer, u first, and ``b`` is 0.1.

    Args:
        features: d.
        n_layers: K.
        shared: one layer, applied K times.

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

    def __init__(self, features: int, n_layers: int, shared: bool = False):
        super().__init__(features, n_layers)
        _checks.flag("PlanarFlow", "shared", shared)
        self.shared = shared
        distinct = min(n_layers, 1) if shared else n_layers
        self.u, self.w = (nn.Parameter(torch.empty(distinct, features)) for _ in range(2))
        self.b = nn.Parameter(torch.empty(distinct))
        self.reset_parameters()

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
            u, w, b = u.expand(self.n_layers, -1), w.expand(self.n_layers, -1), b.expand(self.n_layers)
        return planar_flow(z, u, w, b, constrain=True)

    def extra_repr(self) -> str:
        """Sizes, and whether the layers share their parameters."""
        return super().extra_repr() + (", shared=True" if self.shared else "")


class RadialFlow(_ForwardFlow):
    r"""K radial layers, :math:`f(z) = z + \beta (z - c) / (\alpha + |z - c|)`, invertible by construction.

    :math:`\alpha` is the softplus of ``raw_alpha`` and :math:`\beta = -\alpha` plus that of ``raw_beta``. The centres
    begin as standard normal draws, alpha and beta's softplus as 1: so the flow begins as the identity.

    Args:
        features: d.
        n_layers: K.

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

    def __init__(self, features: int, n_layers: int):
        super().__init__(features, n_layers)
        self.center = nn.Parameter(torch.empty(n_layers, features))
        self.raw_alpha, self.raw_beta = (nn.Parameter(torch.empty(n_layers)) for _ in range(2))
        self.reset_parameters()

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
