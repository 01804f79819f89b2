"""Boxes drawn from any side, the nearest in each pixel."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np


#: World units from the middle of a picture to its edge at zoom 1.
REACH = 0.76
#: The light comes over the viewer's left shoulder: right, up, towards the viewer.
LIGHT = tuple(x / math.sqrt(0.4**2 + 0.6**2 + 1.0) for x in (-0.4, 0.6, 1.0))
AMBIENT = 0.35


class Boxes(NamedTuple):
    """N boxes. x is to the right, y away from who stands in front, z up.

    Attributes:
        centre: ``(N, 3)``.
        half: half their sides, ``(N, 3)``.
        tilt: radians by which the top of each leans away from the front, about its own middle, ``(N,)``.
        albedo: how bright they are, between 0 and 1, ``(N,)``.
    """

    centre: np.ndarray
    half: np.ndarray
    tilt: np.ndarray
    albedo: np.ndarray


class View(NamedTuple):
    """From where: degrees around the upright, from the front to the right, and above the ground; and how near."""

    azimuth: float
    elevation: float
    zoom: float = 1.0


def camera(view: View) -> np.ndarray:
    """The picture's axes in the world, ``(3, 3)``: to the right, up, and towards the viewer."""
    import numpy as np  # of the extra

    azimuth, elevation = math.radians(view.azimuth % 360), math.radians(view.elevation)
    right = [math.cos(azimuth), math.sin(azimuth), 0.0]
    towards = [math.sin(azimuth) * math.cos(elevation), -math.cos(azimuth) * math.cos(elevation), math.sin(elevation)]
    up = [-math.sin(azimuth) * math.sin(elevation), math.cos(azimuth) * math.sin(elevation), math.cos(elevation)]
    return np.array([right, up, towards])


def draw(boxes: Boxes, view: View, size: int, middle: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> np.ndarray:
    """What is seen, by parallel rays: brightness ``(size, size)`` between 0 and 1, 0 where there is nothing.

    Each ray is cut with the boxes near it, in the box's own axes, where it is three pairs of planes; the nearest cut
    stays in a buffer of depths. Brightness is the albedo times the cosine of the light on the face and a constant.

    Args:
        boxes: N of them.
        view: from where.
        size: pixels along a side.
        middle: the point of the world in the middle of the picture.
    """
    import numpy as np  # of the extra

    axes = camera(view)
    pixel = 2 * REACH / (view.zoom * size)
    brightness, depth = np.zeros((size, size)), np.full((size, size), -np.inf)
    for centre, half, tilt, albedo in zip(*boxes, strict=True):
        own = _axes(tilt) @ axes.T  # the picture's axes in the box's own
        place = axes @ (centre - np.asarray(middle))
        extent = np.abs(own).T @ half
        first = np.ceil((place[0] - extent[0]) / pixel + size / 2 - 0.5).clip(0, size).astype(int)
        last = np.floor((place[0] + extent[0]) / pixel + size / 2 - 0.5).clip(-1, size - 1).astype(int)
        top = np.ceil(size / 2 - 0.5 - (place[1] + extent[1]) / pixel).clip(0, size).astype(int)
        bottom = np.floor(size / 2 - 0.5 - (place[1] - extent[1]) / pixel).clip(-1, size - 1).astype(int)
        if last < first or bottom < top:
            continue
        across = (np.arange(first, last + 1) + 0.5 - size / 2) * pixel - place[0]
        above = (size / 2 - 0.5 - np.arange(top, bottom + 1)) * pixel - place[1]
        origin = own[:, 0, None, None] * across + own[:, 1, None, None] * above[:, None]
        along = np.where(np.abs(own[:, 2]) < 1e-9, 1e-9, own[:, 2])[:, None, None]
        planes = -origin / along
        reach = half[:, None, None] / np.abs(along)
        face, near = (planes + reach).argmin(0), (planes + reach).min(0)
        hit = near >= (planes - reach).max(0)
        near = near + place[2]
        window = np.s_[top : bottom + 1, first : last + 1]
        seen = hit & (near > depth[window])
        light = np.sign(own[:, 2]) * (own @ LIGHT)
        shade = albedo * (AMBIENT + (1 - AMBIENT) * light.clip(0, 1))
        depth[window] = np.where(seen, near, depth[window])
        brightness[window] = np.where(seen, shade[face], brightness[window])
    return brightness


def _axes(tilt: float) -> np.ndarray:
    """Of a box whose top leans away from the front, in rows."""
    import numpy as np  # of the extra

    cosine, sine = math.cos(tilt), math.sin(tilt)
    return np.array([[1.0, 0.0, 0.0], [0.0, cosine, -sine], [0.0, sine, cosine]])
