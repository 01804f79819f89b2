"""Reference: annealed Hamiltonian dynamics in plain PyTorch, beside their formula. Any dtype, any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hvae_kernels.ops.leapfrog.reference import gradient_of

Potential = Callable[[Tensor], Tensor]
#: ``score(z, rho, beta)``, of ``z``'s shape.
Score = Callable[[Tensor, Tensor, Tensor], Tensor]


def annealed_leapfrog(
    z: Tensor,
    noise: Tensor,
    potential: Potential,
    base_potential: Potential,
    step_size: Tensor,
    betas: Tensor,
    refreshment: Tensor,
    *,
    leapfrog_steps: int = 1,
    score: Score | None = None,
    gradient: str = "full",
) -> tuple[Tensor, Tensor]:
    """``(z_M, log_weight)``; bridge m has the potential ``(1 - beta_m) U_0 + beta_m U`` and L steps.

    In each ``rho' = eta rho + sqrt(1 - eta^2) xi_m``, leapfrog steps from ``(z, rho')`` to ``(z_m, rho_m)``, and
    ``log_weight += log N(rho_m) - log N(rho')``. With a score the reverse of the refreshment has the mean
    ``eta rho' + (1 - eta^2) s(z, rho', beta_m)``.
    """
    record = torch.is_grad_enabled() and gradient == "full"
    rho, log_weight = noise[0], z.new_zeros(z.shape[:-1])
    rest = 1 - refreshment.square()
    for xi, step, beta in zip(noise[1:], step_size.expand(len(betas), z.shape[-1]), betas, strict=True):

        def force(position: Tensor, beta: Tensor = beta) -> Tensor:
            base, model = (gradient_of(u, position, record)[0] for u in (base_potential, potential))
            return (1 - beta) * base + beta * model

        refreshed = refreshment * rho + rest.sqrt() * xi
        if score is not None:
            mean, shift = refreshment * refreshed, score(z, refreshed, beta)
            log_weight = log_weight + ((rho - mean) * shift - rest / 2 * shift.square()).sum(-1)
        rho = refreshed
        for _ in range(leapfrog_steps):
            rho = rho - step / 2 * force(z)
            z = z + step * rho
            rho = rho - step / 2 * force(z)
        log_weight = log_weight + (refreshed.square() - rho.square()).sum(-1) / 2
    return z, log_weight


def annealed_leapfrog_update(
    z: Tensor, rho: Tensor, base_grad: Tensor, grad: Tensor, noise: Tensor, kicks: Tensor, mixing: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``(z', rho', log_weight)``; ``kicks (5, d)``: two ends, two beginnings, drift; ``mixing (2,)``: eta, sigma."""
    shift, rho, log_weight = increment(rho, base_grad, grad, noise, kicks, mixing)
    return z + shift, rho, log_weight


def increment(
    rho: Tensor, base_grad: Tensor, grad: Tensor, noise: Tensor, kicks: Tensor, mixing: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``(z' - z, rho', log_weight)``: all that derivatives are about, as ``z`` only ever passes through."""
    return begin(*middle(rho, base_grad, grad, noise, kicks, mixing), base_grad, grad, kicks)


def middle(
    rho: Tensor, base_grad: Tensor, grad: Tensor, noise: Tensor, kicks: Tensor, mixing: Tensor
) -> tuple[Tensor, Tensor]:
    """Momenta at a point: where the step before it ends, and where the next one begins, refreshed."""
    ended = rho - kicks[0] * base_grad - kicks[1] * grad
    return ended, mixing[0] * ended + mixing[1] * noise


def begin(
    ended: Tensor, refreshed: Tensor, base_grad: Tensor, grad: Tensor, kicks: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`increment` from what :func:`middle` returns."""
    begun = refreshed - kicks[2] * base_grad - kicks[3] * grad
    return kicks[4] * begun, begun, ((refreshed - ended) * (refreshed + ended)).sum(-1) / 2


def tables(
    step_size: Tensor, betas: Tensor, rest: Tensor, eta: Tensor, sigma: Tensor, leapfrog_steps: int
) -> tuple[Tensor, Tensor]:
    """``kicks (M L + 1, 5, d)`` and ``mixing (M L + 1, 2)`` of the points of a trajectory; ``rest`` is ``1 - betas``.

    Point n ends a step and begins the next one with the same two gradients. Within a bridge, and at the end, momenta
    are as they are: ``eta = 1, sigma = 0``.
    """
    steps = step_size.expand(len(betas), step_size.shape[-1]) / 2
    half = torch.stack([steps * rest[:, None], steps * betas[:, None]], 1).repeat_interleave(leapfrog_steps, 0)
    drift = (2 * steps).repeat_interleave(leapfrog_steps, 0)[:, None]
    none = torch.zeros_like(half[:1])
    kicks = torch.cat([torch.cat([none, half]), torch.cat([half, none]), torch.cat([drift, none[:, :1]])], 1)
    refreshed = torch.zeros(len(half) + 1, dtype=torch.bool, device=eta.device)
    refreshed[:-1:leapfrog_steps] = True
    mixing = torch.stack([torch.where(refreshed, eta, 1), torch.where(refreshed, sigma, 0)], -1)
    return kicks, mixing


def noise_at(noise: Tensor, point: int, leapfrog_steps: int, n_points: int) -> Tensor:
    """That of a point; where momenta are not refreshed any, which does not count."""
    last = point == n_points - 1 or point % leapfrog_steps
    return noise[0 if last else 1 + point // leapfrog_steps]


def score_terms(
    z: Tensor, ended: Tensor, refreshed: Tensor, score: Score, beta: Tensor, eta: Tensor, rest: Tensor
) -> Tensor:
    """What a score adds to the logarithm of the weight; ``rest = 1 - eta^2``."""
    shift = score(z, refreshed, beta)
    return ((ended - eta * refreshed) * shift - rest / 2 * shift.square()).sum(-1)
