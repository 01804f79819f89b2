"""GPU kernels of planar layers: a program owns some rows and walks through the layers.

Of layers that rows share it has the recursion, products being torch's; amortised ones it reads, once, for whole rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hvae_kernels._triton.device import load, log1p_unit
from hvae_kernels._triton.launch import cdiv, next_power_of_2, on_device_of
from hvae_kernels.ops.planar_flow import algebra, autograd

#: Rows a program, one a thread: what a thread writes for one layer it reads back for the next ones.
BLOCK = 32
#: Numbers of a program's rows of amortised layers, and how many rows: few, as it waits for memory at every layer, and
#: the rows' scalars in double have to fit into registers.
TILE, MOST_ROWS = 256, 8
#: Bytes of a row up to which the next layers' u and w are fetched ahead: four such rows lie in shared memory.
PIPELINED = 16384


@triton.jit
def _bounded(a, SINGLE: tl.constexpr):
    """``(tanh a, 1 - tanh(a)^2)`` without cancellation; to 1e-8 for float32 batches."""
    x = -2.0 * tl.abs(a)
    if SINGLE:
        x = tl.where(x < -700.0, -700.0, x)
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
def _place(rows, BLOCK: tl.constexpr):
    """``(replica, rows)`` of this program; both lie on the first axis, as others end at 65,535."""
    blocks = tl.cdiv(rows, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _forward_kernel(
    projections, table, s_of_layers, h, slope, log_det, layers, rows, SINGLE: tl.constexpr, BLOCK: tl.constexpr
):
    replica, row = _place(rows, BLOCK)
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
    replica, row = _place(rows, BLOCK)
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
        weight = gl / tl.where(gl == 0, 1.0, _determinant(value, rest, s))
        cotangent = load(grad_h, i * stride + at, inside, tl.float64) + 2.0 * value * (1.0 - s) * weight
        for k in range(i + 1, layers):
            cotangent += tl.load(table + k * layers + i).to(tl.float64) * load(y, k * stride + at, inside, tl.float64)
        tl.store(y + i * stride + at, rest * cotangent, mask=inside)
        if terms is not None:
            tl.store(terms + i * stride + at, rest * weight, mask=inside)


@triton.jit
def _solve_kernel(constant, slope, table, x, layers, rows, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr):
    replica, row = _place(rows, BLOCK)
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


@triton.jit
def _constraint(product, square):
    """softplus(u.w), its slope, and the multiple of w that is added to u."""
    e = tl.exp(-tl.abs(product))
    rest = log1p_unit(e)
    target = tl.where(product < 0, rest, product + rest)
    ratio = (tl.where(product < 0, rest - product, rest) - 1.0) / square
    return target, tl.where(product < 0, e, 1.0) / (1.0 + e), ratio


@triton.jit
def _layer(u, w, at, mask, inside, features, CONSTRAIN: tl.constexpr, DTYPE: tl.constexpr):
    """``(u, u as the layer uses it, w, s, ratio, sigmoid, square)`` of one layer of each row; scalars in double."""
    given, across = load(u, at, mask, DTYPE), load(w, at, mask, DTYPE)
    product = tl.sum(given * across, 1).to(tl.float64)
    along = given
    s, ratio, sigmoid, square = 1.0 + product, product, product, product
    if CONSTRAIN:
        square = tl.where(inside & (features > 0), tl.sum(across * across, 1).to(tl.float64), 1.0)
        s, sigmoid, ratio = _constraint(product, square)
        along += ratio.to(DTYPE)[:, None] * across
    return given, along, across, s, ratio, sigmoid, square


@triton.jit
def _amortised_kernel(
    z, u, w, b, output, log_det, projections, rows, features, layers,
    CONSTRAIN: tl.constexpr, DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_FEATURES)
    inside = row < rows
    mask = inside[:, None] & (column < features)[None, :]
    at = row[:, None] * features + column[None, :]
    of_layers = row[:, None] * layers * features + column[None, :]
    here = load(z, at, mask, DTYPE)
    logs = tl.zeros((BLOCK_ROWS,), tl.float64)
    for k in tl.range(0, layers, num_stages=STAGES):
        _, along, across, s, _, _, _ = _layer(u, w, of_layers + k * features, mask, inside, features, CONSTRAIN, DTYPE)
        a = tl.sum(across * here, 1).to(tl.float64) + load(b, row * layers + k, inside, tl.float64)
        value, slope = _bounded(a, here.dtype == tl.float32)
        if projections is not None:
            tl.store(projections + row * layers + k, a, mask=inside)
        logs += tl.log(tl.abs(_determinant(value, slope, s)))
        here += value.to(DTYPE)[:, None] * along
    tl.store(output + at, here, mask=mask)
    tl.store(log_det + row, logs, mask=inside)


@triton.jit
def _amortised_backward_kernel(
    grad, grad_log, z, u, w, projections, d_z, d_u, d_w, d_b, rows, features, layers,
    CONSTRAIN: tl.constexpr, DTYPE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_FEATURES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_FEATURES)
    inside = row < rows
    mask = inside[:, None] & (column < features)[None, :]
    at = row[:, None] * features + column[None, :]
    of_layers = row[:, None] * layers * features + column[None, :]
    here = load(z, at, mask, DTYPE)
    for k in tl.range(0, layers, num_stages=STAGES):  # d_w keeps the layers' inputs
        _, along, _, _, _, _, _ = _layer(u, w, of_layers + k * features, mask, inside, features, CONSTRAIN, DTYPE)
        value, _ = _bounded(load(projections, row * layers + k, inside, tl.float64), here.dtype == tl.float32)
        tl.store(d_w + of_layers + k * features, here, mask=mask)
        here += value.to(DTYPE)[:, None] * along
    tl.debug_barrier()  # other threads than those that wrote d_w may read it
    g = load(grad, at, mask, DTYPE)
    gl = load(grad_log, row, inside, tl.float64)
    for step in range(0, layers):
        k = layers - 1 - step
        place = of_layers + k * features
        given, along, across, s, ratio, sigmoid, square = _layer(u, w, place, mask, inside, features, CONSTRAIN, DTYPE)
        value, slope = _bounded(load(projections, row * layers + k, inside, tl.float64), g.dtype == tl.float32)
        rest = gl / tl.where(gl == 0, 1.0, _determinant(value, slope, s))
        y = slope * (tl.sum(g * along, 1).to(tl.float64) + 2.0 * value * (1.0 - s) * rest)
        mixed = slope * rest
        d_across = y.to(DTYPE)[:, None] * load(d_w, place, mask, DTYPE)
        if CONSTRAIN:
            turn = value * tl.sum(g * across, 1).to(tl.float64) / square
            mixed = mixed * sigmoid + turn * (sigmoid - 1.0)
            d_across += (ratio * value).to(DTYPE)[:, None] * g - (2.0 * ratio * turn).to(DTYPE)[:, None] * across
        d_across += mixed.to(DTYPE)[:, None] * given
        tl.store(d_w + place, d_across, mask=mask)
        tl.store(d_u + place, value.to(DTYPE)[:, None] * g + mixed.to(DTYPE)[:, None] * across, mask=mask)
        tl.store(d_b + row * layers + k, y, mask=inside)
        g += y.to(DTYPE)[:, None] * across
    tl.store(d_z + at, g, mask=mask)


def _launch(kernel, like: Tensor, *tensors: Tensor | None, **options) -> None:
    """``kernel(tensors..., layers, rows)`` over the rows of ``like (R, K, N)``."""
    layers, rows = like.shape[-2:]
    replicas = like.shape[0] if like.dim() == 3 else 1
    if replicas * rows:
        tensors = [x if x is None else x.contiguous() for x in tensors]
        with on_device_of(like):
            kernel[(cdiv(rows, BLOCK) * replicas,)](*tensors, layers, rows, BLOCK=BLOCK, num_warps=1, **options)


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


def _launch_amortised(kernel, u: Tensor, *tensors: Tensor | None, constrain: bool) -> None:
    """``kernel(tensors..., rows, features, layers)`` over the rows of ``u (N, K, d)``."""
    rows, layers, features = u.shape
    block_features = next_power_of_2(features)
    block_rows = min(MOST_ROWS, max(1, TILE // block_features))
    if rows:
        with on_device_of(u):
            kernel[(cdiv(rows, block_rows),)](
                *tensors, rows, features, layers, CONSTRAIN=constrain, BLOCK_ROWS=block_rows,
                DTYPE=tl.float64 if u.dtype is torch.float64 else tl.float32, BLOCK_FEATURES=block_features,
                STAGES=3 if block_features * u.element_size() <= PIPELINED else 1,
                num_warps=min(8, max(1, block_features // 256)),
            )  # fmt: skip


def planar_flow_amortised(
    z: Tensor, u: Tensor, w: Tensor, b: Tensor, constrain: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel of layers that each row has for itself."""
    output, log_det, a = z.new_empty(z.shape), z.new_empty(z.shape[:-1]), b.new_empty(b.shape if keep else 0)
    tensors = [x.contiguous() for x in (z, u, w, b)]
    _launch_amortised(_amortised_kernel, u, *tensors, output, log_det, a if keep else None, constrain=constrain)
    return output, log_det, a


def planar_flow_amortised_backward(
    grad_output: Tensor | None, grad_log_abs_det: Tensor | None, z: Tensor, u: Tensor, w: Tensor, projections: Tensor,
    constrain: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Launch the backward kernel of layers that each row has for itself."""
    results = tuple(x.new_empty(x.shape) for x in (z, u, w, projections))
    given = (grad_output, grad_log_abs_det, z, u, w, projections)
    tensors = [x if x is None else x.contiguous() for x in given]
    _launch_amortised(_amortised_backward_kernel, u, *tensors, *results, constrain=constrain)
    return results
