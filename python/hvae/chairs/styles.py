"""Chairs: a style is a few numbers and choices, from which come boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


from hvae.chairs.render import Boxes, View, draw

BACKS = ("panel", "slats", "ladder", "frame")
LEGS = ("four", "sled", "pedestal")
ARMS = ("none", "both", "left")
#: The point that all pictures have in the middle.
MIDDLE = (0.0, 0.0, 0.6)


@dataclass(frozen=True)
class Style:
    """A chair, in metres.

    Attributes:
        width, depth, thickness: of the seat.
        seat: its height.
        back: height of the back above it.
        tilt: of the back, in radians.
        leg: thickness of legs and rails.
        arm: height of the arms above the seat.
        cushion, wood: albedo of seat and panels, and of all else.
        back_kind, leg_kind, arm_kind: of ``BACKS``, ``LEGS``, ``ARMS``.
    """

    width: float
    depth: float
    thickness: float
    seat: float
    back: float
    tilt: float
    leg: float
    arm: float
    cushion: float
    wood: float
    back_kind: str
    leg_kind: str
    arm_kind: str


def random_style(generator: np.random.Generator) -> Style:
    """Any chair."""
    low = (0.40, 0.40, 0.03, 0.36, 0.30, 0.00, 0.03, 0.14, 0.55, 0.55)
    high = (0.62, 0.58, 0.10, 0.52, 0.62, 0.25, 0.07, 0.24, 1.00, 1.00)
    kinds = (str(generator.choice(names)) for names in (BACKS, LEGS, ARMS))
    return Style(*generator.uniform(low, high).tolist(), *kinds)


def boxes(style: Style) -> Boxes:
    """The chair's."""
    import numpy as np  # of the extra

    parts: list[tuple[tuple[float, ...], tuple[float, ...], float, float]] = []

    def box(centre: tuple[float, ...], sides: tuple[float, ...], albedo: float = style.wood, tilt: float = 0.0) -> None:
        parts.append((centre, tuple(side / 2 for side in sides), tilt, albedo))

    top, under = style.seat, style.seat - style.thickness
    box((0, 0, top - style.thickness / 2), (style.width, style.depth, style.thickness), style.cushion)
    _legs(style, under, box)
    _back(style, box)
    x, height = (style.width - style.leg) / 2, top + style.arm
    for side in {"none": (), "left": (-1,), "both": (-1, 1)}[style.arm_kind]:
        box((side * x, 0, height), (style.leg, 0.9 * style.depth, style.leg))
        front = -0.35 * style.depth
        box((side * x, front, top + style.arm / 2), (style.leg, style.leg, style.arm))
    centre, half, tilt, albedo = zip(*parts, strict=True)
    return Boxes(np.array(centre), np.array(half), np.array(tilt), np.array(albedo))


def _legs(style: Style, under: float, box) -> None:
    x, y, leg = (style.width - style.leg) / 2, (style.depth - style.leg) / 2, style.leg
    if style.leg_kind == "pedestal":
        box((0, 0, under / 2), (1.6 * leg, 1.6 * leg, under))
        box((0, 0, leg / 2), (style.width, leg, leg))
        box((0, 0, leg / 2), (leg, style.depth, leg))
        return
    for side in (-1, 1):
        for end in (-1, 1):
            box((side * x, end * y, under / 2), (leg, leg, under))
        if style.leg_kind == "sled":
            box((side * x, 0, leg / 2), (leg, style.depth, leg))


def _back(style: Style, box) -> None:
    """Upright parts and bars, in the plane of the back, which leans about the hind edge of the seat."""
    bar = style.leg

    def part(x: float, along: float, width: float, height: float, thickness: float, albedo: float = style.wood) -> None:
        y = style.depth / 2 - bar / 2 + along * math.sin(style.tilt)
        box((x, y, style.seat + along * math.cos(style.tilt)), (width, thickness, height), albedo, style.tilt)

    if style.back_kind == "panel":
        part(0, style.back / 2, style.width, style.back, bar, style.cushion)
        return
    for side in (-1, 1):
        part(side * (style.width - bar) / 2, style.back / 2, bar, style.back, bar)
    part(0, style.back - bar / 2, style.width, bar, bar)
    inside = style.width - 2 * bar
    if style.back_kind == "slats":
        for place in (-0.3, 0.0, 0.3):
            part(place * inside, style.back / 2, 0.12 * inside, style.back, bar / 2)
    elif style.back_kind == "ladder":
        for place in (0.3, 0.6):
            part(0, place * style.back, inside, 0.1 * style.back, bar / 2)
    else:
        part(0, 0.55 * style.back, 0.6 * inside, 0.5 * style.back, bar / 2, style.cushion)
        part(0, 0.25 * style.back, inside, bar, bar / 2)


def picture(style: Style, view: View, size: int) -> np.ndarray:
    """Brightness ``(size, size)`` as uint8, 0 where there is no chair and nowhere else."""
    import numpy as np  # of the extra

    return np.rint(draw(boxes(style), view, size, MIDDLE) * 255).astype(np.uint8)
