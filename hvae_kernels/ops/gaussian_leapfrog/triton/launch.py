"""Launchers: the raw overloads."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from hvae_kernels._triton.dual import Dual, Plain
from hvae_kernels._triton.launch import cdiv, next_power_of_2, on_device_of
from hvae_kernels.ops.gaussian_leapfrog._layout import Layout, layout
from hvae_kernels.ops.gaussian_leapfrog.autograd import NEEDS_OUTPUTS, NEEDS_PARAMETERS, NEEDS_STATE
from hvae_kernels.ops.gaussian_leapfrog.triton.chain import Inputs
from hvae_kernels.ops.gaussian_leapfrog.triton.config import (
    FUSED_STEPS,
    Tiling,
    finish_tiling,
    row_tiling,
    small_tiling,
)
from hvae_kernels.ops.gaussian_leapfrog.triton.kernels import (
    backward_kernel,
    compose_kernel,
    finish_kernel,
    forward_kernel,
    total_kernel,
)


def _dtype(z: Tensor) -> tl.dtype:
    return tl.float64 if z.dtype == torch.float64 else tl.float32


def _inputs(values: tuple[Tensor, ...], directions: tuple[Tensor | None, ...] | None = None) -> Inputs:
    if directions is None:
        return Inputs(*(Plain(x.contiguous()) for x in values))
    pairs = zip(values, directions, strict=True)
    return Inputs(*(Dual(x.contiguous(), None if h is None else h.contiguous()) for x, h in pairs))


def _results(z: Tensor, like: tuple[Tensor, ...], wanted: int) -> list[Tensor | None]:
    """Room for results of these shapes, zeros where no kernel runs; None where they are not wanted."""
    make = torch.empty_like if z.numel() else torch.zeros_like
    return [make(x, memory_format=torch.contiguous_format) if wanted else None for x in like]


def _gradients(values: tuple[Tensor, ...], needs: int) -> Inputs:
    state = _results(values[0], values[:2], needs & NEEDS_STATE)
    return Inputs(*state, *_results(values[0], values[2:], needs & NEEDS_PARAMETERS))


def _or_empty(results: Sequence[Tensor | None], like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if result is None else result for result, x in zip(results, like, strict=True))


def _options(shape: Layout) -> dict[str, object]:
    step = "scalar" if shape.scalar_step else "shared" if shape.step_rows == 1 else "each"
    # Triton itself looks for multiples of 16 only; 100, 200 and 300 features load four at a time too.
    return {"STEP": step, "VECTOR": math.gcd(shape.features, 16)}


def _repeats_a_long_chain(shape: Layout, tiling: Tiling) -> bool:
    return shape.n_steps > FUSED_STEPS and tiling.chunks > 1


def _launch_compose(shape: Layout, inputs: Inputs, dual: bool) -> Tensor:
    """All prefixes ``P_0 .. P_K``, with their tangents if ``dual``."""
    prefixes = _prefixes(shape, inputs, dual)
    block = min(next_power_of_2(shape.features), 32)
    compose_kernel[(shape.replicas * cdiv(shape.features, block),)](
        inputs, prefixes, shape.features, shape.n_steps,
        DUAL=dual, BLOCK_FEATURES=block, num_warps=1, **_options(shape),
    )  # fmt: skip
    return prefixes


def _prefixes(shape: Layout, inputs: Inputs, dual: bool) -> Tensor:
    entries = 8 if dual else 4
    size = (shape.replicas, shape.n_steps + 1, entries, shape.features)
    return inputs.z.value.new_empty(size, dtype=torch.float64)


def gaussian_leapfrog(
    z: Tensor, rho: Tensor, precision: Tensor, loc: Tensor, step_size: Tensor, tempering: Tensor
) -> tuple[Tensor, Tensor]:
    """The overload ``gaussian_leapfrog.triton``."""
    shape = layout(z, precision, step_size, tempering)
    if shape.n_steps == 0 or z.numel() == 0:
        return tuple(x.clone(memory_format=torch.contiguous_format) for x in (z, rho))
    inputs = _inputs((z, rho, precision, loc, step_size, tempering))
    z_out, rho_out = _results(z, (z, rho), 1)
    tiling = row_tiling(shape.replicas, shape.rows, shape.features, 1024)
    separate = _repeats_a_long_chain(shape, tiling)
    with on_device_of(z):
        forward_kernel[(shape.replicas * tiling.chunks * tiling.feature_blocks,)](
            inputs, _launch_compose(shape, inputs, False) if separate else None, z_out, rho_out,
            shape.rows, shape.features, shape.n_steps, tiling.chunks, tiling.tiles,
            DTYPE=_dtype(z), COMPOSE=not separate, **_options(shape),
            BLOCK_ROWS=tiling.block_rows, BLOCK_FEATURES=tiling.block_features, num_warps=tiling.num_warps,
        )  # fmt: skip
    return z_out, rho_out


def _finish(shape: Layout, partials: Tensor, inputs: Inputs, prefixes: Tensor, gradients: Inputs, dual: bool) -> None:
    """Add the partial sums ``(R, chunks, N, d)`` and run the chain backwards into the parameters' gradients."""
    chunks = partials.shape[1]
    tiling = finish_tiling(chunks, shape.features)
    blocks, stride, into = tiling.feature_blocks, shape.n_steps, gradients
    if blocks > 1:  # what sums over the features is left in parts, a row for each replica and block
        stride = shape.n_steps + 1
        totals = prefixes.new_empty((shape.replicas, blocks, stride))
        tempering, step_size = totals[..., :-1], totals[..., -1]
        into = gradients._replace(tempering=tempering)
        if shape.scalar_step:
            into = into._replace(step_size=step_size)
    finish_kernel[(shape.replicas * blocks,)](
        partials, inputs, prefixes, into, shape.features, shape.n_steps, chunks, stride, DUAL=dual, **_options(shape),
        BLOCK_ROWS=tiling.block_rows, BLOCK_FEATURES=tiling.block_features, num_warps=tiling.num_warps,
    )  # fmt: skip
    if blocks > 1:
        total_kernel[(shape.replicas, cdiv(stride, 16))](
            totals, gradients.tempering, gradients.step_size, shape.n_steps, blocks,
            SCALAR=shape.scalar_step, BLOCK_ROWS=64, BLOCK_STEPS=16, num_warps=4,
        )  # fmt: skip


def _launch_backward(
    shape: Layout, inputs: Inputs, cotangents: tuple[Tensor | None, ...], outputs: Sequence[Tensor | None],
    gradients: Inputs, dual: bool,
) -> None:  # fmt: skip
    """Backward or, if ``dual``, double backward, into the results that are there."""
    z, parameters = inputs.z.value, gradients.loc is not None
    small = small_tiling(shape.rows, shape.features) if parameters else None
    tiling = small or row_tiling(shape.replicas, shape.rows, shape.features, 512)
    separate = _repeats_a_long_chain(shape, tiling)
    partials = None
    if parameters and small is None:
        dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        partials = z.new_empty((shape.replicas, tiling.chunks, 10 if dual else 6, shape.features), dtype=dtype)
    with on_device_of(z):
        prefixes = None
        if separate:
            prefixes = _launch_compose(shape, inputs, dual)
        elif parameters:
            prefixes = _prefixes(shape, inputs, dual)
        grad_z, grad_rho = (None if g is None else g.contiguous() for g in cotangents)
        backward_kernel[(shape.replicas * tiling.chunks * tiling.feature_blocks,)](
            inputs, grad_z, grad_rho, prefixes, partials, *outputs, gradients,
            shape.rows, shape.features, shape.n_steps, tiling.chunks, tiling.tiles,
            DUAL=dual, DTYPE=_dtype(z), COMPOSE=not separate, **_options(shape),
            BLOCK_ROWS=tiling.block_rows, BLOCK_FEATURES=tiling.block_features, num_warps=tiling.num_warps,
        )  # fmt: skip
        if partials is not None:
            _finish(shape, partials, inputs, prefixes, gradients, dual)


def gaussian_leapfrog_backward(
    grad_z: Tensor | None,
    grad_rho: Tensor | None,
    z: Tensor,
    rho: Tensor,
    precision: Tensor,
    loc: Tensor,
    step_size: Tensor,
    tempering: Tensor,
    needs: int,
) -> tuple[Tensor, ...]:
    """The overload ``gaussian_leapfrog_backward.triton``."""
    shape, values = layout(z, precision, step_size, tempering), (z, rho, precision, loc, step_size, tempering)
    gradients = _gradients(values, needs)
    if z.numel() and needs & (NEEDS_STATE | NEEDS_PARAMETERS):
        _launch_backward(shape, _inputs(values), (grad_z, grad_rho), [None, None], gradients, False)
    return _or_empty(gradients, values)


def gaussian_leapfrog_double_backward(
    h_z: Tensor | None,
    h_rho: Tensor | None,
    h_precision: Tensor | None,
    h_loc: Tensor | None,
    h_step_size: Tensor | None,
    h_tempering: Tensor | None,
    grad_z: Tensor | None,
    grad_rho: Tensor | None,
    z: Tensor,
    rho: Tensor,
    precision: Tensor,
    loc: Tensor,
    step_size: Tensor,
    tempering: Tensor,
    needs: int,
) -> tuple[Tensor, ...]:
    """The overload ``gaussian_leapfrog_double_backward.triton``."""
    shape, values = layout(z, precision, step_size, tempering), (z, rho, precision, loc, step_size, tempering)
    outputs, gradients = _results(z, (z, rho), needs & NEEDS_OUTPUTS), _gradients(values, needs)
    if z.numel() and needs:
        inputs = _inputs(values, (h_z, h_rho, h_precision, h_loc, h_step_size, h_tempering))
        _launch_backward(shape, inputs, (grad_z, grad_rho), outputs, gradients, True)
    return _or_empty(outputs, (z, rho)) + _or_empty(gradients, values)
