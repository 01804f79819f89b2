"""The likelihood of points that a model draws, between two bounds, by annealed importance sampling both ways."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvae.densities import normal_log_prob
from hvae_kernels.functional import iwae_bound
from hvae_kernels.nn import AnnealedImportanceSampling

#: Chains a point, and leapfrog steps of a transition.
CHAINS, TRANSITION = 8, 5


@torch.no_grad()
def sandwich(
    latents: Tensor,
    gaussian: tuple[Tensor, Tensor],
    potential: Callable[[Tensor], Tensor],
    n_bridges: int,
    generators: tuple[torch.Generator, torch.Generator, torch.Generator],
) -> Tensor:
    """Lower and upper bounds of ``log p(x)`` of N points, ``(2, N)`` in float64, on the CPU.

    In expectation the bounds are on their sides; single ones need not be.

    Args:
        latents: those that the points were drawn from, ``(N, d)``: exact samples of their posteriors, where annealed
            importance sampling begins on its way back.
        gaussian: where it begins on its way forward, mean and log-scale ``(N, d)`` of ``q(z | x)``.
        potential: ``-log p(x, z)``, ``(..., N)`` of ``z (..., N, d)``; bridges lie between the Gaussian and it.
        n_bridges: more make the bounds tighter.
        generators: of the chains' beginnings, on the CPU; of the tuning and of the chains, on the latents' device.
    """
    loc, log_scale = gaussian
    starts, tuning, chains = generators

    def base(z: Tensor) -> Tensor:
        return -normal_log_prob(z, loc.expand_as(z), log_scale.expand_as(z))

    def begun() -> Tensor:
        noise = torch.randn(CHAINS, *latents.shape, generator=starts, dtype=loc.dtype)
        return loc + log_scale.exp() * noise.to(loc.device)

    sampler = AnnealedImportanceSampling(latents.shape[-1], n_bridges, TRANSITION, device=latents.device)
    sampler.tune(begun(), potential, base, generator=tuning)
    _, forward = sampler(begun(), potential, base, generator=chains)
    _, backward = sampler.reverse(latents.expand(CHAINS, -1, -1), potential, base, generator=chains)
    return torch.stack([iwae_bound(forward), -iwae_bound(-backward)]).cpu()
