"""Flows one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hvae_kernels import _checks, _live
from hvae_kernels.nn.annealed import AnnealedHamiltonianFlow
from hvae_kernels.nn.autoregressive import InverseAutoregressiveFlow
from hvae_kernels.nn.coupling import CouplingFlow
from hvae_kernels.nn.flow import Flow
from hvae_kernels.nn.hamiltonian import HamiltonianFlow


class FlowStack(Flow):
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

    flows: Any  # an nn.ModuleList of Flow, for which torch has no type

    def __init__(self, flows: Sequence[Flow]) -> None:
        super().__init__()
        if not isinstance(flows, Iterable) or isinstance(flows, (str, Tensor)):
            raise _checks.type_error("FlowStack", "flows", "a sequence of flows", flows)
        flows = list(flows)
        for flow in flows:
            if not isinstance(flow, nn.Module) or isinstance(flow, HamiltonianFlow | AnnealedHamiltonianFlow):
                raise _checks.type_error("FlowStack", "flows", "a sequence of flows", flow)
        sizes: set[Any] = {getattr(flow, "features", None) for flow in flows}
        if len(sizes) != 1 or None in sizes:
            raise _checks.value_error(
                "FlowStack", "flows", "at least one flow, all of the same features", f"features {sizes}"
            )
        self.flows = nn.ModuleList(flows)
        (self.features,) = sizes

    @property
    def is_conditional(self) -> bool:
        """Whether any flow is; code that is not ours may have a context of its own."""
        ours = type(self) is FlowStack and _live.untouched(self)
        return not ours or any(getattr(flow, "is_conditional", True) for flow in self.flows)

    @property
    def forward_is_parallel(self) -> bool:  # type: ignore[override]
        """By majority of the flows."""
        return 2 * sum(getattr(flow, "forward_is_parallel", True) for flow in self.flows) >= len(self.flows)

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
        **options: Any,
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
            raise _checks.type_error("FlowStack", "kind", "a class of autoregressive flows", kind)
        _checks.integer("FlowStack", "n_layers", n_layers, 1)
        _checks.integer("FlowStack", "features", features, 1)
        _checks.generator("FlowStack", generator)
        _checks.one_of("FlowStack", "orders", orders, ("reversed", "permuted", "same"))
        if "order" in options:
            raise _checks.value_error("FlowStack", "order", "absent, as orders says it", options["order"])
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

    @classmethod
    def coupling(cls, n_layers: int, features: int, hidden_features: int | Sequence[int], **options: Any) -> FlowStack:
        """``n_layers`` coupling flows; every other one transforms the features that pass through its neighbours.

        Args:
            n_layers: how many.
            features: d, at least 2.
            hidden_features: as for the flow.
            **options: further arguments of :class:`CouplingFlow`; ``mask`` is that of the first one.

        Raises:
            TypeError: an argument is nothing of its kind.
            ValueError: a size is out of range, or a mask that transforms all features or none.
        """
        _checks.integer("FlowStack", "n_layers", n_layers, 1)
        _checks.integer("FlowStack", "features", features, 2)
        if options.get("conditioner") is not None:
            expected = "absent, as all layers would share it: make a FlowStack of CouplingFlow"
            raise _checks.value_error("FlowStack", "conditioner", expected, options["conditioner"])
        first = CouplingFlow(features, hidden_features, **options)
        others = (
            CouplingFlow(
                features, hidden_features, **{**options, "mask": first.mask if place % 2 == 0 else ~first.mask}
            )
            for place in range(1, n_layers)
        )
        return cls([first, *others])

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All flows in order; raises ``ValueError`` where no flow takes the context."""
        return self._compose([(flow, flow) for flow in self.flows], z, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All inverses in the opposite order; raises as ``forward``."""
        return self._compose([(flow, flow.inverse) for flow in reversed(self.flows)], z, context)

    def _compose(
        self,
        directions: Iterable[tuple[Flow, Callable[..., tuple[Tensor, Tensor]]]],
        z: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        _checks.tensors("FlowStack", z=z)
        if context is not None and not self.is_conditional:
            raise _checks.value_error("FlowStack", "context", "None, as no flow takes one", context)
        total = z.new_zeros(z.shape[:-1])
        for flow, direction in directions:
            given = context if context is not None and getattr(flow, "is_conditional", True) else None
            z, log_abs_det = direction(z, given)
            total = total + log_abs_det
        return z, total
