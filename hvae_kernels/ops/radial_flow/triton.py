"""GPU kernels of ``radial_flow``: a program holds whole rows in registers through all layers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._triton.device import load
from hvae_kernels._triton.launch import cdiv, next_power_of_2, on_device_of

_ACCUMULATORS = {torch.float64: tl.float64}
_TILE = 1024


@triton.jit
def _layer(z, centers, alphas, betas, k, column, inside, features, DTYPE: tl.constexpr):
    """``(y, r, h, alpha, beta)`` of layer k; the scalars of each row in double."""
    y = z - load(centers, k * features + column, inside, DTYPE)[None, :]
    alpha = tl.load(alphas + k).to(tl.float64)
    radius = tl.sqrt(tl.sum((y * y).to(tl.float64), 1))
    return y, radius, 1.0 / (alpha + radius), alpha, tl.load(betas + k).to(tl.float64)


@triton.jit
def _forward_kernel(
    z, centers, alphas, betas, output, log_det, rows, features, layers,
    DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_FEATURES)
    inside = column < features
    mask = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * features + column[None, :]
    here = load(z, at, mask, DTYPE)
    logs = tl.zeros((BLOCK_ROWS,), tl.float64)
    for k in range(0, layers):
        y, _, h, alpha, beta = _layer(here, centers, alphas, betas, k, column, inside, features, DTYPE)
        logs += (features - 1) * tl.log(tl.abs(1.0 + beta * h)) + tl.log(tl.abs(1.0 + alpha * beta * h * h))
        here += (beta * h).to(DTYPE)[:, None] * y
    tl.store(output + at, here, mask=mask)
    tl.store(log_det + row, logs, mask=row < rows)


@triton.jit
def _backward_kernel(
    grad, grad_log, z, centers, alphas, betas, ys, d_z, d_alpha, d_beta, rows, features, layers,
    DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_FEATURES)
    inside = column < features
    mask = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * features + column[None, :]
    plane = rows * tl.full([], 1, tl.int64) * features
    here = load(z, at, mask, DTYPE)
    for k in range(0, layers):
        y, _, h, _, beta = _layer(here, centers, alphas, betas, k, column, inside, features, DTYPE)
        tl.store(ys + k * plane + at, y, mask=mask)
        here += (beta * h).to(DTYPE)[:, None] * y
    tl.debug_barrier()  # other threads than those that wrote ys may read it
    g = load(grad, at, mask, DTYPE)
    gl = load(grad_log, row, row < rows, tl.float64)
    for step in range(0, layers):
        k = layers - 1 - step
        y = load(ys, k * plane + at, mask, DTYPE)
        alpha = tl.load(alphas + k).to(tl.float64)
        beta = tl.load(betas + k).to(tl.float64)
        radius = tl.sqrt(tl.sum((y * y).to(tl.float64), 1))
        h = 1.0 / (alpha + radius)
        projected = tl.sum((g * y).to(tl.float64), 1)
        across = (features - 1) * gl / tl.where(gl == 0, 1.0, 1.0 + beta * h)
        along = gl / tl.where(gl == 0, 1.0, 1.0 + alpha * beta * h * h)
        d_h = beta * (projected + across + 2.0 * alpha * h * along)
        of_rows = k * tl.full([], 1, tl.int64) * rows + row
        tl.store(d_alpha + of_rows, h * h * (beta * along - d_h), mask=row < rows)
        tl.store(d_beta + of_rows, h * (projected + across) + alpha * h * h * along, mask=row < rows)
        turn = tl.where(radius > 0, -h * h * d_h / tl.where(radius > 0, radius, 1.0), 0.0)
        moved = (beta * h).to(DTYPE)[:, None] * g + turn.to(DTYPE)[:, None] * y
        tl.store(ys + k * plane + at, moved, mask=mask)
        g += moved
    tl.store(d_z + at, g, mask=mask)


def _launch(kernel, z: Tensor, *tensors: Tensor | None, layers: int) -> None:
    features = z.shape[-1]
    block_features = next_power_of_2(features)
    block_rows = max(1, _TILE // block_features)
    rows = z.numel() // features
    with on_device_of(z):
        kernel[(cdiv(rows, block_rows),)](
            *tensors, rows, features, layers, DTYPE=_ACCUMULATORS.get(z.dtype, tl.float32),
            BLOCK_ROWS=block_rows, BLOCK_FEATURES=block_features,
            num_warps=min(16, max(4, block_features // 512)),
        )  # fmt: skip


def radial_flow(z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel."""
    inputs = [x.contiguous() for x in (z, center, alpha, beta)]
    output = z.new_empty(z.shape)
    log_det = (z.new_empty if z.shape[-1] else z.new_zeros)(z.shape[:-1])  # nothing to stretch: nothing to launch for
    if z.numel():
        _launch(_forward_kernel, z, *inputs, output, log_det, layers=len(alpha))
    return output, log_det


def radial_flow_backward(
    grad_output: Tensor | None, grad_log_abs_det: Tensor | None, z: Tensor, center: Tensor, alpha: Tensor, beta: Tensor
) -> tuple[Tensor, ...]:
    """Launch the backward kernel; what it leaves for each row is added up by torch."""
    grads = [x if x is None else x.contiguous() for x in (grad_output, grad_log_abs_det)]
    inputs = [x.contiguous() for x in (z, center, alpha, beta)]
    layers, features = center.shape
    d_z = z.new_empty(z.shape)
    if not z.numel():
        return d_z, *(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs[1:])
    rows = z.numel() // features
    moved = z.new_empty(layers, rows, features)
    d_alpha, d_beta = (z.new_empty((layers, rows), dtype=torch.float64) for _ in range(2))
    _launch(_backward_kernel, z, *grads, *inputs, moved, d_z, d_alpha, d_beta, layers=layers)
    return d_z, -moved.sum(1), d_alpha.sum(1).to(z.dtype), d_beta.sum(1).to(z.dtype)
