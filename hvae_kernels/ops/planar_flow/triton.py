"""GPU kernels of the planar recursion: a program owns a run of rows and walks through the layers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._triton.device import load
from hvae_kernels._triton.launch import cdiv, on_device_of
from hvae_kernels.ops.planar_flow import algebra, autograd

#: Rows a program, one a thread: what a thread writes for one layer it reads back for the next ones.
BLOCK = 32


@triton.jit
def _bounded(a, SINGLE: tl.constexpr):
    """``(tanh a, 1 - tanh(a)^2)`` without cancellation; to 1e-8 for float32 batches."""
    x = -2.0 * tl.abs(a)
    if SINGLE:
        x = tl.where(x < -80.0, -80.0, x)
        k = tl.floor(x * 1.4426950408889634 + 0.5)
        r = x - k * 0.6931471805599453
        p = 1.9908904235e-4 * r + 1.3934544233e-3
        p = p * r + 8.3332841058e-3
        p = p * r + 4.1666456781e-2
        p = p * r + 1.6666666762e-1
        p = p * r + 5.0000000143e-1
        p = p * (r * r) + r
        n = tl.where(k == k, k, 0.0).to(tl.int64)
        power = ((n + 1023) << 52).to(tl.float64, bitcast=True)
        e = power * p + power
        less = power * p + (power - 1.0)
    else:
        # exp(x) - 1 from the logarithm of the rounded exp(x), which has the same error.
        e = tl.exp(x)
        log = tl.log(e)
        exact = (e < 1.0) & (e > 0.0)
        less = tl.where(exact, (e - 1.0) * (x / tl.where(exact, log, 1.0)), tl.where(e == 1.0, x, e - 1.0))
    inverse = 1.0 / (2.0 + less)
    value = less * inverse
    return tl.where(a < 0, value, -value), 4.0 * e * inverse * inverse


@triton.jit
def _determinant(h, slope, s):
    """``1 + slope (s - 1)``: near s = 0 in the form that cannot cancel."""
    return tl.where(s < 0.5, h * h + slope * s, 1.0 + slope * (s - 1.0))


@triton.jit
def _forward_kernel(
    projections, table, s_of_layers, h, slope, log_det, layers, rows, SINGLE: tl.constexpr, BLOCK: tl.constexpr
):
    replica = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    stride = tl.full([], 0, tl.int64) + rows
    table += replica * layers * layers
    at = replica * layers * rows + row
    logs = tl.zeros((BLOCK,), tl.float64)
    for i in range(0, layers):
        a = load(projections + i * stride, at, inside, tl.float64)
        for j in range(0, i):
            a += tl.load(table + i * layers + j).to(tl.float64) * load(h + j * stride, at, inside, tl.float64)
        value, rest = _bounded(a, SINGLE)
        s = tl.load(s_of_layers + replica * layers + i).to(tl.float64)
        tl.store(h + i * stride + at, value, mask=inside)
        tl.store(slope + i * stride + at, rest, mask=inside)
        logs += tl.log(tl.abs(_determinant(value, rest, s)))
    tl.store(log_det + replica * rows + row, logs, mask=inside)


@triton.jit
def _backward_kernel(grad_h, grad_log, h, slope, table, s_of_layers, y, terms, layers, rows, BLOCK: tl.constexpr):
    replica = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    stride = tl.full([], 0, tl.int64) + rows
    table += replica * layers * layers
    at = replica * layers * rows + row
    gl = load(grad_log, replica * rows + row, inside, tl.float64)
    for step in range(0, layers):
        i = layers - 1 - step
        value = load(h, i * stride + at, inside, tl.float64)
        rest = load(slope, i * stride + at, inside, tl.float64)
        s = tl.load(s_of_layers + replica * layers + i).to(tl.float64)
        weight = gl / tl.where(inside, _determinant(value, rest, s), 1.0)
        cotangent = load(grad_h, i * stride + at, inside, tl.float64) + 2.0 * value * (1.0 - s) * weight
        for k in range(i + 1, layers):
            cotangent += tl.load(table + k * layers + i).to(tl.float64) * load(y, k * stride + at, inside, tl.float64)
        tl.store(y + i * stride + at, rest * cotangent, mask=inside)
        if terms is not None:
            tl.store(terms + i * stride + at, rest * weight, mask=inside)


@triton.jit
def _solve_kernel(constant, slope, table, x, layers, rows, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr):
    replica = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    stride = tl.full([], 0, tl.int64) + rows
    table += replica * layers * layers
    at = replica * layers * rows + row
    for step in range(0, layers):
        total = tl.zeros((BLOCK,), tl.float64)
        i = step
        if TRANSPOSED:
            i = layers - 1 - step
            for k in range(i + 1, layers):
                total += tl.load(table + k * layers + i).to(tl.float64) * load(x, k * stride + at, inside, tl.float64)
        else:
            for j in range(0, i):
                total += tl.load(table + i * layers + j).to(tl.float64) * load(x, j * stride + at, inside, tl.float64)
        total *= load(slope, i * stride + at, inside, tl.float64)
        tl.store(x + i * stride + at, load(constant, i * stride + at, inside, tl.float64) + total, mask=inside)


def _launch(kernel, like: Tensor, *tensors: Tensor | None, **options) -> None:
    """``kernel(tensors..., layers, rows)`` over the rows of ``like (R, K, N)``."""
    layers, rows = like.shape[-2:]
    replicas = like.shape[0] if like.dim() == 3 else 1
    if replicas * rows:
        tensors = [x if x is None else x.contiguous() for x in tensors]
        with on_device_of(like):
            kernel[(cdiv(rows, BLOCK), replicas)](*tensors, layers, rows, BLOCK=BLOCK, num_warps=1, **options)


def planar_flow(
    z: Tensor, u: Tensor, w: Tensor, b: Tensor, constrain: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products of torch around the forward kernel."""
    layers, table, s = algebra.effective(u, w, constrain)
    projections = algebra.add_product(b.unsqueeze(-1), w, z.mT)
    h, slope = projections.new_empty(projections.shape), projections.new_empty(projections.shape)
    log_det = z.new_empty(z.shape[:-1])
    single = z.dtype is not torch.float64
    _launch(_forward_kernel, projections, projections, table, s, h, slope, log_det, SINGLE=single)
    output = algebra.add_product(z, h.mT, layers)
    return (output, log_det, h, slope) if keep else (output, log_det, z.new_empty(0), z.new_empty(0))


def planar_flow_backward(
    grad_output: Tensor | None, grad_log_abs_det: Tensor | None, grad_h: Tensor | None, z: Tensor, u: Tensor, w: Tensor,
    h: Tensor, slope: Tensor, constrain: bool, needs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Products of torch around the backward kernel."""
    needs_parameters = bool(needs & autograd.NEEDS_PARAMETERS)
    wanted = (bool(needs & autograd.NEEDS_STATE), *(needs_parameters,) * 3)

    def pull_back(grad_h, grad_log, h, slope, table, s):
        y, terms = h.new_empty(h.shape), h.new_empty(h.shape) if needs_parameters else None
        _launch(_backward_kernel, h, grad_h, grad_log, h, slope, table, s, y, terms)
        return (y, table, s) if terms is None else (y, (y @ h.mT).tril(-1), terms.sum(-1))

    cotangents, saved = (grad_output, grad_log_abs_det, grad_h), (z, u, w, h, slope)
    results = algebra.gradients(pull_back, wanted, cotangents, saved, constrain)
    return tuple(z.new_empty(0) if x is None else x.contiguous() for x in results)


def planar_recursion_solve(constant: Tensor, slope: Tensor, table: Tensor, transposed: bool) -> Tensor:
    """Launch the kernel of the linear recursion."""
    x = constant.new_empty(constant.shape)
    _launch(_solve_kernel, x, constant, slope, table, x, TRANSPOSED=transposed)
    return x
