"""``rational_quadratic_spline``."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.ops._row import Case, Row
from hvae_kernels import functional
from hvae_kernels.ops.rational_quadratic_spline import reference

SPLINE = functional.Spline(8)
_WORDS = SPLINE.parameters  # of an element


def spline_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, features: int
) -> tuple[Tensor, ...]:
    """Random arguments of ``rational_quadratic_spline``: x seldom outside, raw parameters of order 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, features, generator=generator, dtype=torch.float64)
    parameters = torch.randn(batch, features, _WORDS, generator=generator, dtype=torch.float64)
    return tuple(x.to(dtype).to(device).contiguous() for x in (x, parameters))


def spline_case(batch: int, features: int) -> Case:
    """Of rows of features."""
    return Case(f"({batch}, {features}), K = {SPLINE.bins}", {"batch": batch, "features": features})


def forward(x: Tensor, parameters: Tensor) -> tuple[Tensor, ...]:
    """The plain formula."""
    return reference.rational_quadratic_spline(x, parameters, SPLINE)


def inverse(x: Tensor, parameters: Tensor) -> tuple[Tensor, ...]:
    """The plain formula's inverse."""
    return reference.rational_quadratic_spline(x, parameters, SPLINE, inverse=True)


def by_nflows(x: Tensor, parameters: Tensor, inverse: bool = False) -> tuple[Tensor, ...]:
    """As layers of nflows do it."""
    from nflows.transforms.splines import unconstrained_rational_quadratic_spline

    parts = parameters.split((SPLINE.bins, SPLINE.bins, SPLINE.bins - 1), -1)
    bound = SPLINE.interval[1]
    y, log = unconstrained_rational_quadratic_spline(x, *parts, inverse=inverse, tails="linear", tail_bound=bound)
    return y, log.sum(-1)


def by_zuko(x: Tensor, parameters: Tensor, inverse: bool = False) -> tuple[Tensor, ...]:
    """As transforms of zuko do it, with their own knots."""
    from zuko.transforms import MonotonicRQSTransform

    parts = parameters.split((SPLINE.bins, SPLINE.bins, SPLINE.bins - 1), -1)
    transform = MonotonicRQSTransform(*parts, bound=SPLINE.interval[1])
    y, log = (transform.inv if inverse else transform).call_and_ladj(x)
    return y, log.sum(-1)


ROWS = tuple(
    Row(
        name="rational_quadratic_spline" + ("_inverse" if inverted else ""),
        op=functools.partial(functional.rational_quadratic_spline, spline=SPLINE, inverse=inverted),
        formula=inverse if inverted else forward,
        inputs=spline_inputs,
        # read x and the parameters; write y
        forward_bytes=lambda element_size, batch, features: (_WORDS + 2) * element_size * batch * features,
        # read the cotangent, x and the parameters; write both gradients
        backward_bytes=lambda element_size, batch, features: (2 * _WORDS + 3) * element_size * batch * features,
        # an exponential as one operation, a sum and a comparison of each bin's width and height; a product for each
        # gradient of them, and three times the arithmetic in the bin
        flops=lambda direction, batch, features: (
            {"forward": 6 * SPLINE.bins + 60, "backward": 8 * SPLINE.bins + 180}[direction] * batch * features
        ),
        cases=(spline_case(4096, 64), spline_case(10, 25)),
        peers={
            "nflows": functools.partial(by_nflows, inverse=inverted),
            "zuko": functools.partial(by_zuko, inverse=inverted),
        },
    )
    for inverted in (False, True)
)
