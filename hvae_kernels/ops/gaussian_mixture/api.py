"""Where calls enter: docstring, validation, dispatch."""

from __future__ import annotations

import functools

from torch import Tensor

from hvae_kernels import _checks, _dispatch, _library
from hvae_kernels.ops.gaussian_mixture import autograd, reference

NAME, RESPONSIBILITIES = "gaussian_mixture_log_prob", "gaussian_mixture_responsibilities"
for _name in (NAME, RESPONSIBILITIES):
    _dispatch.register(_dispatch.Op(_name, ("cpp", "triton", "reference"), half_precision=("reference",)))


def gaussian_mixture_log_prob(
    value: Tensor, mixture_logits: Tensor, loc: Tensor, log_scale: Tensor, *, implementation: str | None = None
) -> Tensor:
    r"""Log density of a mixture of C diagonal Gaussians, with nothing of size (batch, C) or (batch, C, d) in memory.

    .. math::
        \log \sum_{c=1}^C \mathrm{softmax}(a)_c \prod_{j=1}^d N(x_j; \mu_{cj}, e^{2 \lambda_{cj}})

    Distances are sums of squared differences, never expanded: narrow and far components keep their digits.

    Args:
        value: x, ``(..., d)``.
        mixture_logits: a, ``(C,)``, not necessarily normalised; ``-inf`` removes a component.
        loc: :math:`\mu`, ``(C, d)``.
        log_scale: :math:`\lambda`, the logarithm of the standard deviations, ``(C, d)``.
        implementation: for this call, as for :func:`hvae_kernels.use_impl`; None is what that says.

    Returns:
        A new tensor of shape ``(...)``.

    One dtype and device for all arguments. Differentiable, to any order, in every tensor; from the third order on with
    plain PyTorch. Nothing is saved for the backward pass but the inputs; it recomputes the densities. Gradients count
    responsibilities below 1e-31 of a row's largest (1e-292 in float64) as zero. Half precision runs the plain formula.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: shapes or devices do not fit, or there is no component.

    Source: Tomczak and Welling, VAE with a VampPrior, arXiv 1705.07120, equation 9 (there with equal weights).

    Equivalent to:
        >>> import torch
        >>> from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
        >>> from hvae_kernels.functional import gaussian_mixture_log_prob
        >>> value, mixture_logits, (loc, log_scale) = torch.randn(8, 5), torch.randn(3), torch.randn(2, 3, 5)
        >>> components = Independent(Normal(loc, log_scale.exp()), 1)
        >>> mixture = MixtureSameFamily(Categorical(logits=mixture_logits), components)
        >>> fused = gaussian_mixture_log_prob(value, mixture_logits, loc, log_scale)
        >>> torch.testing.assert_close(fused, mixture.log_prob(value))
    """
    arguments = value, mixture_logits, loc, log_scale
    if _library.autocasts(value):
        op = functools.partial(gaussian_mixture_log_prob, implementation=implementation)
        return _library.in_float32(op, *arguments)
    _validate(NAME, *arguments)
    implementation = _dispatch.resolve(NAME, value, implementation)
    if implementation == "reference":
        return reference.gaussian_mixture_log_prob(*arguments)
    return autograd.call(implementation, False, value, mixture_logits.log_softmax(-1), loc, log_scale)


def gaussian_mixture_responsibilities(
    value: Tensor, mixture_logits: Tensor, loc: Tensor, log_scale: Tensor, *, implementation: str | None = None
) -> Tensor:
    r"""The probability of each component of a Gaussian mixture given a value: its posterior weights.

    .. math::
        r_c = \frac{\mathrm{softmax}(a)_c \, N(x; \mu_c, e^{2 \lambda_c})}
                   {\sum_k \mathrm{softmax}(a)_k \, N(x; \mu_k, e^{2 \lambda_k})}

    Args:
        value: x, ``(..., d)``.
        mixture_logits: a, ``(C,)``; as the others as for :func:`gaussian_mixture_log_prob`.
        loc: :math:`\mu`, ``(C, d)``.
        log_scale: :math:`\lambda`, ``(C, d)``.
        implementation: for this call, as for :func:`hvae_kernels.use_impl`; None is what that says.

    Returns:
        A new tensor of shape ``(..., C)`` whose rows add up to 1.

    Differentiable, to any order, in every tensor. Memory for results of that shape, never for ``(..., C, d)``.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: shapes or devices do not fit, or there is no component.

    Source: Bishop, Pattern Recognition and Machine Learning, equation 9.13.

    Equivalent to:
        >>> import torch
        >>> from torch.distributions import Independent, Normal
        >>> from hvae_kernels.functional import gaussian_mixture_responsibilities
        >>> value, mixture_logits, (loc, log_scale) = torch.randn(8, 5), torch.randn(3), torch.randn(2, 3, 5)
        >>> log_prob = Independent(Normal(loc, log_scale.exp()), 1).log_prob(value[:, None])
        >>> fused = gaussian_mixture_responsibilities(value, mixture_logits, loc, log_scale)
        >>> torch.testing.assert_close(fused, torch.softmax(mixture_logits + log_prob, -1))
    """
    arguments = value, mixture_logits, loc, log_scale
    if _library.autocasts(value):
        op = functools.partial(gaussian_mixture_responsibilities, implementation=implementation)
        return _library.in_float32(op, *arguments)
    _validate(RESPONSIBILITIES, *arguments)
    implementation = _dispatch.resolve(RESPONSIBILITIES, value, implementation)
    if implementation == "reference":
        return reference.gaussian_mixture_responsibilities(*arguments)
    return autograd.call(implementation, True, value, mixture_logits.log_softmax(-1), loc, log_scale)


def _validate(name: str, value: Tensor, mixture_logits: Tensor, loc: Tensor, log_scale: Tensor) -> None:
    _checks.same_kind(name, value=value, mixture_logits=mixture_logits, loc=loc, log_scale=log_scale)
    if not value.shape:
        raise _checks.value_error(name, "value", "of shape (..., d)", value)
    if mixture_logits.dim() != 1 or not len(mixture_logits):
        raise _checks.value_error(name, "mixture_logits", "of shape (C,) with C at least 1", mixture_logits)
    shape = (len(mixture_logits), value.shape[-1])
    for argument, tensor in (("loc", loc), ("log_scale", log_scale)):
        if tensor.shape != shape:
            raise _checks.value_error(name, argument, f"of shape {shape}", tensor)
