"""DRAW: a recurrent auto-encoder that reads an image and writes on a canvas, T times."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvae.data.mnist import N_PIXELS, SIDE
from hvae.densities import standard_normal_divergence, standard_normal_log_prob
from hvae.importance import Scored
from hvae_kernels.functional import bernoulli_log_prob, draw_read, draw_write

HIDDEN, LATENT = 256, 100
#: Filters along a side; the paper's.
READ, WRITE = 2, 5
#: How they begin, in shares of the image's side: from the first to the last, of a read at most a quarter from one to
#: the next; and the gain of a read.
READ_SPAN, WRITE_SPAN, READ_STRIDE, READ_GAIN = 0.4, 0.6, 1 / 4, 4.0


#: Of an LSTM cell: ``(hidden, cell)``, each ``(B, units)``.
State = tuple[Tensor, Tensor]


class Picture(NamedTuple):
    """Canvases ``(T, B, 784)`` after each step, as logits; with attention its numbers ``(T, B, 5)``, or None."""

    canvases: Tensor
    reads: Tensor | None
    writes: Tensor | None


class Encoder(nn.LSTMCell):
    """An LSTM cell, of whose inputs the first may be the same in every step."""

    def holding(self, first: Tensor) -> Callable[[Tensor, State], State]:
        """The cell as a function of its other inputs and its state; the product of ``first (B, c)`` is made once."""
        of_first, of_rest = self.weight_ih.tensor_split([first.shape[-1]], -1)
        held = F.linear(first, of_first, self.bias_ih)

        def step(rest: Tensor, state: State) -> State:
            hidden, cell = state
            gates = held + F.linear(rest, of_rest) + F.linear(hidden, self.weight_hh, self.bias_hh)
            enter, keep, candidate, leave = gates.chunk(4, -1)
            cell = keep.sigmoid() * cell + enter.sigmoid() * candidate.tanh()
            return leave.sigmoid() * cell.tanh(), cell

        return step


class Draw(nn.Module):
    """In each of T steps: ``x^ = x - sigmoid(c)``, ``r = read(x, x^)``, ``z ~ q(encoder(r, h))``, ``h = decoder(z)``.

    Then ``c += write(h)``. Encoder and decoder are LSTMs, the prior of z is N(0, I) in each step, pixels are Bernoulli
    given the last canvas. With attention both read and write a patch through a grid of Gaussian filters, whose five
    numbers are linear in the decoder's state; without, they see the whole image. Canvas and states begin at learned
    biases.

    Args:
        steps: T.
        attention: whether there is any.
        hidden, latent: units of the LSTMs, and dimensions of z in a step.
        canvas: where the first canvas' bias begins, ``(784,)`` logits; None is zeros.
        read: filters along a side of what attention reads.

    Source: Gregor et al., DRAW: a recurrent neural network for image generation, arXiv 1502.04623.
    """

    def __init__(
        self,
        steps: int,
        attention: bool,
        hidden: int = HIDDEN,
        latent: int = LATENT,
        canvas: Tensor | None = None,
        read: int = READ,
    ):
        super().__init__()
        self.steps, self.attention, self.hidden, self.latent, self.read = steps, attention, hidden, latent, read
        self.encoder = Encoder((2 * read**2 if attention else 2 * N_PIXELS) + hidden, hidden)
        self.posterior = nn.Linear(hidden, 2 * latent)
        self.decoder = nn.LSTMCell(latent, hidden)
        self.write = nn.Linear(hidden, WRITE**2 if attention else N_PIXELS)
        if attention:
            span = min(READ_SPAN, READ_STRIDE * max(read - 1, 1))
            self.read_at = attention_of(hidden, read, span=span, log_gamma=math.log(READ_GAIN))
            # filters sum to 1: a patch spreads over stride^2 pixels a number, and gamma makes that up
            stride = WRITE_SPAN * (SIDE - 1) / max(WRITE - 1, 1)
            self.write_at = attention_of(hidden, WRITE, span=WRITE_SPAN, log_gamma=-2 * math.log(stride))
        self.canvas = nn.Parameter(torch.zeros(N_PIXELS) if canvas is None else canvas.clone())
        self.states = nn.Parameter(torch.zeros(4, hidden))

    def forward(self, pixels: Tensor, noise: Tensor) -> Scored:
        """Images ``(B, 784)`` and standard normals ``(T, B, latent)``, of each step its own."""
        result, _ = self.run(pixels, noise)
        return result

    def run(self, pixels: Tensor, noise: Tensor) -> tuple[Scored, Picture]:
        """:meth:`forward`, and how the canvas and the windows moved."""
        x = pixels.to(noise.dtype)
        canvas, (encoded, decoded) = self._begin(noise)
        encode = self.encoder if self.attention else self.encoder.holding(x)
        divergence = log_ratio = x.new_zeros(len(x))
        canvases: list[Tensor] = []
        reads: list[Tensor | None] = []
        writes: list[Tensor | None] = []
        for step_noise in noise:
            seen, at = self._read(x, x - canvas.sigmoid(), decoded[0])
            encoded = encode(torch.cat([seen, decoded[0]], -1), encoded)
            loc, log_scale = self.posterior(encoded[0]).chunk(2, -1)
            z = loc + log_scale.exp() * step_noise
            divergence = divergence + standard_normal_divergence(loc, log_scale)
            log_q = standard_normal_log_prob(step_noise) - log_scale.sum(-1)
            log_ratio = log_ratio + standard_normal_log_prob(z) - log_q
            decoded = self.decoder(z, decoded)
            canvas, to = self._write(canvas, decoded[0])
            canvases.append(canvas)
            reads.append(at)
            writes.append(to)
        drawn = Scored(bernoulli_log_prob(canvas, pixels), divergence, log_ratio)
        return drawn, _picture(canvases, reads, writes)

    def generate(self, noise: Tensor) -> Picture:
        """Images from standard normals ``(T, B, latent)`` as the z of the prior."""
        canvas, (_, decoded) = self._begin(noise)
        canvases: list[Tensor] = []
        writes: list[Tensor | None] = []
        for z in noise:
            decoded = self.decoder(z, decoded)
            canvas, to = self._write(canvas, decoded[0])
            canvases.append(canvas)
            writes.append(to)
        return _picture(canvases, [], writes)

    def _begin(self, noise: Tensor) -> tuple[Tensor, tuple[State, State]]:
        batch = noise.shape[1]
        first, second, third, fourth = (state.expand(batch, -1) for state in self.states)
        return self.canvas.expand(batch, -1), ((first, second), (third, fourth))

    def _read(self, x: Tensor, error: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None]:
        """Patches of both, or the error alone, as the image is the same in every step; and the attention's numbers."""
        if not self.attention:
            return error, None
        at = self.read_at(state)
        images = torch.stack([x, error], 1).unflatten(-1, (SIDE, SIDE))
        return draw_read(images, at, self.read).flatten(1), at

    def _write(self, canvas: Tensor, state: Tensor) -> tuple[Tensor, Tensor | None]:
        patch = self.write(state)
        if not self.attention:
            return canvas + patch, None
        at = self.write_at(state)
        return canvas + draw_write(patch.view(-1, 1, WRITE, WRITE), at, (SIDE, SIDE)).flatten(1), at


def _picture(canvases: list[Tensor], reads: list[Tensor | None], writes: list[Tensor | None]) -> Picture:
    return Picture(torch.stack(canvases), _stacked(reads), _stacked(writes))


def _stacked(parts: list[Tensor | None]) -> Tensor | None:
    given = [part for part in parts if part is not None]
    return torch.stack(given) if given else None


def attention_of(hidden: int, size: int, side: int = SIDE, span: float = 1.0, log_gamma: float = 0.0) -> nn.Linear:
    """A layer for the five numbers, whose filters begin as wide as half of the distance between them.

    With a variance of 1 they begin beside the strokes, the first of them in blank corners, and learn nothing for long.

    Args:
        hidden: features.
        size: filters along a side.
        side: of images.
        span: of the side, from the first filter to the last.
        log_gamma: added to what it begins at, as is the logarithm of ``span``.
    """
    layer = nn.Linear(hidden, 5)
    with torch.no_grad():
        layer.bias[2] = 2 * math.log(span * (side - 1) / max(size - 1, 1) / 2)
        layer.bias[3] += math.log(span)
        layer.bias[4] += log_gamma
    return layer


def window(attention: Tensor, size: int, image_side: int = SIDE) -> Tensor:
    """Where a grid lies: ``(left, top, side)`` of the square from its first centre to its last, in pixels from 0.

    With one filter the side is 0. ``attention (..., 5)`` as of ``draw_read``.
    """
    x, y, _, log_stride, _ = attention.unbind(-1)
    half = (image_side - 1) / max(size - 1, 1) * log_stride.exp() * (size - 1) / 2
    left, top = ((image_side + 1) / 2 * (center + 1) - 1 - half for center in (x, y))
    return torch.stack([left, top, 2 * half], -1)
