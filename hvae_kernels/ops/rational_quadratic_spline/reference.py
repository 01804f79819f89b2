"""Reference: the spline in plain PyTorch, beside its formula. Any dtype, any device, any order of derivatives."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hvae_kernels.ops.rational_quadratic_spline.spline import Spline


def rational_quadratic_spline(
    x: Tensor, parameters: Tensor, spline: Spline, inverse: bool = False, event_ndims: int = 1
) -> tuple[Tensor, Tensor]:
    """In a bin with knots (x0, y0), (x1, y1), width w, height h, ``s = h / w`` and slopes d0, d1, from both knots.

    ``z = (x - x0) / w``, ``zc = (x1 - x) / w``, ``den = s (z^2 + zc^2) + (d0 + d1) z zc``, ``y = y0 + h z (s z + d0 zc)
    / den``, ``dy / dx = s^2 (d1 z^2 + 2 s z zc + d0 zc^2) / den^2``; the inverse is the quadratic's root without a
    difference that cancels.
    """
    bins = spline.bins
    left, right, bottom, top = spline.interval
    raw_widths, raw_heights, raw_slopes = parameters.split((bins, bins, parameters.shape[-1] - 2 * bins), -1)
    widths = _shares(raw_widths, spline, spline.min_width) * (right - left)
    heights = _shares(raw_heights, spline, spline.min_height) * (top - bottom)
    slopes = _slopes(raw_slopes, spline)
    columns, rows = _knots(widths, left, right), _knots(heights, bottom, top)
    low, high, knots = (bottom, top, rows) if inverse else (left, right, columns)
    outside = (x < low) | (x > high)
    # the other branch's derivatives must be finite too, where it is not taken
    at = torch.where(outside, 0.5 * (low + high), x)
    index = (at[..., None] >= knots[..., 1:-1]).sum(-1, keepdim=True)

    def pick(values: Tensor, shift: int = 0) -> Tensor:
        # not -1: a dimension from the end is what ONNX' own evaluator gets wrong
        return values.gather(values.dim() - 1, index + shift).squeeze(-1)

    x0, x1, w, y0, y1, h = pick(columns), pick(columns, 1), pick(widths), pick(rows), pick(rows, 1), pick(heights)
    d0, d1, s = pick(slopes), pick(slopes, 1), h / w
    if inverse:
        z, zc = _root((at - y0) / h, (y1 - at) / h, d0, d1, s)
        y = torch.where(z < zc, x0 + z * w, x1 - zc * w)
    else:
        z, zc = (at - x0) / w, (x1 - at) / w
    den = s * (z * z + zc * zc) + (d0 + d1) * z * zc
    log = torch.log(s * s * (d1 * z * z + 2 * s * z * zc + d0 * zc * zc)) - 2 * torch.log(den)
    if inverse:
        log = -log
    else:
        lo, hi = h * z * (s * z + d0 * zc) / den, h * zc * (s * zc + d1 * z) / den
        y = torch.where(lo < hi, y0 + lo, y1 - hi)
    y, log = (
        torch.where(outside, x if spline.tails else math.nan, y),
        torch.where(outside, 0.0 if spline.tails else math.nan, log),
    )
    return y, log.flatten(log.dim() - event_ndims).sum(-1) if event_ndims else log


def _shares(raw: Tensor, spline: Spline, floor: float) -> Tensor:
    """Each bin's share of the interval."""
    raw = raw * spline.logit_scale
    if spline.style == "zuko":
        return torch.softmax(raw / (1 + (2 / math.log(spline.min_derivative) * raw).abs()), -1)
    return floor + (1 - spline.bins * floor) * torch.softmax(raw, -1)


def _slopes(raw: Tensor, spline: Spline) -> Tensor:
    """Derivatives at all K + 1 knots."""
    if spline.style == "zuko":
        slopes = torch.exp(raw / (1 + (raw / math.log(spline.min_derivative)).abs()))
    else:
        slopes = spline.min_derivative + torch.nn.functional.softplus(raw, threshold=40.0)
    if spline.tails == "circular":
        return torch.cat((slopes, slopes[..., :1]), -1)
    if spline.tails == "linear":
        outer = torch.full_like(slopes[..., :1], spline.outer_slope)
        return torch.cat((outer, slopes, outer), -1)
    return slopes


def _knots(lengths: Tensor, low: float, high: float) -> Tensor:
    """The first and the last exactly at the bounds."""
    inner = low + lengths.cumsum(-1)[..., :-1]
    ends = torch.full_like(inner[..., :1], low), torch.full_like(inner[..., :1], high)
    return torch.cat((ends[0], inner, ends[1]), -1)


def _root(t: Tensor, q: Tensor, d0: Tensor, d1: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """``z`` and ``1 - z`` where the spline has risen by the share t of the bin's height, and q is missing."""
    u = d0 * q - d1 * t
    r = torch.sqrt(u * u + 4 * s * s * t * q)
    n, m = torch.where(u >= 0, 2 * s * t, r - u), torch.where(u >= 0, u + r, 2 * s * q)
    return n / (n + m), m / (n + m)
