"""Inverse and masked autoregressive flows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvae_kernels import _checks, _live
from hvae_kernels.nn import tail
from hvae_kernels.nn.flow import Flow
from hvae_kernels.nn.made import MADE, is_read
from hvae_kernels.ops import autoregressive_network
from hvae_kernels.ops.affine_autoregressive import Gate
from hvae_kernels.ops.rational_quadratic_spline import Spline


class InverseAutoregressiveFlow(Flow):
    r"""One step of an inverse autoregressive flow: :math:`z'_j = \sigma_j(z_{<j}) z_j + \tau_j(z_{<j}) \mu_j(z_{<j})`.

    Or a spline of :math:`z_j` whose parameters depend on :math:`z_{<j}`: a neural spline flow.

    ``forward`` is parallel. ``inverse`` is sequential in the features, and costs about one forward pass all the same:
    the kernels read the network's weights. Where a call of ``made`` is more than that, by hooks (hook forms of
    ``weight_norm``, ``spectral_norm`` and ``prune`` among them), subclasses or a ``forward`` of an instance, it is
    called: once by ``forward`` and ``d + 1`` times by ``inverse``.

    Args:
        features: d.
        hidden_features: width of the hidden layers, or a sequence with one for each.
        context_features: width of the context; 0 for none.
        gate: how the network's raw scale becomes a scale, a name or a ``Gate`` of ``affine_autoregressive``; or a
            ``Spline`` of ``rational_quadratic_spline``.
        order: a permutation of ``range(features)``; None is the natural order.
        activation: as for :class:`MADE`.
        hidden_degrees: as for :class:`MADE`.
        device: of the parameters and buffers.
        dtype: of the parameters.

    Raises:
        TypeError: an argument is nothing of its kind.
        ValueError: as for :class:`MADE`, or an unknown gate.

    References:
        Kingma et al., Improving variational inference with inverse autoregressive flow, 2016; Durkan et al., Neural
        spline flows, 2019.

    Equivalent to:
        >>> import torch, hvae_kernels as hk
        >>> flow, z = hk.nn.InverseAutoregressiveFlow(5, [32, 32]), torch.randn(8, 5)
        >>> shift, log_scale = flow.made(z).unbind(-2)
        >>> torch.testing.assert_close(flow(z), (z * log_scale.exp() + shift, log_scale.sum(-1)))
        >>> image, log_abs_det = flow(z)
        >>> torch.testing.assert_close(flow.inverse(image), (z, -log_abs_det))
        >>> spline = hk.functional.Spline(8)
        >>> flow = hk.nn.InverseAutoregressiveFlow(5, [32, 32], gate=spline)
        >>> parameters = flow.made(z).mT
        >>> torch.testing.assert_close(flow(z), hk.functional.rational_quadratic_spline(z, parameters, spline))
    """

    def __init__(
        self,
        features: int,
        hidden_features: int | Sequence[int],
        context_features: int = 0,
        gate: str | Gate | Spline = "affine",
        order: Sequence[int] | Tensor | None = None,
        *,
        activation: str = "relu",
        hidden_degrees: Sequence[Sequence[int] | Tensor] | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.features = features
        self.gate = tail.checked(type(self).__name__, gate)
        outputs = tail.outputs_of(self.gate)
        options: dict[str, Any] = {"hidden_degrees": hidden_degrees, "device": device, "dtype": dtype}
        self.made = MADE(features, hidden_features, outputs, context_features, order, activation, **options)

    @property
    def is_conditional(self) -> bool:
        """Whether ``made`` takes a context; code that is not ours may have one of its own."""
        ours = type(self) in (InverseAutoregressiveFlow, MaskedAutoregressiveFlow) and _live.untouched(self)
        return not ours or type(self.made) is not MADE or self.made.context is not None

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``z (..., d)`` and ``context (..., context_features)`` to ``(z', log_abs_det)``; parallel."""
        return self._along(autoregressive_network.autoregressive_forward, self._forward_by_call, z, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``z' (..., d)`` to ``(z, log_abs_det)`` of the inverse map; sequential, in one pass of work.

        Raises:
            RuntimeError: a scale is below the least normal number, so that there is no inverse (on the CPU; on a GPU
                such rows come back infinite or NaN); gates with a bounded scale never get there. Or ``made`` is
                called and is not autoregressive.
        """
        return self._along(autoregressive_network.autoregressive_inverse, self._inverse_by_calls, z, context)

    def _along(
        self,
        direction: Callable[[Tensor, autoregressive_network.Network], tuple[Tensor, Tensor]],
        by_call: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
        z: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        _checks.features(type(self).__name__, "z", z, self.features)
        if not is_read(self.made):
            return by_call(z, context)
        network = self.made.network(self.gate, context, z.shape[:-1])
        if z.dim() == 2:
            return direction(z, network)
        image, log_abs_det = direction(z.reshape(-1, self.features), network)
        return image.reshape(z.shape), log_abs_det.reshape(z.shape[:-1])

    def _forward_by_call(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return tail.apply(self.gate, z, self.made(z, context))

    def _inverse_by_calls(self, image: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """A call finds one feature more, as only the kernels know how to go on from one feature to the next."""
        z = torch.zeros_like(image)
        for _ in range(self.features + 1):  # the last one has to find what is there already
            before = z
            z, log_abs_det, scale = tail.invert(self.gate, image, self.made(z, context))
        tail.refuse_underflow("autoregressive_inverse", scale)
        tolerance = torch.finfo(z.dtype).eps ** 0.5
        if _checks.values_readable(z) and not torch.allclose(z, before, tolerance, tolerance, equal_nan=True):
            raise RuntimeError(
                f"{type(self).__name__}: hooks or code of its own make made differ from call to call, or see later "
                "features, so there is no inverse: call eval() if that is so in training only, remove them, or use the "
                "other direction alone"
            )
        return z, log_abs_det

    def extra_repr(self) -> str:
        """The gate, or the spline."""
        return f"gate={self.gate}"


class MaskedAutoregressiveFlow(InverseAutoregressiveFlow):
    r"""The same map the other way round: ``forward`` is sequential (sampling), ``inverse`` parallel (density).

    :math:`z_j = \sigma_j(z'_{<j}) z'_j + \tau_j(z'_{<j}) \mu_j(z'_{<j})`, the network reads what comes out. Both
    directions cost about one pass. Arguments and errors are those of :class:`InverseAutoregressiveFlow`.

    References:
        Papamakarios, Pavlakou and Murray, Masked autoregressive flow for density estimation, 2017.

    Example:
        >>> import torch, hvae_kernels as hk
        >>> flow, z = hk.nn.MaskedAutoregressiveFlow(5, [32, 32]), torch.randn(8, 5)
        >>> sample, log_abs_det = flow(z)
        >>> torch.testing.assert_close(flow.inverse(sample), (z, -log_abs_det))
    """

    forward_is_parallel = False

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``z (..., d)`` to ``(z', log_abs_det)``; sequential, in one pass of work; raises as the inverse of an IAF."""
        return super().inverse(z, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``z' (..., d)`` to ``(z, log_abs_det)`` of the inverse map; parallel."""
        return super().forward(z, context)
