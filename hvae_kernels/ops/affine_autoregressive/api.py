"""Where calls enter: docstring, validation, dispatch."""

from __future__ import annotations

import functools

from torch import Tensor

from hvae_kernels import _checks, _dispatch, _library
from hvae_kernels.ops.affine_autoregressive import autograd, reference
from hvae_kernels.ops.affine_autoregressive.gates import CODES, DEFAULTS, Gate

NAME = "affine_autoregressive"
_dispatch.register(_dispatch.Op(NAME, ("cpp", "triton", "reference")))


def affine_autoregressive(
    z: Tensor,
    shift: Tensor,
    log_scale: Tensor,
    *,
    gate: str | Gate = "affine",
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The element-wise tail of inverse and masked autoregressive flows, with its log-determinant, in one pass.

    .. math::
        z' = \sigma(s) \, z + \tau(s) \, m, \quad \log |\det| = \sum_{j=1}^d \log \sigma(s_j)

    with the shift :math:`m` and the network's raw output :math:`s`. The Jacobian is triangular whenever :math:`m_j`
    and :math:`s_j` depend on :math:`z_{<j}` alone. The gate says what :math:`\sigma` and :math:`\tau` are; see
    :class:`Gate`.

    Args:
        z: ``(..., d)``.
        shift: m, the shape of ``z``.
        log_scale: s, the shape of ``z``: the network's output as it is, before any gate.
        gate: ``"affine"``, ``"clipped"``, ``"soft-clipped"``, ``"softplus"``, ``"shifted-sigmoid"`` or ``"sigmoid"``,
            or a :class:`Gate` with parameters of its own.
        implementation: for this call, as for :func:`hvae_kernels.use_impl`; None is what that says.

    Returns:
        ``(z', log_abs_det)``, new contiguous tensors of shapes ``(..., d)`` and ``(...)``.

    One dtype and device for all arguments. Differentiable, to any order, in every tensor. For finite ``log_scale`` the
    log-determinant is finite. The scale underflows with ``"affine"`` and ``"sigmoid"`` below about -103 in float32
    (-745 in float64), where :math:`z'` is the shift and the map can no longer be inverted, and ``"affine"`` overflows
    above 88.7 (709.7). Saved for the backward pass: ``z``, ``log_scale`` and, for ``"sigmoid"`` only, ``shift``.

    Raises:
        TypeError: an argument is not a floating-point tensor, dtypes differ, or ``gate`` is neither name nor Gate.
        ValueError: shapes or devices do not fit, or there is no such gate.

    Source: Kingma et al., Improving variational inference with inverse autoregressive flow, arXiv 1606.04934,
    equations 10 and 14; Papamakarios et al., Masked autoregressive flow for density estimation, arXiv 1705.07057.

    Equivalent to:
        >>> import torch
        >>> from hvae_kernels.functional import affine_autoregressive
        >>> z, shift, log_scale = torch.randn(3, 8, 5, dtype=torch.float64).unbind()
        >>> fused = affine_autoregressive(z, shift, log_scale)
        >>> torch.testing.assert_close(fused, (z * log_scale.exp() + shift, log_scale.sum(-1)))
        >>> fused = affine_autoregressive(z, shift, log_scale, gate="sigmoid")
        >>> g = torch.sigmoid(log_scale)
        >>> torch.testing.assert_close(fused, (g * z + (1 - g) * shift, g.log().sum(-1)))
    """
    _checks.same_kind(NAME, z=z)  # alone: the others may differ under autocast
    if _library.autocasts(z):
        op = functools.partial(affine_autoregressive, gate=gate, implementation=implementation)
        return _library.in_float32(op, z, shift, log_scale)
    gate = _gate(gate)
    implementation = _dispatch.resolve(NAME, z, implementation)
    _validate(z, shift, log_scale)
    if implementation == "reference":
        return reference.affine_autoregressive(z, shift, log_scale, gate)
    return autograd.call(implementation, *gate.encoded, z, shift, log_scale)


def _gate(gate: str | Gate) -> Gate:
    if isinstance(gate, Gate):
        return gate
    if not isinstance(gate, str):
        raise TypeError(f"{NAME}: gate must be a name or a Gate, got {_checks.describe(gate)}")
    if gate not in DEFAULTS:
        raise ValueError(f"{NAME}: gate must be a Gate or one of {', '.join(CODES)}, got {gate!r}")
    return DEFAULTS[gate]


def _validate(z: Tensor, shift: Tensor, log_scale: Tensor) -> None:
    if isinstance(shift, Tensor) and isinstance(log_scale, Tensor):
        alike = z.dtype is shift.dtype is log_scale.dtype and z.shape == shift.shape == log_scale.shape
        alike = alike and z.layout is shift.layout is log_scale.layout
        if alike and z.device == shift.device == log_scale.device and z.dim():
            return  # the usual case, checked quickly
    _checks.same_kind(NAME, z=z, shift=shift, log_scale=log_scale)
    if not z.shape:
        raise _checks.value_error(NAME, "z", "of shape (..., d)", z)
    for argument, tensor in (("shift", shift), ("log_scale", log_scale)):
        if tensor.shape != z.shape:
            raise _checks.value_error(NAME, argument, f"of z's shape {tuple(z.shape)}", tensor)
