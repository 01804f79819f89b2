"""Annealed importance sampling, both ways: a lower and an upper bound of a log-evidence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hvae_kernels import _checks
from hvae_kernels.ops.annealed_leapfrog.reference import gradient_of

NAME = "AnnealedImportanceSampling"
Potential = Callable[[Tensor], Tensor] | nn.Module

#: Where the wished part of proposals is accepted step sizes stay: above it they grow, below they shrink.
TARGET_ACCEPTANCE = 0.65
GROWTH = 1.05


class _Point(NamedTuple):
    """Positions, and energies and gradients of the base potential and the model's there."""

    z: Tensor
    base_energy: Tensor
    energy: Tensor
    base_grad: Tensor
    grad: Tensor

    def energy_at(self, beta: Tensor) -> Tensor:
        """Of the bridge."""
        return (1 - beta) * self.base_energy + beta * self.energy

    def grad_at(self, beta: Tensor) -> Tensor:
        """Of the bridge's energy."""
        return (1 - beta) * self.base_grad + beta * self.grad

    def where(self, accepted: Tensor, other: _Point) -> _Point:
        """This one's rows where accepted, else the other's."""
        rows = accepted[..., None]
        kept = (accepted if x.dim() == accepted.dim() else rows for x in self)
        return _Point(*(torch.where(k, x, y) for k, x, y in zip(kept, self, other, strict=True)))


class AnnealedImportanceSampling(nn.Module):
    r"""Chains of Hamiltonian Monte Carlo along M bridges between a base density and a model's, and their weight.

    Bridge m has the potential :math:`U_m = (1 - \beta_m) U_0 + \beta_m U`. A chain from the base density meets, for
    m = 1..M,

    .. math::
        \log w \mathrel{+}= (\beta_m - \beta_{m-1}) (U_0 - U)(z_{m-1}), \qquad z_m \sim T_m(z_{m-1}),

    where T_m leaves the bridge's density as it is: L leapfrog steps with a fresh momentum, accepted or refused. With
    the base density normalised the expectation of w is the evidence, and that of log w is below its logarithm.
    :meth:`reverse` starts from an exact sample of the posterior, as there is for data simulated from the model, and
    goes back: the expectation of 1/w is then the evidence's inverse, and that of log w above the evidence's logarithm.
    Between the two lies the truth; they meet as M grows.

    Nothing here is differentiable, and random numbers are drawn from ``generator``.

    Args:
        features: d.
        n_bridges: M.
        leapfrog_steps: L, of a transition.
        init_step_size: where step sizes begin, one a bridge; :meth:`tune` finds better ones.
        device: of the buffers.
        dtype: of the buffers.

    Raises:
        TypeError: an argument is nothing of its kind.
        ValueError: an argument is out of its range.

    References:
        Neal, Annealed importance sampling, 2001; Grosse, Ghahramani and Adams, Sandwiching the marginal likelihood
        using bidirectional Monte Carlo, 2015; Wu, Burda, Salakhutdinov and Grosse, On the quantitative analysis of
        decoder-based generative models, 2017, whose schedule of beta this is.

    Example:
        >>> import math, torch, hvae_kernels as hk
        >>> _ = torch.manual_seed(0)
        >>> base = lambda z: z.square().sum(-1) / 2 + math.log(2 * math.pi)  # N(0, I) in two dimensions
        >>> potential = lambda z: 2 * (z - 1).square().sum(-1)  # the evidence is pi / 2
        >>> sampler = hk.nn.AnnealedImportanceSampling(2, n_bridges=50, leapfrog_steps=3, init_step_size=0.3)
        >>> _, log_weight = sampler(torch.randn(16, 100, 2), potential, base)
        >>> lower = hk.functional.iwae_bound(log_weight, dim=0).mean()
        >>> _, log_weight = sampler.reverse(1 + torch.randn(16, 100, 2) / 2, potential, base)
        >>> upper = -hk.functional.iwae_bound(-log_weight, dim=0).mean()
        >>> bool(lower - 0.01 < math.log(math.pi / 2) < upper + 0.01), bool(upper - lower < 0.1)
        (True, True)
    """

    betas: Tensor
    step_size: Tensor

    def __init__(
        self,
        features: int,
        n_bridges: int,
        leapfrog_steps: int = 10,
        init_step_size: float = 0.1,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind = _checks.factory(NAME, device, dtype)
        _checks.integer(NAME, "features", features, 1)
        _checks.integer(NAME, "n_bridges", n_bridges, 1)
        _checks.integer(NAME, "leapfrog_steps", leapfrog_steps, 1)
        _checks.finite_real(NAME, "init_step_size", init_step_size)
        if not init_step_size > 0:
            raise _checks.value_error(NAME, "init_step_size", "positive", init_step_size)
        self.features, self.n_bridges, self.leapfrog_steps = features, n_bridges, leapfrog_steps
        self._init_step_size = init_step_size
        self.register_buffer("betas", torch.empty(n_bridges + 1, **kind))
        self.register_buffer("step_size", torch.empty(n_bridges, **kind))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The schedule, slow at both ends, and the first step sizes."""
        ramp = torch.linspace(-4, 4, self.n_bridges + 1, dtype=torch.float64, device="cpu").sigmoid()
        self.betas.copy_((ramp - ramp[0]) / (ramp[-1] - ramp[0]))
        self.step_size.fill_(self._init_step_size)

    @torch.no_grad()
    def forward(
        self, z: Tensor, potential: Potential, base_potential: Potential, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """From the base density to the model's.

        Args:
            z: exact samples of the base density ``(..., d)``, a chain each.
            potential: ``-log p(x, z)``, energies ``(...)`` of positions.
            base_potential: minus the base density's logarithm, with its constant.
            generator: of momenta and decisions; None is torch's default.

        Returns:
            ``(z_M, log_weight)``, ``(..., d)`` and, in double, ``(...)``.
        """
        point, _, log_weight = self._run(z, potential, base_potential, generator)
        return point.z, log_weight

    @torch.no_grad()
    def reverse(
        self, z: Tensor, potential: Potential, base_potential: Potential, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """From exact samples ``z (..., d)`` of the posterior back to the base density: ``(z_0, log_weight)``.

        Arguments and shapes as of :meth:`forward`.
        """
        point, _, log_weight = self._run(z, potential, base_potential, generator, backwards=True)
        return point.z, log_weight

    @torch.no_grad()
    def tune(
        self, z: Tensor, potential: Potential, base_potential: Potential, *, generator: torch.Generator | None = None
    ) -> float:
        """Choose step sizes on chains of their own, and return how often these accepted.

        Each bridge's begins at the one before it, and changes by 5 % as fewer or more than 65 % of the proposals are
        accepted. Bounds hold for any step sizes that are fixed before: do not use these chains' weights.
        """
        tuned: list[Tensor] = []
        _, acceptance, _ = self._run(z, potential, base_potential, generator, tuned=tuned)
        self.step_size.copy_(torch.stack(tuned))
        return acceptance

    def _run(
        self,
        z: Tensor,
        potential: Potential,
        base_potential: Potential,
        generator: torch.Generator | None,
        *,
        backwards: bool = False,
        tuned: list[Tensor] | None = None,
    ) -> tuple[_Point, float, Tensor]:
        """The end, the acceptance and the weight; ``tuned`` collects better step sizes, which are used."""
        self._check(z, potential, base_potential, generator)
        if torch.is_inference_mode_enabled():  # where nothing is recorded, not even for a potential's own gradient
            with torch.inference_mode(False), torch.no_grad():
                arguments = z.clone(), potential, base_potential, generator
                return self._run(*arguments, backwards=backwards, tuned=tuned)
        potentials = base_potential, potential
        bridges = range(self.n_bridges)[:: -1 if backwards else 1]
        point = _point(z.detach(), *potentials)
        last, log_weight, total = 0.0, torch.zeros(z.shape[:-1], dtype=torch.float64, device=z.device), 0.0
        increments, betas = self.betas.double().diff(), self.betas.to(z)
        for bridge in bridges:
            if not backwards:
                log_weight += increments[bridge] * (point.base_energy - point.energy)
            step = self.step_size[bridge]
            if tuned is not None:
                if tuned:
                    step = tuned[-1] * (GROWTH if last > TARGET_ACCEPTANCE else 1 / GROWTH)
                tuned.append(step)
            point, last = self._transition(point, betas[bridge + 1], step.to(z), potentials, generator)
            total += last
            if backwards:
                log_weight += increments[bridge] * (point.base_energy - point.energy)
        return point, total / len(bridges), log_weight

    def _transition(
        self,
        start: _Point,
        beta: Tensor,
        step: Tensor,
        potentials: tuple[Potential, Potential],
        generator: torch.Generator | None,
    ) -> tuple[_Point, float]:
        """Leapfrog steps with a fresh momentum, taken or not, and the part of them that was."""
        kind: Any = {"generator": generator, "dtype": start.z.dtype, "device": start.z.device}
        rho = torch.randn(start.z.shape, **kind)
        before = start.energy_at(beta).double() + rho.double().square().sum(-1) / 2
        point = start
        for _ in range(self.leapfrog_steps):
            rho = rho - step / 2 * point.grad_at(beta)
            point = _point(point.z + step * rho, *potentials)
            rho = rho - step / 2 * point.grad_at(beta)
        after = point.energy_at(beta).double() + rho.double().square().sum(-1) / 2
        chance = (before - after).exp()  # NaN, of an energy that is not finite, is below any number drawn
        accepted = torch.rand(start.z.shape[:-1], **kind) < chance
        return point.where(accepted, start), accepted.double().mean().item()

    def _check(
        self, z: Tensor, potential: Potential, base_potential: Potential, generator: torch.Generator | None
    ) -> None:
        _checks.features(NAME, "z", z, self.features)
        _checks.same_kind(NAME, z=z)
        for argument, function in (("potential", potential), ("base_potential", base_potential)):
            if not callable(function):
                raise _checks.type_error(NAME, argument, "a function or a torch.nn.Module", function)
        _checks.generator(NAME, generator)
        if z.device != self.betas.device:
            raise _checks.value_error(NAME, "z", f"on the device of the module, {self.betas.device}", z)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"features={self.features}, n_bridges={self.n_bridges}, leapfrog_steps={self.leapfrog_steps}"


def _point(z: Tensor, base_potential: Potential, potential: Potential) -> _Point:
    base_grad, base_energy = gradient_of(base_potential, z, False, NAME, "base_potential")
    grad, energy = gradient_of(potential, z, False, NAME, "potential")
    for argument, found in (("base_potential", base_energy), ("potential", energy)):
        if found.shape != z.shape[:-1]:
            expected = f"a function with energies {tuple(z.shape[:-1])} of positions {tuple(z.shape)}"
            raise _checks.value_error(NAME, argument, expected, found)
    return _Point(z, base_energy.detach(), energy.detach(), base_grad, grad)
