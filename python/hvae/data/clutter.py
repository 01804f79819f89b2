"""Cluttered translated digits: a digit somewhere on a large dark image, and pieces of other digits all over it."""

from __future__ import annotations

import torch
from torch import Tensor

from hvae.data.mnist import SIDE

#: Height and width of a piece.
PIECE = 8


def cluttered(
    digits: Tensor, others: Tensor, side: int, pieces: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Images, and where their digits lie.

    Every place is as likely as any other. The digit is whole: where things meet, the brighter pixel is seen.

    Source: Mnih, Heess, Graves and Kavukcuoglu, Recurrent models of visual attention, arXiv 1406.6247, section 4.1,
    with 8 pieces where ``side`` is 100 and 4 where it is 60.

    Args:
        digits: intensities ``(B, 784)``.
        others: of the digits that pieces are cut from, ``(N, 784)``.
        side: height and width of the images, at least 28.
        pieces: how many an image.
        generator: of places and pieces.

    Returns:
        Intensities ``(B, side, side)``, uint8, and rows and columns of the digits' upper left corners, ``(B, 2)``.
    """
    batch = len(digits)
    corners = torch.randint(side - SIDE + 1, (batch, 2), generator=generator)
    source = torch.randint(len(others), (batch, pieces), generator=generator)
    cut = torch.randint(SIDE - PIECE + 1, (batch, pieces, 2), generator=generator)
    laid = torch.randint(side - PIECE + 1, (batch, pieces, 2), generator=generator)
    images = torch.zeros(batch, side**2, dtype=torch.uint8)
    images.scatter_(1, _square(corners, SIDE, side), digits)
    chosen = others[source[..., None], _square(cut, PIECE, SIDE)]
    images.scatter_reduce_(1, _square(laid, PIECE, side).flatten(1), chosen.flatten(1), "amax")
    return images.view(batch, side, side), corners


def _square(corners: Tensor, size: int, width: int) -> Tensor:
    """Numbers of the pixels of squares in images of that width: corners ``(..., 2)`` to ``(..., size^2)``."""
    along = torch.arange(size)
    within = (along[:, None] * width + along).flatten()
    return corners[..., :1] * width + corners[..., 1:] + within
