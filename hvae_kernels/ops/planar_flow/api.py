"""Where calls enter: docstring, validation, dispatch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvae_kernels import _checks, _dispatch, _library
from hvae_kernels.ops.planar_flow import amortised, autograd, constraint, reference

NAME = "planar_flow"
for _name in (NAME, amortised.NAME):
    _dispatch.register(_dispatch.Op(_name, ("cpp", "triton", "reference"), half_precision=("reference",)))

#: From cotangents of ``(z_K, log_abs_det)`` to gradients of z, u, w and b.
Vjp = Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor, Tensor, Tensor]]


def planar_flow(
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    *,
    constrain: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""K stacked planar layers, for all rows or for each row its own, and their log-determinant.

    .. math::
        z_k = z_{k-1} + u_k t_k, \quad t_k = \tanh(w_k \cdot z_{k-1} + b_k), \quad
        \log |\det| = \sum_{k=1}^K \log |1 + (1 - t_k^2) \, u_k \cdot w_k|

    With ``constrain`` the layers use :func:`constrain_planar` of ``u`` and are invertible; the log-determinant is then
    :math:`\sum_k \log(t_k^2 + (1 - t_k^2) \, \mathrm{softplus}(u_k \cdot w_k))` with the ``u`` given, which cannot
    cancel to :math:`\log 0`.

    Layers that rows share are two products around a recursion of K numbers a row: ``z`` is read twice and written once,
    whatever K. Amortised ones, outputs of an inference network for instance, are read once, 2 K d numbers a row.

    Args:
        z: ``(..., d)``; for R replicas, each with layers of its own, ``(R, B, d)``.
        u: ``(K, d)``, one row a layer; for replicas ``(R, K, d)``; amortised, K layers for each row of z,
            ``(..., K, d)``.
        w: of ``u``'s shape.
        b: ``(K,)``; for replicas ``(R, K)``; amortised ``(..., K)``.
        constrain: whether ``u`` is free, and to be made invertible here.
        implementation: for this call, as for :func:`hvae_kernels.use_impl`; None is what that says.

    Returns:
        ``(z_K, log_abs_det)``, new tensors of shapes ``(..., d)`` and ``(...)``.

    One dtype and device for all arguments. Differentiable, to any order, in every tensor. Where a determinant is
    exactly 0, which only an unconstrained layer with ``u.w <= -1`` can do, ``log_abs_det`` is ``-inf``. Saved for the
    backward pass beside the inputs: 2 K numbers a row, amortised K. Amortised, derivatives from the second order on are
    plain PyTorch. Half precision runs the plain formula.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: shapes or devices do not fit.

    Source: Rezende and Mohamed, Variational inference with normalizing flows, arXiv 1505.05770, equations 10 to 12 and
    appendix A.1.

    Equivalent to:
        >>> import torch
        >>> from hvae_kernels.functional import planar_flow
        >>> z, (u, w), b = torch.randn(8, 5), torch.rand(2, 3, 5), torch.randn(3)
        >>> fused = planar_flow(z, u, w, b)
        >>> log_abs_det = torch.zeros(8)
        >>> for k in range(3):
        ...     t = torch.tanh(z @ w[k] + b[k])
        ...     z = z + t[:, None] * u[k]
        ...     log_abs_det += torch.log(abs(1 + (1 - t**2) * (u[k] @ w[k])))
        >>> torch.testing.assert_close(fused, (z, log_abs_det))

    Amortised, with ``u, w (8, 3, 5)`` and ``b (8, 3)``, this is each row's flow by itself:
        >>> z, (u, w), b = torch.randn(8, 5), torch.rand(2, 8, 3, 5), torch.randn(8, 3)
        >>> rows = [planar_flow(*row) for row in zip(z, u, w, b)]
        >>> torch.testing.assert_close(planar_flow(z, u, w, b), tuple(map(torch.stack, zip(*rows))))
    """
    if _library.autocasts(z):
        op = functools.partial(planar_flow, constrain=constrain, implementation=implementation)
        return _library.in_float32(op, z, u, w, b)
    _validate(z, u, w, b)
    _checks.flag(NAME, "constrain", constrain)
    implementation = _dispatch.resolve(NAME, z, implementation)
    if implementation == "reference":
        return reference.planar_flow(z, u, w, b, constrain)
    if z.dim() == u.dim():
        return autograd.call(implementation, constrain, z, u, w, b)
    if _is_amortised(z, u):
        output, log_abs_det = amortised.call(implementation, constrain, *_rows(z, u, w, b))
        return output.view(z.shape), log_abs_det.view(z.shape[:-1])
    rows = z.unsqueeze(0) if z.dim() == 1 else z.flatten(0, -2)
    output, log_abs_det = autograd.call(implementation, constrain, rows, u, w, b)
    return output.view(z.shape), log_abs_det.view(z.shape[:-1])


def planar_flow_with_vjp(
    z: Tensor,
    u: Tensor,
    w: Tensor,
    b: Tensor,
    *,
    constrain: bool = False,
    implementation: str | None = None,
) -> tuple[tuple[Tensor, Tensor], Vjp]:
    r""":func:`planar_flow` and its backward pass as a function, for loops that chain their gradients by hand.

    Without the autograd engine, which for a small batch costs more than forward and backward together.

    Args:
        z: as in :func:`planar_flow`, like all that follow.
        u: one row a layer, of all rows or of each.
        w: of ``u``'s shape.
        b: one number a layer.
        constrain: whether ``u`` is free, and made invertible there.
        implementation: for this call, as for :func:`hvae_kernels.use_impl`; None is what that says.

    Returns:
        ``((z_K, log_abs_det), vjp)`` where ``vjp((grad_z, grad_log_abs_det))`` are the gradients of z, u, w and b, in
        their shapes; differentiable themselves if gradients were being recorded at this call.

    Raises:
        TypeError, ValueError: as :func:`planar_flow`; ``vjp`` too, for cotangents that do not fit.

    Equivalent to:
        >>> import torch, hvae_kernels as hk
        >>> arguments = torch.randn(8, 5), *torch.rand(2, 3, 5), torch.randn(3)
        >>> cotangents = torch.randn(8, 5), torch.randn(8)
        >>> outputs, vjp = hk.functional.planar_flow_with_vjp(*arguments)
        >>> expected, expected_vjp = torch.func.vjp(hk.functional.planar_flow, *arguments)
        >>> torch.testing.assert_close(outputs, expected)
        >>> torch.testing.assert_close(vjp(cotangents), expected_vjp(cotangents))
    """
    autocasts = _library.autocasts(z)
    if autocasts:
        _checks.tensors(NAME, z=z, u=u, w=w, b=b)  # whose dtypes may differ
    else:
        _validate(z, u, w, b)
    _checks.flag(NAME, "constrain", constrain)
    chosen = _dispatch.resolve(NAME, z, implementation)
    if chosen == "reference" or autocasts or torch.is_grad_enabled() or not _library.nothing_differentiates():
        op = functools.partial(planar_flow, constrain=constrain, implementation=implementation)
        pulled: Any = torch.func.vjp(op, z, u, w, b)
        return pulled
    if _is_amortised(z, u):
        inputs, call = _rows(z, u, w, b), amortised.call_with_vjp
    else:
        inputs, call = (z if z.dim() == u.dim() else z.reshape(-1, z.shape[-1]), u, w, b), autograd.call_with_vjp
    rows = inputs[0]
    (output, log_abs_det), gradients = call(chosen, constrain, *inputs)

    @torch.no_grad()
    def vjp(cotangents: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grad_z, grad_log_abs_det = cotangents
        _validate_cotangents(z, grad_z, grad_log_abs_det)
        with torch.autocast(z.device.type, enabled=False):
            d_z, d_u, d_w, d_b = gradients(grad_z.reshape(rows.shape), grad_log_abs_det.reshape(rows.shape[:-1]))
        return d_z.view(z.shape), d_u.view(u.shape), d_w.view(w.shape), d_b.view(b.shape)

    return (output.view(z.shape), log_abs_det.view(z.shape[:-1])), vjp


def constrain_planar(u: Tensor, w: Tensor) -> Tensor:
    r"""The ``u`` that makes planar layers invertible.

    .. math::
        \hat u = u + (\mathrm{softplus}(u \cdot w) - 1 - u \cdot w) \, w / |w|^2

    So :math:`\hat u \cdot w = \mathrm{softplus}(u.w) - 1 > -1`. As ``w`` tends to 0 the correction grows like
    :math:`0.3 / |w|`, and at ``w = 0`` it is NaN: there the layer is a shift, whose length the constraint leaves open.

    Args:
        u: ``(..., d)``.
        w: the shape of ``u``.

    Returns:
        A new tensor of ``u``'s shape. Differentiable to any order.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: shapes or devices do not fit.

    Source: Rezende and Mohamed, arXiv 1505.05770, appendix A.1.

    Equivalent to:
        >>> import torch
        >>> from hvae_kernels.functional import constrain_planar
        >>> u, w = torch.randn(2, 3, 5)
        >>> product = (u * w).sum(-1)
        >>> constrained = (constrain_planar(u, w) * w).sum(-1)
        >>> torch.testing.assert_close(constrained, torch.nn.functional.softplus(product) - 1)
    """
    _checks.same_kind("constrain_planar", u=u, w=w)
    if not u.shape:
        raise _checks.value_error("constrain_planar", "u", "of shape (..., d)", u)
    if w.shape != u.shape:
        raise _checks.value_error("constrain_planar", "w", f"of u's shape {tuple(u.shape)}", w)
    return constraint.constrained(u, w)[0]


def _is_amortised(z: Tensor, u: Tensor) -> bool:
    """Whether each row of z has layers of its own; a single row (d,) has, in either reading."""
    return u.dim() > z.dim() > 1


def _rows(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """The arguments of amortised layers with one leading dimension."""
    return z.flatten(0, -2), u.flatten(0, -3), w.flatten(0, -3), b.flatten(0, -2)


def _validate(z: Tensor, u: Tensor, w: Tensor, b: Tensor) -> None:
    _checks.same_kind(NAME, z=z, u=u, w=w, b=b)
    if not z.shape:
        raise _checks.value_error(NAME, "z", "of shape (..., d)", z)
    leading, features = tuple(z.shape[:-1]), z.shape[-1]
    of_layers = {2: (), z.dim() + 1: leading} | ({3: leading[:1]} if z.dim() == 3 else {})
    if u.shape[:-2] != of_layers.get(u.dim()) or u.shape[-1] != features:
        shapes = [", ".join([*map(str, shape), "K", str(features)]) for shape in dict.fromkeys(of_layers.values())]
        raise _checks.value_error(NAME, "u", f"of shape {', or '.join(f'({shape})' for shape in shapes)}", u)
    if w.shape != u.shape:
        raise _checks.value_error(NAME, "w", f"of u's shape {tuple(u.shape)}", w)
    if b.shape != u.shape[:-1]:
        raise _checks.value_error(NAME, "b", f"of shape {tuple(u.shape[:-1])}", b)


def _validate_cotangents(z: Tensor, grad_z: Tensor, grad_log_abs_det: Tensor) -> None:
    name = "planar_flow_with_vjp"
    _checks.same_kind(name, z=z, grad_z=grad_z, grad_log_abs_det=grad_log_abs_det)
    for argument, tensor, shape in (("grad_z", grad_z, z.shape), ("grad_log_abs_det", grad_log_abs_det, z.shape[:-1])):
        if tensor.shape != shape:
            raise _checks.value_error(name, argument, f"of shape {tuple(shape)}", tensor)
