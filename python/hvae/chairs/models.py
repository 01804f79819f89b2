"""A network that draws: from a chair's z, a view and a transformation to a picture and a mask, by up-convolutions."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hvae.chairs.data import N_TRANSFORM, N_VIEW, Condition, Target
from hvae.densities import standard_normal_divergence
from hvae_kernels.functional import bernoulli_log_prob

CHANNELS = (64, 48, 24)
BRANCH, JOINED = 128, 512
#: Slope of the rectifiers below zero.
SLOPE = 0.2
#: Of transformations: about where they lie, and how wide.
MIDDLE, WIDTH = (0.72, 0.72, 0.72, 0.8, 0.9), (0.25, 0.25, 0.25, 0.12, 0.09)
#: Standard deviation of a pixel's colour around what is drawn.
SCALE = 0.1


class Scored(NamedTuple):
    """What B pictures came to, ``(B,)`` each: ``log p`` of the image and of the mask, and the chair's divergence."""

    image: Tensor
    mask: Tensor
    divergence: Tensor


class Generator(nn.Module):
    """``z ~ q(z | class)``; picture ``N(mean(z, view, transformation), SCALE^2)``, mask Bernoulli.

    Class, view and transformation go through fully connected branches, which are joined; then three times the picture
    is made twice as large, with zeros between the pixels, and convolved with filters of 5 x 5: a transposed
    convolution. Weights begin so that the variance stays about the same from layer to layer.

    Args:
        n_chairs: classes.
        size: pixels along a side, a multiple of 8.
        latent: dimensions of z.
        gaussian: whether q is a Gaussian, with N(0, I) as its prior, or a point, the class's embedding.

    Source: Dosovitskiy et al., Learning to generate chairs with convolutional neural networks, arXiv 1411.5928; with a
    Gaussian a class in place of one-hot vectors.
    """

    middle: Tensor
    width: Tensor

    def __init__(self, n_chairs: int, size: int, latent: int, gaussian: bool):
        super().__init__()
        self.gaussian, self.size = gaussian, size
        self.loc = nn.Parameter(0.5 * torch.randn(n_chairs, latent))
        if gaussian:
            self.log_scale = nn.Parameter(torch.full((n_chairs, latent), -2.0))
        self.branches = nn.ModuleList(_branch(inputs) for inputs in (latent, N_VIEW, N_TRANSFORM))
        act = nn.LeakyReLU(SLOPE)
        first, second, third = CHANNELS
        self.joined = nn.Sequential(
            *(nn.Linear(3 * BRANCH, JOINED), act, nn.Linear(JOINED, first * (size // 8) ** 2), act),
            nn.Unflatten(1, (first, size // 8, size // 8)),
            *(_up(first, second), act, _up(second, third), act, _up(third, 4)),
        )
        for layer in self.modules():
            _begin(layer)
        self.register_buffer("middle", torch.tensor(MIDDLE), persistent=False)
        self.register_buffer("width", torch.tensor(WIDTH), persistent=False)

    def forward(self, condition: Condition, target: Target, noise: Tensor) -> Scored:
        """Of pictures, with standard normals ``(B, latent)``, one sample of q for each.

        Raises:
            ValueError: the pictures have another size than the network draws.
        """
        if target.image.shape[-2:] != (self.size, self.size):
            height, width = target.image.shape[-2:]
            raise ValueError(f"target: expected pictures of {self.size} x {self.size}, got {height} x {width}")
        loc = self.loc[condition.chair]
        if self.gaussian:
            log_scale = self.log_scale[condition.chair]
            z = loc + log_scale.exp() * noise
            divergence = standard_normal_divergence(loc, log_scale)
        else:
            z, divergence = loc, loc.new_zeros(len(loc))
        image, logits = self.draw(z, condition.view, condition.transform)
        squares = (target.image - image).square().flatten(1)
        constant = squares.shape[1] * math.log(SCALE * math.sqrt(2 * math.pi))
        log_image = -squares.sum(-1) / (2 * SCALE**2) - constant
        return Scored(log_image, bernoulli_log_prob(logits.flatten(1), target.mask.flatten(1)), divergence)

    def draw(self, z: Tensor, view: Tensor, transform: Tensor) -> tuple[Tensor, Tensor]:
        """Means ``(B, 3, S, S)`` of the image, and logits ``(B, 1, S, S)`` of the mask."""
        branches = zip(self.branches, (z, view, (transform - self.middle) / self.width), strict=True)
        drawn = self.joined(torch.cat([branch(given) for branch, given in branches], -1))
        return drawn[:, :3].sigmoid(), drawn[:, 3:]


def _branch(inputs: int) -> nn.Sequential:
    act = nn.LeakyReLU(SLOPE)
    return nn.Sequential(nn.Linear(inputs, BRANCH), act, nn.Linear(BRANCH, BRANCH), act)


def _begin(layer: nn.Module) -> None:
    """Weights of a variance of 2 over the number of inputs of an output (He et al., arXiv 1502.01852), biases 0."""
    if isinstance(layer, nn.Linear):
        nn.init.kaiming_normal_(layer.weight, SLOPE)
        nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.ConvTranspose2d):
        inputs = layer.in_channels * 5**2 / 2**2  # every other pixel is a zero, both ways
        nn.init.normal_(layer.weight, std=math.sqrt(2 / ((1 + SLOPE**2) * inputs)))
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)


def _up(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, 5, stride=2, padding=2, output_padding=1)
