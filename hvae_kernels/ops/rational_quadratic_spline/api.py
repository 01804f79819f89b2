"""Where calls enter: docstring, validation, dispatch."""

from __future__ import annotations

import functools

from torch import Tensor

from hvae_kernels import _checks, _dispatch, _library
from hvae_kernels.ops.rational_quadratic_spline import autograd, reference
from hvae_kernels.ops.rational_quadratic_spline.spline import Spline

NAME = "rational_quadratic_spline"
_dispatch.register(_dispatch.Op(NAME, ("cpp", "triton", "reference")))


def rational_quadratic_spline(
    x: Tensor,
    parameters: Tensor,
    spline: Spline,
    *,
    inverse: bool = False,
    event_ndims: int = 1,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Monotone rational-quadratic splines, element by element, with the log-determinant, in one pass.

    In the bin of :math:`x`, between the knots :math:`(x_0, y_0)` and :math:`(x_1, y_1)`, of width w, height h, slope
    :math:`s = h / w` and with derivatives :math:`d_0` and :math:`d_1` at the knots,

    .. math::
        y = y_0 + h \frac{z (s z + d_0 \bar z)}{D}, \quad
        \frac{dy}{dx} = s^2 \frac{d_1 z^2 + 2 s z \bar z + d_0 \bar z^2}{D^2}, \quad
        D = s (z^2 + \bar z^2) + (d_0 + d_1) z \bar z

    with :math:`z = (x - x_0) / w` and :math:`\bar z = (x_1 - x) / w`. The inverse is the root of a quadratic, in a form
    in which nothing cancels. How the parameters become knots, and what lies outside the interval, says ``spline``.

    Args:
        x: ``(..., d)``.
        parameters: ``(..., d, P)`` with P = ``spline.parameters``, raw; of any strides.
        spline: a :class:`Spline`.
        inverse: whether to map y to x; the log-determinant is then that of the inverse.
        event_ndims: over how many last dimensions of x the log-determinant is summed; 0 leaves it element by element.
        implementation: for this call, as for :func:`hvae_kernels.use_impl`; None is what that says.

    Returns:
        ``(y, log_abs_det)``, new contiguous tensors of shapes ``(..., d)`` and x's shape without its last
        ``event_ndims`` dimensions.

    One dtype and device for both tensors. Differentiable, to any order, in both; outside the interval of linear and
    circular tails y is x, with gradient 1, and 0 for the parameters. Finite for finite raw parameters up to about 1e9
    in size, if the floors are not 0. NaN in x or in a feature's parameters stays in its element. Saved for the
    backward pass: x and parameters.

    Raises:
        TypeError: an argument is not a floating-point tensor, dtypes differ, or ``spline`` is no Spline.
        ValueError: shapes or devices do not fit.

    Source: Durkan et al., Neural spline flows, arXiv 1906.04032, equations 4 to 8.

    Equivalent to:
        >>> import torch
        >>> from hvae_kernels.functional import Spline, rational_quadratic_spline
        >>> spline = Spline(8)
        >>> x, parameters = torch.randn(6, 5), torch.randn(6, 5, spline.parameters)
        >>> y, log_abs_det = rational_quadratic_spline(x, parameters, spline)
        >>> derivative = torch.func.jacrev(lambda x: rational_quadratic_spline(x, parameters, spline)[0].sum(0))(x)
        >>> derivative = derivative.diagonal(dim1=0, dim2=2)
        >>> torch.testing.assert_close(log_abs_det, derivative.log().sum(-1))
        >>> back, minus = rational_quadratic_spline(y, parameters, spline, inverse=True)
        >>> torch.testing.assert_close((back, minus), (x, -log_abs_det), rtol=1e-3, atol=1e-4)
    """
    _checks.same_kind(NAME, x=x)  # alone: the parameters may differ under autocast
    if _library.autocasts(x):
        op = functools.partial(
            rational_quadratic_spline, inverse=inverse, event_ndims=event_ndims, implementation=implementation
        )
        return _library.in_float32(op, x, parameters, spline)
    implementation = _dispatch.resolve(NAME, x, implementation)
    _validate(x, parameters, spline, inverse, event_ndims)
    if implementation == "reference":
        return reference.rational_quadratic_spline(x, parameters, spline, inverse, event_ndims)
    return autograd.call(implementation, x, parameters, *autograd.options_of(spline, inverse, event_ndims))


def _validate(x: Tensor, parameters: Tensor, spline: Spline, inverse: bool, event_ndims: int) -> None:
    _checks.same_kind(NAME, x=x, parameters=parameters)
    if not isinstance(spline, Spline):
        raise _checks.type_error(NAME, "spline", "a Spline", spline)
    _checks.flag(NAME, "inverse", inverse)
    _checks.integer(NAME, "event_ndims", event_ndims, 0)
    if not x.shape:
        raise _checks.value_error(NAME, "x", "of shape (..., d)", x)
    if event_ndims > x.dim():
        raise _checks.value_error(NAME, "event_ndims", f"at most {x.dim()}, x's number of dimensions", event_ndims)
    if parameters.shape != (*x.shape, spline.parameters):
        expected = f"of x's shape and {spline.parameters} more, {(*x.shape, spline.parameters)}"
        raise _checks.value_error(NAME, "parameters", expected, parameters)
