"""What sees a cluttered image: DRAW's reader, a few glimpses one after the other, and a small convolutional network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvae.draw.models import HIDDEN, attention_of
from hvae_kernels.functional import draw_read

CLASSES = 10
#: Filters along a side of a glimpse.
GLIMPSE = 12


class Reader(nn.Module):
    """T times ``h = LSTM(read(x, h), h)``; the class is linear in the last state.

    The reader's five numbers are linear in the state; the first state is learned, so that the first glimpse is the same
    for all images. Glimpses begin as the whole image.

    Source: Gregor et al., DRAW, arXiv 1502.04623, section 4.1.

    Args:
        glimpses: T.
        side: height and width of images.
        hidden: units of the LSTM.
    """

    def __init__(self, glimpses: int, side: int, hidden: int = HIDDEN):
        super().__init__()
        self.glimpses = glimpses
        self.core = nn.LSTMCell(GLIMPSE**2, hidden)
        self.read_at = attention_of(hidden, GLIMPSE, side)
        self.classes = nn.Linear(hidden, CLASSES)
        self.states = nn.Parameter(torch.zeros(2, hidden))

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(B, 10)`` of images ``(B, side, side)`` in [0, 1]."""
        return self.run(images)[0]

    def run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`forward`, and the reader's numbers, ``(T, B, 5)``."""
        first, second = (state.expand(len(images), -1) for state in self.states)
        state, reads = (first, second), []
        for _ in range(self.glimpses):
            reads.append(self.read_at(state[0]))
            state = self.core(draw_read(images[:, None], reads[-1], GLIMPSE).flatten(1), state)
        return self.classes(state[0]), torch.stack(reads)


class Convolutional(nn.Sequential):
    """The baseline of Mnih et al., arXiv 1406.6247: 8 filters of 10 x 10 at every fifth pixel, 256 units, a class.

    Args:
        side: height and width of images.
    """

    def __init__(self, side: int):
        places = (side - 10) // 5 + 1
        super().__init__(
            *(nn.Unflatten(1, (1, side)), nn.Conv2d(1, 8, 10, 5), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(8 * places**2, 256), nn.ReLU(), nn.Linear(256, CLASSES)),
        )
