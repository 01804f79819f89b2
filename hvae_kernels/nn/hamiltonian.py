"""The Hamiltonian flow: tempered leapfrog with learned step sizes and temperatures, and Gaussian potentials."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from hvae_kernels import _checks, _live, functional
from hvae_kernels.ops.leapfrog import reference

TEMPERINGS = ("none", "quadratic", "quadratic-beta", "free")


class GaussianPotential(nn.Module):
    r"""The potential of a Gaussian, :math:`U(z) = \frac12 (z - \mu)^\top P (z - \mu)`, up to its constant.

    Args:
        precision: P: its positive diagonal ``(d,)``, a symmetric positive definite ``(d, d)``, or ``(R, 1, d)`` for R
            replicas. An ``nn.Parameter`` is registered as one, any other tensor as a buffer.
        loc: mu, ``(d,)``, or ``(R, 1, d)``.

    Raises:
        TypeError: not floating-point tensors of one dtype.
        ValueError: shapes or devices do not fit; a diagonal precision is not positive (looked at on the CPU only, where
            looking costs no device sync).

    Equivalent to:
        >>> import torch, hvae_kernels as hk
        >>> precision, loc, z = torch.rand(3) + 1, torch.randn(3), torch.randn(8, 3)
        >>> energies = hk.nn.GaussianPotential(precision, loc)(z)
        >>> torch.testing.assert_close(energies, (precision * (z - loc) ** 2).sum(-1) / 2)
    """

    precision: Tensor
    loc: Tensor

    def __init__(self, precision: Tensor, loc: Tensor) -> None:
        super().__init__()
        name = "GaussianPotential"
        _checks.same_kind(name, precision=precision, loc=loc)
        if loc.dim() != 1 and not (loc.dim() == 3 and loc.shape[1] == 1):
            raise _checks.value_error(name, "loc", "of shape (d,), or (R, 1, d) for replicas", loc)
        dense = loc.dim() == 1 and precision.dim() == 2
        if precision.shape != (loc.shape * 2 if dense else loc.shape):
            expected = "(d,) or (d, d)" if loc.dim() == 1 else "(R, 1, d)"
            raise _checks.value_error(
                name, "precision", f"of shape {expected} to go with loc {tuple(loc.shape)}", precision
            )
        if not dense and _checks.values_readable(precision) and not bool((precision > 0).all()):
            raise _checks.value_error(name, "precision", "positive", f"a smallest value of {precision.min().item()}")
        self._own("precision", precision)
        self._own("loc", loc)

    def _own(self, name: str, tensor: Tensor) -> None:
        if isinstance(tensor, nn.Parameter):
            self.register_parameter(name, tensor)
        else:
            self.register_buffer(name, tensor)

    @property
    def dense(self) -> bool:
        """Whether the precision is a full matrix."""
        return self.precision.dim() == 2

    def forward(self, z: Tensor) -> Tensor:
        """Energies ``(...)`` of positions ``z (..., d)``."""
        _checks.features("GaussianPotential", "z", z, self.loc.shape[-1])
        if z.device != self.loc.device:
            raise _checks.value_error("GaussianPotential", "z", f"on the device of loc, {self.loc.device}", z)
        centred = z - self.loc
        gradient = centred @ self.precision if self.dense else self.precision * centred
        return (gradient * centred).sum(-1) / 2

    def extra_repr(self) -> str:
        """Shape of the precision."""
        return f"precision={tuple(self.precision.shape)}"


def is_gaussian(potential: Callable[[Tensor], Tensor] | nn.Module) -> TypeGuard[GaussianPotential]:
    """Whether the energy is that of its precision and loc alone: no subclass's, no hook's."""
    return (
        isinstance(potential, GaussianPotential)
        and _live.runs_only(potential, GaussianPotential.forward)
        and not _live.hooked_everywhere()
    )


class HamiltonianFlow(nn.Module):
    r"""K tempered leapfrog steps with learned step sizes and temperatures.

    Step sizes are ``max_step_size * sigmoid(.)``, one a dimension. Tempering schedules, with temperatures ``T_k`` and
    ``alpha_k = T_k / T_{k-1}``, ``T_K = 1``:

    ================== =============================================================== ======================
    ``none``           ``T_k = 1``                                                     nothing learned
    ``quadratic``      ``T_k = 1 + (T_0 - 1)(1 - k^2/K^2)``                            ``log(T_0 - 1)``
    ``quadratic-beta`` ``T_k^2 = 1 + (T_0^2 - 1)(1 - k^2/K^2)``                        ``log(T_0 - 1)``
    ``free``           ``alpha_k = sigmoid(a_k)``, ``T_0 = prod_k 1/alpha_k``          every ``a_k``
    ================== =============================================================== ======================

    The flow's momentum starts at ``rho_0 = T_0 gamma`` with ``gamma ~ N(0, I)``. The map ``(z, gamma) -> (z_K, rho_K)``
    has Jacobian determinant 1 for every schedule, so the evidence bound is
    ``log p(x, z_K) + log N(rho_K) - log q0(z) - log N(gamma) + log_abs_det``.

    Args:
        features: d.
        n_steps: K; 0 makes the identity with ``T_0 = 1``.
        tempering: one of the four schedules.
        max_step_size: upper end of every step size.
        init_step_size: initial step size, in ``(0, max_step_size)``.
        init_temperature: initial ``T_0``, above 1 (not used by ``none``).
        replicas: R independent flows in one module, for ``z (R, B, d)`` and parameters with a leading R.
        memory: for potentials that are not Gaussian, as in :func:`functional.leapfrog`. By default ``"reversible"``
            where the parameters are known, that is for modules and with ``params``, and else ``"store"``. Replicas
            always store.
        gradient: ``"full"`` or ``"detached"``, for potentials that are not Gaussian, as in
            :func:`functional.leapfrog`.
        compile: compile the gradient of potentials that are not Gaussian.
        device: of the parameters and buffers.
        dtype: of the parameters.

    Raises:
        TypeError: an argument is nothing of its kind.
        ValueError: an argument is out of its range.

    References:
        Caterini, Doucet and Sejdinovic, Hamiltonian variational auto-encoder, 2018.

    Example:
        >>> import torch, hvae_kernels as hk
        >>> flow = hk.nn.HamiltonianFlow(3, n_steps=10)
        >>> potential = hk.nn.GaussianPotential(precision=torch.ones(3), loc=torch.zeros(3))
        >>> z_K, rho_K, log_abs_det = flow(torch.randn(8, 3), torch.randn(8, 3), potential)
        >>> log_abs_det.abs().max().item()
        0.0
    """

    _profile: Tensor

    def __init__(
        self,
        features: int,
        n_steps: int,
        tempering: str = "quadratic",
        max_step_size: float = 0.5,
        init_step_size: float = 0.005,
        init_temperature: float = 5.0,
        *,
        replicas: int | None = None,
        memory: str | None = None,
        gradient: str = "full",
        compile: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = "HamiltonianFlow"
        kind = _checks.factory(name, device, dtype)
        _checks.integer(name, "features", features, 1)
        if replicas is not None:
            _checks.integer(name, "replicas", replicas, 1)
        _checks.integer(name, "n_steps", n_steps, 0)
        _checks.one_of(name, "tempering", tempering, TEMPERINGS)
        if memory is not None:
            _checks.one_of(name, "memory", memory, ("reversible", "store"))
        _checks.one_of(name, "gradient", gradient, ("full", "detached"))
        _checks.flag(name, "compile", compile)
        _checks.finite_real(name, "max_step_size", max_step_size)
        _checks.finite_real(name, "init_step_size", init_step_size)
        _checks.finite_real(name, "init_temperature", init_temperature)
        if not 0 < init_step_size < max_step_size:
            raise _checks.value_error(
                name, "init_step_size", f"between 0 and max_step_size = {max_step_size}", init_step_size
            )
        if tempering != "none" and not init_temperature > 1:
            raise _checks.value_error(name, "init_temperature", "above 1", init_temperature)
        self.features, self.n_steps, self.tempering, self.replicas = features, n_steps, tempering, replicas
        self.max_step_size = max_step_size
        self.memory, self.gradient, self.compile_gradient = memory, gradient, compile
        lead = () if replicas is None else (replicas,)
        row = () if replicas is None else (replicas, 1)
        ratio = init_step_size / max_step_size
        self._initial = {"step_size_logit": math.log(ratio / (1 - ratio))}
        self.step_size_logit = nn.Parameter(torch.empty(*row, features, **kind))
        if tempering == "free":
            alpha = init_temperature ** (-1 / max(n_steps, 1))
            self._initial["tempering_logit"] = math.log(alpha / (1 - alpha))
            self.tempering_logit = nn.Parameter(torch.empty(*lead, n_steps, **kind))
        elif tempering != "none":
            self._initial["log_excess_temperature"] = math.log(init_temperature - 1)
            self.log_excess_temperature = nn.Parameter(torch.empty(*lead, 1, **kind))
        self.reset_parameters()
        self.register_buffer("_profile", self._exact_profile(), persistent=False)

    def reset_parameters(self) -> None:
        """The initial step sizes and temperatures."""
        for name, value in self._initial.items():
            nn.init.constant_(getattr(self, name), value)

    def _exact_profile(self) -> Tensor:
        """``1 - k^2/K^2`` for k = 0..K, rounded once, to the parameters' dtype."""
        k = torch.arange(self.n_steps + 1, dtype=torch.float64, device="cpu")
        return (1 - (k / max(self.n_steps, 1)) ** 2).to(self.step_size_logit)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HamiltonianFlow:
        """``.double()`` and the like: the profile is computed again, a cast would keep the old dtype's rounding."""
        super()._apply(fn, recurse)
        self._profile = self._exact_profile()
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Assigned parameters may be of another device or dtype."""
        super()._load_from_state_dict(*arguments)
        self._profile = self._exact_profile()

    @property
    def step_size(self) -> Tensor:
        """Step sizes ``(d,)``, or ``(R, 1, d)``, in ``(0, max_step_size)``."""
        return self.max_step_size * torch.sigmoid(self.step_size_logit)

    def temperatures(self) -> tuple[Tensor, Tensor]:
        """``(T_0, alpha)``: ``(1,)`` and ``(K,)``, or ``(R, 1)`` and ``(R, K)``."""
        if self.n_steps == 0 or self.tempering == "none":
            ones = self._profile.new_ones((*self.step_size_logit.shape[:-2], 1))
            return ones, ones.expand(*ones.shape[:-1], self.n_steps)
        if self.tempering == "free":
            alpha = torch.sigmoid(self.tempering_logit)
            return 1 / alpha.prod(-1, keepdim=True), alpha
        excess = torch.exp(self.log_excess_temperature)
        if self.tempering == "quadratic":
            temperature = 1 + excess * self._profile
        else:
            temperature = torch.sqrt(1 + excess * (excess + 2) * self._profile)
        return temperature[..., :1], temperature[..., 1:] / temperature[..., :-1]

    def forward(
        self,
        z: Tensor,
        gamma: Tensor,
        potential: Callable[[Tensor], Tensor] | nn.Module,
        *,
        params: Iterable[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Transport ``(z, gamma)`` along the dynamics of ``potential``.

        Args:
            z: positions ``(..., d)``; ``(R, B, d)`` with replicas.
            gamma: standard normal momenta of ``z``'s shape.
            potential: energies ``(...)`` of positions; a :class:`GaussianPotential` takes the fused path, any other
                module or function, and one with hooks or with another ``forward``, goes through
                :func:`functional.leapfrog`; of replicas one of each, ``(R, 1, d)``, or one for all.
            params: the tensors that need gradients through such a potential; by default a module's parameters.

        Returns:
            ``(z_K, rho_K, log_abs_det)``, the last ``(...)`` and zero.
        """
        _checks.features("HamiltonianFlow", "z", z, self.features)
        _checks.features("HamiltonianFlow", "gamma", gamma, self.features)
        if self.replicas is not None and (z.dim() != 3 or z.shape[0] != self.replicas):
            raise _checks.value_error("HamiltonianFlow", "z", f"of shape ({self.replicas}, B, {self.features})", z)
        if gamma.shape != z.shape:
            raise _checks.value_error("HamiltonianFlow", "gamma", f"of z's shape {tuple(z.shape)}", gamma)
        if gamma.device != z.device:
            raise _checks.value_error("HamiltonianFlow", "gamma", f"on the device of z, {z.device}", gamma)
        initial, alpha = self.temperatures()
        rho = gamma * (initial if self.replicas is None else initial[:, None])
        z_final, rho_final = self._transport(z, rho, potential, params, alpha)
        return z_final, rho_final, z.new_zeros(z.shape[:-1])

    def _transport(
        self,
        z: Tensor,
        rho: Tensor,
        potential: Callable[[Tensor], Tensor] | nn.Module,
        params: Iterable[Tensor] | None,
        alpha: Tensor,
    ) -> tuple[Tensor, Tensor]:
        if is_gaussian(potential) and (self.replicas is None or not potential.dense):
            op = functional.dense_gaussian_leapfrog if potential.dense else functional.gaussian_leapfrog
            precision, loc = potential.precision, potential.loc
            if self.replicas is not None and loc.shape == (self.features,):  # one potential for all replicas
                precision, loc = (x.expand(self.replicas, 1, -1) for x in (precision, loc))
            return op(z, rho, precision, loc, self.step_size, alpha)
        if self.replicas is not None:
            return reference.leapfrog(z, rho, potential, self.step_size, alpha, gradient=self.gradient)
        known = params is not None or isinstance(potential, nn.Module)
        return functional.leapfrog(
            z,
            rho,
            potential,
            self.step_size,
            alpha,
            params=params,
            memory=self.memory or ("reversible" if known else "store"),
            gradient=self.gradient,
            compile=self.compile_gradient,
        )

    def extra_repr(self) -> str:
        """Sizes and schedule."""
        replicas = "" if self.replicas is None else f", replicas={self.replicas}"
        return f"features={self.features}, n_steps={self.n_steps}, tempering={self.tempering!r}{replicas}"
