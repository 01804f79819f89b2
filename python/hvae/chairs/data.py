"""Pictures of random chairs from all sides, each with a colour, brightness and zoom of its own; some held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hvae.chairs.render import View
from hvae.chairs.styles import Style, picture, random_style

ELEVATIONS = (10.0, 35.0)
#: Sin and cos of a view's azimuth and elevation; a transformation's red, green, blue, brightness and zoom.
N_VIEW, N_TRANSFORM = 4, 5
#: Of the azimuths of every other chair this part is held out, one beside another.
SHARE_HELD_OUT = 3 / 8


class Target(NamedTuple):
    """Pictures: ``image (B, 3, S, S)`` between 0 and 1 on white, ``mask (B, 1, S, S)`` uint8, 1 where the chair is."""

    image: Tensor
    mask: Tensor


class Condition(NamedTuple):
    """What pictures are of: ``chair (B,)`` int64, ``view (B, 4)``, ``transform (B, 5)``."""

    chair: Tensor
    view: Tensor
    transform: Tensor


class Gallery:
    """C chairs from A azimuths and E elevations, in one picture each.

    Attributes:
        styles: of the chairs.
        azimuths: in degrees.
        transforms: ``(C, A, E, 5)``.
        shades: brightness ``(C, A, E, S, S)`` uint8, 0 where there is no chair, before colour.
        unseen: ``(C, A)`` whether all pictures of a chair from there are held out.
    """

    def __init__(
        self, seed: int, n_chairs: int, n_azimuths: int, size: int, watch: Callable[[Iterable], Iterable] = iter
    ):
        import numpy as np  # of the extra

        generator = np.random.default_rng(seed)
        self.size = size
        self.styles = [random_style(generator) for _ in range(n_chairs)]
        self.azimuths = [360 * index / n_azimuths for index in range(n_azimuths)]
        shape = n_chairs, n_azimuths, len(ELEVATIONS)
        colour = generator.uniform(0.25, 1.0, (*shape, 3))
        colour /= colour.max(-1, keepdims=True)
        brightness, zoom = generator.uniform(0.6, 1.0, shape), generator.uniform(0.75, 1.05, shape)
        transforms = np.concatenate([colour, brightness[..., None], zoom[..., None]], -1)
        self.transforms = torch.from_numpy(transforms.astype(np.float32))
        first = generator.integers(n_azimuths, size=n_chairs)
        behind = (np.arange(n_azimuths) - first[:, None]) % n_azimuths
        unseen = (behind < round(SHARE_HELD_OUT * n_azimuths)) & (np.arange(n_chairs) % 2 == 1)[:, None]
        self.unseen = torch.from_numpy(unseen)
        self.shades = torch.empty(*shape, size, size, dtype=torch.uint8)
        for chair in watch(range(n_chairs)):
            for azimuth in range(n_azimuths):
                for elevation in range(len(ELEVATIONS)):
                    zoom_of_it = self.transforms[chair, azimuth, elevation, 4].item()
                    shade = self.draw(self.styles[chair], azimuth, elevation, zoom_of_it)
                    self.shades[chair, azimuth, elevation] = shade

    def draw(self, style: Style, azimuth: int, elevation: int, zoom: float) -> Tensor:
        """Brightness ``(S, S)`` uint8 of any chair from one of the views."""
        view = View(self.azimuths[azimuth], ELEVATIONS[elevation], zoom)
        return torch.from_numpy(picture(style, view, self.size))

    def indices(self, unseen: bool) -> Tensor:
        """Of pictures seen in training, or of those held out, ``(N, 3)``: chair, azimuth, elevation."""
        return (self.unseen == unseen).unsqueeze(-1).expand(self.shades.shape[:3]).nonzero()

    def target(self, index: Tensor) -> Target:
        """The pictures of indices ``(B, 3)``."""
        at = index.unbind(-1)
        return coloured(self.shades[at], self.transforms[at])

    def condition(self, index: Tensor) -> Condition:
        """What they are of."""
        chair, azimuth, elevation = index.unbind(-1)
        return Condition(chair, self.view(azimuth, elevation), self.transforms[chair, azimuth, elevation])

    def view(self, azimuth: Tensor, elevation: Tensor) -> Tensor:
        """Sin and cos of both, ``(B, 4)``."""
        angles = torch.stack([torch.tensor(self.azimuths)[azimuth], torch.tensor(ELEVATIONS)[elevation]], -1).deg2rad()
        return torch.cat([angles.sin(), angles.cos()], -1)

    def steps_between(self, azimuth: Tensor, other: Tensor) -> Tensor:
        """How many of the gallery's azimuths lie from one to the other, the shorter way."""
        count = len(self.azimuths)
        distance = (azimuth - other) % count
        return torch.minimum(distance, count - distance)


def coloured(shades: Tensor, transforms: Tensor) -> Target:
    """Brightness ``(B, S, S)`` in colour and brightness of transformations ``(B, 5)``, on white."""
    mask = (shades > 0).unsqueeze(-3)
    colour = transforms[..., :3] * transforms[..., 3:4]
    image = torch.where(mask, (shades / 255).unsqueeze(-3) * colour[..., None, None], 1.0)
    return Target(image, mask.to(torch.uint8))
