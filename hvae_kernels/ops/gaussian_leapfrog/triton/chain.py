"""The chain: K steps composed, and the way back from the cotangent of ``P_K`` to the parameters' gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from hvae_kernels._triton.device import store
from hvae_kernels._triton.dual import (
    Dual,
    Plain,
    add_product,
    affine,
    constant,
    derivative_part,
    dot,
    load_number,
    load_one,
    mul,
    scaled,
)


class Inputs(NamedTuple):
    """The op's inputs, each :class:`Plain` or with its direction, or the tensors that take their gradients."""

    z: Any
    rho: Any
    precision: Any
    loc: Any
    step_size: Any
    tempering: Any


class Columns(NamedTuple):
    """The features ``cols`` of a replica, of which ``mask`` exist; they are number ``block`` of its blocks."""

    replica: tl.tensor
    block: tl.tensor
    cols: tl.tensor
    mask: tl.tensor
    features: tl.tensor


@triton.jit
def load_map(prefixes, at, features, mask, DUAL: tl.constexpr):
    """A map's four entries, and after them, if DUAL, their tangents; all are ``features`` apart."""
    entries = Dual(prefixes, prefixes + 4 * features) if DUAL else Plain(prefixes)
    return (
        load_number(entries, at, mask, tl.float64),
        load_number(entries, at + features, mask, tl.float64),
        load_number(entries, at + 2 * features, mask, tl.float64),
        load_number(entries, at + 3 * features, mask, tl.float64),
    )


@triton.jit
def store_map(prefixes, at, features, mask, A, B, C, D):
    """What ``load_map`` reads; the matrix of column sums is stored so, too."""
    tl.store(prefixes + at, A.value, mask=mask)
    tl.store(prefixes + at + features, B.value, mask=mask)
    tl.store(prefixes + at + 2 * features, C.value, mask=mask)
    tl.store(prefixes + at + 3 * features, D.value, mask=mask)
    if len(A) == 2:
        tl.store(prefixes + at + 4 * features, A.tangent, mask=mask)
        tl.store(prefixes + at + 5 * features, B.tangent, mask=mask)
        tl.store(prefixes + at + 6 * features, C.tangent, mask=mask)
        tl.store(prefixes + at + 7 * features, D.tangent, mask=mask)


@triton.jit
def _step_offsets(here, k, n_steps, STEP: tl.constexpr):
    """Where the step sizes of step k are: ``()``, ``(R, 1, d)`` if shared by all steps, else ``(R, K, d)``."""
    if STEP == "scalar":
        return here.cols * 0
    elif STEP == "shared":
        return here.replica * here.features + here.cols
    else:
        return (here.replica * n_steps + k) * here.features + here.cols


@triton.jit
def _load_step(inputs, here, k, n_steps, STEP: tl.constexpr):
    return load_number(inputs.step_size, _step_offsets(here, k, n_steps, STEP), here.mask, tl.float64)


@triton.jit
def _load_tempering(inputs, here, k, n_steps):
    return load_one(inputs.tempering, here.replica * n_steps + k, tl.float64)


@triton.jit
def _step(p, e):
    """``c``, ``s`` of ``M = [[c, e], [alpha s, alpha c]]``, and ``p e^2``."""
    pe = mul(p, e)
    pee = mul(pe, e)
    return affine(-0.5, pee, 1.0), mul(pe, affine(0.25, pee, -1.0)), pee


@triton.jit
def compose(inputs, prefixes, here, keep, n_steps, STEP: tl.constexpr, DUAL: tl.constexpr):
    """P_K; stores P_0 .. P_K to ``prefixes (R, K + 1, 4 or 8, d)`` where ``keep``, if there are any."""
    ENTRIES: tl.constexpr = 8 if DUAL else 4
    features = here.features
    at = here.replica * features + here.cols
    p = load_number(inputs.precision, at, here.mask, tl.float64)
    zero = tl.zeros_like(p.value)
    A, B = constant(zero + 1.0, DUAL), constant(zero, DUAL)
    C, D = B, A
    at = here.replica * (n_steps + 1) * ENTRIES * features + here.cols
    if STEP != "each":
        e = _load_step(inputs, here, 0, n_steps, STEP)
    for k in range(n_steps):
        if prefixes is not None:
            store_map(prefixes, at, features, keep, A, B, C, D)
            at += ENTRIES * features
        if STEP == "each":
            e = _load_step(inputs, here, k, n_steps, STEP)
        alpha = _load_tempering(inputs, here, k, n_steps)
        c, s, _ = _step(p, e)
        alpha_s, alpha_c = mul(alpha, s), mul(alpha, c)
        A, C = dot(c, A, e, C), dot(alpha_s, A, alpha_c, C)
        B, D = dot(c, B, e, D), dot(alpha_s, B, alpha_c, D)
    if prefixes is not None:
        store_map(prefixes, at, features, keep, A, B, C, D)
    return A, B, C, D


@triton.jit
def load_composed(prefixes, here, n_steps, DUAL: tl.constexpr):
    """The P_K that ``compose`` has stored."""
    ENTRIES: tl.constexpr = 8 if DUAL else 4
    at = (here.replica * (n_steps + 1) + n_steps) * ENTRIES * here.features + here.cols
    return load_map(prefixes, at, here.features, here.mask, DUAL)


@triton.jit
def chain_backward(
    g11, g12, g21, g22, sum_z, sum_rho, inputs, prefixes, gradients, here, n_steps, total_stride,
    STEP: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    """From the cotangent of P_K to the parameters' gradients, or their tangents if DUAL (README.md, "Backward").

    ``gradients.tempering`` (and a scalar ``gradients.step_size``) has a row for each replica and feature block,
    ``total_stride`` apart.
    """
    ENTRIES: tl.constexpr = 8 if DUAL else 4
    features, mask = here.features, here.mask
    own = here.replica * features + here.cols
    p = load_number(inputs.precision, own, mask, tl.float64)
    A, B, C, D = load_composed(prefixes, here, n_steps, DUAL)
    d_loc = derivative_part(affine(-1.0, A, 1.0)) * sum_z - derivative_part(C) * sum_rho
    store(gradients.loc, own, d_loc, mask)
    d_precision = tl.zeros(here.cols.shape, tl.float64)
    d_step = tl.zeros(here.cols.shape, tl.float64)
    at = (here.replica * (n_steps + 1) + n_steps) * ENTRIES * features + here.cols
    total = (here.replica * tl.cdiv(features, here.cols.shape[0]) + here.block) * total_stride
    for i in range(n_steps):
        k = n_steps - 1 - i
        at -= ENTRIES * features
        A, B, C, D = load_map(prefixes, at, features, mask, DUAL)
        e = _load_step(inputs, here, k, n_steps, STEP)
        alpha = _load_tempering(inputs, here, k, n_steps)
        c, s, pee = _step(p, e)
        m21, m22 = dot(g21, A, g22, B), dot(g21, C, g22, D)
        c_bar, s_bar = add_product(dot(g11, A, g12, B), alpha, m22), mul(alpha, m21)
        p_bar = mul(e, dot(s_bar, affine(0.5, pee, -1.0), scaled(-0.5, e), c_bar))
        e_bar = dot(s_bar, affine(0.75, pee, -1.0), scaled(-1.0, e), c_bar)
        e_bar = add_product(dot(g11, C, g12, D), p, e_bar)
        alpha_bar = derivative_part(dot(s, m21, c, m22))
        d_precision += derivative_part(p_bar)
        store(gradients.tempering, total + k, tl.sum(tl.where(mask, alpha_bar, 0.0), 0), None)
        if STEP == "each":
            store(gradients.step_size, _step_offsets(here, k, n_steps, STEP), derivative_part(e_bar), mask)
        else:
            d_step += derivative_part(e_bar)
        alpha_s, alpha_c = mul(alpha, s), mul(alpha, c)
        g11, g21 = dot(c, g11, alpha_s, g21), dot(e, g11, alpha_c, g21)
        g12, g22 = dot(c, g12, alpha_s, g22), dot(e, g12, alpha_c, g22)
    store(gradients.precision, own, d_precision, mask)
    if STEP == "scalar":
        store(gradients.step_size, here.block * total_stride, tl.sum(tl.where(mask, d_step, 0.0), 0), None)
    elif STEP == "shared":
        store(gradients.step_size, own, d_step, mask)
