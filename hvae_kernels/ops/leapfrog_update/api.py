"""Where calls enter: docstring, validation, dispatch. Internal, for the public ops to build on."""

from __future__ import annotations

import torch
from torch import Tensor

from hvae_kernels import _checks, _dispatch, _library
from hvae_kernels.ops.leapfrog_update import autograd, reference

NAME = "leapfrog_update"
_dispatch.register(_dispatch.Op(NAME, ("cpp", "triton", "reference")))


def leapfrog_update(
    z: Tensor, rho: Tensor, grad: Tensor, decay: Tensor, kick: Tensor, drift: Tensor
) -> tuple[Tensor, Tensor]:
    r"""What a leapfrog trajectory does between two gradient evaluations, in one pass.

    .. math::
        \rho' = a \rho - c \, \nabla U(z), \quad z' = z + e \rho'

    The second half kick of step k and the first of step k + 1 use the same gradient, so with tempering
    :math:`\alpha` and step sizes :math:`\epsilon` an interior point has :math:`a = \alpha_k`,
    :math:`c = (\alpha_k \epsilon_k + \epsilon_{k+1}) / 2` and :math:`e = \epsilon_{k+1}`.

    Args:
        z: positions ``(..., d)``.
        rho: momenta, the shape of ``z``.
        grad: the potential's gradient at ``z``, the shape of ``z``.
        decay: a, ``()``.
        kick: c, ``(d,)``.
        drift: e, ``(d,)``.

    Returns:
        ``(z', rho')``, new contiguous tensors of ``z``'s shape.

    One dtype and device for all arguments. Differentiable, to any order, in every argument.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: shapes or devices do not fit.

    Equivalent to:
        >>> import torch
        >>> from hvae_kernels.ops.leapfrog_update import leapfrog_update
        >>> z, rho, grad = torch.randn(3, 8, 5, dtype=torch.float64).unbind()
        >>> kick, drift = torch.rand(2, 5, dtype=torch.float64).unbind()
        >>> decay = torch.tensor(0.9, dtype=torch.float64)
        >>> fused = leapfrog_update(z, rho, grad, decay, kick, drift)
        >>> rho = decay * rho - kick * grad
        >>> torch.testing.assert_close(fused, (z + drift * rho, rho))
    """
    if _library.autocasts(z):
        return _library.in_float32(leapfrog_update, z, rho, grad, decay, kick, drift)
    _validate(z, rho, grad, decay, kick, drift)
    implementation = _dispatch.resolve(NAME, z)
    if implementation == "reference":
        return reference.leapfrog_update(z, rho, grad, decay, kick, drift)
    return autograd.call(implementation, z, rho, grad, decay, kick, drift)


def leapfrog_update_vjp(
    grad_z: Tensor,
    grad_rho: Tensor,
    rho: Tensor,
    grad: Tensor,
    decay: Tensor,
    kick: Tensor,
    drift: Tensor,
    *,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``rho, grad, decay, kick, drift`` in one pass, from cotangents of both results; that of z is grad_z.

    For hand-written backward passes: checks nothing and is not differentiable.

    Equivalent to:
        >>> import torch
        >>> from hvae_kernels.ops.leapfrog_update import leapfrog_update, leapfrog_update_vjp
        >>> z, *tensors, a, c, e = *torch.randn(5, 8, 3), torch.tensor(0.9), *torch.rand(2, 3)
        >>> rho, grad, grad_z, grad_rho = tensors
        >>> gradients = leapfrog_update_vjp(grad_z, grad_rho, rho, grad, a, c, e)
        >>> outputs, pullback = torch.func.vjp(leapfrog_update, z, rho, grad, a, c, e)
        >>> torch.testing.assert_close((grad_z, *gradients), pullback((grad_z, grad_rho)))
    """
    implementation, inputs = _dispatch.resolve(NAME, rho, implementation), (rho, grad, decay, kick, drift)
    if implementation == "reference":
        return torch.func.vjp(reference.increment, *inputs)[1]((grad_z, grad_rho))
    needs = autograd.NEEDS_STATE | autograd.NEEDS_PARAMETERS
    return autograd.RAW_BACKWARD[implementation](grad_z, grad_rho, *inputs, needs)


def _validate(z: Tensor, rho: Tensor, grad: Tensor, decay: Tensor, kick: Tensor, drift: Tensor) -> None:
    _checks.same_kind(NAME, z=z, rho=rho, grad=grad, decay=decay, kick=kick, drift=drift)
    if not z.shape:
        raise _checks.value_error(NAME, "z", "of shape (..., d)", z)
    if decay.shape:
        raise _checks.value_error(NAME, "decay", "of shape ()", decay)
    for argument, tensor in (("rho", rho), ("grad", grad)):
        if tensor.shape != z.shape:
            raise _checks.value_error(NAME, argument, f"of z's shape {tuple(z.shape)}", tensor)
    for argument, tensor in (("kick", kick), ("drift", drift)):
        if tensor.shape != z.shape[-1:]:
            raise _checks.value_error(NAME, argument, f"of shape ({z.shape[-1]},)", tensor)
