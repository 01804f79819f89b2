"""Where calls enter: docstring, validation, layout, dispatch."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hvae_kernels import _checks, _dispatch, _library
from hvae_kernels.ops.bernoulli_log_prob import autograd, reference

NAME = "bernoulli_log_prob"
_dispatch.register(_dispatch.Op(NAME, ("cpp", "triton", "reference")))

#: What ``value`` may be besides the logits' own dtype.
BITS = (torch.bool, torch.uint8)
#: How far outside [0, 1] arithmetic may take a probability; as in csrc/cpu/bernoulli_log_prob.cpp.
_ROUNDING = 1e-3


def bernoulli_log_prob(
    logits: Tensor, value: Tensor, event_ndims: int = 1, *, implementation: str | None = None
) -> Tensor:
    r"""Log-probability of independent Bernoulli variables with the given logits, summed over the event, in one pass.

    .. math::
        \log p(x) = \sum_j x_j l_j - \log(1 + e^{l_j})
                  = \sum_j x_j \log \sigma(l_j) + (1 - x_j) \log \sigma(-l_j)

    computed so that no terms cancel: relative to the result however sure the logits are. Infinite logits have the
    limits: 0 where the value is certain, ``-inf`` where it is impossible.

    Args:
        logits: ``(..., *event)``.
        value: ``(..., *event)``, whose leading dimensions broadcast against those of ``logits``; no expanded copy is
            made (unless broadcast dimensions lie apart, with others between them). Bits (bool, or uint8 holding 0 and
            1) or, for soft targets, floating values in [0, 1] of ``logits``' dtype.
        event_ndims: how many last dimensions the event has; 0 sums nothing.
        implementation: for this call, as for :func:`hvae_kernels.use_impl`; None is what that says.

    Returns:
        A new tensor ``(...)`` of ``logits``' leading dimensions.

    Differentiable, to any order, in ``logits`` and in a floating ``value``. Saved for the backward pass: the inputs
    alone. The gradient of ``value`` takes a temporary of the size of ``logits``.

    Raises:
        TypeError: ``logits`` is not a floating-point tensor, ``value`` neither of its dtype nor bool or uint8, or
            ``event_ndims`` not an integer.
        ValueError: shapes or devices do not fit, or a finite value is more than 0.001 outside [0, 1], as raw pixels are
            (on the CPU; a GPU, and what torch.compile or vmap make of the reference, take it as it is). Inside a
            compiled graph or a ``torch.func`` transform it is a RuntimeError.

    Source: Kingma and Welling, Auto-encoding variational Bayes, arXiv 1312.6114, appendix C.1, with the sigmoid and
    the logarithm taken together.

    Equivalent to:
        >>> import torch
        >>> from hvae_kernels.functional import bernoulli_log_prob
        >>> logits, value = torch.randn(40, 8, 5, dtype=torch.float64), torch.rand(8, 5) < 0.5
        >>> plain = (value * logits - torch.nn.functional.softplus(logits)).sum(-1)
        >>> torch.testing.assert_close(bernoulli_log_prob(logits, value), plain)
        >>> torch.testing.assert_close(bernoulli_log_prob(logits, value, event_ndims=2), plain.sum(-1))
    """
    _checks.same_kind(NAME, logits=logits)  # alone: a value may differ under autocast
    if _library.autocasts(logits):
        op = functools.partial(bernoulli_log_prob, event_ndims=event_ndims, implementation=implementation)
        return _library.in_float32(op, logits, value)
    implementation = _dispatch.resolve(NAME, logits, implementation)
    _validate(logits, value, event_ndims)
    if implementation == "reference":
        _refuse_outside(value)
        return reference.bernoulli_log_prob(logits, value, event_ndims)
    first_event = logits.dim() - event_ndims
    leading, event = logits.shape[:first_event], logits.shape[first_event:]
    own = value.shape[: value.dim() - event_ndims]
    shape = (1,) * (len(leading) - len(own)) + own
    first, stop = _broadcast_run(leading, shape)
    groups, outer, rows = math.prod(leading[:first]), math.prod(leading[first:stop]), math.prod(leading[stop:])
    size = math.prod(event)
    value = value.expand((*shape[:stop], *leading[stop:], *event)).reshape(groups, rows, size)
    try:
        log_prob = autograd.call(implementation, logits.reshape(groups, outer, rows, size), value)
    except RuntimeError:  # the kernel does not say what it met
        _refuse_outside(value)
        raise
    return log_prob.view(leading)


def _refuse_outside(value: Tensor) -> None:
    """Require probabilities, but for rounding, where they can be read without a sync; others show in their rows."""
    if value.dtype is torch.bool or not _checks.values_readable(value):
        return
    outside = value[((value < -_ROUNDING) | (value > 1 + _ROUNDING)) & value.isfinite()]
    if outside.numel():
        raise _checks.value_error(NAME, "value", "in [0, 1] (divide pixels by 255)", f"{outside[0].item()}")


def _broadcast_run(leading: Sequence[int], shape: Sequence[int]) -> tuple[int, int]:
    """The first run of dimensions, ``[first, stop)``, along which a value of ``shape`` broadcasts."""
    broadcast = [size != own for size, own in zip(leading, shape, strict=True)]
    first = stop = broadcast.index(True) if True in broadcast else 0
    while stop < len(leading) and (broadcast[stop] or leading[stop] == 1):
        stop += 1
    return first, stop


def _validate(logits: Tensor, value: Tensor, event_ndims: int) -> None:
    if not (isinstance(value, Tensor) and value.dtype in BITS):
        _checks.same_kind(NAME, logits=logits, value=value)
    if value.layout is not torch.strided:
        raise _checks.type_error(NAME, "value", "a dense tensor", value)
    if value.device != logits.device:
        raise _checks.value_error(NAME, "value", f"on the device of logits, {logits.device}", value)
    _checks.integer(NAME, "event_ndims", event_ndims)
    if not 0 <= event_ndims <= logits.dim():
        raise _checks.value_error(NAME, "event_ndims", f"between 0 and logits' {logits.dim()} dimensions", event_ndims)
    first, own_first = logits.dim() - event_ndims, value.dim() - event_ndims
    leading, own = logits.shape[:first], value.shape[: max(0, own_first)]
    fits = 0 <= own_first <= first and value.shape[own_first:] == logits.shape[first:]
    if not fits or any(a not in (1, b) for a, b in zip(reversed(own), reversed(leading), strict=False)):
        expected = (
            f"of a shape that broadcasts to logits' {tuple(logits.shape)} and ends in {tuple(logits.shape[first:])}"
        )
        raise _checks.value_error(NAME, "value", expected, value)
