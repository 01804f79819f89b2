"""Coupling flows: some features pass through, and a network of them transforms the others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvae_kernels import _checks, _library, _live
from hvae_kernels.nn import tail
from hvae_kernels.nn.flow import Flow
from hvae_kernels.ops.affine_autoregressive import Gate
from hvae_kernels.ops.autoregressive_network.network import ACTIVATIONS
from hvae_kernels.ops.rational_quadratic_spline import Spline


class CouplingFlow(Flow):
    r"""One coupling layer: :math:`z'_j = f(z_j; \theta_j(z_A))` for the transformed features, :math:`z'_A = z_A`.

    f is an affine map or a spline of ``z_j``, and theta a network of the features A that pass through. Both directions
    are parallel.

    Args:
        features: d.
        hidden_features: width of the network's hidden layers, or a sequence with one for each.
        context_features: width of the context, which the network reads too; 0 for none.
        gate: a name or a ``Gate`` of ``affine_autoregressive``, or a ``Spline`` of ``rational_quadratic_spline``.
        mask: d booleans, True for the features that are transformed; None is every other one, from the first on.
        activation: of the hidden layers, one of elu, gelu, identity, relu, sigmoid, silu, softplus, tanh.
        conditioner: a module in place of the network, from ``(z_A, context)``, or ``z_A`` where ``context_features`` is
            0, to ``(..., outputs, n)`` for the n transformed features: shift and raw scale, or the spline's parameters.
            ``hidden_features`` and ``activation`` are then not used.
        device: of the parameters and buffers.
        dtype: of the parameters.

    Raises:
        TypeError: an argument is nothing of its kind.
        ValueError: a size is out of range, the activation or gate is unknown, or the mask transforms nothing.

    References:
        Dinh, Sohl-Dickstein and Bengio, Density estimation using Real NVP, 2016; Durkan et al., Neural spline flows,
        2019.

    Equivalent to:
        >>> import torch, hvae_kernels as hk
        >>> flow, z = hk.nn.CouplingFlow(5, [32, 32]), torch.randn(8, 5)
        >>> shift, log_scale = flow.conditioner(z[:, [1, 3]]).unbind(-2)
        >>> expected = z.clone()
        >>> expected[:, [0, 2, 4]] = z[:, [0, 2, 4]] * log_scale.exp() + shift
        >>> image, log_abs_det = flow(z)
        >>> torch.testing.assert_close((image, log_abs_det), (expected, log_scale.sum(-1)))
        >>> torch.testing.assert_close(flow.inverse(image), (z, -log_abs_det))
    """

    passing: Tensor
    transformed: Tensor

    def __init__(
        self,
        features: int,
        hidden_features: int | Sequence[int],
        context_features: int = 0,
        gate: str | Gate | Spline = "affine",
        mask: Sequence[bool] | Tensor | None = None,
        activation: str = "relu",
        *,
        conditioner: nn.Module | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        kind = _checks.factory(name, device, dtype)
        _checks.integer(name, "features", features, 1)
        _checks.integer(name, "context_features", context_features, 0)
        self.features, self.context_features = features, context_features
        self.gate = tail.checked(name, gate)
        chosen, widths = _booleans(name, features, mask), _checks.widths(name, hidden_features)
        _checks.one_of(name, "activation", activation, sorted(ACTIVATIONS))
        self._given = {
            buffer: [place for place, one in enumerate(chosen) if one is value]
            for buffer, value in (("passing", False), ("transformed", True))
        }
        for buffer, places in self._given.items():
            self.register_buffer(buffer, torch.tensor(places, dtype=torch.int64, device=device))
        n, outputs = sum(chosen), tail.outputs_of(self.gate)
        if conditioner is None:
            shape = outputs, n
            conditioner = Conditioner(features - n, widths, shape, context_features, activation, **kind)
        elif not isinstance(conditioner, nn.Module):
            raise _checks.type_error(name, "conditioner", "None or a torch.nn.Module", conditioner)
        self.conditioner = conditioner

    @property
    def is_conditional(self) -> bool:
        """Whether the network takes a context; code that is not ours may have one of its own."""
        ours = type(self) is CouplingFlow and _live.untouched(self)
        return not ours or self.context_features > 0

    @property
    def mask(self) -> Tensor:
        """Booleans ``(d,)`` on the CPU, True for the features that are transformed."""
        mask = torch.zeros(self.features, dtype=torch.bool, device="cpu")
        mask[self._given["transformed"]] = True
        return mask

    def reset_parameters(self) -> None:
        """The places that were given or loaded, which ``to_empty`` loses; the network has its own."""
        for buffer, places in self._given.items():
            getattr(self, buffer).copy_(torch.tensor(places, dtype=torch.int64, device="cpu"))

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if not (self.passing.is_meta or self.transformed.is_meta):
            self._given = {buffer: getattr(self, buffer).tolist() for buffer in self._given}

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``z (..., d)`` and ``context (..., context_features)`` to ``(z', log_abs_det)``."""
        parameters = self._parameters_of(z, context)
        image, log_abs_det = tail.apply(self.gate, z.index_select(-1, self.transformed), parameters)
        return z.index_copy(-1, self.transformed, image), log_abs_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``z' (..., d)`` to ``(z, log_abs_det)`` of the inverse map.

        Raises:
            RuntimeError: a scale is below the least normal number, so that there is no inverse (on the CPU).
        """
        parameters = self._parameters_of(z, context)
        image, log_abs_det, scale = tail.invert(self.gate, z.index_select(-1, self.transformed), parameters)
        tail.refuse_underflow(type(self).__name__, scale)
        return z.index_copy(-1, self.transformed, image), log_abs_det

    def _parameters_of(self, z: Tensor, context: Tensor | None) -> Tensor:
        name = type(self).__name__
        _checks.features(name, "z", z, self.features)
        if self.context_features:
            if context is None:
                raise _checks.value_error(name, "context", f"a tensor of shape (..., {self.context_features})", context)
            _checks.features(name, "context", context, self.context_features)
            _checks.broadcasts(name, "context", context, z.shape[:-1])
        elif context is not None:
            raise _checks.value_error(name, "context", "None, as context_features is 0", context)
        if not _library.autocasts(z):
            tensors = {"z": z} if context is None else {"z": z, "context": context}
            if type(self.conditioner) is Conditioner:
                tensors = {"weight": self.conditioner.layers[0].weight, **tensors}
            _checks.same_kind(name, **tensors)
        passing = z.index_select(-1, self.passing)
        parameters = self.conditioner(passing, context) if self.context_features else self.conditioner(passing)
        expected = (*z.shape[:-1], tail.outputs_of(self.gate), len(self.transformed))
        if not isinstance(parameters, Tensor) or parameters.shape != expected:
            said = f"a network that returns a tensor of shape {expected}"
            raise _checks.value_error(name, "conditioner", said, parameters)
        return parameters

    def extra_repr(self) -> str:
        """Sizes and gate."""
        context = f", context_features={self.context_features}" if self.context_features else ""
        return f"features={self.features}, transformed={len(self.transformed)}{context}, gate={self.gate}"


class Conditioner(nn.Module):
    """A fully connected network from ``(..., features)`` and a context to ``(..., *shape)``."""

    layers: Any  # an nn.ModuleList of nn.Linear

    def __init__(
        self,
        features: int,
        widths: list[int],
        shape: tuple[int, int],
        context_features: int,
        activation: str,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.activation = shape, activation
        outputs, n = shape
        sizes = [features + context_features, *widths, outputs * n]
        self.layers = nn.ModuleList(nn.Linear(a, b, device=device, dtype=dtype) for a, b in itertools.pairwise(sizes))

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The parameters."""
        hidden = z
        if context is not None:
            hidden = torch.cat((z, context.expand(*z.shape[:-1], context.shape[-1])), -1)
        *first, last = self.layers
        for layer in first:
            hidden = ACTIVATIONS[self.activation](layer(hidden))
        return last(hidden).unflatten(-1, self.shape)

    def extra_repr(self) -> str:
        """The activation."""
        return f"activation={self.activation!r}"


def _booleans(name: str, features: int, mask: Sequence[bool] | Tensor | None) -> list[bool]:
    if mask is None:
        return [place % 2 == 0 for place in range(features)]
    values: Any = mask.tolist() if isinstance(mask, Tensor) else mask
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, bool) for value in values):
        raise _checks.type_error(name, "mask", "None, or booleans", mask)
    if len(values) != features or not any(values):
        expected = f"of {features} booleans, not all of them False"
        raise _checks.value_error(name, "mask", expected, str(list(values)))
    return list(values)
