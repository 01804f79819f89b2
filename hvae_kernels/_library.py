"""The one ``torch.library`` fragment, and what every op's autograd glue shares.

An op ``x`` has one schema and one overload an implementation: ``hvae_kernels::x.cpp``, ``hvae_kernels::x.triton``.
The overloads are raw kernels without autograd; the differentiable op is the ``autograd.Function`` in its folder.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvae_kernels import _checks, _torch

NAMESPACE = "hvae_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(name: str, signature: str, fake: Callable, implementations: tuple[str, ...]) -> dict[str, Callable]:
    """Define ``name``'s raw overloads with their fake; returns the overload to call for each implementation."""
    overloads = {}
    for implementation in implementations:
        qualified = f"{name}.{implementation}"
        LIBRARY.define(qualified + signature)
        torch.library.register_fake(f"{NAMESPACE}::{qualified}", fake, lib=LIBRARY)
        overloads[implementation] = getattr(getattr(torch.ops.hvae_kernels, name), implementation)
    return overloads


def implement(name: str, implementation: str, function: Callable) -> None:
    """Register a Python kernel (a Triton launcher) for an overload, for every device."""
    LIBRARY.impl(f"{name}.{implementation}", function, "CompositeExplicitAutograd")


FORWARD_WITHIN_FORWARD = "torch loses the derivative of a kernel by jvp within jvp; the reference has it"


def _outside_autocast(backward: Callable) -> Callable:
    @functools.wraps(backward)
    def guarded(ctx, *grads):
        for grad in grads:
            if grad is not None:
                device = grad.device.type
                break
        else:
            return backward(ctx, *grads)
        if not torch.is_autocast_enabled(device):
            return backward(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return guarded


class OpFunction(torch.autograd.Function):
    """An ``autograd.Function`` in ``setup_context`` style without the price of that style.

    The stock ``apply`` re-binds the signature with ``inspect`` at every call (15 us), which only functorch needs.
    Backward passes run outside autocast, which would make their products half-precision ones.
    """

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "backward" in vars(cls):
            cls.backward = staticmethod(_outside_autocast(cls.backward))

    @classmethod
    def apply(cls, *args):
        if _torch.functorch_is_active():
            if _torch.forward_within_forward():  # of what was pulled back to here, as other calls take the reference
                raise NotImplementedError(f"{cls.__name__}: {FORWARD_WITHIN_FORWARD} (implementation='reference')")
            return super().apply(*args)
        args = [_torch.unwrap_if_dead(x) if isinstance(x, Tensor) else x for x in args]
        return super(torch.autograd.Function, cls).apply(*args)


_OPAQUE: list[Callable] = []


def opaque_to_dynamo(function: Callable) -> Callable:
    """Mark an op's helper that Dynamo writes into its graph as it is: it loses the second order of what it traces.

    ``torch.compiler.allow_in_graph`` for everybody who compiles, at no price for those who do not: it imports Dynamo,
    which takes longer than importing torch, so it is called when Dynamo first meets one of our ops.
    """
    _OPAQUE.append(function)
    return function


def register_opaque() -> None:
    """Hand the functions marked by :func:`opaque_to_dynamo` to Dynamo, once."""
    while _OPAQUE:
        torch.compiler.allow_in_graph(_OPAQUE.pop())


def nothing_differentiates(*tensors: Tensor | None) -> bool:
    """Whether an op may skip its Function: no functorch transform, no forward mode, no gradients of ``tensors``."""
    if _torch.functorch_is_active() or _torch.forward_mode_is_active():
        return False
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and _torch.unwrap_if_dead(tensor).requires_grad:
                return False
    return True


def only_reverse_mode() -> bool:
    """Whether a Function needs neither ``vmap`` nor ``jvp`` nor to be traced."""
    return (
        not torch.compiler.is_compiling() and not _torch.functorch_is_active() and not _torch.forward_mode_is_active()
    )


def is_batched_gradient(grad: Tensor | None) -> bool:
    """Whether ``torch.autograd.grad(is_grads_batched=True)`` made it: raw ops that take lists have no rule for it."""
    return grad is not None and _torch.is_legacy_batched(grad)


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for ``tensor``'s device; the meta device knows none. No tensor is left to checks."""
    if not isinstance(tensor, Tensor):
        return False
    device_type = tensor.device.type
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def in_float32(op: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``op`` outside autocast, with half-precision tensors as float32: these ops accumulate rounding."""
    half = _checks.HALF_PRECISION
    device_type = next(x.device.type for x in arguments if isinstance(x, Tensor))
    with torch.autocast(device_type, enabled=False):
        return op(*(x.float() if isinstance(x, Tensor) and x.dtype in half else x for x in arguments))


def vmap_by_loop(
    function: Callable[..., tuple[Tensor, ...]], size: int, in_dims: tuple[int | None, ...], args: tuple
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """A Function's ``vmap`` where no kernel takes the batch: one call a sample, results stacked in front."""
    if size == 0:
        raise ValueError("vmap over an empty dimension: this op takes its samples one by one, and there are none")
    columns = [[x] * size if dim is None else x.movedim(dim, 0).unbind() for x, dim in zip(args, in_dims, strict=True)]
    samples = [function(*sample) for sample in zip(*columns, strict=True)]
    results = tuple(torch.stack(column) for column in zip(*samples, strict=True))
    return results, (0,) * len(results)


def jvp_of_double_backward(
    reference: Callable[..., tuple[Tensor, ...]],
    directions: tuple[Tensor | None, ...],
    cotangents: tuple[Tensor | None, ...],
    inputs: tuple[Tensor, ...],
    tangents: tuple[Tensor | None, ...],
) -> tuple[Tensor, ...]:
    """Third derivatives forward: tangents of the double backward's results.

    Args: as of :func:`vjp_of_double_backward`; ``tangents`` of ``directions``, ``cotangents`` and ``inputs``, None for
    zero.
    """
    double_backward, variables = _double_backward(reference, directions, cotangents, inputs)
    tangents = tuple(torch.zeros_like(x) if t is None else t for t, x in zip(tangents, variables, strict=True))
    return torch.func.jvp(double_backward, variables, tangents)[1]


def vjp_of_double_backward(
    reference: Callable[..., tuple[Tensor, ...]],
    directions: tuple[Tensor | None, ...],
    cotangents: tuple[Tensor | None, ...],
    inputs: tuple[Tensor, ...],
    upstream: tuple[Tensor | None, ...],
) -> tuple[Tensor, ...]:
    """Third derivatives, from the reference: rarely asked for, so plain PyTorch, differentiable to any order.

    Args:
        reference: the op, plain.
        directions: cotangents of the first backward's results, one an input (None is zero).
        cotangents: cotangents of the op's outputs (None is zero).
        inputs: the op's inputs.
        upstream: cotangents of the double backward's results: one an output, then one an input.

    Returns:
        Gradients for ``directions``, ``cotangents`` and ``inputs``, in this order.
    """
    double_backward, variables = _double_backward(reference, directions, cotangents, inputs)
    wanted = variables[len(inputs) :]
    upstream = tuple(torch.zeros_like(v) if u is None else u for u, v in zip(upstream, wanted, strict=True))
    return torch.func.vjp(double_backward, *variables)[1](upstream)


def _double_backward(
    reference: Callable[..., tuple[Tensor, ...]],
    directions: tuple[Tensor | None, ...],
    cotangents: tuple[Tensor | None, ...],
    inputs: tuple[Tensor, ...],
) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A plain double backward, and where it is to be differentiated: ``(*directions, *cotangents, *inputs)``."""
    outputs = reference(*inputs)
    vectors = tuple(torch.zeros_like(x) if h is None else h for h, x in zip(directions, inputs, strict=True))
    covectors = tuple(torch.zeros_like(y) if g is None else g for g, y in zip(cotangents, outputs, strict=True))
    n_outputs, n_inputs = len(covectors), len(inputs)

    def pairing(*variables: Tensor) -> Tensor:
        """``sum_i <direction_i, gradient_i>``; its gradients are the double backward's results."""
        h, g, x = variables[:n_inputs], variables[n_inputs : n_inputs + n_outputs], variables[n_inputs + n_outputs :]
        gradients = torch.func.vjp(reference, *x)[1](tuple(g))
        return sum((a * b).sum() for a, b in zip(h, gradients, strict=True))

    def double_backward(*variables: Tensor) -> tuple[Tensor, ...]:
        wanted = tuple(range(n_inputs, len(variables)))
        return torch.func.grad(pairing, argnums=wanted)(*variables)

    return double_backward, (*vectors, *covectors, *inputs)
