"""Where users' calls enter: docstrings, validation, dispatch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from hvae_kernels import _checks, _dispatch, _library, _torch
from hvae_kernels.ops.gaussian_leapfrog import autograd, dense, reference

DENSE, WITH_VJP = "dense_gaussian_leapfrog", "gaussian_leapfrog_with_vjp"
#: From cotangents of ``(z_K, rho_K)`` to gradients of the six arguments.
Vjp = Callable[[tuple[Tensor, Tensor]], autograd.Gradients]
_Results = TypeVar("_Results")

_dispatch.register(_dispatch.Op("gaussian_leapfrog", ("cpp", "triton", "reference")))
_dispatch.register(_dispatch.Op(DENSE, ("cpp", "triton", "reference")))


def gaussian_leapfrog(
    z: Tensor,
    rho: Tensor,
    precision: Tensor,
    loc: Tensor,
    step_size: Tensor,
    tempering: Tensor,
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""K tempered leapfrog steps through a diagonal Gaussian potential, at a cost that does not depend on K.

    With :math:`U(z) = \frac12 \sum_i p_i (z_i - \mu_i)^2`, one step k is

    .. math::
        \rho' = \rho - \tfrac{\epsilon}{2} \nabla U(z), \quad
        z \leftarrow z + \epsilon \rho', \quad
        \rho \leftarrow \alpha_k \big(\rho' - \tfrac{\epsilon}{2} \nabla U(z)\big).

    Each dimension's K steps are one 2x2 linear map of ``(z - loc, rho)``, composed once and applied to the batch in
    one pass. Nothing but the inputs is kept for the backward pass.

    Args:
        z: positions ``(..., d)``, or ``(R, B, d)`` for R replicas.
        rho: momenta, the shape of ``z``.
        precision: p, ``(d,)``, or ``(R, 1, d)``. Negative values give an inverted potential; zero gives free motion.
        loc: mu, the shape of ``precision``.
        step_size: epsilon, ``()`` or ``(d,)`` for all steps, ``(K, d)`` for each; ``(R, 1, d)`` or ``(R, K, d)``.
        tempering: alpha, ``(K,)``, or ``(R, K)``. K = 0 returns copies of the inputs.
        implementation: for this call, as for :func:`hvae_kernels.use_impl`; None is what that says.

    Returns:
        ``(z_K, rho_K)``, new contiguous tensors of ``z``'s shape. The Jacobian determinant of the map is
        ``prod_k alpha_k^d``.

    All arguments have one dtype (float32, float64; also bfloat16, float16 on GPUs and in the reference) and device.
    Differentiable, twice, in every argument; reverse and forward mode, ``torch.compile``, ``vmap``. Under autocast
    half-precision arguments are computed in float32.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: shapes or devices do not fit, or on the CPU a step size or tempering is not finite.

    References:
        Neal, MCMC using Hamiltonian dynamics, 2011, section 5.5.7; Caterini, Doucet and Sejdinovic, Hamiltonian
        variational auto-encoder, 2018, algorithm 1.

    Equivalent to:
        >>> import torch, hvae_kernels as hk
        >>> z, rho = torch.randn(2, 8, 3, dtype=torch.float64).unbind()
        >>> precision, loc, step_size = torch.rand(3, 3, dtype=torch.float64).unbind()
        >>> tempering = torch.tensor([0.9, 0.8], dtype=torch.float64)
        >>> fused = hk.functional.gaussian_leapfrog(z, rho, precision, loc, step_size, tempering)
        >>> for alpha in tempering:
        ...     rho = rho - step_size / 2 * precision * (z - loc)
        ...     z = z + step_size * rho
        ...     rho = alpha * (rho - step_size / 2 * precision * (z - loc))
        >>> torch.testing.assert_close(fused, (z, rho))
    """
    return _checked(
        _gaussian_leapfrog, "gaussian_leapfrog", implementation, z, rho, precision, loc, step_size, tempering
    )


def _gaussian_leapfrog(name: str, implementation: str | None, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    implementation = _dispatch.resolve(name, arguments[0], implementation)
    if not _kernel_checks(implementation, arguments):
        _validate(name, *arguments)
    if implementation == "reference":
        return reference.gaussian_leapfrog(*arguments)
    return autograd.call(implementation, *arguments)


def gaussian_leapfrog_with_vjp(
    z: Tensor,
    rho: Tensor,
    precision: Tensor,
    loc: Tensor,
    step_size: Tensor,
    tempering: Tensor,
    *,
    implementation: str | None = None,
) -> tuple[tuple[Tensor, Tensor], Vjp]:
    """:func:`gaussian_leapfrog` and its backward pass as a function, for loops that chain their gradients by hand.

    One kernel and no autograd engine, which for a small batch costs more than forward and backward together.

    Args:
        z: as in :func:`gaussian_leapfrog`, like all that follow.
        rho: momenta.
        precision: of the potential.
        loc: of the potential.
        step_size: for all steps, or for each.
        tempering: one factor a step.
        implementation: for this call, as for :func:`hvae_kernels.use_impl`; None is what that says.

    Returns:
        ``((z_K, rho_K), vjp)`` where ``vjp((grad_z, grad_rho))`` are the gradients of the six arguments, in their order
        and shapes; differentiable themselves.

    Raises:
        TypeError, ValueError: as :func:`gaussian_leapfrog`; ``vjp`` too, for cotangents that do not fit.

    Equivalent to:
        >>> import torch, hvae_kernels as hk
        >>> arguments = (*torch.randn(2, 8, 3), *torch.rand(3, 3), torch.tensor([0.9, 0.8]))
        >>> cotangents = tuple(torch.randn(2, 8, 3))
        >>> outputs, vjp = hk.functional.gaussian_leapfrog_with_vjp(*arguments)
        >>> expected, expected_vjp = torch.func.vjp(hk.functional.gaussian_leapfrog, *arguments)
        >>> torch.testing.assert_close(outputs, expected)
        >>> torch.testing.assert_close(vjp(cotangents), expected_vjp(cotangents))
    """
    inputs = z, rho, precision, loc, step_size, tempering
    if _library.autocasts(z):
        names = ("z", "rho", "precision", "loc", "step_size", "tempering")
        _checks.tensors(WITH_VJP, **dict(zip(names, inputs, strict=True)))  # whose dtypes may differ
        op = functools.partial(gaussian_leapfrog, implementation=implementation)
        pulled: Any = torch.func.vjp(op, *inputs)
        return pulled
    outputs = gaussian_leapfrog(*inputs, implementation=implementation)
    chosen = _dispatch.resolve("gaussian_leapfrog", z, implementation)

    def vjp(cotangents: tuple[Tensor, Tensor]) -> autograd.Gradients:
        grad_z, grad_rho = cotangents
        return _checked(_pull_back, WITH_VJP, chosen, *inputs, grad_z, grad_rho)

    return outputs, vjp


def _pull_back(name: str, implementation: str, *arguments: Tensor) -> autograd.Gradients:
    *inputs, grad_z, grad_rho = arguments
    if not _kernel_checks(implementation, arguments):
        _validate(name, *arguments)
    if implementation == "reference":
        return torch.func.vjp(reference.gaussian_leapfrog, *inputs)[1]((grad_z, grad_rho))
    return autograd.call_vjp(implementation, grad_z, grad_rho, *inputs)


def _kernel_checks(implementation: str, arguments: tuple[Tensor, ...]) -> bool:
    """Whether the kernel itself refuses what does not fit: in a tenth of the time, and :func:`_checked` explains."""
    if implementation != "cpp" or torch.compiler.is_compiling() or _torch.functorch_is_active():
        return False  # vmap's rule reshapes what the kernel would refuse
    return all(x.is_cpu for x in arguments)


def dense_gaussian_leapfrog(
    z: Tensor,
    rho: Tensor,
    precision: Tensor,
    loc: Tensor,
    step_size: Tensor,
    tempering: Tensor,
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""K tempered leapfrog steps through a Gaussian potential with a dense precision matrix.

    As :func:`gaussian_leapfrog`, with :math:`U(z) = \frac12 (z - \mu)^T P (z - \mu)`. Only the symmetric part of P
    counts, so :math:`\nabla U(z) = \frac12 (P + P^T) (z - \mu)`.

    Either K + 1 matrix products and fused updates on the batch, or, where that takes fewer multiply-adds, the steps'
    linear map of ``(z - loc, rho)``, composed once on its 2d basis vectors and then applied to the batch.

    Args:
        z: positions ``(..., d)``.
        rho: momenta, the shape of ``z``.
        precision: P, ``(d, d)``. Not required to be positive definite.
        loc: mu, ``(d,)``.
        step_size: epsilon, ``()`` or ``(d,)`` for all steps, ``(K, d)`` for each.
        tempering: alpha, ``(K,)``. K = 0 returns copies of the inputs.
        implementation: for this call, as for :func:`hvae_kernels.use_impl`; None is what that says.

    Returns:
        ``(z_K, rho_K)``, new contiguous tensors of ``z``'s shape. The Jacobian determinant of the map is
        ``prod_k alpha_k^d``.

    All arguments have one dtype (float32, float64; also bfloat16, float16 on GPUs and in the reference) and device.
    Differentiable, twice, in every argument; reverse and forward mode, ``torch.compile``, ``vmap``. Under autocast
    half-precision arguments are computed in float32.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: shapes or devices do not fit (there is no form for replicas), or on the CPU a step size or tempering
            is not finite.

    References:
        Neal, MCMC using Hamiltonian dynamics, 2011, section 5.5.7; Caterini, Doucet and Sejdinovic, Hamiltonian
        variational auto-encoder, 2018, algorithm 1.

    Equivalent to:
        >>> import torch, hvae_kernels as hk
        >>> z, rho = torch.randn(2, 8, 3, dtype=torch.float64).unbind()
        >>> precision = torch.randn(3, 3, dtype=torch.float64)
        >>> loc, step_size = torch.rand(2, 3, dtype=torch.float64).unbind()
        >>> tempering = torch.tensor([0.9, 0.8], dtype=torch.float64)
        >>> fused = hk.functional.dense_gaussian_leapfrog(z, rho, precision, loc, step_size, tempering)
        >>> symmetric = (precision + precision.T) / 2
        >>> for alpha in tempering:
        ...     rho = rho - step_size / 2 * ((z - loc) @ symmetric)
        ...     z = z + step_size * rho
        ...     rho = alpha * (rho - step_size / 2 * ((z - loc) @ symmetric))
        >>> torch.testing.assert_close(fused, (z, rho))
    """
    return _checked(_dense_gaussian_leapfrog, DENSE, implementation, z, rho, precision, loc, step_size, tempering)


def _dense_gaussian_leapfrog(name: str, implementation: str | None, *arguments: Tensor) -> tuple[Tensor, Tensor]:
    implementation = _dispatch.resolve(name, arguments[0], implementation)
    _validate(name, *arguments)
    if implementation == "reference":
        return reference.dense_gaussian_leapfrog(*arguments)
    return dense.dense_gaussian_leapfrog(implementation, *arguments)


def _checked(op: Callable[..., _Results], name: str, implementation: str | None, *arguments: Tensor) -> _Results:
    """Run ``op`` under autocast's rule, and explain its failure where the arguments are at fault."""
    z = arguments[0]
    try:
        if _library.autocasts(z):
            return _library.in_float32(op, name, implementation, *arguments)
        return op(name, implementation, *arguments)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        try:
            _validate(name, *arguments)
        except (TypeError, ValueError) as explanation:
            raise explanation from None
        raise


def _validate(
    name: str,
    z: Tensor,
    rho: Tensor,
    precision: Tensor,
    loc: Tensor,
    step_size: Tensor,
    tempering: Tensor,
    grad_z: Tensor | None = None,
    grad_rho: Tensor | None = None,
) -> None:
    tensors = {"z": z, "rho": rho, "precision": precision, "loc": loc, "step_size": step_size, "tempering": tempering}
    cotangents: dict[str, Any] = {"grad_z": grad_z, "grad_rho": grad_rho} if name == WITH_VJP else {}
    _checks.same_kind(name, **tensors, **cotangents)
    _check_shapes(name, *tensors.values())
    for argument, tensor in cotangents.items():
        if tensor.shape != z.shape:
            raise _checks.value_error(name, argument, f"of z's shape {tuple(z.shape)}", tensor)
    _checks.finite(name, "step_size", step_size)
    _checks.finite(name, "tempering", tempering)


def _check_shapes(
    name: str, z: Tensor, rho: Tensor, precision: Tensor, loc: Tensor, step_size: Tensor, tempering: Tensor
) -> None:
    shape = z.shape
    if not shape:
        raise _checks.value_error(name, "z", "of shape (..., d)", z)
    if rho.shape != shape:
        raise _checks.value_error(name, "rho", f"of z's shape {tuple(shape)}", rho)
    if tempering.dim() == 2 and name != DENSE:
        return _check_replica_shapes(name, z, precision, loc, step_size, tempering)
    features = shape[-1]
    if tempering.dim() != 1:
        replicas = "" if name == DENSE else ", or (R, K) for replicas"
        raise _checks.value_error(name, "tempering", f"of shape (K,){replicas}", tempering)
    precision_shape = (features, features) if name == DENSE else (features,)
    if precision.shape != precision_shape:
        raise _checks.value_error(name, "precision", f"of shape {precision_shape}", precision)
    if loc.shape != (features,):
        raise _checks.value_error(name, "loc", f"of shape ({features},)", loc)
    if step_size.dim() and not _checks.has_shape(step_size, (features,), (tempering.shape[0], features)):
        expected = f"of shape (), ({features},) or (K, d) = ({tempering.shape[0]}, {features})"
        raise _checks.value_error(name, "step_size", expected, step_size)


def _check_replica_shapes(
    name: str, z: Tensor, precision: Tensor, loc: Tensor, step_size: Tensor, tempering: Tensor
) -> None:
    if z.dim() != 3:
        raise _checks.value_error(name, "z", "of shape (R, B, d), as tempering (R, K) asks for replicas", z)
    replicas, _, features = z.shape
    n_steps = tempering.shape[1]
    if tempering.shape[0] != replicas:
        raise _checks.value_error(name, "tempering", f"of shape (R, K) with R = {replicas}", tempering)
    for argument, tensor in (("precision", precision), ("loc", loc)):
        if tensor.shape != (replicas, 1, features):
            raise _checks.value_error(name, argument, f"of shape (R, 1, d) = ({replicas}, 1, {features})", tensor)
    if not _checks.has_shape(step_size, (replicas, 1, features), (replicas, n_steps, features)):
        expected = f"of shape (R, 1, d) or (R, K, d) with R, K, d = {replicas}, {n_steps}, {features}"
        raise _checks.value_error(name, "step_size", expected, step_size)
