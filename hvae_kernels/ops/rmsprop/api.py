"""Where calls enter: docstring, validation, dispatch. Internal, for training loops of flat parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvae_kernels import _checks, _dispatch, _library
from hvae_kernels.ops.rmsprop import reference

NAME = "rmsprop_step_"
_dispatch.register(_dispatch.Op(NAME, ("cpp", "reference")))
RAW = _library.define(
    NAME,
    "(Tensor(a!) parameter, Tensor gradient, Tensor(b!) square_average, float learning_rate, float alpha, float eps, "
    "float max_norm) -> bool",
    lambda *arguments: True,
    ("cpp",),
)


def rmsprop_step_(
    parameter: Tensor,
    gradient: Tensor,
    square_average: Tensor,
    learning_rate: float,
    *,
    alpha: float = 0.99,
    eps: float = 1e-8,
    max_norm: float = math.inf,
) -> bool:
    r"""One step of RMSProp on R models whose parameters are the rows of one tensor, in place and in one pass.

    .. math::
        g \leftarrow \min(1, c / (|g| + 10^{-6})) \, g, \quad v \leftarrow a v + (1 - a) g^2, \quad
        \theta \leftarrow \theta - \eta g / (\sqrt v + \epsilon)

    with :math:`|g|` the norm of a row. ``gradient`` itself is left as it is. Not differentiable.

    Args:
        parameter: theta, ``(R, P)``, contiguous, updated.
        gradient: g, of ``parameter``'s shape, contiguous.
        square_average: v, of ``parameter``'s shape, contiguous, updated.
        learning_rate: eta.
        alpha: a, the moving average's memory.
        eps: epsilon.
        max_norm: c, the largest norm of a row's gradient.

    Returns:
        Whether the norms of all rows, taken in float64, are finite. Where one is not, nothing is changed.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: shapes or devices do not fit, a tensor is not contiguous, or ``max_norm`` is not above 0.

    Source: Tieleman and Hinton, Lecture 6.5: RMSProp, 2012, as ``torch.optim.RMSprop`` has it.

    Equivalent to:
        >>> import torch
        >>> from hvae_kernels.ops.rmsprop import rmsprop_step_
        >>> parameter, gradient = torch.nn.Parameter(torch.randn(1, 5)), torch.randn(1, 5)
        >>> updated, square_average = parameter.detach().clone(), torch.zeros(1, 5)
        >>> finite = rmsprop_step_(updated, gradient, square_average, 1e-3, max_norm=0.5)
        >>> parameter.grad = gradient
        >>> norm = torch.nn.utils.clip_grad_norm_([parameter], 0.5)
        >>> torch.optim.RMSprop([parameter], lr=1e-3).step()
        >>> torch.testing.assert_close(updated, parameter.detach())
    """
    _checks.same_kind(NAME, parameter=parameter, gradient=gradient, square_average=square_average)
    if parameter.dim() != 2 or not parameter.is_contiguous():
        raise _checks.value_error(NAME, "parameter", "contiguous, of shape (R, P)", parameter)
    for argument, tensor in (("gradient", gradient), ("square_average", square_average)):
        if tensor.shape != parameter.shape or not tensor.is_contiguous():
            raise _checks.value_error(NAME, argument, f"contiguous, of shape {tuple(parameter.shape)}", tensor)
    for argument, number in (("learning_rate", learning_rate), ("alpha", alpha), ("eps", eps), ("max_norm", max_norm)):
        _checks.real(NAME, argument, number)
    if not max_norm > 0:
        raise _checks.value_error(NAME, "max_norm", "above 0", max_norm)
    implementation = _dispatch.resolve(NAME, parameter)
    step = reference.rmsprop_step_ if implementation == "reference" else RAW[implementation]
    with torch.no_grad():
        finite = step(parameter, gradient, square_average, learning_rate, alpha, eps, max_norm)
    torch.autograd.graph.increment_version((parameter, square_average))  # a raw kernel does not
    return finite
