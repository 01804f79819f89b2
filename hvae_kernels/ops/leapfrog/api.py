"""Where users' calls enter: docstring, validation, dispatch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from hvae_kernels import _checks, _dispatch, _library, _torch
from hvae_kernels.ops.leapfrog import statistics
from hvae_kernels.ops.leapfrog.autograd import ReversibleLeapfrog
from hvae_kernels.ops.leapfrog.field import NAME, Field, modules_called
from hvae_kernels.ops.leapfrog.reference import Potential, functional_gradient
from hvae_kernels.ops.leapfrog_update.trajectory import coefficients, leapfrog_trajectory, update_of

MEMORY = ("reversible", "store")
GRADIENT = ("full", "detached")


def leapfrog(
    z: Tensor,
    rho: Tensor,
    potential: Potential | nn.Module,
    step_size: Tensor,
    tempering: Tensor,
    *,
    params: Iterable[Tensor] | None = None,
    memory: str = "reversible",
    gradient: str = "full",
    compile: bool = False,
    on_drift: Callable[[Tensor], object] | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""K tempered leapfrog steps through any differentiable potential, in memory that does not grow with K.

    One step k is

    .. math::
        \rho' = \rho - \tfrac{\epsilon}{2} \nabla U(z), \quad
        z \leftarrow z + \epsilon \rho', \quad
        \rho \leftarrow \alpha_k \big(\rho' - \tfrac{\epsilon}{2} \nabla U(z)\big).

    The gradient that ends a step begins the next, so K steps take K + 1 gradients. The map is its own inverse's mirror:
    ``memory="reversible"`` keeps its end alone, and the backward pass steps back from there, with K + 1 gradients and
    Hessian-vector products more.

    Args:
        z: positions ``(B, ...)``; which dimensions are the batch's is what the shape of the energies says.
        rho: momenta, the shape of ``z``.
        potential: U, differentiable: energies ``(B,)`` of positions, or ``()`` of a single position ``(d,)``. It must
            be the same function at every evaluation. Those of the backward pass run with the tensors, modules and
            settings of the forward pass, whatever has come in their place since; they are back in their place while it
            runs, where other threads see them. Batch norm in training mode updates its running statistics at the first
            evaluation alone, whatever other threads do with the same module.
        step_size: epsilon, ``()`` or of a position's shape ``(...)`` for all steps, ``(K, ...)`` for each.
        tempering: alpha, ``(K,)``, nowhere zero if the trajectory is to be rebuilt. K = 0 returns copies of the inputs.
        params: the tensors besides ``z`` that need gradients through the potential; by default a module's parameters
            and buffers. Those that require no gradients are left out. Only ``memory="reversible"`` needs to know them.
        memory: ``"reversible"``, or ``"store"``: keep every step's graph, which is faster by the K + 1 evaluations.
        gradient: ``"full"``, or ``"detached"``: take every gradient of U for a constant. Cheaper, and biased.
        compile: compile the gradient (and by that its backward pass) for use in all evaluations but the first. The
            time that it takes does not depend on K. On a CPU without Inductor's choice of memory layouts, whose kernels
            may write past their end; give your own ``torch.compile`` of a convolutional potential the same
            ``options={"layout_optimization": False}``.
        on_drift: called by every reversible backward pass with the largest distance of an entry of the rebuilt ``z``
            from the true one, a tensor ``()``; keeps a copy of ``z``, and leaves out the comparison of gradients.
        implementation: of the updates between gradients, as for :func:`hvae_kernels.use_impl`; None is what that says.
            The potential makes its own calls.

    Returns:
        ``(z_K, rho_K)``, new tensors of ``z``'s shape. The Jacobian determinant of the map is ``prod_k alpha_k^d``,
        with d the size of a position.

    All tensors have one dtype and device; a reversible trajectory carries its state in double. Differentiable once in
    every argument and in ``params``; as often as the potential is with ``memory="store"``. Inside ``torch.func``
    transforms and under ``torch.compile(fullgraph=True)`` the formula is unrolled, whatever ``memory`` and ``compile``
    say; running statistics then take one evaluation more. Under autocast the steps stay in float32, the potential does
    as it is told.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: shapes or devices do not fit; an option is unknown; the potential does not depend on ``z``, its
            energies do not fit, or, for a reversible trajectory, it draws random numbers, changes its buffers at every
            evaluation, has a part that is differentiable once, or needs gradients of a tensor that is not among
            ``params``; a tempering cannot be divided by (looked at on the CPU).
        RuntimeError: in the backward pass, tensors were written in place or a module's training mode has changed since;
            the potential's gradient is another one (looked at on the CPU); it has no second derivative, as attention
            outside of ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``; or a second derivative is asked for.

    References:
        Neal, MCMC using Hamiltonian dynamics, 2011, section 5.5.7; Caterini, Doucet and Sejdinovic, Hamiltonian
        variational auto-encoder, 2018, algorithm 1.

    Equivalent to:
        >>> import torch, hvae_kernels as hk
        >>> z, rho = torch.randn(2, 8, 3, dtype=torch.float64).requires_grad_().unbind()
        >>> step_size, tempering = torch.tensor(0.1).double(), torch.tensor([0.9, 0.8]).double()
        >>> potential = lambda z: torch.logsumexp(z, -1)
        >>> result = hk.functional.leapfrog(z, rho, potential, step_size, tempering)
        >>> gradient = lambda z: torch.autograd.grad(potential(z).sum(), z, create_graph=True)[0]
        >>> for alpha in tempering:
        ...     rho = rho - step_size / 2 * gradient(z)
        ...     z = z + step_size * rho
        ...     rho = alpha * (rho - step_size / 2 * gradient(z))
        >>> torch.testing.assert_close(result, (z, rho))
    """
    _validate(z, rho, step_size, tempering, memory, gradient)
    _validate_callables(potential, on_drift)
    _checks.flag(NAME, "compile", compile)
    if implementation is not None:
        _dispatch.validate(implementation, NAME)
    params = None if params is None else _checks.tensors_among(NAME, "params", params)
    if tempering.shape[0] == 0:
        return z.clone(), rho.clone()
    if _library.autocasts(z):
        half = _checks.HALF_PRECISION
        z, rho, step_size, tempering = (x.float() if x.dtype in half else x for x in (z, rho, step_size, tempering))
    full = gradient == "full"
    if torch.compiler.is_compiling() or _torch.functorch_is_active():
        return _unrolled(z, rho, potential, step_size, tempering, full, implementation)
    if torch.is_inference_mode_enabled():  # where nothing is recorded, not even for the potential's own gradient
        with torch.inference_mode(False), torch.no_grad():
            inputs = z.clone(), rho.clone(), potential, step_size.clone(), tempering.clone()
            return leapfrog(*inputs, memory=memory, gradient=gradient, compile=compile, implementation=implementation)
    field = Field(potential, compile)
    if memory == "store" or not torch.is_grad_enabled():
        return _stored(z, rho, field, step_size, tempering, full and torch.is_grad_enabled(), implementation)
    _check_tempering(tempering)
    grad, batch, watched = field.first_of_rebuilt(z, lambda: _parameters(potential, params), full)
    doubles = (x.double() for x in (z, rho, grad, step_size, tempering))
    chosen, state, steps = _flat(implementation, batch, *doubles)
    end = ReversibleLeapfrog.apply(field, chosen, full, on_drift, *state, *steps, *watched)
    return end[0].to(z.dtype).reshape(z.shape), end[1].to(z.dtype).reshape(z.shape)


def _stored(
    z: Tensor,
    rho: Tensor,
    field: Field,
    step_size: Tensor,
    tempering: Tensor,
    record: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    """Autograd keeps what there is to keep."""
    grad, batch = field.first(z, record)
    chosen, state, steps = _flat(implementation, batch, z, rho, grad, step_size, tempering)
    with field.held():
        end = leapfrog_trajectory(update_of(chosen), *state, lambda position: field(position, record), *steps)
    return end[0].reshape(z.shape), end[1].reshape(z.shape)


def _unrolled(
    z: Tensor,
    rho: Tensor,
    potential: Potential,
    step_size: Tensor,
    tempering: Tensor,
    full: bool,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    """The formula as ``torch.func`` and ``torch.compile`` take it.

    They let no module change its buffers while it is differentiated, so running statistics take one evaluation more.
    """
    modules = list(potential.modules()) if isinstance(potential, nn.Module) else []

    def gradient(position: Tensor) -> tuple[Tensor, Tensor]:
        grad, energy = functional_gradient(potential, position.reshape(z.shape))
        return grad if full else grad.detach(), energy

    with statistics.held(modules) as tracking:
        grad, energy = gradient(z)
        chosen, state, steps = _flat(implementation, energy.shape, z, rho, grad, step_size, tempering)
        flat = state[0].shape
        end = leapfrog_trajectory(
            update_of(chosen), *state, lambda position: gradient(position)[0].reshape(flat), *steps
        )
    if tracking:
        alone = contextlib.nullcontext() if torch.compiler.is_compiling() else modules_called()
        with torch.no_grad(), alone:
            potential(z)
    return end[0].reshape(z.shape), end[1].reshape(z.shape)


def _flat(
    implementation: str | None,
    batch: torch.Size,
    z: Tensor,
    rho: Tensor,
    grad: Tensor,
    step_size: Tensor,
    tempering: Tensor,
) -> tuple[str, tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """The updates' implementation, ``(z, rho, grad)`` with one dimension a position, and the updates' coefficients."""
    event, n_steps = z.shape[len(batch) :], tempering.shape[0]
    if z.shape[: len(batch)] != batch or (not batch and z.dim() > 1):
        expected = f"a function with energies (B,), one for each position in z {tuple(z.shape)}"
        raise _checks.value_error(NAME, "potential", expected, f"energies of shape {tuple(batch)}")
    if step_size.dim() and not _checks.has_shape(step_size, event, (n_steps, *event)):
        expected = f"of shape (), {tuple(event)} or {(n_steps, *event)}"
        raise _checks.value_error(NAME, "step_size", expected, step_size)
    features = math.prod(event)
    if step_size.dim():
        step_size = step_size.reshape(*step_size.shape[: step_size.dim() - len(event)], features)
    shape = (*batch, features)
    state = z.reshape(shape), rho.reshape(shape), grad.reshape(shape)
    chosen = _dispatch.resolve("leapfrog_update", z, implementation)
    return chosen, state, coefficients(step_size, tempering, features)


def _parameters(potential: Potential | nn.Module, params: Iterable[Tensor] | None) -> list[Tensor]:
    """Those given, each once, or a module's parameters and buffers; a plain function does not tell."""
    if params is None:
        if not isinstance(potential, nn.Module):
            return []
        # a copy that torch made for one of several devices has its parameters as attributes
        copies = (x for m in potential.modules() for x in vars(m).get("_former_parameters", {}).values())
        params = [*potential.parameters(), *potential.buffers(), *copies]
    return list({id(x): x for x in params}.values())


def _check_tempering(tempering: Tensor) -> None:
    if _checks.values_readable(tempering) and not bool(tempering.all()):
        expected = "nowhere zero with memory='reversible', as rebuilding divides by it"
        raise _checks.value_error(NAME, "tempering", expected, tempering)


def _validate_callables(potential: object, on_drift: object) -> None:
    for argument, function in (("potential", potential), ("on_drift", on_drift)):
        if not callable(function) and (argument == "potential" or function is not None):
            expected = "a function or a torch.nn.Module" if argument == "potential" else "a function or None"
            raise _checks.type_error(NAME, argument, expected, function)


def _validate(z: Tensor, rho: Tensor, step_size: Tensor, tempering: Tensor, memory: str, gradient: str) -> None:
    _checks.one_of(NAME, "memory", memory, MEMORY)
    _checks.one_of(NAME, "gradient", gradient, GRADIENT)
    _checks.same_kind(NAME, z=z, rho=rho, step_size=step_size, tempering=tempering)
    if not z.dim():
        raise _checks.value_error(NAME, "z", "of shape (B, ...)", z)
    if rho.shape != z.shape:
        raise _checks.value_error(NAME, "rho", f"of z's shape {tuple(z.shape)}", rho)
    if tempering.dim() != 1:
        raise _checks.value_error(NAME, "tempering", "of shape (K,)", tempering)
    _checks.finite(NAME, "step_size", step_size)
    _checks.finite(NAME, "tempering", tempering)
