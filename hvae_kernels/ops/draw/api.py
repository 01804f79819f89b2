"""Where calls enter: docstrings, validation, dispatch."""

from __future__ import annotations

import functools

from torch import Tensor

from hvae_kernels import _checks, _dispatch, _library
from hvae_kernels.ops.draw import autograd, reference

READ, WRITE = "draw_read", "draw_write"
for _name in (READ, WRITE):
    _dispatch.register(_dispatch.Op(_name, ("cpp", "triton", "reference"), half_precision=("reference",)))


def draw_read(images: Tensor, attention: Tensor, size: int, *, implementation: str | None = None) -> Tensor:
    r"""Patches of images, through grids of Gaussian filters: DRAW's selective attention.

    .. math::
        \gamma \, F_Y X F_X^T, \quad F_X[i, a] = \frac{1}{Z_i} \exp \frac{-(a - \mu_i)^2}{2 \sigma^2}, \quad
        \mu_i = g_x + (i - N/2 - 1/2) \, \delta

    with pixels a and filters i counted from 1, :math:`g_x = \frac{W + 1}{2} (\tilde g_x + 1)`, :math:`\delta =
    \frac{\max(W, H) - 1}{N - 1} \tilde \delta`, and the same for :math:`F_Y` along the height. Rows of both sum to 1,
    for every width of the filters and wherever the grid lies.

    Args:
        images: X, ``(B, C, height, width)``.
        attention: ``(B, 5)``, :math:`\tilde g_x, \tilde g_y, \log \sigma^2, \log \tilde \delta, \log \gamma` of each
            image.
        size: N, filters along each side, at least 1.
        implementation: for this call, as for :func:`hvae_kernels.use_impl`; None is what that says.

    Returns:
        ``(B, C, N, N)``.

    One dtype and device for both tensors. Differentiable, to any order; from the second order on with plain PyTorch.
    Filters are never in memory: what is saved for the backward pass are the inputs. Half precision runs the plain
    formula.

    Raises:
        TypeError: an argument is not a floating-point tensor, dtypes differ, or ``size`` is no integer.
        ValueError: shapes or devices do not fit, or ``size`` is below 1.

    Source: Gregor et al., DRAW: a recurrent neural network for image generation, arXiv 1502.04623, section 3.3.

    Equivalent to:
        >>> import torch
        >>> from hvae_kernels.functional import draw_read
        >>> images, attention = torch.rand(7, 1, 28, 20), torch.randn(7, 5) / 2
        >>> x, y, log_variance, log_stride, log_gamma = attention.unbind(-1)
        >>> places = torch.arange(1, 6) - 3
        >>> def filters(center, length):
        ...     pixels = torch.arange(1, length + 1)
        ...     stride = (28 - 1) / (5 - 1) * log_stride.exp()
        ...     centers = (length + 1) / 2 * (center + 1)[:, None] + places * stride[:, None]
        ...     exponent = -((pixels - centers[..., None]) ** 2) / (2 * log_variance.exp()[:, None, None])
        ...     return exponent.softmax(-1)[:, None]
        >>> expected = log_gamma.exp()[:, None, None, None] * (filters(y, 28) @ images @ filters(x, 20).mT)
        >>> torch.testing.assert_close(draw_read(images, attention, 5), expected, rtol=1e-4, atol=1e-5)
    """
    if _library.autocasts(images):
        function = functools.partial(draw_read, size=size, implementation=implementation)
        return _library.in_float32(function, images, attention)
    _validate(READ, "images", "of shape (B, C, height, width), height and width at least 1", images, attention)
    _checks.integer(READ, "size", size, 1)
    implementation = _dispatch.resolve(READ, images, implementation)
    if implementation == "reference":
        return reference.draw_read(images, attention, size)
    return autograd.call(implementation, False, (size,), images, attention)


def draw_write(
    patch: Tensor, attention: Tensor, image_size: tuple[int, int], *, implementation: str | None = None
) -> Tensor:
    r"""Images of patches, through the same grids: the transpose of :func:`draw_read`, with :math:`1 / \gamma`.

    .. math::
        \frac{1}{\gamma} F_Y^T P F_X

    Args:
        patch: P, ``(B, C, N, N)``.
        attention: ``(B, 5)``, as for :func:`draw_read`.
        image_size: ``(height, width)`` of the result, each at least 1.
        implementation: for this call, as for :func:`hvae_kernels.use_impl`; None is what that says.

    Returns:
        ``(B, C, height, width)``.

    As :func:`draw_read` in all else.

    Raises:
        TypeError: an argument is not a floating-point tensor, dtypes differ, or ``image_size`` is no pair of integers.
        ValueError: shapes or devices do not fit, or a size is below 1.

    Source: Gregor et al., DRAW: a recurrent neural network for image generation, arXiv 1502.04623, section 3.3.

    Equivalent to:
        >>> import torch
        >>> from hvae_kernels.functional import draw_read, draw_write
        >>> patch, attention = torch.randn(7, 1, 5, 5), torch.randn(7, 5) / 2
        >>> zeros = torch.zeros(7, 1, 28, 20, requires_grad=True)
        >>> attention[:, 4] = 0  # gamma 1: the transpose, which is the gradient
        >>> (transposed,) = torch.autograd.grad(draw_read(zeros, attention, 5), zeros, patch)
        >>> torch.testing.assert_close(draw_write(patch, attention, (28, 20)), transposed)
    """
    if _library.autocasts(patch):
        function = functools.partial(draw_write, image_size=image_size, implementation=implementation)
        return _library.in_float32(function, patch, attention)
    _validate(WRITE, "patch", "of shape (B, C, N, N), N at least 1", patch, attention)
    if patch.shape[2] != patch.shape[3]:
        raise _checks.value_error(WRITE, "patch", "of shape (B, C, N, N), N at least 1", patch)
    if not isinstance(image_size, (tuple, list)) or len(image_size) != 2:
        raise _checks.type_error(WRITE, "image_size", "a pair (height, width) of integers of at least 1", image_size)
    for name, length in zip(("height", "width"), image_size, strict=True):
        _checks.integer(WRITE, f"image_size's {name}", length, 1)
    implementation = _dispatch.resolve(WRITE, patch, implementation)
    if implementation == "reference":
        return reference.draw_write(patch, attention, (image_size[0], image_size[1]))
    return autograd.call(implementation, True, tuple(image_size), patch, attention)


def _validate(function: str, argument: str, expected: str, source: Tensor, attention: Tensor) -> None:
    _checks.same_kind(function, **{argument: source, "attention": attention})
    if source.dim() != 4 or 0 in source.shape[2:]:
        raise _checks.value_error(function, argument, expected, source)
    if attention.shape != (len(source), 5):
        raise _checks.value_error(function, "attention", f"of shape ({len(source)}, 5)", attention)
