"""Where calls enter: docstrings, validation, dispatch."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from hvae_kernels import _checks, _dispatch, _library
from hvae_kernels.ops.iwae import autograd, reference

_NAMES = ("iwae_bound", "stl_surrogate", "dreg_surrogate")
for _name in _NAMES:
    _dispatch.register(_dispatch.Op(_name, ("cpp", "triton", "reference")))


def iwae_bound(log_weights: Tensor, dim: int = 0, *, implementation: str | None = None) -> Tensor:
    r"""The importance-weighted bound of K samples.

    .. math::
        \log \frac{1}{K} \sum_{k=1}^K w_k, \quad
        \frac{\partial}{\partial \log w_k} = \tilde w_k = \frac{w_k}{\sum_j w_j}

    Its expectation rises with K from the evidence lower bound (K = 1) to the evidence.

    Args:
        log_weights: :math:`\log w_k = \log p(x, z_k) - \log q(z_k | x)`, samples along ``dim``.
        dim: the dimension of the samples, at least one. The first costs no copy.
        implementation: for this call, as for :func:`hvae_kernels.use_impl`; None is what that says.

    Returns:
        A new tensor of ``log_weights``' shape without ``dim``.

    Differentiable to any order. For any spread of the weights no exponential overflows; ``-inf`` is a weight of zero
    with gradient zero, and where all weights are zero the bound is ``-inf`` and its gradient zero. Normalised weights
    below 1e-20 (1e-154 in float64) count as zero in the kernels' gradients: they would only make denormal numbers, with
    which CPUs are slow. Saved for the backward pass: the input, and two numbers for each of the results.

    Raises:
        TypeError: ``log_weights`` is not a floating-point tensor, or ``dim`` not an integer.
        ValueError: there is no such dimension, or no sample along it.

    Source: Burda, Grosse and Salakhutdinov, Importance weighted autoencoders, arXiv 1509.00519, equations 8 and 14.

    Equivalent to:
        >>> import math, torch
        >>> from hvae_kernels.functional import iwae_bound
        >>> log_weights = torch.randn(40, 8, dtype=torch.float64)
        >>> torch.testing.assert_close(iwae_bound(log_weights), log_weights.logsumexp(0) - math.log(40))
    """
    return _run("iwae_bound", 0, iwae_bound, log_weights, dim, implementation)


def stl_surrogate(log_weights: Tensor, dim: int = 0, *, implementation: str | None = None) -> Tensor:
    r"""What to differentiate for the encoder instead of the bound: "sticking the landing".

    .. math::
        \sum_k \mathrm{sg}(\tilde w_k) \log w_k

    with the stop-gradient sg. The value means nothing, the gradient is what counts.

    For **encoder parameters only**, those of q, and only where :math:`\log q`'s own parameters are detached and the
    path through the reparameterised sample is kept: the gradient then lacks the score function's noise and vanishes
    where q is the posterior. It is **unbiased for K = 1 and biased for K > 1**: there take :func:`dreg_surrogate`.
    Parameters of the decoder, of the prior or of a flow on the samples take :func:`iwae_bound`'s gradient.

    Args, Returns, Raises: as of :func:`iwae_bound`. The gradient is :math:`\tilde w_k`, constant: second derivatives
    by ``log_weights`` are zero. Weights of zero add nothing to value and gradient; what is small enough for
    :func:`iwae_bound`'s gradient to drop, this one drops too.

    Source: Roeder, Wu and Duvenaud, Sticking the landing, arXiv 1703.09194; its bias for K > 1: Tucker et al., arXiv
    1810.04152, section 3.

    Equivalent to:
        >>> import torch
        >>> from hvae_kernels.functional import stl_surrogate
        >>> log_weights = torch.randn(40, 8, dtype=torch.float64)
        >>> weights = log_weights.detach().softmax(0)
        >>> torch.testing.assert_close(stl_surrogate(log_weights), (weights * log_weights).sum(0))
    """
    return _run("stl_surrogate", 1, stl_surrogate, log_weights, dim, implementation)


def dreg_surrogate(log_weights: Tensor, dim: int = 0, *, implementation: str | None = None) -> Tensor:
    r"""What to differentiate for the encoder instead of the bound: the doubly reparameterised gradient.

    .. math::
        \sum_k \mathrm{sg}(\tilde w_k^2) \log w_k

    with the stop-gradient sg. The value means nothing, the gradient is what counts.

    For **encoder parameters only**, those of q, and only where :math:`\log q`'s own parameters are detached and the
    path through the reparameterised sample is kept: the gradient is then an **unbiased** one of the bound for every K,
    whose signal does not fade as K grows. Parameters of the decoder, of the prior or of a flow on the samples take
    :func:`iwae_bound`'s gradient.

    Args, Returns, Raises: as of :func:`iwae_bound`. The gradient is :math:`\tilde w_k^2`, constant: second derivatives
    by ``log_weights`` are zero. Weights of zero add nothing to value and gradient; squares small enough for
    :func:`iwae_bound`'s gradient to drop, this one drops too.

    Source: Tucker, Lawson, Gu and Maddison, Doubly reparameterized gradient estimators for Monte Carlo objectives,
    arXiv 1810.04152, equation 8.

    Equivalent to:
        >>> import torch
        >>> from hvae_kernels.functional import dreg_surrogate
        >>> log_weights = torch.randn(40, 8, dtype=torch.float64)
        >>> weights = log_weights.detach().softmax(0)
        >>> torch.testing.assert_close(dreg_surrogate(log_weights), (weights**2 * log_weights).sum(0))
    """
    return _run("dreg_surrogate", 2, dreg_surrogate, log_weights, dim, implementation)


def _run(
    name: str, power: int, public: Callable[..., Tensor], log_weights: Tensor, dim: int, implementation: str | None
) -> Tensor:
    _validate(name, log_weights, dim)
    if _library.autocasts(log_weights):
        return _library.in_float32(functools.partial(public, dim=dim, implementation=implementation), log_weights)
    implementation = _dispatch.resolve(name, log_weights, implementation)
    if implementation == "reference":
        return reference.surrogate(log_weights, dim, power) if power else reference.iwae_bound(log_weights, dim)
    samples = log_weights if dim == 0 else log_weights.movedim(dim, 0)
    return autograd.call(implementation, power, samples)


def _validate(name: str, log_weights: Tensor, dim: int) -> None:
    _checks.same_kind(name, log_weights=log_weights)
    _checks.integer(name, "dim", dim)
    if not -log_weights.dim() <= dim < log_weights.dim():
        raise _checks.value_error(name, "dim", f"one of log_weights' {log_weights.dim()} dimensions", dim)
    if log_weights.shape[dim] == 0:
        raise _checks.value_error(name, "log_weights", f"of at least one sample along dim {dim}", log_weights)
