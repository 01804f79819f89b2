"""Where calls enter: docstring, validation, dispatch."""

from __future__ import annotations

import functools

from torch import Tensor

from hvae_kernels import _checks, _dispatch, _library
from hvae_kernels.ops.radial_flow import autograd, reference

NAME = "radial_flow"
_dispatch.register(_dispatch.Op(NAME, ("cpp", "triton", "reference"), half_precision=("reference",)))


def radial_flow(
    z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor, *, implementation: str | None = None
) -> tuple[Tensor, Tensor]:
    r"""K stacked radial layers and their log-determinant: one read and one write of ``z``, whatever K.

    .. math::
        z_k = z_{k-1} + \beta_k h_k \, y_k, \quad y_k = z_{k-1} - c_k, \quad h_k = \frac{1}{\alpha_k + |y_k|}

        \log |\det| = \sum_{k=1}^K (d - 1) \log |1 + \beta_k h_k| + \log |1 + \alpha_k \beta_k h_k^2|

    A layer is invertible if :math:`\alpha_k > 0` and :math:`\beta_k > -\alpha_k`, which is not checked.

    Args:
        z: ``(..., d)``.
        center: c, ``(K, d)``, one row a layer.
        alpha: ``(K,)``.
        beta: ``(K,)``.
        implementation: for this call, as for :func:`hvae_kernels.use_impl`; None is what that says.

    Returns:
        ``(z_K, log_abs_det)``, new tensors of shapes ``(..., d)`` and ``(...)``.

    One dtype and device for all arguments. Differentiable, to any order, in every tensor; from the second order on with
    plain PyTorch. At a centre, where ``|y|`` has no derivative, it counts as 0. Nothing is saved for the backward pass
    but the inputs; it recomputes the layers. Half precision runs the plain formula.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: shapes or devices do not fit.

    Source: Rezende and Mohamed, Variational inference with normalizing flows, arXiv 1505.05770, equation 14.

    Equivalent to:
        >>> import torch
        >>> from hvae_kernels.functional import radial_flow
        >>> z, center, (alpha, beta) = torch.randn(8, 5), torch.randn(3, 5), torch.rand(2, 3) + 0.5
        >>> fused = radial_flow(z, center, alpha, beta)
        >>> log_abs_det = torch.zeros(8)
        >>> for c, a, b in zip(center, alpha, beta):
        ...     h = 1 / (a + (z - c).norm(dim=-1))
        ...     z = z + b * h[:, None] * (z - c)
        ...     log_abs_det += 4 * torch.log(1 + b * h) + torch.log(1 + a * b * h**2)
        >>> torch.testing.assert_close(fused, (z, log_abs_det))
    """
    if _library.autocasts(z):
        return _library.in_float32(
            functools.partial(radial_flow, implementation=implementation), z, center, alpha, beta
        )
    _validate(z, center, alpha, beta)
    implementation = _dispatch.resolve(NAME, z, implementation)
    if implementation == "reference":
        return reference.radial_flow(z, center, alpha, beta)
    return autograd.call(implementation, z, center, alpha, beta)


def _validate(z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor) -> None:
    _checks.same_kind(NAME, z=z, center=center, alpha=alpha, beta=beta)
    if not z.shape:
        raise _checks.value_error(NAME, "z", "of shape (..., d)", z)
    if center.dim() != 2 or center.shape[1] != z.shape[-1]:
        raise _checks.value_error(NAME, "center", f"of shape (K, {z.shape[-1]})", center)
    for argument, tensor in (("alpha", alpha), ("beta", beta)):
        if tensor.shape != center.shape[:1]:
            raise _checks.value_error(NAME, argument, f"of shape ({center.shape[0]},)", tensor)
