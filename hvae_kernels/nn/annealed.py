"""Annealed Hamiltonian flow: leapfrog steps along bridges from a base density to a model's, with a weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from hvae_kernels import _checks, _library, functional
from hvae_kernels.nn.hamiltonian import GaussianPotential, is_gaussian
from hvae_kernels.ops.annealed_leapfrog import annealed_leapfrog, reference

NAME = "AnnealedHamiltonianFlow"
MEMORY = ("states", "store", "reversible")
Potential = Callable[[Tensor], Tensor] | nn.Module


class MomentumScore(nn.Module):
    r"""A small network for :math:`s(z, \rho, \beta)`, which begins at zero: then the flow is as without it.

    Args:
        features: d.
        hidden_features: units of its two hidden layers.

    Source: Geffner and Domke, Langevin diffusion variational inference, arXiv 2208.07743, section 3.
    """

    def __init__(self, features: int, hidden_features: int, *, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        kind = {"device": device, "dtype": dtype}
        self.network = nn.Sequential(
            nn.Linear(2 * features + 1, hidden_features, **kind),
            nn.SiLU(),
            nn.Linear(hidden_features, hidden_features, **kind),
            nn.SiLU(),
            nn.Linear(hidden_features, features, **kind),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Hidden layers anew, the last one zero."""
        *hidden, last = (layer for layer in self.network if isinstance(layer, nn.Linear))
        for layer in hidden:
            layer.reset_parameters()
        for parameter in last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, z: Tensor, rho: Tensor, beta: Tensor) -> Tensor:
        """Of positions and momenta ``(..., d)`` and a bridge's ``beta ()``."""
        return self.network(torch.cat([z, rho, beta.expand(*z.shape[:-1], 1)], -1))


class AnnealedHamiltonianFlow(nn.Module):
    r"""M bridges of L leapfrog steps from a base density to a model's, with partially refreshed momenta.

    The bridges' potentials are :math:`U_m = (1 - \beta_m) U_0 + \beta_m U` with learned
    :math:`0 < \beta_1 < \dots < \beta_M = 1`. From :math:`\rho_0 = \xi_0`, for m = 1..M,

    .. math::
        \rho'_m = \eta \rho_{m-1} + \sqrt{1 - \eta^2}\, \xi_m, \quad
        (z_m, \rho_m) = \text{leapfrog}_{U_m}(z_{m-1}, \rho'_m), \quad
        \log w \mathrel{+}= \log N(\rho_m) - \log N(\rho'_m).

    With ``potential = -log p(x, z)`` and ``base_potential = -log q0(z)`` the evidence bound is
    ``mean(-potential(z_M) + base_potential(z_0) + log_weight)``, and its terms' exponentials are unbiased for p(x).
    A flow takes M L + 1 evaluations of each potential's gradient, M + 1 with L = 1.

    Args:
        features: d.
        n_bridges: M; 0 makes the identity with weight 1.
        leapfrog_steps: L, in each bridge.
        refreshment: where eta begins, in [0, 1); 0 stays, momenta are then drawn anew in each bridge.
        max_step_size: upper end of every step size.
        init_step_size: where step sizes begin, in ``(0, max_step_size)``.
        memory: ``"states"`` keeps positions and momenta, and evaluates gradients again in the backward pass, with one
            graph at a time. ``"reversible"`` rebuilds the states, too, in double: errors grow like ``1 / eta^M``, and
            eta may not be 0. ``"store"`` keeps every graph: the fastest where they fit, and differentiable as often as
            the potentials are.
        betas: None for learned ones, or their values ``(M,)``, not decreasing, the last one 1.
        learn_refreshment: whether eta is learned.
        bridge_step_sizes: whether each bridge has step sizes of its own.
        score_features: None; or the hidden width of a network that shifts the mean of a refreshment's reverse, as of
            Langevin diffusion.
        gradient: ``"full"``; or ``"detached"``, which takes every gradient of a potential for a constant. Cheaper, and
            biased.
        compile: compile the gradient of ``potential``, for all evaluations but the first; its time does not depend on
            M.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        TypeError: an argument is nothing of its kind.
        ValueError: an argument is out of its range.

    References:
        Geffner and Domke, MCMC variational inference via uncorrected Hamiltonian annealing, 2021, and Langevin
        diffusion variational inference, 2022; Zhang, Hsu, Li, Finn and Grosse, Differentiable annealed importance
        sampling and the perils of gradient noise, 2021.

    Example:
        >>> import torch, hvae_kernels as hk
        >>> flow = hk.nn.AnnealedHamiltonianFlow(3, n_bridges=4)
        >>> potential = hk.nn.GaussianPotential(precision=torch.full((3,), 4.0), loc=torch.ones(3))
        >>> base = hk.nn.GaussianPotential(precision=torch.ones(3), loc=torch.zeros(3))
        >>> z_0, noise = torch.randn(8, 3), torch.randn(5, 8, 3)
        >>> z_M, log_weight = flow(z_0, noise, potential, base)
        >>> (-potential(z_M) + base(z_0) + log_weight).shape
        torch.Size([8])
    """

    given_betas: Tensor
    refreshment_logit: Tensor

    def __init__(
        self,
        features: int,
        n_bridges: int,
        leapfrog_steps: int = 1,
        refreshment: float = 0.9,
        max_step_size: float = 0.5,
        init_step_size: float = 0.005,
        memory: str = "states",
        *,
        betas: Tensor | None = None,
        learn_refreshment: bool = True,
        bridge_step_sizes: bool = False,
        score_features: int | None = None,
        gradient: str = "full",
        compile: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind = _checks.factory(NAME, device, dtype)
        _checks.integer(NAME, "features", features, 1)
        _checks.integer(NAME, "n_bridges", n_bridges, 0)
        _checks.integer(NAME, "leapfrog_steps", leapfrog_steps, 1)
        for name, value in (
            ("refreshment", refreshment),
            ("max_step_size", max_step_size),
            ("init_step_size", init_step_size),
        ):
            _checks.finite_real(NAME, name, value)
        if not 0 <= refreshment < 1:
            raise _checks.value_error(NAME, "refreshment", "in [0, 1)", refreshment)
        if not 0 < init_step_size < max_step_size:
            expected = f"between 0 and max_step_size = {max_step_size}"
            raise _checks.value_error(NAME, "init_step_size", expected, init_step_size)
        _checks.one_of(NAME, "memory", memory, MEMORY)
        if memory == "reversible" and not refreshment:
            expected = "'states' or 'store' where refreshment is 0, as rebuilding divides by it"
            raise _checks.value_error(NAME, "memory", expected, memory)
        _checks.one_of(NAME, "gradient", gradient, ("full", "detached"))
        for name, flag in (
            ("learn_refreshment", learn_refreshment),
            ("bridge_step_sizes", bridge_step_sizes),
            ("compile", compile),
        ):
            _checks.flag(NAME, name, flag)
        self.features, self.n_bridges, self.leapfrog_steps = features, n_bridges, leapfrog_steps
        self.max_step_size, self.memory, self.gradient, self.compile_gradient = max_step_size, memory, gradient, compile
        self.learn_refreshment = learn_refreshment and refreshment > 0
        self._initial = {"step_size_logit": _logit(init_step_size / max_step_size)}
        lead = (n_bridges,) if bridge_step_sizes else ()
        self.step_size_logit = nn.Parameter(torch.empty(*lead, features, **kind))
        self._initial["refreshment_logit"] = _logit(refreshment) if refreshment else -math.inf
        if self.learn_refreshment:
            self.refreshment_logit = nn.Parameter(torch.empty((), **kind))
        else:
            self.register_buffer("refreshment_logit", torch.empty((), **kind))
        self.beta_logits: nn.Parameter | None = None
        if betas is None:
            self._initial["beta_logits"] = 0.0
            self.beta_logits = nn.Parameter(torch.empty(n_bridges, **kind))
        else:
            self._given_betas = self._checked(betas)
            self.register_buffer("given_betas", torch.empty(n_bridges, **kind))
        self.score: MomentumScore | None = None
        if score_features is not None:
            _checks.integer(NAME, "score_features", score_features, 1)
            self.score = MomentumScore(features, score_features, **kind)
        self.reset_parameters()

    def _checked(self, betas: Tensor) -> list[float]:
        _checks.same_kind(NAME, betas=betas)
        expected = f"of shape ({self.n_bridges},) with values in [0, 1], not decreasing, the last one 1"
        if betas.shape != (self.n_bridges,) or betas.is_meta:
            raise _checks.value_error(NAME, "betas", expected, betas)
        values = betas.tolist()
        if values and not (all(0 <= x <= 1 for x in values) and sorted(values) == values and values[-1] == 1):
            raise _checks.value_error(NAME, "betas", expected, values)
        return values

    def reset_parameters(self) -> None:
        """The initial step sizes, equal increments of beta, and the initial refreshment."""
        with torch.no_grad():
            for name, value in self._initial.items():
                getattr(self, name).fill_(value)
            if self.beta_logits is None:
                self.given_betas.copy_(torch.tensor(self._given_betas, dtype=torch.float64, device="cpu"))

    @property
    def step_size(self) -> Tensor:
        """Step sizes ``(d,)``, or ``(M, d)``, in ``(0, max_step_size)``."""
        return self.max_step_size * torch.sigmoid(self.step_size_logit)

    def betas(self) -> tuple[Tensor, Tensor]:
        """``(beta, 1 - beta)``, ``(M,)`` each; the last pair is (1, 0)."""
        if self.beta_logits is None:
            return self.given_betas, 1 - self.given_betas
        increments = self.beta_logits.softmax(-1)
        one, none = increments.new_ones(1), increments.new_zeros(1)
        rest = increments.flip(-1)[:-1].cumsum(-1).flip(-1)
        beta = increments[:-1].cumsum(-1)
        return (torch.cat([beta, one]), torch.cat([rest, none])) if self.n_bridges else (beta, rest)

    def refreshment(self) -> tuple[Tensor, Tensor]:
        """``(eta, sqrt(1 - eta^2))``, ``()`` each."""
        eta, rest = torch.sigmoid(self.refreshment_logit), torch.sigmoid(-self.refreshment_logit)
        return eta, torch.sqrt(rest * (1 + eta))

    def forward(
        self,
        z: Tensor,
        noise: Tensor,
        potential: Potential,
        base_potential: Potential,
        *,
        params: Iterable[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Carry ``z`` from the base density to the model's.

        Args:
            z: positions ``(..., d)``, drawn from the base density.
            noise: standard normals ``(M + 1, ..., d)``: the first momentum, and the refreshments.
            potential: ``-log p(x, z)``, energies ``(...)`` of positions. Two :class:`GaussianPotential` of diagonal
                precision take the fused path, without a score and with the full gradient.
            base_potential: ``-log q0(z)``.
            params: the tensors that need gradients through a potential, where the memory is not ``"store"``; by default
                they are looked for in modules and closures, and the leaves of the potentials' graphs.

        Returns:
            ``(z_M, log_weight)``, ``(..., d)`` and ``(...)``.

        Raises:
            TypeError: an argument is nothing of its kind.
            ValueError: shapes or devices do not fit; a potential does not depend on ``z``, its energies do not fit, or
                its gradient cannot be evaluated again, as :func:`functional.leapfrog` says; of ``params`` one is made
                from another.
            RuntimeError: in the backward pass, as :func:`functional.leapfrog` says, of the score's tensors too; or,
                looked at on the CPU, ``memory="reversible"`` did not come back to the first momenta.
        """
        _checks.features(NAME, "z", z, self.features)
        _checks.features(NAME, "noise", noise, self.features)
        if noise.shape != (self.n_bridges + 1, *z.shape):
            expected = f"of shape {(self.n_bridges + 1, *z.shape)}: M + 1 of z's"
            raise _checks.value_error(NAME, "noise", expected, noise)
        if noise.device != z.device:
            raise _checks.value_error(NAME, "noise", f"on the device of z, {z.device}", noise)
        for argument, function in (("potential", potential), ("base_potential", base_potential)):
            if not callable(function):
                raise _checks.type_error(NAME, argument, "a function or a torch.nn.Module", function)
        if not self.n_bridges:
            return z.clone(), z.new_zeros(z.shape[:-1])
        plain = self.score is None and self.gradient == "full"
        if plain and _is_diagonal(potential) and _is_diagonal(base_potential):
            return self._between_gaussians(z, noise, potential, base_potential)
        betas, rest = self.betas()
        kicks, mixing = reference.tables(self.step_size, betas, rest, *self.refreshment(), self.leapfrog_steps)
        return annealed_leapfrog(
            z, noise, potential, base_potential, kicks, mixing, betas, leapfrog_steps=self.leapfrog_steps,
            score=self.score, params=params, memory=self.memory, gradient=self.gradient,
            compile=self.compile_gradient,
        )  # fmt: skip

    def _between_gaussians(
        self, z: Tensor, noise: Tensor, potential: GaussianPotential, base_potential: GaussianPotential
    ) -> tuple[Tensor, Tensor]:
        """Bridges are Gaussian, too: all leapfrog steps of one are a single pass."""
        self._check_gaussians(z, noise, potential=potential, base_potential=base_potential)
        betas, rest = self.betas()
        eta, sigma = self.refreshment()
        ours, base = (u.precision for u in (potential, base_potential))
        precisions = rest[:, None] * base + betas[:, None] * ours
        pulls = rest[:, None] * (base * base_potential.loc) + betas[:, None] * (ours * potential.loc)
        steps, tempering = self.step_size.expand_as(precisions), z.new_ones(self.leapfrog_steps)
        rho, log_weight = noise[0], z.new_zeros(z.shape[:-1])
        for xi, precision, pull, step in zip(noise[1:], precisions, pulls, steps, strict=True):
            refreshed = eta * rho + sigma * xi
            z, rho = functional.gaussian_leapfrog(z, refreshed, precision, pull / precision, step, tempering)
            log_weight = log_weight + ((refreshed - rho) * (refreshed + rho)).sum(-1) / 2
        return z, log_weight

    def _check_gaussians(self, z: Tensor, noise: Tensor, **potentials: GaussianPotential) -> None:
        """Sizes would broadcast, and what is of another kind would be found in the products of both."""
        tensors = {"z": z, "noise": noise, "step_size": self.step_size_logit}
        tensors |= {argument: potential.loc for argument, potential in potentials.items()}
        if _library.autocasts(z):
            tensors = {name: x.float() if x.dtype in _checks.HALF_PRECISION else x for name, x in tensors.items()}
        _checks.same_kind(NAME, **tensors)
        for argument in potentials:
            if tensors[argument].shape != (self.features,):
                expected = f"a GaussianPotential with loc of shape ({self.features},)"
                raise _checks.value_error(NAME, argument, expected, tensors[argument])

    def extra_repr(self) -> str:
        """Sizes and memory."""
        return (
            f"features={self.features}, n_bridges={self.n_bridges}, leapfrog_steps={self.leapfrog_steps}, "
            f"memory={self.memory!r}"
        )


def _is_diagonal(potential: Potential) -> TypeGuard[GaussianPotential]:
    return is_gaussian(potential) and potential.loc.dim() == 1 and not potential.dense


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
