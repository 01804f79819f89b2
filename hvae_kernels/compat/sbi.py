"""sbi: finds the estimators that its posteriors, potentials and trainers hold; their flows are zuko's and nflows'.

Classes are known by name, so that nothing of sbi is imported: what it calls them has changed less than where they are.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def names(thing: object) -> set[str]:
    """The names of those of its classes that are sbi's; none where it has nothing to do with sbi."""
    return {cls.__name__ for cls in type(thing).__mro__ if cls.__module__.partition(".")[0] == "sbi"}


def modules(holder: object) -> Iterator[tuple[str, nn.Module]]:
    """``(name, module)`` of all that is inside, each once, by its shortest name: posteriors hold theirs twice."""
    waiting: list[tuple[str, object]] = [("", holder)]
    seen: set[int] = set()
    for name, thing in waiting:
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        prefix = f"{name}." if name else ""
        if isinstance(thing, nn.Module):
            yield name, thing
        elif isinstance(thing, list | tuple):
            waiting += [(f"{prefix}{place}", value) for place, value in enumerate(thing)]
        elif names(thing):
            waiting += [(f"{prefix}{key}", value) for key, value in getattr(thing, "__dict__", {}).items()]


def require_trained(holder: object, function: str) -> None:
    """Refuse a trainer that has made no network yet.

    Raises:
        ValueError: it has not.
    """
    if names(holder) and getattr(holder, "_neural_net", holder) is None:
        raise ValueError(
            f"{function}: module must hold a trained network, got {type(holder).__name__} whose train() has not been "
            "called: call it first, or let its density_estimator build an accelerated one"
        )


def without_flow(module: nn.Module) -> Iterator[tuple[str, str]]:
    """``(name, reason)`` of the estimators in it that hold no flow, known by what is their map."""
    for name, part in module.named_modules():
        kinds = names(part)
        if "RatioEstimator" in kinds:
            yield name, f"{type(part).__name__} is a classifier (NRE), in which there is no flow"
        elif "ConditionalVectorFieldEstimator" in kinds:
            yield name, f"{type(part).__name__} integrates a vector field, in which there are no layers of a flow"
        elif kinds & {"CategoricalMassEstimator", "MixtureDensityEstimator", "TabPFNFlow"}:
            yield name, f"{type(part).__name__} is no flow"
