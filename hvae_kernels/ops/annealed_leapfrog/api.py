"""Where calls enter: docstrings, validation, dispatch. Internal, for ``nn.AnnealedHamiltonianFlow`` to build on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from hvae_kernels import _checks, _dispatch, _library, _torch
from hvae_kernels.ops.annealed_leapfrog import autograd, reference
from hvae_kernels.ops.annealed_leapfrog.reference import Potential, Score
from hvae_kernels.ops.annealed_leapfrog.trajectory import FLOW, HeldScore, RecomputedTrajectory, Run, trajectory
from hvae_kernels.ops.leapfrog import statistics
from hvae_kernels.ops.leapfrog.field import Field, dependent, functional_gradient, modules_called, refuse_dependent

NAME = "annealed_leapfrog_update"
_dispatch.register(_dispatch.Op(NAME, ("cpp", "triton", "reference")))
#: ``z, noise, kicks, mixing, betas``.
Tensors = tuple[Tensor, ...]
#: In the order of a run's fields.
ARGUMENTS = ("base_potential", "potential")


def annealed_leapfrog_update(
    z: Tensor,
    rho: Tensor,
    base_grad: Tensor,
    grad: Tensor,
    noise: Tensor,
    kicks: Tensor,
    mixing: Tensor,
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""All that an annealed trajectory does between two pairs of gradients, in one pass.

    .. math::
        q = \rho - a_0 g_0 - a\, g, \quad p = \eta q + \sigma \xi, \quad \rho' = p - b_0 g_0 - b\, g, \quad
        z' = z + e \rho', \quad w = \tfrac12 \sum (p - q)(p + q)

    A bridge's last half kick, the refreshment of the momentum, its part of the log-weight, and the next bridge's first
    half kick and drift.

    Args:
        z: positions ``(..., d)``.
        rho: momenta, the shape of ``z``.
        base_grad: gradient of the base potential, g_0, the shape of ``z``.
        grad: that of the model's, g.
        noise: xi, the shape of ``z``.
        kicks: the rows ``a_0, a, b_0, b, e``, ``(5, d)``.
        mixing: ``eta, sigma``, ``(2,)``.
        implementation: as for :func:`hvae_kernels.use_impl`; None is what that says.

    Returns:
        ``(z', rho', w)``, new contiguous tensors of ``z``'s shape and without its last dimension.

    One dtype and device for all arguments. Differentiable, to any order, in every argument.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: shapes or devices do not fit.

    References:
        Geffner and Domke, MCMC variational inference via uncorrected Hamiltonian annealing, 2021, algorithm 2.

    Equivalent to:
        >>> import torch
        >>> from hvae_kernels.ops.annealed_leapfrog import annealed_leapfrog_update
        >>> z, rho, g_0, g, xi = torch.randn(5, 8, 3, dtype=torch.float64).unbind()
        >>> kicks, mixing = torch.rand(5, 3, dtype=torch.float64), torch.tensor([0.6, 0.8], dtype=torch.float64)
        >>> fused = annealed_leapfrog_update(z, rho, g_0, g, xi, kicks, mixing)
        >>> q = rho - kicks[0] * g_0 - kicks[1] * g
        >>> p = mixing[0] * q + mixing[1] * xi
        >>> momentum = p - kicks[2] * g_0 - kicks[3] * g
        >>> torch.testing.assert_close(fused, (z + kicks[4] * momentum, momentum, (p**2 - q**2).sum(-1) / 2))
    """
    inputs = z, rho, base_grad, grad, noise, kicks, mixing
    if _library.autocasts(z):
        return _library.in_float32(functools.partial(annealed_leapfrog_update, implementation=implementation), *inputs)
    _validate_update(*inputs)
    chosen = _dispatch.resolve(NAME, z, implementation)
    if chosen == "reference":
        return reference.annealed_leapfrog_update(*inputs)
    return autograd.call(chosen, *inputs)


def annealed_leapfrog(
    z: Tensor,
    noise: Tensor,
    potential: Potential | nn.Module,
    base_potential: Potential | nn.Module,
    kicks: Tensor,
    mixing: Tensor,
    betas: Tensor,
    *,
    leapfrog_steps: int = 1,
    score: Score | None = None,
    params: Iterable[Tensor] | None = None,
    memory: str = "states",
    gradient: str = "full",
    compile: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``(z_M, log_weight)`` of :class:`hvae_kernels.nn.AnnealedHamiltonianFlow`, which has checked its arguments.

    Args:
        z: positions ``(..., d)``.
        noise: ``(M + 1, ..., d)``.
        potential: energies ``(...)`` of positions.
        base_potential: the same of the base density.
        kicks: of all points, from :func:`reference.tables`.
        mixing: the same.
        betas: ``(M,)``, which a score is given.
        leapfrog_steps: L.
        score: None, or what shifts the reverse of a refreshment.
        params: the tensors that need gradients through a potential; by default they are looked for.
        memory: as of the module.
        gradient: as of the module.
        compile: as of the module.
        implementation: of the updates.
    """
    if _library.autocasts(z):
        half = _checks.HALF_PRECISION
        z, noise, kicks, mixing, betas = (x.float() if x.dtype in half else x for x in (z, noise, kicks, mixing, betas))
    _checks.same_kind(FLOW, z=z, noise=noise, step_size=kicks)
    given = None if params is None else _checks.tensors_among(FLOW, "params", params)
    full = gradient == "full"
    held = None if score is None else HeldScore(score, z.dtype)
    make = functools.partial(Run, leapfrog_steps=leapfrog_steps, score=held, full=full)
    tensors: Tensors = (z, noise, kicks, mixing, betas)
    if torch.compiler.is_compiling() or _torch.functorch_is_active():
        return _unrolled(make, (base_potential, potential), tensors, implementation)
    fields = Field(base_potential, False, FLOW, ARGUMENTS[0]), Field(potential, compile, FLOW, ARGUMENTS[1])
    if torch.is_inference_mode_enabled():  # where nothing is recorded, not even for a potential's own gradient
        with torch.inference_mode(False), torch.no_grad():
            return _stored(make, fields, tuple(x.clone() for x in tensors), implementation)
    if memory == "store" or not torch.is_grad_enabled():
        return _stored(make, fields, tensors, implementation)
    gradients, found = [], []
    for field in fields:
        first, batch, read = field.first_of_rebuilt(z, None if given is None else lambda: given, full)
        _check_energies(field.argument, batch, z)
        gradients.append(first)
        found.append(read)
    watched = _watched(fields, held, found, given is not None)
    dtype, reversible = z.dtype, memory == "reversible"
    if reversible:
        tensors, gradients = tuple(x.double() for x in tensors), [x.double() for x in gradients]
    run = make(fields, _dispatch.resolve(NAME, tensors[0], implementation), reversible=reversible)
    end = RecomputedTrajectory.apply(run, tuple(gradients), *tensors, *watched)
    z, log_weight = _ended(tensors[1], *end)
    return z.to(dtype), log_weight.to(dtype)


def _watched(
    fields: tuple[Field, Field], held: HeldScore | None, found: list[tuple[Tensor, ...]], given: bool
) -> list[Tensor]:
    """What all need gradients of, each once: where one is made from another, of another potential too, the leaves."""
    watched = _each_once([*found, *([held.watch()] if held else ())])
    if given:
        refuse_dependent(FLOW, watched)
    elif dependent(watched) is not None:
        watched = _each_once([*(field.leaves() for field in fields), *([held.leaves()] if held else ())])
    return watched


def _each_once(groups: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return list({id(x): x for group in groups for x in group}.values())


def _stored(
    make: Callable[..., Run], fields: tuple[Field, Field], tensors: Tensors, implementation: str | None
) -> tuple[Tensor, Tensor]:
    """Autograd keeps what there is to keep."""
    z, noise, kicks, mixing, betas = tensors
    run, gradients = make(fields, _dispatch.resolve(NAME, z, implementation)), []
    for field in fields:
        first, batch = field.first(z, run.full and torch.is_grad_enabled())
        _check_energies(field.argument, batch, z)
        gradients.append(first)
    with run.held():
        return _ended(noise, *trajectory(run, (gradients[0], gradients[1]), z, noise, kicks, mixing, betas))


class _Unrolled:
    """A potential's gradient as ``torch.func`` and ``torch.compile`` take it, in the place of a field."""

    def __init__(self, potential: Potential, full: bool, argument: str) -> None:
        self.potential, self.full, self.argument = potential, full, argument

    def __call__(self, z: Tensor, record: bool = False) -> Tensor:
        grad, energy = functional_gradient(self.potential, z)
        _check_energies(self.argument, energy.shape, z)
        return grad if self.full else grad.detach()

    def held(self) -> contextlib.AbstractContextManager:
        """They are, around the whole run."""
        return contextlib.nullcontext()


def _unrolled(
    make: functools.partial[Run],
    potentials: tuple[Potential, Potential],
    tensors: Tensors,
    implementation: str | None,
) -> tuple[Tensor, Tensor]:
    """The formula unrolled; running statistics take one evaluation more, after it."""
    modules = [m for u in potentials if isinstance(u, nn.Module) for m in u.modules()]
    z, noise, kicks, mixing, betas = tensors
    chosen = _dispatch.resolve(NAME, z, implementation)
    full = make.keywords["full"]
    run = make(tuple(_Unrolled(u, full, name) for u, name in zip(potentials, ARGUMENTS, strict=True)), chosen)
    with statistics.held(modules) as tracking:
        end = trajectory(run, run.gradients(z), z, noise, kicks, mixing, betas)
    if tracking:
        alone = contextlib.nullcontext() if torch.compiler.is_compiling() else modules_called()
        with torch.no_grad(), alone:
            for potential in potentials:
                potential(z)
    return _ended(noise, *end)


def _ended(noise: Tensor, z: Tensor, rho: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """The parts of the points count the first momentum and leave out the last."""
    return z, total + ((noise[0] - rho) * (noise[0] + rho)).sum(-1) / 2


def _check_energies(argument: str, batch: torch.Size, z: Tensor) -> None:
    if batch != z.shape[:-1]:
        expected = f"a function with energies {tuple(z.shape[:-1])} of positions {tuple(z.shape)}"
        raise _checks.value_error(FLOW, argument, expected, f"energies of shape {tuple(batch)}")


def _validate_update(
    z: Tensor, rho: Tensor, base_grad: Tensor, grad: Tensor, noise: Tensor, kicks: Tensor, mixing: Tensor
) -> None:
    _checks.same_kind(NAME, z=z, rho=rho, base_grad=base_grad, grad=grad, noise=noise, kicks=kicks, mixing=mixing)
    if not z.shape:
        raise _checks.value_error(NAME, "z", "of shape (..., d)", z)
    for argument, tensor in (("rho", rho), ("base_grad", base_grad), ("grad", grad), ("noise", noise)):
        if tensor.shape != z.shape:
            raise _checks.value_error(NAME, argument, f"of z's shape {tuple(z.shape)}", tensor)
    if kicks.shape != (5, z.shape[-1]):
        raise _checks.value_error(NAME, "kicks", f"of shape (5, {z.shape[-1]})", kicks)
    if mixing.shape != (2,):
        raise _checks.value_error(NAME, "mixing", "of shape (2,)", mixing)
