"""Launchers: the raw overloads."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from hvae_kernels._triton.launch import cdiv, next_power_of_2, on_device_of
from hvae_kernels.ops.rational_quadratic_spline.autograd import (
    NEEDS_LOG_ABS_DET,
    NEEDS_OUTPUT,
    NEEDS_PARAMETERS,
    NEEDS_X,
    as_parameters,
)
from hvae_kernels.ops.rational_quadratic_spline.triton.bins import constants
from hvae_kernels.ops.rational_quadratic_spline.triton.kernels import (
    backward_kernel,
    double_backward_kernel,
    forward_kernel,
)


class Strides(NamedTuple):
    """Of parameters ``(rows, features, P)``."""

    row: Any
    feature: Any
    parameter: Any


def _rows(parameters: Tensor) -> Tensor:
    """``(rows, features, P)``; a copy only where the strides are not those of such rows."""
    return parameters.reshape(math.prod(parameters.shape[:-2]), *parameters.shape[-2:])


def _launch(kernel, before: tuple, parameters: tuple[Tensor | None, ...], x: Tensor, options: tuple, **given) -> None:
    """Run a kernel with the tensors ``before``, then the strides of ``parameters``, of which the last is written."""
    if x.numel() == 0:
        return
    bins, tails, style, *numbers, inverse, event_ndims = options
    features, tile = x.shape[-1], 128 if given.pop("dual", False) else 256
    rows = x.numel() // features
    block_features = min(tile, next_power_of_2(features))
    block_rows = max(1, min(tile // block_features, next_power_of_2(rows)))
    strides = [Strides(*(1, 1, 1) if p is None else p.stride()) for p in parameters]
    with on_device_of(x):
        kernel[(cdiv(rows, block_rows),)](
            *before, rows, features, *strides, C=constants(bins, style, *numbers), BINS=bins, TAIL=tails,
            STYLE=style, INVERTS=bool(inverse), SUMS=event_ndims > 0,
            DTYPE=tl.float64 if x.dtype == torch.float64 else tl.float32,
            BLOCK_ROWS=block_rows, BLOCK_FEATURES=block_features, num_warps=4,
        )  # fmt: skip


def _row_logs(x: Tensor, event_ndims: int) -> Tensor:
    """What the kernels write of a log-determinant: one a row, or an element; zeros where there is nothing to sum."""
    shape = x.shape[:-1] if event_ndims else x.shape
    return (x.new_empty if x.numel() else x.new_zeros)(shape)


def _summed(logs: Tensor, event_ndims: int) -> Tensor:
    """Over the event dimensions before the last."""
    return logs.flatten(logs.dim() - event_ndims + 1).sum(-1) if event_ndims > 1 else logs


def _of_rows(grad_log: Tensor | None, x: Tensor, event_ndims: int) -> Tensor | None:
    """A cotangent of the log-determinant as one of what :func:`_row_logs` is."""
    if grad_log is None:
        return None
    if event_ndims > 1:
        grad_log = grad_log[(...,) + (None,) * (event_ndims - 1)].expand(x.shape[:-1])
    return grad_log.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def rational_quadratic_spline(x: Tensor, parameters: Tensor, *options) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel."""
    x, parameters = x.contiguous(), _rows(parameters)
    output, logs = torch.empty_like(x), _row_logs(x, options[-1])
    _launch(forward_kernel, (x, parameters, output, logs), (parameters,), x, options)
    return output, _summed(logs, options[-1])


def rational_quadratic_spline_backward(
    grad_output: Tensor | None, grad_log_abs_det: Tensor | None, x: Tensor, parameters: Tensor, *last
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel."""
    *options, needs = last
    x, rows = x.contiguous(), _rows(parameters)
    d_x = torch.empty_like(x) if needs & NEEDS_X else None
    d_parameters = as_parameters(parameters) if needs & NEEDS_PARAMETERS else None
    to = None if d_parameters is None else _rows(d_parameters)
    given = _contiguous(grad_output), _of_rows(grad_log_abs_det, x, options[-1])
    _launch(backward_kernel, (*given, x, rows, d_x, to), (rows, to), x, tuple(options))
    return tuple(x.new_empty(0) if result is None else result for result in (d_x, d_parameters))


def rational_quadratic_spline_double_backward(
    h_x: Tensor | None,
    h_parameters: Tensor | None,
    grad_output: Tensor | None,
    grad_log_abs_det: Tensor | None,
    x: Tensor,
    parameters: Tensor,
    *last,
) -> tuple[Tensor, ...]:
    """Launch the double backward kernel."""
    *options, needs = last
    event_ndims = options[-1]
    x, rows = x.contiguous(), _rows(parameters)
    h_rows = None if h_parameters is None else _rows(h_parameters)
    output = torch.empty_like(x) if needs & NEEDS_OUTPUT else None
    logs = _row_logs(x, event_ndims) if needs & NEEDS_LOG_ABS_DET else None
    d_x = torch.empty_like(x) if needs & NEEDS_X else None
    d_parameters = as_parameters(parameters) if needs & NEEDS_PARAMETERS else None
    to = None if d_parameters is None else _rows(d_parameters)
    given = _contiguous(h_x), h_rows, _contiguous(grad_output), _of_rows(grad_log_abs_det, x, event_ndims)
    results = output, logs, d_x, to
    _launch(double_backward_kernel, (*given, x, rows, *results), (h_rows, rows, to), x, tuple(options), dual=True)
    log_abs_det = None if logs is None else _summed(logs, event_ndims)
    results = output, log_abs_det, d_x, d_parameters
    return tuple(x.new_empty(0) if result is None else result for result in results)
