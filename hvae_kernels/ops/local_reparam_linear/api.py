"""Where users' calls enter: docstring, validation, dispatch."""

from __future__ import annotations

import functools

from torch import Tensor

from hvae_kernels import _checks, _dispatch, _library
from hvae_kernels.ops.local_reparam_linear import autograd, reference

NAME = "local_reparam_linear"
_dispatch.register(_dispatch.Op(NAME, ("cpp", "triton", "reference")))


def local_reparam_linear(
    x: Tensor,
    weight_loc: Tensor,
    weight_log_scale: Tensor,
    bias_loc: Tensor | None,
    bias_log_scale: Tensor | None,
    noise: Tensor,
    *,
    implementation: str | None = None,
) -> Tensor:
    r"""A linear layer with independent Gaussian weights, sampled in its activations.

    .. math::
        y = x \mu^T + b + \sqrt{x^2 \exp(2 \lambda)^T + \exp(2 \lambda_b)} \; \zeta

    With weights :math:`W_{oi} \sim N(\mu_{oi}, e^{2 \lambda_{oi}})` each row of :math:`y` has the distribution of
    :math:`x W^T + b`, independently of the other rows: gradients averaged over a batch vary less than those of one
    sample of the weights that all rows share. On a GPU both products come from one read of x; the CPU uses BLAS.

    Args:
        x: inputs ``(..., in)``.
        weight_loc: :math:`\mu`, ``(out, in)``.
        weight_log_scale: :math:`\lambda`, the logarithm of the weights' standard deviation, ``(out, in)``.
        bias_loc: b, ``(out,)``, or None.
        bias_log_scale: :math:`\lambda_b`, ``(out,)``, or None: a bias that does not vary.
        noise: :math:`\zeta`, ``(..., out)``: standard normal draws for a sample.
        implementation: for this call, as for :func:`hvae_kernels.use_impl`; None is what that says.

    Returns:
        y, ``(..., out)``, a new contiguous tensor.

    One dtype (float32, float64; also bfloat16, float16 on GPUs and in the reference, with sums in float32) and device
    for all arguments. Differentiable, to any order, in all of them; where the variance is exactly 0, by underflow or
    because a row of x is 0, its gradient is 0. Saved for the backward pass beside the inputs: the standard deviation,
    ``(..., out)``. Under autocast half-precision arguments are computed in float32.

    Raises:
        TypeError: an argument is not a floating-point tensor, or dtypes differ.
        ValueError: shapes or devices do not fit.

    References:
        Kingma, Salimans and Welling, Variational dropout and the local reparameterization trick, 2015, arXiv
        1506.02557, section 2.3, equation 6.

    Equivalent to:
        >>> import torch
        >>> from torch.nn.functional import linear
        >>> from hvae_kernels.functional import local_reparam_linear
        >>> x, (loc, log_scale) = torch.randn(8, 3), torch.randn(2, 5, 3)
        >>> (bias, bias_log_scale), noise = torch.randn(2, 5), torch.randn(8, 5)
        >>> y = local_reparam_linear(x, loc, log_scale, bias, bias_log_scale, noise)
        >>> variance = linear(x**2, (2 * log_scale).exp(), (2 * bias_log_scale).exp())
        >>> torch.testing.assert_close(y, linear(x, loc, bias) + variance.sqrt() * noise)
    """
    tensors = (x, weight_loc, weight_log_scale, bias_loc, bias_log_scale, noise)
    if _library.autocasts(x):
        return _library.in_float32(functools.partial(local_reparam_linear, implementation=implementation), *tensors)
    _validate(*tensors)
    implementation = _dispatch.resolve(NAME, x, implementation)
    if implementation == "reference":
        return reference.local_reparam_linear(*tensors)
    if x.dim() == 2:
        return autograd.call(implementation, *tensors)
    rows, draws = (t[None] if t.dim() == 1 else t.flatten(0, -2) for t in (x, noise))
    return autograd.call(implementation, rows, *tensors[1:-1], draws).view(noise.shape)


def _validate(
    x: Tensor,
    weight_loc: Tensor,
    weight_log_scale: Tensor,
    bias_loc: Tensor | None,
    bias_log_scale: Tensor | None,
    noise: Tensor,
) -> None:
    every = {"bias_loc": bias_loc, "bias_log_scale": bias_log_scale}
    biases = {name: bias for name, bias in every.items() if bias is not None}
    _checks.same_kind(NAME, x=x, weight_loc=weight_loc, weight_log_scale=weight_log_scale, noise=noise, **biases)
    if not x.dim():
        raise _checks.value_error(NAME, "x", "of shape (..., in)", x)
    if weight_loc.dim() != 2 or weight_loc.shape[1] != x.shape[-1]:
        raise _checks.value_error(NAME, "weight_loc", f"of shape (out, in) with in = {x.shape[-1]}", weight_loc)
    if weight_log_scale.shape != weight_loc.shape:
        raise _checks.value_error(
            NAME, "weight_log_scale", f"of weight_loc's shape {tuple(weight_loc.shape)}", weight_log_scale
        )
    outputs = weight_loc.shape[0]
    for name, bias in biases.items():
        if bias.shape != (outputs,):
            raise _checks.value_error(NAME, name, f"of shape ({outputs},) or None", bias)
    if noise.shape != (*x.shape[:-1], outputs):
        raise _checks.value_error(NAME, "noise", f"of shape {(*x.shape[:-1], outputs)}", noise)
