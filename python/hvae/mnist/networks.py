"""Encoders and decoders: the report's Tables 5 and 6, the same without batch norm, perceptrons, and maxout ones.

A decoder inside a potential must be one function all along a trajectory: ``decoder.hold(z_0)`` is the decoder with the
batch norms of a batch. Images are kept in channels-last order, in which small convolutions take about half the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvae.data.mnist import N_PIXELS
from hvae.mnist import distributed

NETWORKS = ("conv", "conv-plain", "mlp", "mlp-450", "maxout")
#: Units of the hidden layer of perceptrons.
N_HIDDEN = {"mlp": 512, "mlp-450": 450}
#: Of a maxout network: units of each of two hidden layers, and the linear maps of which a unit is the largest.
N_MAXOUT, WINDOW = 400, 4


class Held(nn.Module):
    """A layer in two parts: tensors made of its parameters, and the function of its input and of these."""

    def tensors(self, x: Tensor) -> tuple[Tensor, ...]:
        """What :meth:`run` takes beside a batch ``x``."""
        raise NotImplementedError

    def run(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The output."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The output, with the batch's own tensors."""
        return self.run(x, self.tensors(x))


class BatchNorm(Held):
    """``nn.BatchNorm`` of any dimension as an affine map of each channel, whose statistics are those of all ranks.

    In training the statistics are the batch's, gradients flow through them, and the running ones are updated; in
    evaluation they are the running ones.

    Args:
        channels: C.
        upsampled: height and width to which nearest-neighbour upsampling brings images afterwards: the statistics are
            those of the upsampled ones.
    """

    momentum, eps = 0.1, 1e-5
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, upsampled: int | None = None):
        super().__init__()
        self.upsampled = upsampled
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def tensors(self, x: Tensor) -> tuple[Tensor]:
        """The map for a batch ``x (B, C, ...)``: scale and shift, ``(2, C)``."""
        mean, variance = self._moments(x) if self.training else (self.running_mean, self.running_var)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (torch.stack([scale, self.bias - mean * scale]),)

    def run(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """``(B, C, ...)``."""
        ((scale, shift),) = tensors
        return torch.addcmul(_channels(shift, x), _channels(scale, x), x)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        copies = 1
        if self.upsampled and self.upsampled % x.shape[-1]:
            x = F.interpolate(x, self.upsampled)
        elif self.upsampled:
            copies = (self.upsampled // x.shape[-1]) ** 2
        dims = [0, *range(2, x.dim())]
        count = x.new_full((1,), x.numel() // x.shape[1])
        sums, count = distributed.total(torch.cat([x.sum(dims), count])).split([x.shape[1], 1])
        mean = sums / count
        variance = distributed.total((x - _channels(mean, x)).square().sum(dims)) / count  # torch.var_mean: 4x slower
        with torch.no_grad():
            seen = copies * count
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * seen / (seen - 1).clamp(min=1), self.momentum)
        return mean, variance

    def extra_repr(self) -> str:
        """Number of channels."""
        return str(len(self.weight))


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """Values ``(C,)`` in a shape that broadcasts to ``x (B, C, ...)``."""
    return values.view(-1, *[1] * (x.dim() - 2))


class Linear(Held, nn.Linear):
    """``nn.Linear``."""

    def tensors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias."""
        return self.weight, self.bias

    def run(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """``(B, out)``."""
        return F.linear(x, *tensors)


class SmallConv2d(Held, nn.Conv2d):
    """Nearest-neighbour upsampling and a 5 x 5 convolution, as the matrix that they are: faster for few pixels.

    Args:
        in_channels: C.
        out_channels: O.
        in_size: height and width of the input.
        out_size: those of the output, to which the input is upsampled.
    """

    bias: nn.Parameter
    sources: Tensor

    def __init__(self, in_channels: int, out_channels: int, in_size: int, out_size: int):
        super().__init__(in_channels, out_channels, 5)
        self.in_size, self.out_size = in_size, out_size
        meets = torch.arange(5)[:, None] + torch.arange(out_size) - 2  # the upsampled row that a tap of a row meets
        source = (meets * in_size).div(out_size, rounding_mode="floor")
        self.register_buffer("sources", _is_at(source, in_size).to(self.weight.dtype), persistent=False)

    def tensors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Matrix ``(out_size^2 O, in_size^2 C)`` and bias."""
        matrix = torch.einsum("octu,tri,uqj->rqoijc", self.weight, self.sources, self.sources)
        return matrix.flatten(3).flatten(0, 2), self.bias.repeat(self.out_size**2)

    def run(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """``(B, C, in_size, in_size)`` to ``(B, O, out_size, out_size)``."""
        rows = F.linear(x.movedim(1, -1).flatten(1), *tensors)
        return rows.view(len(x), self.out_size, self.out_size, self.out_channels).movedim(-1, 1)


class UpConv2d(Held, nn.Conv2d):
    """Nearest-neighbour upsampling to twice the size and then a 5 x 5 convolution, without the large image in between.

    The 25 pixels under an output pixel are copies of 3 x 3 inputs, and which ones depends on whether its row and its
    column are even or odd: one 3 x 3 convolution to four such phases, whose weights are sums of the 5 x 5 ones.
    """

    bias: nn.Parameter
    sums: Tensor

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 5)
        phase, tap = torch.arange(2)[:, None], torch.arange(5)
        meets = (phase + tap - 2) // 2 + 1  # which of three input rows the tap meets
        self.register_buffer("sums", _is_at(meets, 3).to(self.weight.dtype), persistent=False)

    def tensors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight ``(4 O, C, 3, 3)`` and bias of the convolution to all phases."""
        weight = torch.einsum("atj,buk,octu->abocjk", self.sums, self.sums, self.weight).flatten(0, 2)
        return weight.contiguous(memory_format=torch.channels_last), self.bias.repeat(4)

    def run(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """``(B, C, H, W)`` to ``(B, O, 2 H, 2 W)``."""
        weight, bias = tensors
        phases = F.conv2d(x, weight, bias, padding=1).movedim(1, -1).unflatten(-1, (2, 2, self.out_channels))
        return phases.transpose(2, 3).flatten(3, 4).flatten(1, 2).movedim(-1, 1)


class Maxout(nn.Module):
    """``max_w x_{wj}`` of ``(B, 4 units)``, the four maps of a unit apart; ``(B, units)``."""

    def forward(self, x: Tensor) -> Tensor:
        """The largest of each window."""
        return x.unflatten(-1, (WINDOW, -1)).amax(-2)


def _is_at(index: Tensor, size: int) -> Tensor:
    """One-hot ``(..., size)``, zero where the index is none."""
    return index[..., None] == torch.arange(size)


class Network(nn.Module):
    """Layers one after the other.

    Args:
        layers: modules; None is left out.
    """

    def __init__(self, *layers: nn.Module | None):
        super().__init__()
        self.layers = nn.ModuleList(layer for layer in layers if layer is not None)

    def forward(self, x: Tensor, held: Sequence[tuple[Tensor, ...]] | None = None) -> Tensor:
        """The output; ``held`` are the tensors to use for the :class:`Held` layers instead of those of this batch."""
        return self.run(x, held)[0]

    def hold(self, x: Tensor) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
        """The network with its tensors for the batch ``x``, as a function, and these tensors.

        These are views, of which none depends on another, as batch norms do on weights and earlier batch norms.
        """
        if self.training and any(isinstance(layer, BatchNorm) for layer in self.layers):
            held = self.run(x)[1]
        else:
            held = [layer.tensors(x) for layer in self.layers if isinstance(layer, Held)]
        held = [tuple(tensor.view_as(tensor) for tensor in tensors) for tensors in held]
        return lambda x: self(x, held), list(chain.from_iterable(held))

    def run(
        self, x: Tensor, held: Sequence[tuple[Tensor, ...]] | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """The output, and the tensors of every :class:`Held` layer."""
        given, used = iter(held or ()), []
        for layer in self.layers:
            if isinstance(layer, Held):
                used.append(layer.tensors(x) if held is None else next(given))
                x = layer.run(x, used[-1])
            else:
                x = layer(x)
        return x, used


def encoder(kind: str, outputs: int) -> Network:
    """Pixels ``(B, 784)`` to ``(B, outputs)``: a location and a log scale for each latent, in Table 5."""
    if width := N_HIDDEN.get(kind):
        return Network(nn.Linear(N_PIXELS, width), nn.Softplus(), nn.Linear(width, outputs))
    if kind == "maxout":
        return _maxout(nn.Linear, N_PIXELS, outputs)
    norm = _norm(kind)
    return Network(
        nn.Unflatten(1, (1, 28, 28)),
        *[norm(1), nn.Conv2d(1, 16, 5, 2, 2), nn.Softplus()],
        *[norm(16), nn.Conv2d(16, 32, 5, 2, 2), nn.Softplus()],
        *[norm(32), nn.Conv2d(32, 32, 5, 2, 2), norm(32)],
        *[nn.Flatten(), nn.Linear(512, 450), nn.Softplus()],
        *[norm(450), nn.Linear(450, outputs)],
    )


def decoder(kind: str, latent: int) -> Network:
    """Latents ``(B, latent)`` to logits ``(B, 784)``.

    The tables put nearest-neighbour upsampling before the softplus and the batch norm; where every pixel is copied as
    often as any other, it is the same after them.
    """
    if width := N_HIDDEN.get(kind):
        return Network(Linear(latent, width), nn.Softplus(), Linear(width, N_PIXELS))
    if kind == "maxout":
        return _maxout(Linear, latent, N_PIXELS)
    norm = _norm(kind)
    return Network(
        *[norm(latent), Linear(latent, 450), nn.Softplus()],
        *[norm(450), Linear(450, 512), nn.Softplus(), nn.Unflatten(1, (32, 4, 4))],
        *[norm(32), SmallConv2d(32, 32, 4, 4), nn.Softplus()],
        *[norm(32, upsampled=7), SmallConv2d(32, 16, 4, 7), nn.Softplus()],
        *[norm(16, upsampled=14), UpConv2d(16, 16), nn.Softplus()],
        *[UpConv2d(16, 1), nn.Flatten()],
    )


def _maxout(linear: type[nn.Linear], inputs: int, outputs: int) -> Network:
    """Two hidden layers, as in Rezende and Mohamed's deep latent Gaussian models."""
    return Network(
        *[linear(inputs, WINDOW * N_MAXOUT), Maxout()],
        *[linear(N_MAXOUT, WINDOW * N_MAXOUT), Maxout()],
        linear(N_MAXOUT, outputs),
    )


def widen(network: Network, bias: Tensor) -> None:
    """Give a network more outputs behind those that it has, which begin as the constants ``bias (n,)``."""
    last = network.layers[-1]
    assert isinstance(last, nn.Linear)
    wide = nn.Linear(last.in_features, last.out_features + len(bias), dtype=last.weight.dtype)
    with torch.no_grad():
        wide.weight.copy_(torch.cat([last.weight, last.weight.new_zeros(len(bias), last.in_features)]))
        wide.bias.copy_(torch.cat([last.bias, bias]))
    network.layers[-1] = wide


def _norm(kind: str):
    """What makes the batch norms of a kind of network: nothing, for the plain one."""
    return BatchNorm if kind == "conv" else lambda channels, upsampled=None: None
