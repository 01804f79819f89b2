"""Calls of the kernels of ``csrc/kernels``, and what must come of them by the ops' references and their derivatives.

A case's arguments are its kernel's fields in their order, those of structs in it one by one; its law computes, in any
precision, what the kernel must leave in the arrays that it writes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ops.rational_quadratic_spline import SPLINES, spline_inputs
from test_elementary import ABSOLUTE, LIMITS, RELATIVE, between
from torch import Tensor

from hvae_kernels.ops.affine_autoregressive.gates import CODES, DEFAULTS, scale_of
from hvae_kernels.ops.affine_autoregressive.reference import affine_autoregressive
from hvae_kernels.ops.annealed_leapfrog.reference import annealed_leapfrog_update
from hvae_kernels.ops.autoregressive_network.network import ACTIVATION_CODES, ACTIVATIONS
from hvae_kernels.ops.bernoulli_log_prob.reference import bernoulli_log_prob, residual, variance
from hvae_kernels.ops.draw.reference import draw_read, draw_write
from hvae_kernels.ops.gaussian_leapfrog.reference import gaussian_leapfrog
from hvae_kernels.ops.gaussian_mixture.reference import log_joint
from hvae_kernels.ops.iwae.reference import iwae_bound, surrogate
from hvae_kernels.ops.leapfrog_update.reference import leapfrog_update
from hvae_kernels.ops.planar_flow.constraint import constrained
from hvae_kernels.ops.planar_flow.reference import planar_flow
from hvae_kernels.ops.radial_flow.reference import radial_flow
from hvae_kernels.ops.rational_quadratic_spline.reference import rational_quadratic_spline
from hvae_kernels.ops.rmsprop.reference import rmsprop_step_

DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Writes:
    """An array that the kernel writes: what is in it before, and whether what is in it afterwards matters."""

    before: Tensor
    checked: bool = True


@dataclass(frozen=True)
class Case:
    """A call. ``law(*tensors)`` is what its checked arrays hold afterwards and, last, what it returns if it does.

    ``in_double``: the kernel computes in double whatever its dtype. ``ulp`` and ``absolute`` bound a function's error,
    where its plain formula's does not: in units of the last place, and in units of max(1, the argument's size).
    ``limits``: NaN is what the reference asks for.
    """

    kernel: str
    arguments: Sequence[Any]
    law: Callable[..., Sequence[Tensor]]
    tensors: Sequence[Tensor]
    note: str = ""
    returns: bool = False
    in_double: bool = False
    limits: bool = False
    ulp: float | None = None
    absolute: float | None = None
    dtype: torch.dtype = torch.float32
    point: tuple = ()

    def __str__(self) -> str:
        return f"{self.kernel}{self.point} {self.dtype} {self.note}".rstrip()


FAMILIES: list[tuple[Callable[..., Iterator[Case]], list[tuple]]] = []


def at(points: Iterable[tuple]) -> Callable:
    """Registers a function that makes cases from a dtype and a point, with its points."""

    def register(family: Callable[..., Iterator[Case]]) -> Callable:
        FAMILIES.append((family, list(points)))
        return family

    return register


def cases() -> Iterator[Case]:
    """All of them, the same ones every time, whatever others there are."""
    for family, points in FAMILIES:
        for dtype, point in itertools.product(DTYPES, points):
            torch.manual_seed(zlib.crc32(f"{family.__name__}{point}".encode()))
            for case in family(dtype, *point):
                yield dataclasses.replace(case, dtype=dtype, point=point)


# ---- Arguments and laws ----


def fresh(like: Tensor) -> Writes:
    """What the kernel writes whole: NaN shows where it does not."""
    return Writes(torch.full_like(like, math.nan))


def scratch(like: Tensor | int, dtype: torch.dtype | None = None) -> Writes:
    """Memory of the kernel's own."""
    shape = like if isinstance(like, int) else like.shape
    return Writes(torch.full((shape,) if isinstance(shape, int) else shape, math.nan, dtype=dtype or like.dtype), False)


def uniform(low: float, high: float, *shape: int, dtype: torch.dtype) -> Tensor:
    return low + (high - low) * torch.rand(shape, dtype=dtype)


def padded(x: Tensor, size: int, value: float = 0.0, dim: int = -1) -> Tensor:
    """``x`` with ``size`` entries along ``dim``."""
    shape = list(x.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([x, x.new_full(shape, value)], dim)


def lanes(dtype: torch.dtype) -> int:
    """Of a group: tile.h."""
    return 64 // dtype.itemsize


def up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def first_order(function: Callable, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of ``sum <upstream, result>`` for the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    pairs = [(y, g) for y, g in zip(function(*leaves), upstream, strict=True) if y.requires_grad]
    results, cotangents = zip(*pairs, strict=True)
    return torch.autograd.grad(results, leaves, cotangents, materialize_grads=True)


def second_order(
    function: Callable, inputs: Sequence[Tensor], upstream: Sequence[Tensor], directions: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Gradients of ``sum <direction, gradient>`` for the cotangents and the inputs."""
    leaves, cotangents = ([x.detach().requires_grad_() for x in some] for some in (inputs, upstream))
    results = function(*leaves)
    gradients = torch.autograd.grad(results, leaves, cotangents, create_graph=True, materialize_grads=True)
    pairing = sum((h * g).sum() for h, g in zip(directions, gradients, strict=True))
    return torch.autograd.grad(pairing, (*cotangents, *leaves), materialize_grads=True)


def single(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor]]:
    return lambda *x: (function(*x),)


# ---- elementary.h ----


@at([(name,) for name in (*RELATIVE, *ABSOLUTE)])
def elementary(dtype: torch.dtype, name: str) -> Iterator[Case]:
    formula, (low, high), budget = {**RELATIVE, **ABSOLUTE}[name]
    if dtype == torch.float32:
        x, bound = between(low, high, 5001), {"absolute" if name in ABSOLUTE else "ulp": budget}
    else:
        x, bound = torch.linspace(max(low, -700.0), min(high, 700.0), 1001, dtype=dtype), {}
    yield Case(name, (len(x), x, fresh(x)), single(formula), (x,), **bound)
    if name in LIMITS:
        points = [*zip((-math.inf, math.inf), LIMITS[name], strict=True), (math.nan, math.nan)]
        x, y = torch.tensor([point for point in points if point[1] is not None], dtype=dtype).mT.contiguous()
        yield Case(name, (len(x), x, fresh(x)), lambda y: (y,), (y,), "limits", limits=True)


# ---- gaussian_leapfrog.h ----

BLOCK = 32


@single
def composed(precision: Tensor, step: Tensor, tempering: Tensor) -> Tensor:
    """``A, B, C, D`` of the map of all steps: what the reference makes of the unit vectors."""
    one, zero = torch.ones_like(precision), torch.zeros_like(precision)
    results = gaussian_leapfrog(torch.stack([one, zero]), torch.stack([zero, one]), precision, zero, step, tempering)
    return torch.cat(results) + 0 * precision  # so that it depends on an input without steps too


def composed_tangent(parameters: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor:
    return second_order(composed, parameters, [torch.zeros_like(composed(*parameters)[0])], directions)[0]


@at([(1, 1, "scalar"), (5, 0, "row"), (31, 3, "rows"), (33, 2, "scalar"), (70, 3, "row")])
def leapfrog_chain(dtype: torch.dtype, d: int, n_steps: int, form: str) -> Iterator[Case]:
    step_shape, *strides = {"scalar": ((), 0, 0), "row": ((d,), 0, 1), "rows": ((n_steps, d), d, 1)}[form]
    shape, blocks, room = (d, n_steps, *strides), up(d, BLOCK) // BLOCK, n_steps * 4 * BLOCK
    step, precision = uniform(0.05, 0.5, *step_shape, dtype=dtype), uniform(0.5, 2, d, dtype=dtype)
    p = precision, step, uniform(0.7, 1.1, n_steps, dtype=dtype)
    h = [torch.randn_like(x) for x in p]
    cotangents = torch.randn(2, 4, d, dtype=torch.float64)
    before = [torch.zeros(d), torch.randn(step_shape), torch.randn(n_steps)]
    before = [x.double() for x in before]
    out, grown = fresh(cotangents[0]), [Writes(x) for x in before]

    def with_tangent(*x):
        return *composed(*x[:3]), composed_tangent(x[:3], x[3:])

    yield Case("leapfrog::Compose", (*shape, *p, None, None, None, 0, blocks, out, None), composed, p, in_double=True)
    tangents = *shape, *p, *h, 0, blocks, out, out
    yield Case("leapfrog::Compose", tangents, with_tangent, (*p, *h), "with tangents", in_double=True)
    for block in range(blocks):
        inside = torch.arange(d) // BLOCK == block

        def gradients(p, cotangent, before, inside=inside):
            return [x + y for x, y in zip(before, first_order(composed, p, [cotangent * inside]), strict=True)]

        def tangents_of_gradients(p, h, cotangents, before, inside=inside, gradients=gradients):
            _, *turned = second_order(composed, p, [cotangents[0] * inside], h)
            return gradients(p, cotangents[1], [x + y for x, y in zip(before, turned, strict=True)])

        yield Case(
            "ChainBackward",
            (*shape, *p, None, None, None, block, cotangents[0], None, scratch(room, torch.float64), *grown),
            lambda *x, f=gradients: f(x[:3], x[3], x[4:]),
            (*p, cotangents[0], *before),
            f"block {block}",
            in_double=True,
        )
        yield Case(
            "ChainBackwardOfDuals",
            (*shape, *p, *h, block, *cotangents, scratch(2 * room, torch.float64), *grown),
            lambda *x, f=tangents_of_gradients: f(x[:3], x[3:6], x[6:8], x[8:]),
            (*p, *h, *cotangents, *before),
            f"block {block}",
            in_double=True,
        )


#: Rows and their width: none fills a vector, some are more than are summed in the batch's dtype.
ROWS = [(7, 1), (3, 5), (65, 7), (130, 33), (2, 64)]


def after_a_row(*tensors: Tensor) -> list[Tensor]:
    """Rows that begin with the second one."""
    return [torch.cat([torch.zeros_like(x[:1]), x]) for x in tensors]


def strided(*tensors: Tensor) -> list[Any]:
    """Inputs after a row, each with the distance from row to row."""
    return [y for x in after_a_row(*tensors) for y in (x, x.shape[1])]


def strided_room(n: int, like: Tensor) -> list[Any]:
    """The same for ``n`` results."""
    room = torch.cat([torch.zeros_like(like[:1]), torch.full_like(like, math.nan)])
    return [Writes(room), like.shape[1]] * n


def column_sums(*terms: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of the sums of a run, nothing, and the sums."""
    sums = torch.stack([x.sum(0) for x in terms])
    return torch.zeros_like(sums), sums


def room_for_sums(n: int, like: Tensor) -> tuple[Writes, Writes]:
    room = torch.zeros(n, like.shape[1], dtype=like.dtype)
    return Writes(room), Writes(room.double())


@at(ROWS)
def leapfrog_rows(dtype: torch.dtype, *size: int) -> Iterator[Case]:
    d = size[1]
    z, rho, gz, gr, hz, hr = torch.randn(6, *size, dtype=dtype)
    precision, loc = uniform(0.5, 2, d, dtype=dtype), torch.randn(d, dtype=dtype)
    p = precision, loc, uniform(0.05, 0.5, d, dtype=dtype), uniform(0.7, 1.1, 3, dtype=dtype)
    h = [torch.randn_like(x) for x in p]
    exact, along = ([x.double() for x in (some[0], *some[2:])] for some in (p, h))
    maps = composed(*exact)[0]
    map_ = *maps.to(dtype), loc
    moving = (maps[0] - 1).to(dtype), *map_[1:]
    tangent = *composed_tangent(exact, along).to(dtype), torch.zeros_like(loc)

    def backward(z, rho, gz, gr, *p):
        y = z - p[1]
        d_state = first_order(gaussian_leapfrog, (z, rho, *p), (gz, gr))[:2]
        return *after_a_row(*d_state), *column_sums(gz * y, gz * rho, gr * y, gr * rho, gz, gr)

    def backward_in_part(z, rho, gr, *p):
        _, d_rho, *sums = backward(z, rho, torch.zeros_like(gr), gr, *p)
        return d_rho, *sums

    def double_backward(z, rho, gz, gr, hz, hr, *rest):
        p, h = rest[:4], rest[4:]
        y, u = z - p[1], hz - h[1]
        results = second_order(gaussian_leapfrog, (z, rho, *p), (gz, gr), (hz, hr, *h))[:4]
        first = gz * y, gz * rho, gr * y, gr * rho, gz, gr
        return *after_a_row(*results), *column_sums(*first, gz * u, gz * hr, gr * u, gr * hr)

    out, (acc, sums), spare = (fresh(z), fresh(z)), room_for_sums(6, z), scratch(2 * d, dtype)
    for streams in (0, 1) if d % 16 == 0 else (0,):
        fields = *size, *moving, z, rho, *out, streams
        yield Case("leapfrog::Forward", fields, gaussian_leapfrog, (z, rho, *p), "past the caches" * streams)
    for streams in (0, 1):
        fields = 1, *size, *map_, *strided(gz, gr, z, rho), *strided_room(2, z), acc, spare, sums, streams
        yield Case("leapfrog::Backward", fields, backward, (z, rho, gz, gr, *p), "past the caches" * streams)
    absent, unwanted = (torch.zeros_like(loc), 0), (scratch(loc), 0)
    fields = 1, *size, *map_, *absent, *strided(gr, z, rho), *unwanted, *strided_room(1, z), acc, spare, sums, 0
    yield Case("leapfrog::Backward", fields, backward_in_part, (z, rho, gr, *p), "a cotangent and a result absent")
    fields = *moving, *tangent, h[1], *strided(hz, hr, gz, gr, z, rho), *strided_room(4, z), *room_for_sums(10, z)
    yield Case("leapfrog::DoubleBackward", (1, *size, *fields), double_backward, (z, rho, gz, gr, hz, hr, *p, *h))


# ---- leapfrog_update.h ----


@at(ROWS)
def update(dtype: torch.dtype, *size: int) -> Iterator[Case]:
    z, rho, grad, gz, gr, hr, hg = torch.randn(7, *size, dtype=dtype)
    kick, drift = uniform(0.05, 0.5, 2, size[1], dtype=dtype)
    h_kick, h_drift = torch.randn(2, size[1], dtype=dtype)
    decay, h_decay = 0.875, -0.625

    def with_terms(z, rho, grad, decay, minus_kick, drift):
        """With coefficients for each element, whose gradients are the terms of the sums."""
        return leapfrog_update(z, rho, grad, decay, -minus_kick, drift)

    def spread(decay, kick, drift, like):
        return [x.expand_as(like) for x in (like.new_tensor(decay), -kick, drift)]

    def backward(gz, gr, z, rho, grad, *c):
        _, d_rho, d_grad, *terms = first_order(with_terms, (z, rho, grad, *spread(decay, *c, z)), (gz, gr))
        return *after_a_row(d_rho, d_grad), *column_sums(*terms)

    def double_backward(gz, gr, hr, hg, h_kick, h_drift, z, rho, grad, *c):
        directions = torch.zeros_like(hr), hr, hg, *spread(h_decay, h_kick, h_drift, z)
        inputs = z, rho, grad, *spread(decay, *c, z)
        gg_z, gg_rho, _, d_rho, d_grad, *terms = second_order(with_terms, inputs, (gz, gr), directions)
        return *after_a_row(gg_z, gg_rho, d_rho, d_grad), *column_sums(*terms)

    c, h, inputs, sums = (kick, drift), (h_kick, h_drift), (z, rho, grad, kick, drift), room_for_sums(3, z)

    def forward(z, rho, grad, *c):
        return leapfrog_update(z, rho, grad, decay, *c)

    for room in (None, scratch(2 * size[1], dtype)) if size[1] % 16 == 0 else (None,):
        fields = *size, decay, *c, z, rho, grad, fresh(z), fresh(z), room
        yield Case("update::Forward", fields, forward, inputs, "past the caches" if room else "")
    fields = decay, *c, *strided(gz, gr, rho, grad), *strided_room(2, z), *sums
    yield Case("update::Backward", (1, *size, *fields), backward, (gz, gr, *inputs))
    fields = decay, *c, h_decay, *h, *strided(hr, hg, gz, gr, rho, grad), *strided_room(4, z), *sums
    yield Case("update::DoubleBackward", (1, *size, *fields), double_backward, (gz, gr, hr, hg, *h, *inputs))


# ---- annealed_leapfrog.h ----


@at((*size, repeat) for size in ROWS for repeat in (1, 3))
def annealed(dtype: torch.dtype, rows: int, width: int, repeat: int) -> Iterator[Case]:
    """Rows of ``repeat`` rows of the batch, for which a row of coefficients is repeated."""
    z, rho, base_grad, grad, noise, gz, gr = torch.randn(7, rows, repeat * width, dtype=dtype)
    kicks, (eta, sigma) = uniform(0.05, 0.5, 5, width, dtype=dtype).repeat(1, repeat), (0.625, 0.75)
    gw, x = torch.randn(rows, repeat, dtype=dtype), (rho, base_grad, grad, noise)

    def update(z, *x):
        """Of the batch's own rows."""
        *state, kicks, mixing = x
        own = (t.unflatten(-1, (repeat, width)) for t in (z, *state))
        z, rho, weight = annealed_leapfrog_update(*own, kicks.unflatten(-1, (repeat, width))[:, 0], mixing)
        return z.flatten(-2), rho.flatten(-2), weight

    def update_alone(z, *x):
        z, rho, weight = update(z, *x, kicks.to(z), z.new_tensor([eta, sigma]))
        return z, rho, weight.flatten()

    def forward(sums, z, *x):
        z, rho, weight = update_alone(z, *x)
        return z, rho, sums + weight

    def with_terms(z, rho, base_grad, grad, noise, a0, a, b0, b, e, eta, sigma):
        """With coefficients for each element, whose gradients are the terms of the sums."""
        ended = rho - a0 * base_grad - a * grad
        refreshed = eta * ended + sigma * noise
        begun = refreshed - b0 * base_grad - b * grad
        weight = (refreshed.square() - ended.square()) / 2
        return z + e * begun, begun, weight.unflatten(-1, (repeat, width)).sum(-1)

    def backward(gz, gr, gw, z, *x):
        *state, kicks = x
        terms = [*(row.expand_as(z) for row in kicks), *(z.new_tensor(number).expand_as(z) for number in (eta, sigma))]
        _, *results = first_order(with_terms, (z, *state, *terms), (gz, gr, gw))
        return *after_a_row(*results[:4]), *column_sums(*results[4:])

    def backward_in_part(gz, *x):
        return backward(gz, torch.zeros_like(gz), gz.new_zeros(rows, repeat), *x)

    c, size, run = (eta, sigma, *kicks), (rows * repeat, width), repeat * width
    sums = torch.randn(rows * repeat, dtype=torch.float64)
    fields = *size, run, *c, z, *x, fresh(z), fresh(z), scratch(z), Writes(sums)
    yield Case("annealed::Forward", fields, forward, (sums, z, *x))
    if repeat == 1 and width * dtype.itemsize >= 64:
        for far in (0, 1):
            fields = rows, width, *c, z, *x, fresh(z), fresh(z), fresh(z[:, 0]), far, int(far and width % 16 == 0)
            yield Case("annealed::LongForward", fields, update_alone, (z, *x), "past the caches" * far)
    size, out, inputs = (1, rows, run, width, repeat), strided_room(4, z), (z, *x, kicks)
    room = scratch(z[0]), *out, *room_for_sums(7, z)
    fields = *size, *c, *strided(gz, gr, *x), *after_a_row(gw), *room
    yield Case("annealed::Backward", fields, backward, (gz, gr, gw, *inputs))
    fields = *size, *c, *strided(gz, torch.zeros_like(gr), *x), None, *room
    yield Case("annealed::Backward", fields, backward_in_part, (gz, *inputs), "some cotangents absent")


# ---- affine_autoregressive.h, autoregressive_network.h ----

#: Rows and their width in a block of the batch.
BLOCKS = [(3, 5), (13, 1), (7, 33), (1, 1001)]


def gate_fields(name: str) -> tuple[int, float, float]:
    return DEFAULTS[name].encoded


@at((name, *size, scale) for name in CODES for size in BLOCKS for scale in (1, 8, -8))
def autoregressive(dtype: torch.dtype, gate: str, rows: int, width: int, scale: int) -> Iterator[Case]:
    z, shift, raw, g = torch.randn(4, rows, width, dtype=dtype)
    x = z, shift, scale * (raw.abs() + 0.5)  # of one sign: nothing cancels in the log-determinant, nor when it doubles
    h, gl = uniform(0.5, 2, 3, rows, width, dtype=dtype), torch.randn(rows, dtype=dtype)
    out, block, head = fresh(z), scratch(z), (*gate_fields(gate), rows, width)

    def op(*x):
        return affine_autoregressive(*x, DEFAULTS[gate])

    sums = op(*x)[1].double()

    def forward(sums, *x):
        z, log = op(*x)
        return z, sums + log

    def backward(g, gl, *x):
        return first_order(op, x, (g, gl))

    def backward_in_part(g, *x):
        return backward(g, g.new_zeros(rows), *x)

    def backward_of_log(gl, *x):
        return backward(torch.zeros_like(x[0]), gl, *x)

    def double_backward(sums, g, gl, *x):
        gg, gg_log, *d = second_order(op, x[:3], (g, gl), x[3:])
        return gg, sums + gg_log, *d

    yield Case("autoregressive::Forward", (*head, *x, out, block, Writes(sums)), forward, (sums, *x))
    yield Case("autoregressive::Backward", (*head, 1, g, gl, block, *x, out, out, out), backward, (g, gl, *x))
    fields = *head, 0, None, gl, block, *x, out, out, out
    yield Case(
        "autoregressive::Backward", fields, backward_of_log, (gl, *x), "a cotangent of the log-determinant alone"
    )
    fields = *head, 1, g, None, block, *x, out, out, out
    yield Case("autoregressive::Backward", fields, backward_in_part, (g, *x), "no cotangent of the log-determinant")
    fields = *head, *h, g, gl, block, *x, out, block, Writes(sums), out, out, out
    yield Case("autoregressive::DoubleBackward", fields, double_backward, (sums, g, gl, *x, *h))


@at((name, n) for name in ACTIVATIONS for n in (13, 67))
def activations(dtype: torch.dtype, activation: str, n: int) -> Iterator[Case]:
    function, code = single(ACTIVATIONS[activation]), ACTIVATION_CODES[activation]
    raw, grad = torch.linspace(-9, 10, n, dtype=dtype), torch.randn(n, dtype=dtype)

    def times_derivative(x, g):
        return first_order(function, (x,), (g,))

    yield Case("network::Activate", (code, raw, n, fresh(raw)), function, (raw,))
    yield Case("network::TimesDerivative", (code, raw, n, Writes(grad)), times_derivative, (raw, grad))


@at([(1, 1), (3, 31), (2, 100)])
def row_sums(dtype: torch.dtype, rows: int, n: int) -> Iterator[Case]:
    x, sums = torch.randn(rows, n + 5, dtype=dtype), torch.randn(rows, dtype=torch.float64)
    law = single(lambda x, sums: sums + x[:, :n].sum(1))
    yield Case("network::RowSums", (rows, n, n + 5, x, Writes(sums)), law, (x, sums))


@at((name, n) for name in CODES for n in (13, 16, 67))
def tails(dtype: torch.dtype, gate: str, n: int) -> Iterator[Case]:
    x, shift, raw, g, h, through = torch.randn(6, n, dtype=dtype)
    log, least = torch.randn(n, dtype=torch.float64), uniform(0, 2, n, dtype=dtype)
    head = gate_fields(gate)

    def op(x, shift, raw):
        z, log = affine_autoregressive(x[:, None], shift[:, None], raw[:, None], DEFAULTS[gate])
        return z[:, 0], log

    def apply(log, *x):
        z, more = op(*x)
        return z, log + more

    def invert(log, least, y, shift, raw):
        scale, rest, log_scale = scale_of(DEFAULTS[gate], raw)
        x = (y - (shift if rest is None else rest * shift)) / scale
        return x, log - log_scale, torch.minimum(scale, least)

    def backward(x, h, v, shift, raw):
        return first_order(op, (x, shift, raw), (v, h))

    def solve(x, through, h, g, shift, raw):
        v = (g - through) / scale_of(DEFAULTS[gate], raw)[0]
        return v, *backward(x, h, v, shift, raw)[1:]

    replaced = Writes(g), Writes(shift), Writes(raw)
    yield Case("network::ApplyTail", (*head, x, shift, raw, n, fresh(x), Writes(log)), apply, (log, x, shift, raw))
    fields = *head, x, shift, raw, n, fresh(x), Writes(log), Writes(least)
    yield Case("network::InvertTail", fields, invert, (log, least, x, shift, raw))
    yield Case("network::BackwardTail", (*head, x, h, n, *replaced), backward, (x, h, g, shift, raw))
    yield Case("network::SolveTail", (*head, x, through, h, n, *replaced), solve, (x, through, h, g, shift, raw))


# ---- bernoulli_log_prob.h ----


@at((*size, scale, bits) for size in (*BLOCKS, (17, 60)) for scale in (1, 30, 10_000) for bits in (False, True))
def bernoulli(dtype: torch.dtype, rows: int, width: int, scale: int, bits: bool) -> Iterator[Case]:
    kind, size = "Bits" if bits else "Bernoulli", (rows, width)
    logits, value = scale * torch.randn(size, dtype=dtype), torch.rand(size, dtype=dtype)
    value = (value > 0.5).to(torch.uint8) if bits else value
    # what is summed has terms of one sign: nothing cancels
    grad, h = torch.randn(rows, dtype=dtype), uniform(0.5, 2, *size, dtype=dtype) * -residual(logits, value).sign()
    sums, out, block = uniform(-2, -1, rows, dtype=torch.float64), fresh(logits), scratch(logits)

    def forward(sums, logits, value):
        return (sums + bernoulli_log_prob(logits, value),)

    def backward(logits, value, grad):
        return (grad[:, None] * residual(logits, value),)

    def double_backward(sums, logits, value, grad, h):
        return sums + (h * residual(logits, value)).sum(1), -grad[:, None] * h * variance(logits)

    yield Case(f"{kind}Forward", (*size, logits, value, block, block, Writes(sums)), forward, (sums, logits, value))
    yield Case(f"{kind}Backward", (*size, grad, block, logits, value, out), backward, (logits, value, grad))
    fields = *size, h, grad, block, logits, value, block, Writes(sums), out
    yield Case(f"{kind}DoubleBackward", fields, double_backward, (sums, logits, value, grad, h))


@at((n, stray) for n in (1, 7, 64, 1023) for stray in (None, -1e-30, 1.0001, 255.0, math.inf))
def probabilities(dtype: torch.dtype, n: int, stray: float | None) -> Iterator[Case]:
    for at in (0, n // 2, n - 1):
        value = torch.rand(n, dtype=dtype)
        value[at] = 1.0 if stray is None else stray
        inside = torch.tensor([float(stray is None)], dtype=dtype)
        yield Case("FractionsAreProbabilities", (n, value, fresh(inside)), single(lambda x: x), (inside,))
        if stray is None or stray == 255:
            bits = (value >= 0.5).to(torch.uint8) if stray is None else value.to(torch.uint8)
            yield Case("BitsAreProbabilities", (n, bits, fresh(inside)), single(lambda x: x), (inside,))


# ---- gaussian_mixture.h ----

#: Features are padded to a multiple of so many.
FEATURES = 4
OUTPUTS = {"log_prob": single(lambda x: x.logsumexp(-1)), "responsibilities": single(lambda x: x.softmax(-1))}


def in_blocks(n: int, first: Tensor, second: Tensor) -> Tensor:
    """Two numbers for each component and feature, ``(C, d)``, as [block][feature][first, second][component]."""
    components, d = first.shape
    both = padded(torch.stack([first, second]), up(d, FEATURES))
    return padded(both, up(components, n), dim=1).unflatten(1, (-1, n)).permute(1, 3, 0, 2).contiguous()


@at((c, d, kind) for c, d in [(1, 1), (3, 5), (16, 4), (17, 20), (35, 8)] for kind in OUTPUTS)
def mixture(dtype: torch.dtype, components: int, d: int, kind: str) -> Iterator[Case]:
    n, output = lanes(dtype), OUTPUTS[kind]
    width, features = up(components, n), up(d, FEATURES)
    loc, log_scale = d**-0.5 * torch.randn(2, components, d, dtype=dtype)  # so that components overlap
    log_weight = torch.randn(components, dtype=dtype)
    x = loc[torch.randint(components, (n,))] + torch.randn(n, d, dtype=dtype)
    p = x, log_weight, loc, log_scale
    hx, h_weight, h_loc, h_scale = h = [torch.randn_like(x) for x in p]
    base = log_weight.double() - log_scale.double().sum(1) - 0.5 * math.log(2 * math.pi) * d
    shift = base.max().item()
    base = padded((base - shift).to(dtype), width, -math.inf)
    h_base = padded((h_weight.double() - h_scale.double().sum(1)).to(dtype), width)
    columns, h_columns = (padded(y.mT, features, dim=0).contiguous() for y in (x, hx))
    c = width // n, features, in_blocks(n, loc, (-log_scale).exp()), base, shift
    along = in_blocks(n, h_loc, h_scale), h_base, h_columns
    slope, w, v = torch.randn(3, n, components, dtype=dtype)
    grad = torch.randn(n, dtype=dtype) if kind == "log_prob" else torch.randn(n, components, dtype=dtype)

    def wide(table):
        return padded(table, width)

    def forward(*p):
        result = output(log_joint(*p))[0]
        return (result if kind == "log_prob" else wide(result),)

    def slopes(zero, *x):
        return (wide(second_order(single(log_joint), x[:4], (zero,), x[4:])[0]),)

    def weights(grad, *p):
        return (wide(first_order(output, (log_joint(*p),), (grad,))[0]),)

    def weights_and_slopes(grad, slope, *p):
        joint = log_joint(*p)
        d_output, d_slope = second_order(output, (joint,), (grad,), (slope,))
        (w,) = first_order(output, (joint,), (grad,))
        return d_output if kind == "log_prob" else wide(d_output), wide(w), wide(d_slope)

    def pulled(d_x, d_weight, d_loc, d_scale, scale):
        return d_x.mT, in_blocks(n, d_loc * scale, d_scale), padded(d_weight, width)

    def backward(w, *p):
        return pulled(*first_order(single(log_joint), p, (w,)), p[3].exp())

    def double_backward(w, v, *x):
        plain = first_order(single(log_joint), x[:4], (w,))
        _, *turned = second_order(single(log_joint), x[:4], (v,), x[4:])
        return pulled(*(a + b for a, b in zip(plain, turned, strict=True)), x[3].exp())

    def cotangent(checked):
        """In the place for one number a row, or in that for one a component; overwritten either way."""
        return (Writes(grad, checked), None) if kind == "log_prob" else (None, Writes(wide(grad), checked))

    table = fresh(wide(w))
    results = (Writes(wide(w), False), fresh(x[:, 0])) if kind == "log_prob" else (table, None)
    yield Case("mixture::Forward", (*c, columns, *results), forward, p)
    yield Case("mixture::Slopes", (*c, *along, columns, table), slopes, (torch.zeros_like(w), *p, *h))
    yield Case("mixture::Weights", (*c, columns, *cotangent(False), table), weights, (grad, *p))
    fields = *c, columns, *cotangent(True), table, Writes(wide(slope))
    yield Case("mixture::WeightsAndSlopes", fields, weights_and_slopes, (grad, slope, *p))
    if d % FEATURES == 0:  # sums for padded features are not zero, and nobody reads them
        results = fresh(columns), Writes(torch.zeros_like(c[2])), Writes(torch.zeros_like(base))
        yield Case("MixtureBackward", (*c, None, None, None, columns, wide(w), None, *results), backward, (w, *p))
        fields = *c, *along, columns, wide(w), wide(v), *results
        yield Case("MixtureDoubleBackward", fields, double_backward, (w, v, *p, *h))


@at([(1,), (19,)])
def mixture_parts(dtype: torch.dtype, n: int) -> Iterator[Case]:
    x, sums = torch.randn(n, dtype=dtype), torch.randn(n, dtype=torch.float64)
    yield Case("mixture::Inverse", (n, x, fresh(x)), single(lambda x: (-x).exp()), (x,))
    yield Case("mixture::Flush", (Writes(sums), Writes(x), n), lambda x, y: (x + y, torch.zeros_like(y)), (sums, x))


# ---- iwae.h ----


@at(
    (*size, power, last)
    for size in [(1, 2), (5, 7), (13, 67), (2, 512)]
    for power in (0, 1, 2)
    for last in (0, -math.inf)
)
def iwae(dtype: torch.dtype, samples: int, n: int, power: int, last: float) -> Iterator[Case]:
    x, grad = 3 * torch.randn(samples, n, dtype=dtype), torch.randn(n, dtype=dtype)
    x[:, -1] += last

    def wide(x):
        return padded(x, n + 3)

    def sums(x):
        top = x.amax(0)
        e = (x - torch.where(top.isinf(), 0, top)).exp()
        return (top, e.sum(0), torch.where(e == 0, 0, e**power * x).sum(0))[: 3 if power else 2]

    def results(x):
        return (surrogate(x, 0, power) if power else iwae_bound(x),)

    def gradient(x, grad):
        return (wide(first_order(results, (x,), (grad,))[0]),)

    def join(x):
        """The first run's become those of all, the others' stay."""
        of_runs = zip(*map(sums, x.split(3)), strict=True)
        return [torch.stack([all_, *runs[1:]]) for all_, runs in zip(sums(x), of_runs, strict=True)]

    columns, out = (wide(x), samples, n + 3, n), fresh(grad)
    known = [y.to(t) for y, t in zip(sums(x.double()), (dtype, torch.float64, torch.float64), strict=False)]
    unused = [None] * (not power)
    yield Case("iwae_columns::ColumnSums", (*columns, power, *map(fresh, known), *unused), sums, (x,))
    yield Case("IwaeResults", (*known, *unused, samples, n, power, out), results, (x,))
    if power:
        inverse = torch.where(known[1] == 0, 1, 1 / known[1]).to(dtype)
        fields = *columns, power, known[0], inverse, grad, Writes(wide(torch.full_like(x, math.nan)))
        yield Case("iwae_columns::Gradient", fields, gradient, (x, grad))
    if samples > 4:
        runs = [torch.stack(y) for y in zip(*map(sums, x.double().split(3)), strict=True)]
        fields = Writes(runs[0].to(dtype)), *map(Writes, runs[1:]), *unused, len(runs[0]), n, n, power
        yield Case("iwae_columns::Join", fields, join, (x,))


# ---- planar_flow.h ----

#: The distance between the rows of a block, what its lanes are a multiple of, and what the rows of the batch are.
COLUMNS, STEP, ROW_TILE = 64, 16, 4


@at([(1, 1, 5), (3, 17, 33), (7, 64, 70), (5, 30, 1100)])
def planar_products(dtype: torch.dtype, layers: int, rows: int, d: int) -> Iterator[Case]:
    width, n = up(d, lanes(dtype)), up(rows, ROW_TILE)
    a, x = padded(torch.randn(layers, d, dtype=dtype), width), padded(torch.randn(n, d, dtype=dtype), width)
    c = torch.randn(layers, COLUMNS, dtype=dtype)
    to, sums = torch.randn(layers, n, dtype=torch.float64), torch.randn(layers, width, dtype=torch.float64)
    size = layers, rows, width
    yield Case("planar::Project", (*size, a, x, Writes(to), n), single(lambda a, x, to: to + a @ x.mT), (a, x, to))
    law = single(lambda c, a, x: x + c[:, :n].mT @ a)
    yield Case("planar::Combine", (*size, c, a, Writes(x)), law, (c, a, x))
    law = single(lambda c, x, sums: sums + c[:, :rows] @ x[:rows])
    yield Case("planar::SumOverRows", (*size, c, x, Writes(sums)), law, (c, x, sums))
    for streams in (0, 1):
        fields = rows, d, width, x[:rows], fresh(x[:rows, :d].contiguous()), streams
        yield Case("planar::StoreRows", fields, single(lambda x: x[:rows, :d]), (x,), "streams" * streams)


@at((layers, d, chunks) for layers, d in [(1, 5), (4, 33), (3, 1100)] for chunks in (1, 3))
def planar_layers(dtype: torch.dtype, layers: int, d: int, chunks: int) -> Iterator[Case]:
    width, k = up(d, lanes(dtype)), layers // 2
    u, w = torch.randn(2, layers, d, dtype=dtype) / d**0.5
    sums = padded(torch.randn(2, chunks, d, dtype=torch.float64), width)
    d_table = torch.randn(layers, layers, dtype=torch.float64)
    numbers = [fresh(torch.zeros(layers, dtype=torch.float64)) for _ in range(3)]
    row = torch.zeros(width, dtype=torch.float64)

    def wide(x):
        return padded(x, width)

    for constrain in (False, True):

        def made(u, w, constrain=constrain):
            product = (u * w).sum(-1)
            return constrained(u, w) if constrain else (u, 1 + product)

        def prepare(u, w, constrain=constrain, made=made):
            layer, s = made(u, w)
            square = (w.square().sum(-1),) if constrain else ()
            return wide(layer), (u * w).sum(-1), *square, s

        def gradient(u, w, sums, d_table, made=made):
            def pairing(u, w):
                layer, s = made(u, w)
                table = (d_table.tril(-1) * (w @ layer.mT)).sum() + (d_table.diagonal() * s).sum()
                by_sums = (sums[0, :, :d] * layer[k]).sum() + (sums[1, :, :d] * w[k]).sum()
                return (table + by_sums,)

            return tuple(wide(x[k]) for x in first_order(pairing, (u, w), (torch.ones((), dtype=u.dtype),)))

        note = "constrained" * constrain
        products, squares, diagonal = numbers
        squares = squares if constrain else Writes(squares.before, checked=False)
        fields = layers, d, width, int(constrain), wide(w), Writes(wide(u)), products, squares, diagonal
        yield Case("planar::Prepare", fields, prepare, (u, w), note)
        head = layers, k, d, width, chunks, width, *sums, d_table, wide(made(u, w)[0]), wide(w)
        dots = [(x[k].double() * w[k].double()).sum().item() for x in (u, w)]
        fields = *head, u[k] if constrain else None, *dots, fresh(row), fresh(row)
        yield Case("planar::LayerGradient", fields, gradient, (u, w, sums, d_table), note)


def recursion(projections: Tensor, table: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """``h`` of each layer, and the log-determinant of layers whose w are unit vectors: z is the projections then."""
    h, one = [], torch.eye(len(table), dtype=table.dtype)
    for i in range(len(table)):
        h.append(torch.tanh(projections[i] + sum(table[i, j] * h[j] for j in range(i))))
    u = table.tril(-1) + torch.diag(s - 1)
    return torch.stack(h), planar_flow(projections.mT, u.mT, one, torch.zeros_like(table[0]))[1]


@at([(1, 1), (3, 17), (7, 64), (4, 30)])
def planar(dtype: torch.dtype, layers: int, rows: int) -> Iterator[Case]:
    n = up(rows, STEP)
    table, s = torch.randn(layers, layers, dtype=torch.float64) / layers, uniform(0.2, 2.5, layers, dtype=torch.float64)
    projections, gh, constant = torch.randn(3, layers, rows, dtype=dtype).double()
    gl, d_table, d_b = torch.randn(rows, dtype=torch.float64), torch.randn_like(table), torch.randn_like(s)
    h = recursion(projections, table, s)[0]
    slope = 1 - h * h

    def wide(x):
        return padded(x, COLUMNS)

    def forward(projections, table, s):
        h, log = recursion(padded(projections, n), table, s)
        return wide(h), wide(1 - h * h), log

    def backward(projections, table, s, gh, gl, d_table, d_b):
        d = first_order(recursion, (projections, table, s), (gh, gl))
        return wide(d[0]), d_table + d[1].tril(-1) + torch.diag(d[2]), d_b + d[0].sum(-1)

    def solve(constant, slope, below):
        """``x = constant + slope * below x`` for each row of the batch."""
        matrix = torch.eye(layers, dtype=below.dtype) - slope.mT[:, :, None] * below
        return (wide(torch.linalg.solve(matrix, constant.mT).mT),)

    zeros = Writes(torch.zeros_like(wide(h))), Writes(torch.zeros(n, dtype=torch.float64))
    fields = layers, n, table, layers, s, Writes(wide(padded(projections, n))), *zeros
    yield Case("planar::Forward", fields, forward, (projections, table, s))
    fields = (
        layers,
        n,
        rows,
        table,
        layers,
        s,
        wide(h),
        wide(slope),
        padded(gl, n),
        *map(Writes, (wide(gh), d_table, d_b)),
    )
    yield Case("PlanarBackward", fields, backward, (projections, table, s, gh, gl, d_table, d_b))
    for transposed in (False, True):
        below = table.to(dtype).tril(-1)
        fields = layers, n, int(transposed), table.to(dtype), wide(slope), Writes(wide(constant))
        matrix = below.mT if transposed else below
        yield Case("planar::Solve", fields, solve, (constant, slope, matrix), "transposed" * transposed)


# ---- planar_flow_amortised.h ----


@at([(1, 1, 1), (3, 5, 4), (8, 33, 3), (2, 1100, 2), (5, 16, 0)])
def planar_amortised(dtype: torch.dtype, rows: int, d: int, layers: int) -> Iterator[Case]:
    width = up(d, lanes(dtype))
    z, g = torch.randn(2, rows, d, dtype=dtype)
    u, w = torch.randn(2, rows, layers, d, dtype=dtype) / d**0.5
    b, gl = torch.randn(rows, layers, dtype=dtype), torch.randn(rows, dtype=dtype)

    def wide(x):
        return padded(x, width)

    for constrain in (False, True):

        def flow(*x, constrain=constrain):
            return planar_flow(*x, constrain=constrain)

        def projections(z, u, w, b, flow=flow):
            inputs = [flow(z, u[:, :k], w[:, :k], b[:, :k])[0] for k in range(layers)]
            return (torch.stack(inputs, 1) * w).sum(-1) + b if layers else b

        def forward(*x, flow=flow, projections=projections):
            image, log = flow(*x)
            return wide(image), log, projections(*x)

        def backward(g, gl, *x, flow=flow):
            d_z, d_u, d_w, d_b = first_order(flow, x, (g, gl))
            return wide(d_z), d_u, d_w, d_b

        head, note = (layers, d, int(constrain), u, w, rows, width), "constrained" * constrain
        fields = *head, b, Writes(wide(z)), fresh(gl), fresh(b)
        yield Case("planar::AmortisedForward", fields, forward, (z, u, w, b), note)
        a = projections(*(x.double() for x in (z, u, w, b))).to(dtype)
        results = Writes(wide(g)), *map(fresh, (u, w, b)), scratch(layers * 7 * 8, torch.float64)
        fields = *head, a, gl, Writes(wide(z), checked=False), *results
        yield Case("planar::AmortisedBackward", fields, backward, (g, gl, z, u, w, b), note)


# ---- radial_flow.h ----


@at((*size, layers) for size in [(1, 1), (4, 5), (3, 33), (4, 70)] for layers in (0, 1, 4))
def radial(dtype: torch.dtype, rows: int, d: int, layers: int) -> Iterator[Case]:
    width = up(d, lanes(dtype))
    z, g = torch.randn(2, rows, d, dtype=dtype)
    center, gl = torch.randn(layers, d, dtype=dtype), torch.randn(rows, dtype=dtype)
    alpha = uniform(0.5, 2, layers, dtype=dtype)
    beta = alpha * uniform(-0.5, 1.5, layers, dtype=dtype)
    before = torch.randn(layers, width, dtype=dtype), *torch.randn(2, layers, dtype=torch.float64)

    def wide(x):
        return padded(x, width)

    def forward(*x):
        z, log = radial_flow(*x)
        return wide(z), log

    def backward(g, gl, d_center, d_alpha, d_beta, *x):
        d = first_order(radial_flow, x, (g, gl))
        return wide(d[0]), d_center + wide(d[1]), d_alpha + d[2], d_beta + d[3]

    head, x = (layers, d, width, wide(center), alpha, beta, rows), (z, center, alpha, beta)
    yield Case("radial::Forward", (*head, Writes(wide(z)), fresh(gl)), forward, x)
    ys, stack = scratch(layers * 4 * width, dtype), scratch(layers * 4 * 4, torch.float64)
    fields = *head, Writes(wide(z), checked=False), gl, Writes(wide(g)), ys, stack, *map(Writes, before)
    yield Case("radial::Backward", fields, backward, (g, gl, *before, *x))


# ---- draw.h ----


@at((*size, narrow) for size in [(1, 1, 1, 1), (2, 5, 9, 3), (1, 28, 28, 5), (1, 3, 40, 7)] for narrow in (0, 4))
def draw(dtype: torch.dtype, channels: int, height: int, width: int, size: int, narrow: float) -> Iterator[Case]:
    image, patch = (torch.randn(1, channels, *shape, dtype=dtype) for shape in ((height, width), (size, size)))
    attention = 0.4 * torch.randn(1, 5, dtype=dtype)
    attention[:, 2] -= narrow
    across, along = up(width, 16), up(height, 16)
    numbers = 3 * size * (across + along) + 3 * size * across + 2 * size * 16 + height * across + up(4 * size, 16)
    ramp = torch.arange(max(across, along)).to(dtype)
    room = ramp, scratch(numbers + up(32 * size // dtype.itemsize, 16), dtype)

    def read(image, attention):
        return (draw_read(image, attention, size),)

    def write(patch, attention):
        return (draw_write(patch, attention, (height, width)),)

    head = channels, height, width, size
    fields = *head, 0, attention, image, None, *room, None, fresh(patch), None
    yield Case("draw::Sample", fields, read, (image, attention), "read")
    fields = *head, 1, attention, None, patch, *room, fresh(image), None, None
    yield Case("draw::Sample", fields, write, (patch, attention), "write")
    fields = *head, 0, attention, image, patch, *room, fresh(image), None, fresh(attention)
    yield Case("draw::Sample", fields, lambda p, *x: first_order(read, x, (p,)), (patch, image, attention), "read's")
    fields = *head, 1, attention, image, patch, *room, None, fresh(patch), fresh(attention)
    yield Case("draw::Sample", fields, lambda x, *p: first_order(write, p, (x,)), (image, patch, attention), "write's")


# ---- rational_quadratic_spline.h ----

#: Elements of a block, and of the batch those before it, and its features; how the parameters lie.
SPLINE_BLOCK = 64
SPLINE_SIZES = [
    (0, 63, 1, "packed"),
    (3, 57, 5, "planes"),
    (10, 50, 3, "apart"),
    (0, 64, 7, "packed"),
    (5, 64, 7, "planes"),
]
IN_MEMORY = {"packed": lambda p: p, "planes": lambda p: p.mT, "apart": lambda p: torch.nn.functional.pad(p, (0, 2))}


@at((name, inverse, *size) for name in SPLINES for inverse in (0, 1) for size in SPLINE_SIZES)
def splines(
    dtype: torch.dtype, name: str, inverse: int, first: int, n: int, features: int, layout: str
) -> Iterator[Case]:
    spline, shape = SPLINES[name], (up(first + n, features) // features, features)
    bins, size = spline.bins, spline.parameters
    every_x, every_p = spline_inputs(dtype, "cpu", shape=shape, spline=name, scale=0.3)
    block = slice(first, first + n)
    x, p = every_x.flatten()[block], every_p.flatten(0, 1)[block]
    g, gl, hx = torch.randn(3, n, dtype=dtype)
    every_h = torch.randn_like(every_p)
    h = every_h.flatten(0, 1)[block]
    strides = {
        "packed": (features * size, size, 1),
        "planes": (features * size, 1, features),
        "apart": (features * (size + 2), size + 2, 1),
    }
    codes, numbers = spline.encoded
    head = *codes, *numbers, inverse, first, n, features, *strides[layout]
    other = "packed" if layout == "planes" else "planes"
    to, in_to = (features, *strides[other]), IN_MEMORY[other]
    given = IN_MEMORY[layout](every_p), x
    room = in_to(placed(torch.full_like(p, math.nan), first, shape))

    def op(x, p):
        return rational_quadratic_spline(x, p, spline, bool(inverse), 0)

    def backward(g, gl, x, p):
        d_x, d_p = first_order(op, (x, p), (g, gl))
        return d_x, in_to(placed(d_p, first, shape))

    def solve(g, gl, x, p):
        one, zero = torch.ones_like(x), torch.zeros_like(x)
        slope, log_slope = (first_order(op, (x, p), seeds)[0] for seeds in ((one, zero), (zero, one)))
        a = (g - gl * log_slope) / slope
        return a, backward(a, gl, x, p)[1]

    def double_backward(g, gl, hx, h, x, p):
        *tangents, d_x, d_p = second_order(op, (x, p), (g, gl), (hx, h))
        return *tangents, d_x, in_to(placed(d_p, first, shape))

    def of_x_alone(g, gl, hx, x, p):
        return double_backward(g, gl, hx, torch.zeros_like(p), x, p)[2:]

    def memory(n_parameters):
        return scratch((n_parameters * size + 2 * bins) * SPLINE_BLOCK, dtype)

    out, grown = fresh(x), Writes(room)
    yield Case("spline::Forward", (*head, *given, memory(1), out, out), op, (x, p))
    fields = *head, *to, g, gl, *given, memory(2), out, grown
    yield Case("spline::Backward", (*fields, 0), backward, (g, gl, x, p))
    yield Case("spline::Backward", (*fields[:-1], None, 0), lambda *x: backward(*x)[:1], (g, gl, x, p), "of x alone")
    if not inverse:
        yield Case("spline::Backward", (*fields, 1), solve, (g, gl, x, p), "solves")
    head = *head, features, *strides[layout], *to
    fields = IN_MEMORY[layout](every_h), g, gl, *given, memory(3)
    results = out, out, out, grown
    yield Case("spline::DoubleBackward", (*head, hx, *fields, *results), double_backward, (g, gl, hx, h, x, p))
    fields = None, *fields[1:], None, None, out, grown
    yield Case("spline::DoubleBackward", (*head, hx, *fields), of_x_alone, (g, gl, hx, x, p), "no directions of p")


def placed(block: Tensor, first: int, shape: tuple[int, int]) -> Tensor:
    """A block's parameters among zeros, those of all elements."""
    every = block.new_zeros(math.prod(shape), block.shape[1])
    every[first : first + len(block)] = block
    return every.unflatten(0, shape)


# ---- rmsprop.h, local_reparam_linear.h ----


@at([(1,), (15,), (67,)])
def rmsprop(dtype: torch.dtype, n: int) -> Iterator[Case]:
    g, p, v = torch.randn(n, dtype=dtype), torch.randn(n, dtype=dtype), uniform(0, 1, n, dtype=dtype)
    numbers = 2**-10, 0.875, 2**-20  # learning rate, alpha and eps: the same in both dtypes

    def step(g, v, p):
        p, v = p.clone()[None], v.clone()[None]
        rmsprop_step_(p, 0.5 * g[None], v, *numbers, math.inf)
        return v, p

    yield Case("rmsprop::SumOfSquares", (n, g), single(lambda g: g.square().sum()), (g,), returns=True)
    yield Case("rmsprop::Update", (n, *numbers, 0.5, g, Writes(v), Writes(p)), step, (g, v, p))


@at([(1,), (15,), (67,)])
def local_reparam(dtype: torch.dtype, n: int) -> Iterator[Case]:
    a, b, y, square, bias = uniform(0.5, 2, 5, n, dtype=dtype)
    std = torch.where(torch.arange(n) % 5 == 1, 0, square)
    out = fresh(a)

    def sample(bias_loc, bias, noise, square, y):
        std = (square + bias).sqrt()
        return std, y + bias_loc + std * noise

    def variance_grad(grad, noise, std):
        return (torch.where(std == 0, 0, grad * noise / torch.where(std == 0, 1, std)),)

    yield Case("local_reparam::Square", (n, a, out), single(torch.square), (a,))
    yield Case("local_reparam::Variance", (n, a, out), single(lambda a: (2 * a).exp()), (a,))
    yield Case("local_reparam::Sample", (n, a, bias, b, Writes(square), Writes(y)), sample, (a, bias, b, square, y))
    yield Case("local_reparam::VarianceGrad", (n, a, b, std, out), variance_grad, (a, b, std))
    yield Case("local_reparam::AddProduct", (n, a, b, Writes(y)), single(lambda a, b, y: y + a * b), (a, b, y))
    yield Case("local_reparam::Multiply", (n, a, Writes(y)), single(lambda a, y: y * a), (a, y))


# ---- tile.h ----


@at(
    (n, terms, groups, columns, permuted)
    for n in (0, 1, 2, 3, 4, 5, 6, 7, 13)
    for terms in (5, 131, 600)
    for groups in (1, 2, 3, 4)
    for columns in (False, True)
    for permuted in (False, True)
    if terms < 600 or n in (2, 13)
)
def staircase(dtype: torch.dtype, n: int, terms: int, groups: int, columns: bool, permuted: bool) -> Iterator[Case]:
    """Weights in rows or in columns; units and terms in order, or not, and then only some terms."""
    first, size, width, packed = 1, n + 3, groups * lanes(dtype), n % 2 == 0
    weight, to = torch.randn(size, terms, dtype=dtype), torch.randn(size, width, dtype=dtype)
    h, stride = torch.randn(terms, width + lanes(dtype), dtype=dtype), width + lanes(dtype)
    unit, index = (torch.randperm(m) if permuted else torch.arange(m) for m in (size, terms))
    ends = torch.randint(terms + 1, (size,)).sort().values
    begin, end = (terms // 7, terms - 1) if permuted else (0, terms)

    def product(weight, h, to):
        to = to.clone()
        for u in range(first, first + n):
            seen = index[begin : max(begin, min(end, ends[u].item()))]
            to[u - first if packed else unit[u]] += weight[unit[u], seen] @ h[seen, :width]
        return (to,)

    head = first, first + n, unit.int(), ends, begin, end, index.int()
    read = (weight.mT.contiguous(), 1, size) if columns else (weight, terms, 1)
    fields = *head, *read, h, width, Writes(to), int(packed), stride
    yield Case("StaircaseProduct", fields, product, (weight, h, to))


@at([(1, 1), (3, 5), (16, 16), (17, 33), (64, 8), (8, 2)])
def transpose(dtype: torch.dtype, rows: int, columns: int) -> Iterator[Case]:
    x, to = torch.randn(rows, columns + 2, dtype=dtype), torch.randn(columns, rows + 3, dtype=dtype)
    law = single(lambda x, to: torch.cat([x[:, :columns].mT, to[:, rows:]], 1))
    yield Case("Transpose", (x, columns + 2, rows, columns, Writes(to), rows + 3), law, (x, to))
