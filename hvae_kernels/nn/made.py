"""Masked linear layers, and the masked autoencoder for distribution estimation that is made of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvae_kernels import _checks, _live
from hvae_kernels.ops.affine_autoregressive import Gate
from hvae_kernels.ops.autoregressive_network import ACTIVATIONS, FEATURES, Network, Stage
from hvae_kernels.ops.masked_linear import masked_linear
from hvae_kernels.ops.rational_quadratic_spline import Spline


class MaskedLinear(nn.Module):
    r"""A linear layer whose output o sees input i only if ``out_degrees[o] >= in_degrees[i]``.

    Args:
        in_degrees: integers, one an input.
        out_degrees: integers, one an output.
        bias: whether to add one.
        strict: ``>`` instead of ``>=``.
        device: of the parameters and buffers.
        dtype: of the parameters.

    Raises:
        TypeError: degrees are not integers.
        ValueError: degrees are not a sequence, or empty.

    Equivalent to:
        >>> import torch, hvae_kernels as hk
        >>> layer, x = hk.nn.MaskedLinear([0, 1, 2], [0, 0, 1, 1]), torch.randn(8, 3)
        >>> mask = layer.out_degrees[:, None] >= layer.in_degrees
        >>> expected = torch.nn.functional.linear(x, layer.weight * mask, layer.bias)
        >>> torch.testing.assert_close(layer(x), expected)
    """

    in_degrees: Tensor
    out_degrees: Tensor

    def __init__(
        self,
        in_degrees: Sequence[int] | Tensor,
        out_degrees: Sequence[int] | Tensor,
        *,
        bias: bool = True,
        strict: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind = _checks.factory("MaskedLinear", device, dtype)
        _checks.flag("MaskedLinear", "bias", bias)
        _checks.flag("MaskedLinear", "strict", strict)
        self.strict = strict
        self._given = {
            "in_degrees": _degrees("MaskedLinear", "in_degrees", in_degrees),
            "out_degrees": _degrees("MaskedLinear", "out_degrees", out_degrees),
        }
        for name, degrees in self._given.items():
            self.register_buffer(name, torch.tensor(degrees, device=device))
        self.weight = nn.Parameter(torch.empty(len(self.out_degrees), len(self.in_degrees), **kind))
        self.bias = nn.Parameter(torch.empty(len(self.out_degrees), **kind)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Torch's ``Linear`` initialisation, and the degrees that were given or loaded: ``to_empty`` loses them."""
        for name, degrees in self._given.items():
            getattr(self, name).copy_(torch.tensor(degrees, device="cpu"))
        bound = 1 / math.sqrt(max(1, self.weight.shape[1]))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if not (self.in_degrees.is_meta or self.out_degrees.is_meta):
            self._given = {name: getattr(self, name).tolist() for name in self._given}

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        return masked_linear(x, self.weight, self.bias, self.in_degrees, self.out_degrees, strict=self.strict)

    def extra_repr(self) -> str:
        """Sizes."""
        strict = ", strict=True" if self.strict else ""
        return f"in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}{strict}"


class MADE(nn.Module):
    r"""A masked autoencoder for distribution estimation: outputs of feature j depend on the features before it.

    Feature ``order[k]`` has degree k; a hidden unit of degree m sees degrees up to m; the outputs of a feature of
    degree k see hidden units of degree below k. Hidden degrees are evenly spread and ascending, so that every mask is a
    staircase.

    Args:
        features: d.
        hidden_features: width of the hidden layers, or a sequence with one for each; none makes a masked linear map.
        outputs_per_feature: how many numbers for each feature.
        context_features: width of the context, which every output may see; 0 for none.
        order: a permutation of ``range(features)``, ``order[k]`` being the k-th feature; None is the natural order.
        activation: one of elu, gelu, identity, relu, sigmoid, silu, softplus, tanh.
        hidden_degrees: degrees of the hidden units, one sequence a layer, instead of evenly spread ones.
        device: of the parameters and buffers.
        dtype: of the parameters.

    Raises:
        TypeError: an argument is nothing of its kind.
        ValueError: a size is out of range, the order is no permutation, the activation is unknown, or a hidden unit has
            a degree that no output can use.

    References:
        Germain, Gregor, Murray and Larochelle, MADE: masked autoencoder for distribution estimation, 2015.

    Example:
        >>> import torch, hvae_kernels as hk
        >>> hk.nn.MADE(5, [32, 32])(torch.randn(8, 5)).shape
        torch.Size([8, 2, 5])
    """

    layers: Any  # an nn.ModuleList of MaskedLinear: torch has no type for what is in one

    def __init__(
        self,
        features: int,
        hidden_features: int | Sequence[int],
        outputs_per_feature: int = 2,
        context_features: int = 0,
        order: Sequence[int] | Tensor | None = None,
        activation: str = "relu",
        *,
        hidden_degrees: Sequence[Sequence[int] | Tensor] | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind = _checks.factory("MADE", device, dtype)
        name = "MADE"
        widths = _checks.widths(name, hidden_features)
        _checks.integer(name, "features", features, 1)
        _checks.integer(name, "outputs_per_feature", outputs_per_feature, 1)
        _checks.integer(name, "context_features", context_features, 0)
        _checks.one_of(name, "activation", activation, sorted(ACTIVATIONS))
        self.features, self.outputs_per_feature = features, outputs_per_feature
        self.context_features, self.activation = context_features, activation
        degrees = _positions(name, features, order)
        spread = [self._spread(width) for width in widths]
        hidden = spread if hidden_degrees is None else self._given(hidden_degrees, widths)
        every = [degrees, *hidden, [degree - 1 for degree in degrees] * outputs_per_feature]
        self.layers = nn.ModuleList(MaskedLinear(a, b, **kind) for a, b in itertools.pairwise(every))
        self.context = nn.Linear(context_features, len(every[1]), bias=False, **kind) if context_features else None

    def _spread(self, width: int) -> list[int]:
        """-1, which sees the context alone, to d - 2, the highest that an output uses."""
        levels = self.features if self.context_features or self.features == 1 else self.features - 1
        lowest = -1 if levels == self.features else 0
        if width >= levels:
            return [unit * levels // width + lowest for unit in range(width)]
        # Too narrow for all: the highest among them, so that no unit of the layer before is without a reader.
        chosen = torch.linspace(levels - 1, 0, width, device="cpu").round().to(torch.int64).flip(0) + lowest
        return chosen.tolist()

    def _given(self, degrees: Sequence[Sequence[int] | Tensor], widths: list[int]) -> list[list[int]]:
        if not isinstance(degrees, (list, tuple)):
            raise _checks.type_error("MADE", "hidden_degrees", "None, or a list or tuple of a layer's degrees", degrees)
        found = [_degrees("MADE", "hidden_degrees", layer) for layer in degrees]
        if [len(layer) for layer in found] != widths:
            raise _checks.value_error(
                "MADE", "hidden_degrees", f"of lengths {widths}", str([len(layer) for layer in found])
            )
        highest = self.features - 2  # that an output can use, then that a unit of the next layer can
        for layer in reversed(found):
            useless = [degree for degree in layer if not -1 <= degree <= highest]
            if useless:
                expected = f"between -1 and {highest}, so that some output can use them"
                raise _checks.value_error("MADE", "hidden_degrees", expected, f"{useless[0]}")
            highest = max(layer)
        return found

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """``x (..., features)`` and ``context (..., context_features)`` to ``(..., outputs_per_feature, features)``."""
        _checks.features("MADE", "x", x, self.features)
        offset = self.offset(context, x.shape[:-1])
        hidden = self.layers[0](x)
        if offset is not None:
            hidden = hidden + offset
        for layer in self.layers[1:]:
            hidden = layer(ACTIVATIONS[self.activation](hidden))
        return hidden.unflatten(-1, (self.outputs_per_feature, self.features))

    def offset(self, context: Tensor | None, batch: torch.Size) -> Tensor | None:
        """What the context adds to the first layer, ``(*batch, units)``; None without a context."""
        if self.context is None:
            if context is not None:
                raise _checks.value_error("MADE", "context", "None, as context_features is 0", context)
            return None
        if context is None:
            raise _checks.value_error("MADE", "context", f"a tensor of shape (..., {self.context_features})", context)
        _checks.features("MADE", "context", context, self.context_features)
        _checks.same_kind("MADE", weight=self.context.weight, context=context)
        _checks.broadcasts("MADE", "context", context, batch)
        return self.context(context).expand(*batch, self.context.out_features)

    def network(self, tail: Gate | Spline, context: Tensor | None, batch: torch.Size) -> Network:
        """The network as data, for the kernels that walk through it; ``outputs_per_feature`` are the tail's."""
        offset = self.offset(context, batch)
        last = len(self.layers) - 1
        stages = tuple(
            Stage(
                weight=layer.weight,
                bias=layer.bias,
                degrees=layer.out_degrees,
                source=place - 1 if place else FEATURES,
                activation="identity" if place == last else self.activation,
                offset=offset.reshape(-1, offset.shape[-1]) if offset is not None and place == 0 else None,
            )
            for place, layer in enumerate(self.layers)
        )
        return Network(self.layers[0].in_degrees, stages, tail, (0, 1, self.features))

    def extra_repr(self) -> str:
        """Sizes and activation."""
        context = f", context_features={self.context_features}" if self.context_features else ""
        return f"features={self.features}{context}, activation={self.activation!r}"


def is_read(made: MADE) -> bool:
    """Whether the kernels may read the network's tensors: to call it would run the code of these classes alone."""
    return (
        _live.runs_only(made, MADE.forward)
        and all(_live.runs_only(layer, MaskedLinear.forward) for layer in made.layers)
        and not _live.hooked_everywhere()
    )


def _degrees(function: str, argument: str, degrees: Sequence[int] | Tensor) -> list[int]:
    """As numbers of Python: on the meta device tensors have none."""
    expected = "a non-empty sequence of integers"
    try:
        tensor = degrees if isinstance(degrees, Tensor) else torch.as_tensor(degrees, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise _checks.type_error(function, argument, expected, degrees) from None
    if tensor.dtype.is_floating_point or tensor.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise _checks.type_error(function, argument, "integers", degrees)
    if tensor.dim() != 1 or not len(tensor):
        raise _checks.value_error(function, argument, expected, degrees)
    if tensor.is_meta or tensor.layout is not torch.strided:
        raise _checks.value_error(function, argument, "integers whose values can be read", degrees)
    return tensor.tolist()


def _positions(function: str, features: int, order: Sequence[int] | Tensor | None) -> list[int]:
    """The place of each feature in the order."""
    if order is None:
        return list(range(features))
    order = _degrees(function, "order", order)
    if sorted(order) != list(range(features)):
        raise _checks.value_error(function, "order", f"a permutation of range({features})", str(order))
    return sorted(range(features), key=order.__getitem__)
