"""Flows of every kind as maps from noise to points, one after the other: ours, torch's, and other libraries'.

Other libraries' classes are known by name, so that nothing of them is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributions import ComposeTransform, Transform, TransformedDistribution

from hvae_kernels import _checks, _live
from hvae_kernels._torch import InverseTransform
from hvae_kernels.nn.flow import Flow, FlowTransform
from hvae_kernels.nn.hamiltonian import HamiltonianFlow
from hvae_kernels.nn.stack import FlowStack

EXPECTED = (
    "a flow of hvae_kernels.nn, a module whose forward and inverse return (x, log_abs_det), a transform or "
    "TransformedDistribution of torch.distributions, a flow of zuko, nflows, glasflow or normflows, a transform of "
    "pyro, or a list of maps"
)
Pair = tuple[Tensor, Tensor]
Direction = Callable[[Tensor], Pair]


@dataclass(frozen=True)
class Map:
    """A map with its log-determinant, both ways; ``inverse`` may raise ``NotImplementedError``.

    Attributes:
        forward: from noise towards points.
        inverse: back.
        module: holds the parameters that both read, as far as known.
        flow: the flow of this package that it is, going forwards.
    """

    forward: Direction
    inverse: Direction
    module: nn.Module | None = None
    flow: Flow | None = None


#: Maps, and the distribution of the noise where the flow brings its own: its ``log_prob``.
Opened = tuple[list[Map], Callable[[Tensor], Tensor] | None]


def opened(name: str, flow: Any, context: Tensor | None) -> Opened:
    """The maps of a flow, given the context.

    Raises:
        TypeError: nothing that is known.
        ValueError: a context that nobody takes.
    """
    if isinstance(flow, TransformedDistribution):
        _refuse_context(name, flow, context)
        return _maps(name, list(flow.transforms), None), flow.base_dist.log_prob
    families = _names(flow)
    if ("zuko", "NormalizingFlow") in families:
        _refuse_context(name, flow, context)
        return _of_transform(name, flow.transform, inverted=True), flow.base.log_prob
    if ("zuko", "LazyDistribution") in families:
        return _of_zuko(name, flow, context)
    if families & {("nflows", "Flow"), ("glasflow", "Flow")}:
        return _of_nflows(flow, context)
    if ("normflows", "NormalizingFlow") in families:
        return _of_normflows(name, flow, context)
    if ("pyro", "ConditionalTransformedDistribution") in families:
        return opened(name, flow.condition(context), None)
    return _maps(name, flow, context), None


def _maps(name: str, flow: Any, context: Tensor | None, inverted: bool = False) -> list[Map]:
    """Of what brings no base of its own; ``inverted``: from its points to its noise."""
    if isinstance(flow, HamiltonianFlow):
        expected = (
            "a flow of positions alone, for which HamiltonianFlow has no density: it moves them with momenta, by a "
            "potential that is an argument of its forward"
        )
        raise _checks.type_error(name, "flow", expected, flow)
    if type(flow) is FlowStack and _live.runs_only(flow, FlowStack.forward) and not _live.hooked_everywhere():
        return _chain(name, flow.flows, context, inverted)
    if isinstance(flow, list | tuple | nn.ModuleList):
        return _chain(name, flow, context, inverted)
    if isinstance(flow, Transform):
        _refuse_context(name, flow, context)
        return _of_transform(name, flow, inverted)
    if ("pyro", "ConditionalTransform") in _names(flow):
        return [_of_conditional(flow, context)]
    if isinstance(flow, nn.Module) and callable(getattr(flow, "inverse", None)):
        return [_of_module(name, flow, context, inverted)]
    raise _checks.type_error(name, "flow", EXPECTED, flow)


def _chain(name: str, flows: Iterable[Any], context: Tensor | None, inverted: bool) -> list[Map]:
    """Of flows one after the other; the context goes to those that take one, as far as that is known."""
    flows = list(flows)
    takes = [not isinstance(flow, Transform) and getattr(flow, "is_conditional", True) for flow in flows]
    if context is not None and not any(takes):
        raise _checks.value_error(name, "context", "None, as no flow takes one", context)
    maps = [_maps(name, flow, context if own else None, inverted) for flow, own in zip(flows, takes, strict=True)]
    return [one for part in (reversed(maps) if inverted else maps) for one in part]


def _of_module(name: str, flow: Any, context: Tensor | None, inverted: bool) -> Map:
    given, held = ((), ()) if context is None else ((context,), (context.detach(),))
    there, back = (flow.inverse, flow) if inverted else (flow, flow.inverse)
    ours = flow if isinstance(flow, Flow) and not inverted else None
    return Map(lambda z: _pair(name, there(z, *given)), lambda x: _pair(name, back(x, *held)), flow, ours)


def _of_transform(name: str, transform: Any, inverted: bool) -> list[Map]:
    """Ours without their caches, a composition part by part."""
    if isinstance(transform, InverseTransform):
        return _of_transform(name, transform.inv, not inverted)
    if isinstance(transform, FlowTransform):
        return _maps(name, transform.flow, transform.context, inverted)
    if isinstance(transform, ComposeTransform):
        return _chain(name, transform.parts, None, inverted)
    there, back = (transform.inv, transform) if inverted else (transform, transform.inv)
    module = transform if isinstance(transform, nn.Module) else None
    return [Map(lambda z: _apply(there, z), lambda x: _apply(back, x), module)]


def _of_conditional(flow: Any, context: Tensor | None) -> Map:
    """A transform of pyro, given the context; at each call, as its parameters may be others then."""

    def inverse(x: Tensor) -> Pair:
        return _apply(flow.condition(*_detached((context,))).inv, x)

    return Map(lambda z: _apply(flow.condition(context), z), inverse, flow if isinstance(flow, nn.Module) else None)


def _of_zuko(name: str, flow: Any, context: Tensor | None) -> Opened:
    """Zuko's transforms go from points to noise."""
    built = flow(context)
    if ("zuko", "NormalizingFlow") not in _names(built):
        raise _checks.type_error(name, "flow", EXPECTED, flow)

    def inverse(x: Tensor) -> Pair:
        return _apply(flow(*_detached((context,))).transform, x)

    return [Map(lambda z: _apply(built.transform.inv, z), inverse, flow)], built.base.log_prob


def _of_nflows(flow: Any, context: Tensor | None) -> Opened:
    """Nflows' go from points to noise too; what reads the context may be a network, which glasflow's have not."""
    embedding = getattr(flow, "_embedding_net", None)

    def embedded(context: Tensor | None) -> Tensor | None:
        return context if embedding is None else embedding(context)

    def inverse(x: Tensor) -> Pair:
        return flow._transform(x, context=embedded(*_detached((context,))))

    given = embedded(context)
    options = {} if embedding is None else {"context": given}
    one = Map(lambda z: flow._transform.inverse(z, context=given), inverse, flow)
    return [one], lambda z: flow._distribution.log_prob(z, **options)


def _of_normflows(name: str, flow: Any, context: Tensor | None) -> Opened:
    """Layer by layer, as it adds up log-determinants in the default dtype."""
    if ("normflows", "ConditionalNormalizingFlow") not in _names(flow):
        _refuse_context(name, flow, context)
        return _chain(name, flow.flows, None, inverted=False), flow.q0.log_prob
    return _chain(name, flow.flows, context, inverted=False), lambda z: flow.q0.log_prob(z, context=context)


def _apply(transform: Any, x: Tensor) -> Pair:
    """A transform and its log-determinant, summed over features where it goes feature by feature."""
    x = x.view_as(x)  # caches go by identity: this one may have met other parameters, or no_grad
    try:
        if hasattr(transform, "call_and_ladj"):  # zuko's, at once
            y, log_abs_det = transform.call_and_ladj(x)
        else:
            y = transform(x)
            log_abs_det = transform.log_abs_det_jacobian(x, y)
    except KeyError as error:  # so pyro says that there is no inverse
        raise NotImplementedError(str(error)) from error
    return y, log_abs_det.sum(-1) if log_abs_det.dim() == x.dim() else log_abs_det


def _pair(name: str, result: Any) -> Pair:
    if not isinstance(result, tuple) or len(result) != 2:
        raise _checks.type_error(name, "flow", EXPECTED, result)
    return result


def _detached(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in tensors)


def _names(flow: object) -> set[tuple[str, str]]:
    """Package and name of all of its classes."""
    return {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(flow).__mro__}


def _refuse_context(name: str, flow: object, context: Tensor | None) -> None:
    if context is not None:
        raise _checks.value_error(name, "context", f"None, as {type(flow).__name__} takes none", context)
