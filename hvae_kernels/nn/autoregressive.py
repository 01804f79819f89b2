"""Masked linear layers, MADE, inverse and masked autoregressive flows, and stacks of flows."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from hvae_kernels import _checks, _live
from hvae_kernels.ops import autoregressive_network
from hvae_kernels.ops.affine_autoregressive import Gate, affine_autoregressive
from hvae_kernels.ops.affine_autoregressive.gates import scale_of
from hvae_kernels.ops.autoregressive_network import ACTIVATIONS, FEATURES, Network, Stage
from hvae_kernels.ops.autoregressive_network.reference import refuse_underflow
from hvae_kernels.ops.masked_linear import masked_linear


class MaskedLinear(nn.Module):
    r"""A linear layer whose output o sees input i only if ``out_degrees[o] >= in_degrees[i]``.

    Args:
        in_degrees: integers, one an input.
        out_degrees: integers, one an output.
        bias: whether to add one.
        strict: ``>`` instead of ``>=``.

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

    def __init__(
        self,
        in_degrees: Sequence[int] | Tensor,
        out_degrees: Sequence[int] | Tensor,
        bias: bool = True,
        strict: bool = False,
    ):
        super().__init__()
        _checks.flag("MaskedLinear", "bias", bias)
        _checks.flag("MaskedLinear", "strict", strict)
        self.strict = strict
        self._given = {
            "in_degrees": _degrees("MaskedLinear", "in_degrees", in_degrees),
            "out_degrees": _degrees("MaskedLinear", "out_degrees", out_degrees),
        }
        for name, degrees in self._given.items():
            self.register_buffer(name, torch.tensor(degrees))
        self.weight = nn.Parameter(torch.empty(len(self.out_degrees), len(self.in_degrees)))
        self.bias = nn.Parameter(torch.empty(len(self.out_degrees))) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Torch's ``Linear`` initialisation, and the degrees that were given or loaded: ``to_empty`` loses them."""
        for name, degrees in self._given.items():
            getattr(self, name).copy_(torch.tensor(degrees, device="cpu"))
        bound = 1 / math.sqrt(max(1, self.weight.shape[1]))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def _load_from_state_dict(self, *arguments):
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
    ):
        super().__init__()
        name = "MADE"
        widths = [hidden_features] if isinstance(hidden_features, int) else hidden_features
        if not isinstance(widths, (list, tuple)):
            expected = "an integer of at least 1, or a list or tuple of them"
            raise _checks.wrong_type(name, "hidden_features", expected, hidden_features)
        widths = list(widths)
        _checks.integer(name, "features", features, 1)
        _checks.integer(name, "outputs_per_feature", outputs_per_feature, 1)
        _checks.integer(name, "context_features", context_features, 0)
        for width in widths:
            _checks.integer(name, "hidden_features", width, 1)
        _checks.one_of(name, "activation", activation, sorted(ACTIVATIONS))
        self.features, self.outputs_per_feature = features, outputs_per_feature
        self.context_features, self.activation = context_features, activation
        degrees = _positions(name, features, order)
        spread = [self._spread(width) for width in widths]
        hidden = spread if hidden_degrees is None else self._given(hidden_degrees, widths)
        every = [degrees, *hidden, [degree - 1 for degree in degrees] * outputs_per_feature]
        self.layers = nn.ModuleList(MaskedLinear(a, b) for a, b in itertools.pairwise(every))
        self.context = nn.Linear(context_features, len(every[1]), bias=False) if context_features else None

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
            raise _checks.wrong_type("MADE", "hidden_degrees", "None, or a list or tuple of a layer's degrees", degrees)
        degrees = [_degrees("MADE", "hidden_degrees", layer) for layer in degrees]
        if [len(layer) for layer in degrees] != widths:
            raise _checks.fail("MADE", "hidden_degrees", f"of lengths {widths}", str([len(layer) for layer in degrees]))
        highest = self.features - 2  # that an output can use, then that a unit of the next layer can
        for layer in reversed(degrees):
            useless = [degree for degree in layer if not -1 <= degree <= highest]
            if useless:
                expected = f"between -1 and {highest}, so that some output can use them"
                raise _checks.fail("MADE", "hidden_degrees", expected, f"{useless[0]}")
            highest = max(layer)
        return degrees

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
                raise _checks.fail("MADE", "context", "None, as context_features is 0", context)
            return None
        if context is None:
            raise _checks.fail("MADE", "context", f"a tensor of shape (..., {self.context_features})", context)
        _checks.features("MADE", "context", context, self.context_features)
        _checks.same_kind("MADE", weight=self.context.weight, context=context)
        try:
            shape = torch.broadcast_shapes(batch, context.shape[:-1])
        except RuntimeError:
            shape = None
        if shape != batch:
            expected = f"of a batch shape that broadcasts to {tuple(batch)}, that of the features"
            raise _checks.fail("MADE", "context", expected, context)
        return self.context(context).expand(*batch, self.context.out_features)

    def network(self, tail: Gate, context: Tensor | None, batch: torch.Size) -> Network:
        """The network as data, for the kernels that walk through it; ``outputs_per_feature`` must be 2."""
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
        return Network(self.layers[0].in_degrees, stages, tail, shift=(0, 1), scale=(self.features, 1))

    def extra_repr(self) -> str:
        """Sizes and activation."""
        context = f", context_features={self.context_features}" if self.context_features else ""
        return f"features={self.features}{context}, activation={self.activation!r}"


def _is_read(made: nn.Module) -> bool:
    """Whether the kernels may read the network's tensors: to call it would run the code of these classes alone."""
    return (
        _live.runs_only(made, MADE.forward)
        and all(_live.runs_only(layer, MaskedLinear.forward) for layer in made.layers)
        and not _live.hooked_everywhere()
    )


class _Flow(nn.Module):
    """A flow with ``forward`` and ``inverse``, both ``(z, context) -> (z', log_abs_det)``."""

    features: int
    #: Whether ``forward`` is the cheap direction when both are at hand; else ``inverse``.
    forward_is_parallel = True

    @property
    def is_conditional(self) -> bool:
        """Whether a stack hands its context on to this flow."""
        return True

    def as_transform(self, context: Tensor | None = None, cache_size: int = 0) -> FlowTransform:
        """The flow as a ``torch.distributions`` transform from z to z', given the context."""
        return FlowTransform(self, context, cache_size)


class InverseAutoregressiveFlow(_Flow):
    r"""One step of an inverse autoregressive flow: :math:`z'_j = \sigma_j(z_{<j}) z_j + \tau_j(z_{<j}) \mu_j(z_{<j})`.

    ``forward`` is parallel. ``inverse`` is sequential in the features, and costs about one forward pass all the same:
    the kernels read the network's weights. Where a call of ``made`` is more than that, by hooks (hook forms of
    ``weight_norm``, ``spectral_norm`` and ``prune`` among them), subclasses or a ``forward`` of an instance, it is
    called: once by ``forward`` and ``d + 1`` times by ``inverse``.

    Args:
        features: d.
        hidden_features: width of the hidden layers, or a sequence with one for each.
        context_features: width of the context; 0 for none.
        gate: how the network's raw scale becomes a scale: a name or a ``Gate`` of ``affine_autoregressive``.
        order: a permutation of ``range(features)``; None is the natural order.
        activation: as for :class:`MADE`.
        hidden_degrees: as for :class:`MADE`.

    Raises:
        TypeError: an argument is nothing of its kind.
        ValueError: as for :class:`MADE`, or an unknown gate.

    References:
        Kingma et al., Improving variational inference with inverse autoregressive flow, 2016.

    Equivalent to:
        >>> import torch, hvae_kernels as hk
        >>> flow, z = hk.nn.InverseAutoregressiveFlow(5, [32, 32]), torch.randn(8, 5)
        >>> shift, log_scale = flow.made(z).unbind(-2)
        >>> torch.testing.assert_close(flow(z), (z * log_scale.exp() + shift, log_scale.sum(-1)))
        >>> image, log_abs_det = flow(z)
        >>> torch.testing.assert_close(flow.inverse(image), (z, -log_abs_det))
    """

    def __init__(
        self,
        features: int,
        hidden_features: int | Sequence[int],
        context_features: int = 0,
        gate: str | Gate = "affine",
        order: Sequence[int] | Tensor | None = None,
        activation: str = "relu",
        *,
        hidden_degrees: Sequence[Sequence[int] | Tensor] | None = None,
    ):
        super().__init__()
        self.features = features
        if not isinstance(gate, (str, Gate)):
            raise _checks.wrong_type(type(self).__name__, "gate", "a name or a Gate", gate)
        self.gate = gate if isinstance(gate, Gate) else Gate(gate)
        self.made = MADE(
            features, hidden_features, 2, context_features, order, activation, hidden_degrees=hidden_degrees
        )

    @property
    def is_conditional(self) -> bool:
        """Whether ``made`` takes a context; a subclass may have one of its own."""
        ours = type(self) in (InverseAutoregressiveFlow, MaskedAutoregressiveFlow) and type(self.made) is MADE
        return not ours or self.made.context is not None

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

    def _along(self, direction, by_call, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        _checks.features(type(self).__name__, "z", z, self.features)
        if not _is_read(self.made):
            return by_call(z, context)
        network = self.made.network(self.gate, context, z.shape[:-1])
        image, log_abs_det = direction(z.reshape(-1, self.features), network)
        return image.reshape(z.shape), log_abs_det.reshape(z.shape[:-1])

    def _forward_by_call(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        shift, raw = self.made(z, context).unbind(-2)
        return affine_autoregressive(z, shift, raw, gate=self.gate)

    def _inverse_by_calls(self, image: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """A call finds one feature more, as only the kernels know how to go on from one feature to the next."""
        z = torch.zeros_like(image)
        for _ in range(self.features + 1):  # the last one has to find what is there already
            shift, raw = self.made(z, context).unbind(-2)
            scale, weight, log_scale = scale_of(self.gate, raw)
            before, z = z, (image - (shift if weight is None else weight * shift)) / scale
        refuse_underflow(scale)
        tolerance = torch.finfo(z.dtype).eps ** 0.5
        if _checks.values_readable(z) and not torch.allclose(z, before, tolerance, tolerance, equal_nan=True):
            raise RuntimeError(
                f"{type(self).__name__}: hooks or code of its own make made differ from call to call, or see later "
                "features, so there is no inverse: call eval() if that is so in training only, remove them, or use the "
                "other direction alone"
            )
        return z, -log_scale.sum(-1)

    def extra_repr(self) -> str:
        """The gate."""
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


class FlowStack(_Flow):
    """Flows one after the other; log-determinants add up.

    A context goes to the flows that take one: those of this package without are left out.

    Args:
        flows: flows of one number of features, applied in this order by ``forward``.

    Raises:
        TypeError: an argument is nothing of its kind.
        ValueError: none, or flows of different numbers of features.

    Example:
        >>> import torch, hvae_kernels as hk
        >>> stack = hk.nn.FlowStack.autoregressive(hk.nn.InverseAutoregressiveFlow, 3, 5, [32])
        >>> [flow.made.layers[0].in_degrees.tolist() for flow in stack.flows]
        [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4]]
    """

    def __init__(self, flows: Sequence[_Flow]):
        super().__init__()
        if not isinstance(flows, Iterable) or isinstance(flows, (str, Tensor)):
            raise _checks.wrong_type("FlowStack", "flows", "a sequence of flows", flows)
        flows = list(flows)
        for flow in flows:
            if not isinstance(flow, nn.Module):
                raise _checks.wrong_type("FlowStack", "flows", "a sequence of flows", flow)
        sizes = {getattr(flow, "features", None) for flow in flows}
        if len(sizes) != 1 or None in sizes:
            raise _checks.fail("FlowStack", "flows", "at least one flow, all of the same features", f"features {sizes}")
        self.flows = nn.ModuleList(flows)
        (self.features,) = sizes

    @property
    def is_conditional(self) -> bool:
        """Whether any flow is."""
        return any(getattr(flow, "is_conditional", True) for flow in self.flows)

    @property
    def forward_is_parallel(self) -> bool:
        """By majority of the flows."""
        return 2 * sum(flow.forward_is_parallel for flow in self.flows) >= len(self.flows)

    @classmethod
    def autoregressive(
        cls,
        kind: type[InverseAutoregressiveFlow],
        n_layers: int,
        features: int,
        hidden_features: int | Sequence[int],
        *,
        orders: str = "reversed",
        generator: torch.Generator | None = None,
        **options,
    ) -> FlowStack:
        """``n_layers`` autoregressive flows whose orders of features alternate.

        Args:
            kind: the flows' class.
            n_layers: how many.
            features: d.
            hidden_features: as for the flow.
            orders: ``"reversed"`` (natural, reversed, natural, ...), ``"permuted"`` (random) or ``"same"``.
            generator: draws the permutations.
            **options: further arguments of the flow.

        Raises:
            TypeError: an argument is nothing of its kind.
            ValueError: ``orders`` is none of these, or ``n_layers`` is below 1.
        """
        if not (isinstance(kind, type) and issubclass(kind, InverseAutoregressiveFlow)):
            raise _checks.wrong_type("FlowStack", "kind", "a class of autoregressive flows", kind)
        _checks.integer("FlowStack", "n_layers", n_layers, 1)
        _checks.integer("FlowStack", "features", features, 1)
        _checks.generator("FlowStack", generator)
        _checks.one_of("FlowStack", "orders", orders, ("reversed", "permuted", "same"))
        flows = []
        for place in range(n_layers):
            order = list(range(features))
            if orders == "permuted":
                device = "cpu" if generator is None else generator.device
                order = torch.randperm(features, generator=generator, device=device).tolist()
            elif orders == "reversed" and place % 2:
                order.reverse()
            flows.append(kind(features, hidden_features, order=order, **options))
        return cls(flows)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All flows in order; raises ``ValueError`` where no flow takes the context."""
        return self._compose([(flow, flow) for flow in self.flows], z, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All inverses in the opposite order; raises as ``forward``."""
        return self._compose([(flow, flow.inverse) for flow in reversed(self.flows)], z, context)

    def _compose(self, directions, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        _checks.tensors("FlowStack", z=z)
        if context is not None and not self.is_conditional:
            raise _checks.fail("FlowStack", "context", "None, as no flow takes one", context)
        total = z.new_zeros(z.shape[:-1])
        for flow, direction in directions:
            z, log_abs_det = direction(z, context if getattr(flow, "is_conditional", True) else None)
            total = total + log_abs_det
        return z, total


class FlowTransform(Transform):
    """A flow as a bijection of ``torch.distributions``, on vectors.

    With ``cache_size=1`` the last pair of points is kept, and the log-determinant found on the way. They are computed
    anew when a point, the context, or a parameter or buffer of the flow has changed, its ``requires_grad`` too, and
    where gradients are on that were not recorded or that a backward pass has used up. Changes in place through
    ``.data`` are not seen: :meth:`clear_cache` after them.

    Example:
        >>> import torch, hvae_kernels as hk
        >>> base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(5), 1.0), 1)
        >>> flow = hk.nn.MaskedAutoregressiveFlow(5, [32])
        >>> model = torch.distributions.TransformedDistribution(base, [flow.as_transform(cache_size=1)])
        >>> model.log_prob(model.rsample((8,))).shape
        torch.Size([8])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, flow: _Flow, context: Tensor | None = None, cache_size: int = 0):
        if not isinstance(flow, _Flow):
            raise _checks.wrong_type("FlowTransform", "flow", "a flow of hvae_kernels.nn", flow)
        if context is not None:
            _checks.tensors("FlowTransform", context=context)
        _checks.integer("FlowTransform", "cache_size", cache_size, 0)
        super().__init__(cache_size=cache_size)
        self.flow, self.context = flow, context
        self.clear_cache()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlowTransform) and self.flow is other.flow and self.context is other.context

    __hash__ = None

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """The same transform with another cache."""
        return self if self._cache_size == cache_size else FlowTransform(self.flow, self.context, cache_size)

    def clear_cache(self) -> None:
        """Forget the pair of points."""
        self.__dict__.update(_NO_PAIR)

    def __getstate__(self):
        return super().__getstate__() | _NO_PAIR

    def __call__(self, x: Tensor) -> Tensor:
        """``y``, from the cache if it holds."""
        self._forget_what_changed()
        known, y = self._cached_x_y
        if x is not known:
            y, log_abs_det = self.flow(x, self.context)
            self._keep(x, y, y, log_abs_det)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        self._forget_what_changed()
        x, known = self._cached_x_y
        if y is not known:
            x, minus = self.flow.inverse(y, self.context)
            self._keep(x, y, x, -minus)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log |det dy/dx|``, ``(...)``; recomputed from the pair's cheaper side unless it is the cached pair."""
        self._forget_what_changed()
        known_x, known_y = self._cached_x_y
        if x is known_x and y is known_y:
            return self._cached_log_abs_det
        if self.flow.forward_is_parallel:
            return self.flow(x, self.context)[1]
        return -self.flow.inverse(y, self.context)[1]

    def _keep(self, x: Tensor, y: Tensor, found: Tensor, log_abs_det: Tensor) -> None:
        if not self._cache_size:
            return
        self._cached_x_y, self._cached_log_abs_det, self._seen = (x, y), log_abs_det, None
        if _is_transformed():
            return
        read = self._read()
        self._seen = _live.Seen(read)
        self._is_recorded = torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in read)
        transform, seen = weakref.ref(self), weakref.ref(self._seen)  # a graph must not hold its own results

        def spend(_) -> None:
            kept = transform()
            if kept is not None and kept._seen is seen():
                kept._is_recorded = False

        for node in {found.grad_fn, log_abs_det.grad_fn} - {None}:
            node.register_prehook(spend)

    def _read(self) -> list[Tensor]:
        """What the pair depends on, and itself."""
        context = () if self.context is None else (self.context,)
        return [*self._cached_x_y, self._cached_log_abs_det, *context, *self.flow.parameters(), *self.flow.buffers()]

    def _forget_what_changed(self) -> None:
        if self._cached_log_abs_det is None:
            return
        if _is_transformed():
            holds = self._seen is None  # of the same trace
        else:
            usable = self._is_recorded or not torch.is_grad_enabled()
            foreign = self._cached_log_abs_det.is_inference() and not torch.is_inference_mode_enabled()
            holds = self._seen is not None and usable and not foreign and self._seen.again(self._read())
        if not holds:
            self.clear_cache()


#: A :class:`FlowTransform` that keeps no pair.
_NO_PAIR = {"_cached_x_y": (None, None), "_cached_log_abs_det": None, "_seen": None, "_is_recorded": False}


def _is_transformed() -> bool:
    """Whether tensors stand for others, whose changes and graphs cannot be looked at."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _degrees(function: str, argument: str, degrees: Sequence[int] | Tensor) -> list[int]:
    """As numbers of Python: on the meta device tensors have none."""
    expected = "a non-empty sequence of integers"
    try:
        tensor = degrees if isinstance(degrees, Tensor) else torch.as_tensor(degrees, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise _checks.wrong_type(function, argument, expected, degrees) from None
    if tensor.dtype.is_floating_point or tensor.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise _checks.wrong_type(function, argument, "integers", degrees)
    if tensor.dim() != 1 or not len(tensor):
        raise _checks.fail(function, argument, expected, degrees)
    if tensor.is_meta or tensor.layout is not torch.strided:
        raise _checks.fail(function, argument, "integers whose values can be read", degrees)
    return tensor.tolist()


def _positions(function: str, features: int, order: Sequence[int] | Tensor | None) -> list[int]:
    """The place of each feature in the order."""
    if order is None:
        return list(range(features))
    order = _degrees(function, "order", order)
    if sorted(order) != list(range(features)):
        raise _checks.fail(function, "order", f"a permutation of range({features})", str(order))
    return sorted(range(features), key=order.__getitem__)
