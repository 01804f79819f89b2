"""The MADE of nflows, and of normflows, which is a port of it: masks and residual blocks alike, contexts different."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Size, Tensor, nn

from hvae_kernels.compat import _coupling, _network
from hvae_kernels.compat._network import Foreign, Layout, Part, Unfused
from hvae_kernels.ops.rational_quadratic_spline import Spline


@dataclass(frozen=True)
class Library:
    """What tells the two apart.

    Attributes:
        made: its network's class.
        linear: its masked layer's.
        feedforward: its feed-forward block's.
        residual: its residual block's.
        gates: whether the context multiplies what a residual block adds (it adds to the block's first layer otherwise).
        preactivates: whether the context is activated before it is added at the entry, and what enters feed-forward
            blocks is activated too.
    """

    made: type
    linear: type
    feedforward: type
    residual: type
    gates: bool
    preactivates: bool


_ELEMENTWISE = "_elementwise", "_elementwise_forward", "_elementwise_inverse"


def _lay_out(
    layer: Foreign, batch: Size, context: Tensor | None, library: Library, tail: _network.Gate | Spline
) -> Layout:
    _network.require_unchanged(layer, *_ELEMENTWISE, "_unconstrained_scale_and_shift")
    net = layer.autoregressive_net
    _network.require(net, library.made)
    if type(getattr(net, "preprocessing", None)) not in (type(None), nn.Identity):
        raise Unfused(f"its input is preprocessed by {type(net.preprocessing).__name__}")
    if len(batch) != 1:
        raise Unfused("its library takes matrices only")
    parts = [Part(net.initial_layer, _network.FEATURES, offset=_entry(net, batch, context, library))]
    if library.preactivates and not net.use_residual_blocks:
        parts[0] = replace(parts[0], activation=_network.activation(net.activation))
    for block in net.blocks:
        if type(block) is library.residual:
            _add_residual(block, parts, batch, context, library)
        else:
            _network.require(block, library.feedforward)
            _add_feedforward(block, parts, context, library)
    parts.append(Part(net.final_layer, len(parts) - 1))
    for part in parts:
        _network.require(part.linear, library.linear)

    outputs = (0, tail.parameters, 1) if isinstance(tail, Spline) else (1, 2, -1)

    def degrees() -> tuple[Tensor, list[Tensor]]:
        return net.final_layer.degrees[:: outputs[1]], [part.linear.degrees for part in parts[:-1]]

    return Layout(net, parts, slice(None), degrees, tail, outputs)


def _through(
    layer: Foreign, context: Tensor | None, function: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor | None:
    """The context through the ``context_layer`` of ``layer``, and ``function`` of that."""
    if context is None:
        return None
    if not hasattr(layer, "context_layer"):
        raise Unfused("it takes no context")
    repeats = _repeats(context)
    if repeats is None:
        return function(layer.context_layer(context))
    rows, counts = repeats
    return function(layer.context_layer(rows)).repeat_interleave(counts, 0)


#: Rows from which on it pays to look for repeated ones.
FEWEST_ROWS = 1024


def _repeats(context: Tensor) -> tuple[Tensor, Tensor] | None:
    """One row of each run of equal ones and how many it has, where samplers repeated a context; None elsewhere.

    Of 10,000 samples of one context the activation of 10,000 equal rows was a third of the time.
    """
    if torch.is_grad_enabled() or context.device.type != "cpu" or context.dim() != 2 or len(context) < FEWEST_ROWS:
        return None
    if not context[0].equal(context[1]):  # the cheap question first
        return None
    begins = (context[1:] != context[:-1]).any(1).nonzero()[:, 0] + 1
    if 4 * len(begins) > len(context):
        return None
    edges = nn.functional.pad(begins, (1, 1))
    edges[-1] = len(context)
    return context[edges[:-1]], edges.diff()


def _entry(net: Foreign, batch: Size, context: Tensor | None, library: Library) -> Tensor | None:
    added = _through(net, context, net.activation) if library.preactivates else _through(net, context)
    return _network.spread(added, batch)


def _add_feedforward(block: Foreign, parts: list[Part], context: Tensor | None, library: Library) -> None:
    if block.batch_norm is not None:
        raise Unfused("batch norm inside its network")
    if context is not None and not library.preactivates:
        raise Unfused("its library's feed-forward blocks take no context")
    _require_no_dropout(block)
    parts.append(Part(block.linear, len(parts) - 1, _network.activation(block.activation)))


def _add_residual(block: Foreign, parts: list[Part], batch: Size, context: Tensor | None, library: Library) -> None:
    """The block reads the activated stream and adds to the raw one."""
    if block.use_batch_norm:
        raise Unfused("batch norm inside its network")
    if parts[-1].activation != "identity":
        raise Unfused("residual blocks behind other ones")
    _require_no_dropout(block)
    name: str = _network.activation(block.activation)
    stream = len(parts) - 1
    parts[stream] = replace(parts[stream], activation=name)
    first, second = block.linear_layers
    given = _network.spread(_through(block, context), batch)
    offset = None if library.gates else given
    gate = torch.sigmoid(given) if library.gates and given is not None else None
    parts.append(Part(first, stream, name, offset=offset))
    parts.append(Part(second, stream + 1, residual=stream, gate=gate))


def _require_no_dropout(block: Foreign) -> None:
    dropout = block.dropout
    if type(dropout) is not nn.Dropout or (dropout.p and dropout.training):
        raise Unfused(f"dropout (p = {dropout.p}) is active in training mode: swap after .eval()")


class Fused(_network.Swapped):
    """Both directions of such a layer, to stand before the library's class; that class's own code is what is left over.

    Attributes:
        lay_out: the adapter's.
        has_splines: whether its map is not affine.
    """

    lay_out: Callable[..., Layout]
    has_splines: bool

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The parallel direction."""
        gains = _network.gains(self.autoregressive_net, inputs, self.has_splines)
        network = _network.served(self.lay_out, self, inputs, context) if gains else None
        return super().forward(inputs, context) if network is None else _network.parallel(inputs, network)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sequential direction, in one pass of work."""
        network = _network.served(self.lay_out, self, inputs, context)
        return super().inverse(inputs, context) if network is None else _network.sequential(inputs, network)


class FusedSplines(Fused):
    """With splines; where features have tails or bounds of their own, the splines alone are fused, not the network."""

    def _elementwise(
        self, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``(outputs, log_abs_det)``, given the parameters."""
        if _coupling.are_alike(self) or not _coupling.is_served(inputs, autoregressive_params):
            return super()._elementwise(inputs, autoregressive_params, inverse)
        parameters, width = autoregressive_params.unflatten(-1, (inputs.shape[-1], -1)), _width(self)
        try:
            outputs, logs = _coupling.elementwise(self, inputs, parameters, self.num_bins, width, bool(inverse))
        except Unfused:
            return super()._elementwise(inputs, autoregressive_params, inverse)
        return outputs, logs.sum(-1)


def _width(layer: Foreign) -> int | None:
    return getattr(layer.autoregressive_net, "hidden_features", None)


class Adapter:
    """What an adapter has to offer, for a library with this MADE.

    Args:
        library: what is particular to its network.
        affine: its layer with the affine map.
        spline: its layer with rational-quadratic splines.
        couplings: its coupling layers with any other map.
        spline_coupling: its coupling layer with them.
        cdf: its layer with splines of parameters of its own.
        gate: the tail of an affine layer.
    """

    twin = staticmethod(copy.deepcopy)

    def __init__(
        self,
        library: Library,
        affine: type[Any],
        spline: type[Any],
        couplings: Sequence[type[Any]],
        spline_coupling: type[Any],
        cdf: type[Any],
        gate: Callable[[Foreign], _network.Gate],
    ) -> None:
        self.library, self.spline, self.gate = library, spline, gate
        self.fused = {kind: self._fused(kind) for kind in (affine, spline)}
        self.fused |= {kind: _coupling.fused(kind, _coupling.Fused) for kind in couplings}
        self.fused[spline_coupling] = _coupling.fused(spline_coupling, _coupling.FusedSplines)
        self.fused[cdf] = _coupling.fused(cdf, _coupling.FusedCDF)

    def _fused(self, kind: type) -> type:
        has_splines = kind is self.spline
        own = {"lay_out": staticmethod(self.lay_out), "library_class": kind, "has_splines": has_splines}
        fused: Any = type(f"Fused{kind.__name__}", (FusedSplines if has_splines else Fused, kind), own)
        fused.prove = functools.partial(self._prove, fused)
        return fused

    def _prove(self, fused: type[Any], layer: Foreign) -> str:
        if not isinstance(layer, self.spline) or _coupling.are_alike(layer):
            return _network.prove(layer, self)
        _network.require_unchanged(layer, "forward", "inverse", *_ELEMENTWISE)
        features = self.sizes(layer)[0]
        _coupling.prove_elementwise(fused, layer, features, layer._output_dim_multiplier(), _width(layer))
        return f"{type(layer).__name__}, the splines of {features} features"

    def sizes(self, layer: Foreign) -> tuple[int, int | None]:
        """Features and context features, None without."""
        net = layer.autoregressive_net
        _network.require(net, self.library.made)
        context = getattr(net, "context_layer", None)
        parameters = layer._output_dim_multiplier() if isinstance(layer, self.spline) else 2
        return net.final_layer.out_features // parameters, context and context.in_features

    def parallel(self, layer: Foreign, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The library's own parallel direction."""
        return layer(x, context)

    def lay_out(self, layer: Foreign, batch: Size, context: Tensor | None) -> Layout:
        """The layer's network."""
        tail = (
            _coupling.spline_of(layer, layer.num_bins, _width(layer))
            if isinstance(layer, self.spline)
            else self.gate(layer)
        )
        return _lay_out(layer, batch, context, self.library, tail)

    def swap(self, layer: nn.Module) -> None:
        """Swap in place."""
        layer.__class__ = self.fused[type(layer)]
