"""Encoders and decoders: the report's Tables 5 and 6, the same without batch norm, and perceptrons.

A decoder inside a potential must be one function all along a trajectory: ``decoder.hold(z_0)`` is the decoder with the
batch norms of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.func import functional_call

from hvae.data.mnist import N_PIXELS

NETWORKS = ("conv", "conv-plain", "mlp")
N_HIDDEN = 512


class BatchNorm(nn.Module):
    """``nn.BatchNorm`` of any dimension as an affine map of each channel, whose statistics are those of all ranks.

    In training the statistics are the batch's, gradients flow through them, and the running ones are updated; in
    evaluation they are the running ones.

    Args:
        channels: C.
        copies: how often each value will be repeated by upsampling, to be counted in the unbiased running variance.
    """

    momentum, eps = 0.1, 1e-5

    def __init__(self, channels: int, copies: int = 1):
        super().__init__()
        self.copies = copies
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def affine(self, x: Tensor) -> Tensor:
        """The map for a batch ``x (B, C, ...)``: scale and shift, ``(2, C)``."""
        mean, variance = self._moments(x) if self.training else (self.running_mean, self.running_var)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return torch.stack([scale, self.bias - mean * scale])

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dims = [0, *range(2, x.dim())]
        count = x.numel() // x.shape[1]
        if dist.is_initialized():
            total = all_reduce(torch.cat([x.sum(dims), x.new_full((1,), count)]))
            count = int(total[-1])
            mean = total[:-1] / count
            variance = all_reduce((x - _channels(mean, x)).square().sum(dims)) / count
        else:
            variance, mean = torch.var_mean(x, dims, correction=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (self.copies * count / max(self.copies * count - 1, 1)), self.momentum)
        return mean, variance

    def extra_repr(self) -> str:
        """Number of channels."""
        return str(len(self.weight))


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """Values ``(C,)`` in a shape that broadcasts to ``x (B, C, ...)``."""
    return values.view(-1, *[1] * (x.dim() - 2))


class UpConv2d(nn.Conv2d):
    """Nearest-neighbour upsampling to twice the size and then a 5 x 5 convolution, without the large image in between.

    The 25 pixels under an output pixel are copies of 3 x 3 inputs, and which ones depends on whether its row and its
    column are even or odd: one 3 x 3 convolution to four such phases, whose weights are sums of the 5 x 5 ones.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 5)
        phase, tap = torch.arange(2)[:, None], torch.arange(5)
        falls_on = (phase + tap - 2) // 2 + 1  # which of three input rows the tap meets
        self.register_buffer(
            "sums", (falls_on[:, None] == torch.arange(3)[:, None]).to(self.weight.dtype), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, out, 2 H, 2 W)``."""
        weight = torch.einsum("ajt,bku,oitu->oabijk", self.sums, self.sums, self.weight).flatten(0, 2)
        return F.pixel_shuffle(F.conv2d(x, weight, self.bias.repeat_interleave(4), padding=1), 2)


class Network(nn.Module):
    """Layers one after the other.

    Args:
        layers: modules; None is left out.
    """

    def __init__(self, *layers: nn.Module | None):
        super().__init__()
        self.layers = nn.ModuleList(layer for layer in layers if layer is not None)

    def forward(self, x: Tensor, norms: Sequence[Tensor] | None = None) -> Tensor:
        """The output; ``norms`` are the affine maps to use for the batch norms instead of those of this batch."""
        return self._run(x, norms)[0]

    def hold(self, x: Tensor) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
        """The network with the batch norms of the batch ``x``, as a function, and the tensors that it depends on.

        These are views, of which none depends on another, as batch norms do on weights and earlier batch norms.
        """
        norms = [layer for layer in self.layers if isinstance(layer, BatchNorm)]
        maps = self._run(x)[1] if norms and self.training else [norm.affine(x) for norm in norms]
        maps = [affine.view_as(affine) for affine in maps]
        weights = {name: parameter.view_as(parameter) for name, parameter in self.named_parameters()}
        return lambda x: functional_call(self, weights, (x, maps)), [*weights.values(), *maps]

    def _run(self, x: Tensor, norms: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """The output, and the affine map of every batch norm."""
        given, used = iter(norms or ()), []
        for layer in self.layers:
            if isinstance(layer, BatchNorm):
                used.append(layer.affine(x) if norms is None else next(given))
                scale, shift = used[-1]
                x = torch.addcmul(_channels(shift, x), _channels(scale, x), x)
            else:
                x = layer(x)
        return x, used


def encoder(kind: str, latent: int) -> Network:
    """Pixels ``(B, 784)`` to location and log scale, ``(B, 2 * latent)``."""
    if kind == "mlp":
        return Network(nn.Linear(N_PIXELS, N_HIDDEN), nn.Softplus(), nn.Linear(N_HIDDEN, 2 * latent))
    norm = _norm(kind)
    return Network(
        nn.Unflatten(1, (1, 28, 28)),
        *[norm(1), nn.Conv2d(1, 16, 5, 2, 2), nn.Softplus()],
        *[norm(16), nn.Conv2d(16, 32, 5, 2, 2), nn.Softplus()],
        *[norm(32), nn.Conv2d(32, 32, 5, 2, 2), norm(32)],
        *[nn.Flatten(), nn.Linear(512, 450), nn.Softplus()],
        *[norm(450), nn.Linear(450, 2 * latent)],
    )


def decoder(kind: str, latent: int) -> Network:
    """Latents ``(B, latent)`` to logits ``(B, 784)``.

    The tables put nearest-neighbour upsampling before the softplus and the batch norm; where every pixel is copied as
    often as any other, it is the same after them.
    """
    if kind == "mlp":
        return Network(nn.Linear(latent, N_HIDDEN), nn.Softplus(), nn.Linear(N_HIDDEN, N_PIXELS))
    norm = _norm(kind)
    return Network(
        *[norm(latent), nn.Linear(latent, 450), nn.Softplus()],
        *[norm(450), nn.Linear(450, 512), nn.Softplus(), nn.Unflatten(1, (32, 4, 4))],
        *[norm(32), nn.Conv2d(32, 32, 5, padding=2), nn.Softplus(), nn.Upsample(7)],
        *[norm(32), nn.Conv2d(32, 16, 5, padding=2), nn.Softplus()],
        *[norm(16, copies=4), UpConv2d(16, 16), nn.Softplus()],
        *[UpConv2d(16, 1), nn.Flatten()],
    )


def _norm(kind: str):
    """What makes the batch norms of a kind of network: nothing, for the plain one."""
    return BatchNorm if kind == "conv" else lambda channels, copies=1: None
