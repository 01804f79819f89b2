"""Where calls enter: docstrings, validation, dispatch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvae_kernels import _checks, _dispatch, _library
from hvae_kernels.ops.autoregressive_network import autograd, reference
from hvae_kernels.ops.autoregressive_network.network import Network
from hvae_kernels.ops.rational_quadratic_spline.spline import Spline

FORWARD, INVERSE = "autoregressive_forward", "autoregressive_inverse"
_dispatch.register(_dispatch.Op(FORWARD, ("cpp", "triton", "reference")))
_dispatch.register(_dispatch.Op(INVERSE, ("cpp", "triton", "reference")))
#: The sequential direction through splines.
SPLINE_INVERSE = "autoregressive_spline_inverse"
_dispatch.register(_dispatch.Op(SPLINE_INVERSE, ("cpp", "triton", "reference")))


def inverse_name(network: Network) -> str:
    """What the sequential direction is registered as."""
    return SPLINE_INVERSE if isinstance(network.tail, Spline) else INVERSE


def autoregressive_forward(x: Tensor, network: Network) -> tuple[Tensor, Tensor]:
    r"""The parallel direction of an autoregressive map.

    .. math:: y_j = \sigma_j(x_{<j}) x_j + \tau_j(x_{<j}) \mu_j(x_{<j}), \quad
        \log |\det| = \sum_j \log \sigma_j

    or a spline of :math:`x_j` whose parameters depend on :math:`x_{<j}`.

    The C++ kernel walks tile by tile through the whole network, so that hidden activations stay in the cache; for a
    backward pass it keeps one number a unit and sample. On a GPU, without gradients, a small chain of stages (at most
    two hidden layers, of at most 128 units each) is one launch. Everything else, and all that ``torch.compile`` and
    ``torch.func`` see, is the composition of ``masked_linear``, activations and the op of the tail.

    Args:
        x: features ``(rows, d)``.
        network: the masked network and its tail.

    Returns:
        ``(y, log_abs_det)``, ``(rows, d)`` and ``(rows,)``.

    Raises:
        TypeError: ``x`` is no floating-point tensor, or its dtype is not the weights'.
        ValueError: shapes or devices do not fit.
    """
    _validate(FORWARD, "x", x, network)
    if _library.autocasts(x):
        return _in_float32(autoregressive_forward, x, network)
    implementation = _dispatch.resolve(FORWARD, x)
    if implementation == "reference":
        return reference.autoregressive_forward(x, network)
    if torch.compiler.is_compiling():
        return autograd.composition(x, network)
    return autograd.forward(implementation, x, network)


def autoregressive_inverse(y: Tensor, network: Network) -> tuple[Tensor, Tensor]:
    r"""The sequential direction: x with ``autoregressive_forward(x) = y``, in one pass of work instead of d.

    Features are found in order of degree, and each hidden unit is finished exactly once, when its last input is known,
    as in a triangular solve: the arithmetic of one forward pass. The derivative is implicit,
    :math:`J^\top v = g` by one sweep in the opposite order, never through the sequence of steps. Second derivatives and
    forward mode come from the reference, which takes d passes.

    Args:
        y: ``(rows, d)``.
        network: the masked network and its tail.

    Returns:
        ``(x, log_abs_det)``, the latter of the inverse map: minus that of the forward direction.

    Raises:
        TypeError: ``y`` is no floating-point tensor, or its dtype is not the weights'.
        ValueError: shapes or devices do not fit.
        RuntimeError: a scale is below the least normal number, so that there is no inverse. Found on the CPU only,
            where looking costs no device sync; on a GPU such rows come back infinite or NaN.
    """
    _validate(INVERSE, "y", y, network)
    if _library.autocasts(y):
        return _in_float32(autoregressive_inverse, y, network)
    implementation = _dispatch.resolve(inverse_name(network), y)
    if implementation == "reference":
        return reference.autoregressive_inverse(y, network)
    return autograd.inverse(implementation, y, network)


def _in_float32(
    op: Callable[[Tensor, Network], tuple[Tensor, Tensor]], x: Tensor, network: Network
) -> tuple[Tensor, Tensor]:
    return _library.in_float32(lambda x, *tensors: op(x, network.with_tensors(tensors)), x, *network.tensors())


def _validate(function: str, argument: str, x: Tensor, network: Network) -> None:
    if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != network.features:
        raise _checks.value_error(function, argument, f"a tensor of shape (rows, {network.features})", x)
    if not _library.autocasts(x):
        _checks.same_kind(function, **{argument: x}, weight=network.stages[0].weight)
