"""Schemas, fakes, and the implicit derivative of the inverse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvae_kernels import _library, _torch
from hvae_kernels._library import OpFunction
from hvae_kernels._op import kernel
from hvae_kernels.ops.affine_autoregressive import affine_autoregressive
from hvae_kernels.ops.autoregressive_network import reference
from hvae_kernels.ops.autoregressive_network.network import Network, fits_whole, flattened, unflattened
from hvae_kernels.ops.masked_linear import masked_linear
from hvae_kernels.ops.rational_quadratic_spline import Spline, rational_quadratic_spline

_NETWORK = (
    "Tensor[] weights, Tensor[] biases, Tensor[] offsets, Tensor[] gates, Tensor[] degrees, int[] program, "
    "int[] tail, float[] numbers"
)


def _empty(x: Tensor, wanted: bool = True) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)


def _map_fake(known, *network):
    return _empty(known), known.new_empty(known.shape[:1])


def _training_fake(x, weights, biases, offsets, gates, degrees, *rest):
    """The tape holds all units of whole tiles, and nothing where a context gates."""
    lanes, rows = 64 // x.element_size(), x.shape[0]
    lanes *= 1 if rows <= 2 * lanes else 2 if rows <= 4 * lanes else 4
    units = 0 if any(gate.numel() for gate in gates) else sum(d.shape[0] for d in degrees[1:])
    return (*_map_fake(x), x.new_empty((rows + lanes - 1) // lanes * lanes * units))


def _backward_fake(grad, grad_log_abs_det, x, tape, inverse, needs_known, needs_parameters, *network):
    lists = network[:4]
    return _empty(x, needs_known), [_empty(t, needs_parameters) for tensors in lists for t in tensors]


def _solve_fake(grad, grad_log_abs_det, x, *network):
    return _empty(x), x.new_empty(x.shape[0], network[4][-1].shape[0])


def _define(name: str, arguments: str, results: str, fake, *implementations: str) -> dict:
    return kernel(__package__, name, f"({arguments}, {_NETWORK}) -> {results}", fake, implementations)


RAW_FORWARD = _define("autoregressive_forward", "Tensor x", "(Tensor, Tensor)", _map_fake, "cpp", "triton")
RAW_TRAINING = _define("autoregressive_training", "Tensor x", "(Tensor, Tensor, Tensor)", _training_fake, "cpp")
RAW_INVERSE = _define("autoregressive_inverse", "Tensor y", "(Tensor, Tensor)", _map_fake, "cpp", "triton")
RAW_BACKWARD = _define(
    "autoregressive_backward",
    "Tensor? grad, Tensor? grad_log_abs_det, Tensor x, Tensor tape, bool inverse, bool needs_known, "
    "bool needs_parameters",
    "(Tensor, Tensor[])",
    _backward_fake,
    "cpp",
)
RAW_SOLVE = _define(
    "autoregressive_solve",
    "Tensor? grad, Tensor? grad_log_abs_det, Tensor x",
    "(Tensor, Tensor)",
    _solve_fake,
    "triton",
)


def _gradients(implementation, counts, settings, inverse, wanted, grad, grad_log_abs_det, x, tape, *tensors):
    """Gradients of the known values and of every tensor, from the kernel; None where there is none."""
    flags = inverse, wanted[0], any(wanted[1:])
    raw = RAW_BACKWARD[implementation]
    known, results = raw(grad, grad_log_abs_det, x, tape, *flags, *_lists(tensors, counts, settings))
    return (known, *results, *(None,) * counts[-1])


class AutoregressiveForward(OpFunction):
    """``(x, network) -> (y, log_abs_det, tape)``; keeps x and the stages' raw values, for one backward kernel.

    For eager first derivatives. Where more is asked (``create_graph``) the composition of the ops is differentiated.
    """

    @staticmethod
    def forward(implementation, counts, settings, x, *tensors):
        return RAW_TRAINING[implementation](x, *_lists(tensors, counts, settings))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, ctx.counts, ctx.settings, x, *tensors = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(x, output[2], *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, grad_log_abs_det, _):
        x, tape, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        if grad is None and grad_log_abs_det is None:
            return (None,) * (3 + len(wanted))
        if torch.is_grad_enabled() or any(map(_library.is_batched_gradient, (grad, grad_log_abs_det))):
            results = _composition_vjp(ctx, (x, *tensors), wanted, (grad, grad_log_abs_det))
        else:
            call = ctx.implementation, ctx.counts, ctx.settings, False, wanted
            results = _gradients(*call, grad, grad_log_abs_det, x, tape, *tensors)
        return (None, None, None, *(r if want else None for r, want in zip(results, wanted, strict=True)))


def _composition_vjp(ctx, inputs: tuple[Tensor, ...], wanted: tuple[bool, ...], cotangents) -> tuple:
    """Through the ops that the network is made of, which are differentiable to any order.

    By aliases: an input may depend on another one (a shared or tied weight), and that way is not this call's to go.
    """
    with torch.enable_grad():
        aliases = [x.view_as(x) if want else x for x, want in zip(inputs, wanted, strict=True)]
        chosen = [x for x, want in zip(aliases, wanted, strict=True) if want]
        outputs = composition(aliases[0], unflattened(aliases[1:], ctx.counts, ctx.settings))
        given = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if g is not None]
        outputs, cotangents = zip(*given, strict=True)
        gradients = torch.autograd.grad(outputs, chosen, cotangents, create_graph=True, materialize_grads=True)
    remaining = iter(gradients)
    return tuple(next(remaining) if want else None for want in wanted)


def composition(x: Tensor, network: Network) -> tuple[Tensor, Tensor]:
    """The forward direction from ``masked_linear``, activations and the op of the tail."""
    if isinstance(network.tail, Spline):
        return rational_quadratic_spline(x, reference.spline_parameters(x, network, masked_linear), network.tail)
    return affine_autoregressive(x, *reference.shift_and_scale(x, network, masked_linear), gate=network.tail)


class AutoregressiveInverse(OpFunction):
    r"""``(y, network) -> (x, log_abs_det)`` with :math:`f(x; \theta) = y`, by implicit differentiation.

    With cotangents g and h of the results, the solution v of :math:`J^\top v = g - h \nabla_x L`, L being the forward
    log-determinant, is the cotangent of y: one triangular solve with the network's own structure, which meets the
    cotangents of all units on its way, and so the gradients of all parameters. Saves x and its inputs.
    """

    @staticmethod
    def forward(implementation, counts, settings, y, *tensors):
        return RAW_INVERSE[implementation](y, *_lists(tensors, counts, settings))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, ctx.counts, ctx.settings, y, *tensors = inputs
        ctx.save_for_backward(output[0], y, *tensors)
        ctx.save_for_forward(y, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad, grad_log_abs_det):
        x, y, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        if grad is None and grad_log_abs_det is None:
            return (None,) * (3 + len(wanted))
        if torch.is_grad_enabled() or any(map(_library.is_batched_gradient, (grad, grad_log_abs_det))):
            results = _reference_vjp(ctx, y, tensors, (grad, grad_log_abs_det))
        else:
            call = ctx.implementation, ctx.counts, ctx.settings, wanted
            results = _ImplicitVjp.apply(*call, grad, grad_log_abs_det, x, *tensors)
        return (None, None, None, *(r if want else None for r, want in zip(results, wanted, strict=True)))

    @staticmethod
    def jvp(ctx, _, __, ___, *tangents):
        return torch.func.jvp(*_reference_of(ctx, ctx.saved_tensors, tangents))[1]

    @staticmethod
    def vmap(info, in_dims, implementation, counts, settings, *tensors):
        def one(*sample):
            return AutoregressiveInverse.apply(implementation, counts, settings, *sample)

        return _library.vmap_by_loop(one, info.batch_size, in_dims[3:], tensors)


def _lists(tensors: tuple[Tensor, ...], counts: tuple[int, ...], settings: tuple) -> tuple:
    """The raw ops' arguments after the features."""
    remaining = iter(tensors)
    return (*([next(remaining) for _ in range(count)] for count in counts), *map(list, settings))


class _ImplicitVjp(OpFunction):
    """The implicit derivative; a Function for the sake of its ``vmap``, never differentiated itself."""

    @staticmethod
    def forward(implementation, counts, settings, wanted, *tensors):
        x = tensors[2]
        if implementation in RAW_BACKWARD:
            grad, grad_log_abs_det, x, *network = tensors
            call = implementation, counts, settings, True, wanted
            results = _gradients(*call, grad, grad_log_abs_det, x, x.new_empty(0), *network)
        else:
            results = _solve_and_compose(implementation, counts, settings, wanted, *tensors)
        return tuple(x.new_empty(0) if r is None else r for r in results)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, implementation, counts, settings, wanted, *tensors):
        def one(*sample):
            return _ImplicitVjp.apply(implementation, counts, settings, wanted, *sample)

        return _library.vmap_by_loop(one, info.batch_size, in_dims[4:], tensors)


def _solve_and_compose(implementation, counts, settings, wanted, grad, grad_log_abs_det, x, *tensors):
    """Where the kernel only solves: the outputs' cotangents go through the network once more for its tensors."""
    solve = RAW_SOLVE[implementation]
    solution, outputs = solve(grad, grad_log_abs_det, x, *_lists(tensors, counts, settings))
    leaves = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted[1:], strict=True)]
    chosen = [leaf for leaf in leaves if leaf.requires_grad]
    if not chosen:
        return (solution, *(None for _ in leaves))
    with torch.enable_grad():
        last = reference.outputs(x, unflattened(leaves, counts, settings), masked_linear)
        gradients = iter(torch.autograd.grad(last, chosen, -outputs, materialize_grads=True))
    return (solution, *(next(gradients) if leaf.requires_grad else None for leaf in leaves))


def _reference_of(ctx, tensors, tangents=None):
    """The reference as a function of the floating tensors, them, and their tangents (None is zero)."""
    floating = [i for i, t in enumerate(tensors) if t.is_floating_point() and (t.numel() or i == 0)]

    def function(*values):
        every = list(tensors)
        for i, value in zip(floating, values, strict=True):
            every[i] = value
        return reference.autoregressive_inverse(every[0], unflattened(every[1:], ctx.counts, ctx.settings))

    primals = tuple(tensors[i] for i in floating)
    if tangents is None:
        return function, primals, floating
    return (
        function,
        primals,
        tuple(torch.zeros_like(tensors[i]) if tangents[i] is None else tangents[i] for i in floating),
    )


def _reference_vjp(ctx, y: Tensor, tensors: list[Tensor], cotangents) -> tuple[Tensor | None, ...]:
    """Where second derivatives are recorded: through the reference's steps, differentiable to any order."""
    function, primals, floating = _reference_of(ctx, (y, *tensors))
    pulled: Any = torch.func.vjp(function, *primals)
    outputs, vjp = pulled
    given = tuple(torch.zeros_like(o) if c is None else c for c, o in zip(cotangents, outputs, strict=True))
    results: list[Tensor | None] = [None] * (1 + len(tensors))
    for i, gradient in zip(floating, vjp(given), strict=True):
        results[i] = gradient
    return tuple(results)


def forward(implementation: str, x: Tensor, network: Network) -> tuple[Tensor, Tensor]:
    """The forward direction where the kernels serve it whole, otherwise composed."""
    trains = implementation in RAW_TRAINING
    if not trains and not _library.nothing_differentiates(x, *network.tensors()):
        return composition(x, network)
    counts, settings, tensors = flattened(network)
    if _library.nothing_differentiates(x, *tensors) and (trains or _fits_whole(tensors, counts, settings)):
        return RAW_FORWARD[implementation](x, *_lists(tensors, counts, settings))
    if not trains or not _library.only_reverse_mode():
        return composition(x, network)
    return AutoregressiveForward.apply(implementation, counts, settings, x, *tensors)[:2]


def _fits_whole(tensors, counts, settings) -> bool:
    _, _, _, gates, degrees, program, tail, _ = _lists(tensors, counts, settings)
    return len(tail) == 1 and fits_whole(gates, degrees, program)


@_library.opaque_to_dynamo
def call_inverse(implementation: str, counts, settings, y: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """The differentiable inverse."""
    if _torch.forward_mode_is_active() and not _torch.functorch_is_active():
        return reference.autoregressive_inverse(y, unflattened(tensors, counts, settings))
    if _library.nothing_differentiates(y, *tensors):
        return RAW_INVERSE[implementation](y, *_lists(tensors, counts, settings))
    return AutoregressiveInverse.apply(implementation, counts, settings, y, *tensors)


def inverse(implementation: str, y: Tensor, network: Network) -> tuple[Tensor, Tensor]:
    """The same for a network."""
    counts, settings, tensors = flattened(network)
    return call_inverse(implementation, counts, settings, y, *tensors)
