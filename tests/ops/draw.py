"""``draw_read`` and ``draw_write``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvae_kernels import functional as F
from hvae_kernels.ops.draw import autograd, reference
from ops._mutation import Mutation
from ops._spec import OpSpec, RawOp, in_layout


def attention(dtype: torch.dtype, device: str, batch: int, spread: float = 0.4, narrow: float = 0.0) -> Tensor:
    """Grids around the middle of the image; ``narrow`` is taken from log sigma^2."""
    numbers = spread * torch.randn(batch, 5, dtype=dtype, device=device)
    numbers[:, 2] -= narrow
    return numbers


def images_of(
    dtype: torch.dtype,
    device: str,
    *,
    shape: tuple[int, int],
    height: int = 5,
    channels: int = 2,
    layout: str = "contiguous",
    scale: float = 1.0,
    size: int = 3,
    **grid: float,
) -> tuple[Tensor, Tensor]:
    """Inputs of ``draw_read``: images of ``shape``'s rows and width."""
    batch, width = shape
    images = scale * torch.randn(batch, channels, height, width, dtype=dtype, device=device)
    return in_layout(images, layout), attention(dtype, device, batch, **grid)


def patches_of(
    dtype: torch.dtype, device: str, *, size: int = 3, image_size: tuple[int, int] = (5, 4), **case: Any
) -> tuple[Tensor, Tensor]:
    """Inputs of ``draw_write``: patches, for images of ``shape``'s width."""
    batch, _ = case["shape"]
    return images_of(dtype, device, **{**case, "shape": (batch, size), "height": size})


def one(function: Callable[..., Tensor], **small: Any) -> Callable[..., tuple[Tensor]]:
    """As the contract has results; of the small case's sizes, where it binds no others."""
    return lambda *inputs, **options: (function(*inputs, **{**small, **options}),)


FAR = "a weight that is very small is 0, and rows that no filter near weighs are not read"
CASES = {
    "plain": {"shape": (7, 6)},
    "no_rows": {"shape": (0, 5)},
    "one_element": {"shape": (1, 1), "height": 1, "channels": 1, "size": 1},
    "one_filter": {"shape": (3, 7), "size": 1},
    "no_channels": {"shape": (3, 7), "channels": 0},
    "prime": {"shape": (13, 17), "height": 11, "size": 5},
    "above_power": {"shape": (2, 17), "height": 33, "size": 5},
    "below_power": {"shape": (2, 15), "height": 31, "size": 7},
    "more_filters": {"shape": (3, 3), "height": 4, "size": 9},
    "off_the_image": {"shape": (5, 7), "spread": 2.0},
    "narrow": {"shape": (5, 9), "narrow": 5.0},
    "digits": {"shape": (40, 28), "height": 28, "channels": 1, "size": 5},
    "more_than_filters_see": {"shape": (3, 100), "height": 70, "size": 5},
    "strided": {"shape": (3, 6), "layout": "strided"},
    "transposed": {"shape": (3, 6), "layout": "transposed"},
    "expanded": {"shape": (3, 6), "layout": "expanded"},
}
INTERPRETED = {"digits": {"shape": (3, 28), "height": 28, "channels": 1, "size": 5}}
SMALL = {"shape": (2, 4), "height": 3, "channels": 1, "size": 2}
EXTREMES = {"large": {"shape": (7, 5), "scale": 1e18}, "tiny": {"shape": (7, 5), "scale": 1e-18}}
LONG_SUMS = {"shape": (3, 400), "height": 300, "channels": 1, "size": 4}


def written(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same cases for ``draw_write``."""
    return {name: written_case(case) for name, case in cases.items()}


def written_case(case: dict[str, Any]) -> dict[str, Any]:
    """A patch of the size that the images are read with, and the images' size."""
    height = case.get("height", 5)
    return {**{k: v for k, v in case.items() if k != "height"}, "image_size": (height, case["shape"][1])}


SPECS = (
    OpSpec(
        name="draw_read",
        op=one(F.draw_read, size=2),
        reference=one(reference.draw_read, size=2),
        make=images_of,
        cases={name: {"size": 3, **case} for name, case in CASES.items()},
        small=SMALL,
        extremes={name: {"size": 3, **case} for name, case in EXTREMES.items()},
        same=(0, 0),
        raw=(
            RawOp(autograd.READ, lambda x: (*x, 2)),
            RawOp(autograd.READ_BACKWARD, lambda x: (x[0][..., :2, :2], *x, 3)),
            RawOp(autograd.READ_BACKWARD, lambda x: (x[0][..., :2, :2], *x, 2)),
        ),
        shared=("size",),
        summed_by_torch=("second",),  # the reference's
        long_sums=LONG_SUMS,
        rows=(0, 1),
        defined_at_infinity={0: FAR},
        undefined_at_infinity={0: FAR},
        row_cases=({"size": 3},),
        interpreted=INTERPRETED,
    ),
    OpSpec(
        name="draw_write",
        op=one(F.draw_write, image_size=(3, 4)),
        reference=one(reference.draw_write, image_size=(3, 4)),
        make=patches_of,
        cases=written(CASES),
        small=written_case(SMALL),
        extremes=written(EXTREMES),
        same=(0, 0),
        raw=(
            RawOp(autograd.WRITE, lambda x: (*x, 3, 4)),
            RawOp(autograd.WRITE_BACKWARD, lambda x: (x[0].repeat(1, 1, 2, 3), *x, 3)),
            RawOp(autograd.WRITE_BACKWARD, lambda x: (x[0].repeat(1, 1, 2, 3), *x, 1)),
        ),
        options=("image_size",),
        summed_by_torch=("second",),  # the reference's
        long_sums=written_case(LONG_SUMS),
        rows=(0, 1),
        defined_at_infinity={0: FAR},
        undefined_at_infinity={0: FAR},
        row_cases=({"image_size": (4, 6)},),
        interpreted=written(INTERPRETED),
    ),
)

_DRAW = "csrc/kernels/draw.h"
_CPP = "tests/test_contract.py -k draw_{}/cpp"
_TRITON = "hvae_kernels/ops/draw/triton.py"
_INTERPRETED = "tests/test_contract.py -k draw_{}/triton"
_TESTS = "tests/test_draw.py -k {}"

MUTATIONS = (
    Mutation(_DRAW, "place <= length ? std::nearbyint(place) : length : 1", "std::nearbyint(place) : 1", _TESTS.format("cpp")),
    Mutation(_DRAW, "row[a] = pixels[a] < end ? value : T(0);", "row[a] = value;", _CPP.format("read")),
    Mutation(_DRAW, "is_short ? width : window.end;", "is_short ? width : window.end - kGroup;", _CPP.format("write")),
    Mutation(_DRAW, "share * (step - mean) * all;", "share * step * all;", _CPP.format("read")),
    Mutation(_DRAW, "(step * (step + place.twice) - mean_square)", "(step * (step + place.twice))", _CPP.format("write")),
    Mutation(_DRAW, "const double low = nearest - radius - 2", "const double low = nearest + 2", _CPP.format("read")),
    Mutation(_DRAW, "w.begin >= b + rows", "w.begin >= b", _CPP.format("write")),
    Mutation(_DRAW, "writes ? -gamma : gamma, 0}", "gamma, 0}", _CPP.format("write")),
    Mutation(_DRAW, "writes ? -(scale * sum) : scale * sum", "scale * sum", _CPP.format("write")),
    Mutation(_DRAW, "* (at_x + at_y);", "* at_x;", _CPP.format("read")),
    Mutation(_DRAW, "scale * by_stride * stride", "scale * by_stride", _CPP.format("read")),
    Mutation(_DRAW, "< end ? sums[r][w] * factor : V{}", "< end + 1 ? sums[r][w] * factor : V{}", _TESTS.format("infinite")),
    Mutation(_DRAW, "if (copies) return {rest, inside, width, end};", "if (copies) return {rest, inside, width, inside};", _CPP.format("read")),
    Mutation(_DRAW, "if (w == W - 1) pixels = counts ? pixels : V{};", "", _TESTS.format("not_seen")),
    Mutation(_DRAW, "by_variance[r] += at[bank] * products[r];", "by_variance[r] += at[0] * products[r];", _CPP.format("write")),
    Mutation(_DRAW, "std::copy_n(rest + (b - inside) * W, width, to + b * width)", "(void)b", _CPP.format("write")),
    Mutation("csrc/cpu/draw.cpp", ".patch = at(of, i * patch)", ".patch = of", _CPP.format("write")),
    Mutation("hvae_kernels/ops/draw/autograd.py", "needs = SOURCE * wanted[0] | ATTENTION * wanted[1]", "needs = SOURCE * wanted[0]", _CPP.format("read")),
    Mutation(_TRITON, "half = 0.5 - 0.5 * (size * one)", "half = 0.5 - 0.5 * size.to(DTYPE)", "tests/test_absent_gpu.py -k sizes_of_one"),
    Mutation(_TRITON, "value * (step - tl.sum(value * step, axis, keep_dims=True))", "value * step", _INTERPRETED.format("read")),
    Mutation(_TRITON, "tl.store(to + 4, (-scale if WRITES else scale)", "tl.store(to + 4, scale", _INTERPRETED.format("write")),
    Mutation(_TRITON, "tl.minimum(tl.maximum(tl.floor(place + 0.5), 1.0), length)", "tl.floor(place + 0.5)", _TESTS.format("triton")),
)  # fmt: skip
