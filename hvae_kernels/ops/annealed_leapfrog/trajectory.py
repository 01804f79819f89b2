"""The trajectory through any pair of potentials whose graphs are not kept: the backward pass makes each anew.

It meets the very positions of the forward pass, kept (``memory="states"``), or rebuilt from the end (``"reversible"``,
in double).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hvae_kernels import _checks
from hvae_kernels.ops.annealed_leapfrog import autograd, reference
from hvae_kernels.ops.annealed_leapfrog.reference import Score
from hvae_kernels.ops.leapfrog.autograd import OnceDifferentiable, products, requiring
from hvae_kernels.ops.leapfrog.field import leaves_above
from hvae_kernels.ops.leapfrog.state import Snapshot, tensors_held

FLOW = "AnnealedHamiltonianFlow"
#: The base potential's and the model's gradient at a position.
Gradients = tuple[Tensor, Tensor]


class HeldScore:
    """A score that computes in its own dtype, whatever the states are in, and backwards as it did forwards."""

    def __init__(self, score: Score | nn.Module, dtype: torch.dtype) -> None:
        self.score, self.dtype = score, dtype
        #: whether evaluations share the graph of a tensor made before them
        self.shared = False
        self.snapshot: Snapshot

    def watch(self) -> list[Tensor]:
        """The tensors that it needs gradients of; from here on what it reads is remembered."""
        modules = list(self.score.modules()) if isinstance(self.score, nn.Module) else []
        self.snapshot = Snapshot(self.score, modules)
        return [x for x in tensors_held(self.score, modules) if x.requires_grad]

    def leaves(self) -> list[Tensor]:
        """What these are made from."""
        watched = self.watch()
        self.shared = any(x.grad_fn for x in watched)
        return leaves_above(watched)

    def __call__(self, z: Tensor, rho: Tensor, beta: Tensor) -> Tensor:
        """In the dtype of ``z``, also where autocast makes it half-precision: it is going to be squared."""
        return self.score(*(x.to(self.dtype) for x in (z, rho, beta))).to(z.dtype)


@dataclass(frozen=True)
class Run:
    """What a trajectory is besides tensors.

    Attributes:
        fields: a ``Field`` of the base potential and of the model's, or what stands in for one.
        implementation: of the updates.
        leapfrog_steps: in a bridge.
        score: None, or what shifts the reverse of a refreshment.
        full: whether second-order terms count.
        reversible: whether states are rebuilt.
    """

    fields: tuple[Any, Any]
    implementation: str
    leapfrog_steps: int
    score: HeldScore | None
    full: bool
    reversible: bool = False

    def gradients(self, z: Tensor, record: bool = False) -> Gradients:
        """At ``z``."""
        base, model = self.fields
        return base(z, record), model(z, record)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Running statistics stay as the first evaluation left them."""
        with self.fields[0].held(), self.fields[1].held():
            yield

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """What the forward pass ran under."""
        score = self.score.snapshot.restored(FLOW, "score") if self.score else contextlib.nullcontext()
        with self.fields[0].again(), self.fields[1].again(), score:
            yield

    def step(
        self,
        point: int,
        state: tuple[Tensor, Tensor],
        gradients: Gradients,
        noise: Tensor,
        kicks: Tensor,
        mixing: Tensor,
        betas: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From one point to the next: ``(z', rho', part of the log-weight)``. All but the state are of this point.

        ``betas`` are those of all bridges.
        """
        z, rho = state
        if self.score is None or point % self.leapfrog_steps or point == len(betas) * self.leapfrog_steps:
            if self.implementation == "reference":
                return reference.annealed_leapfrog_update(z, rho, *gradients, noise, kicks, mixing)
            return autograd.call(self.implementation, z, rho, *gradients, noise, kicks, mixing)
        middle = reference.middle(rho, *gradients, noise, kicks, mixing)
        shift, begun, part = reference.begin(*middle, *gradients, kicks)
        eta, sigma = mixing.unbind()
        beta = betas[point // self.leapfrog_steps]
        return z + shift, begun, part + reference.score_terms(z, *middle, self.score, beta, eta, sigma.square())


def trajectory(
    run: Run,
    gradients: Gradients,
    z: Tensor,
    noise: Tensor,
    kicks: Tensor,
    mixing: Tensor,
    betas: Tensor,
    seen: list | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(z_M, rho_M, sum of the parts)`` from the gradients at ``z``; ``seen`` collects what is kept."""
    state, total = (z, noise[0]), z.new_zeros(z.shape[:-1])
    for point in range(len(kicks)):
        if point:
            gradients = run.gradients(state[0], run.full and torch.is_grad_enabled())
        if seen is not None:
            seen[0].append(state)
            seen[1] = gradients
        xi = reference.noise_at(noise, point, run.leapfrog_steps, len(kicks))
        *pair, part = run.step(point, state, gradients, xi, kicks[point], mixing[point], betas)
        state, total = (pair[0], pair[1]), total + part
    return *state, total


class RecomputedTrajectory(torch.autograd.Function):
    """``(z, noise, kicks, mixing, betas, *params) -> (z_M, rho_M, sum of the parts)``, from the gradients at ``z``."""

    @staticmethod
    def forward(ctx, run, gradients: Gradients, z, noise, kicks, mixing, betas, *params):
        seen: list[Any] = [[], gradients]
        with run.held():
            z_end, rho_end, total = trajectory(run, gradients, z, noise, kicks, mixing, betas, seen)
        states, last = seen
        for field, gradient in zip(run.fields, last, strict=True):
            field.settle(gradient, noise[0])
        if run.score:
            run.score.snapshot.settle(FLOW, "score")
        kept = [(z_end, rho_end)] if run.reversible else states
        ctx.run, ctx.params, ctx.n_kept = run, params, len(kept)
        ctx.save_for_backward(noise, kicks, mixing, betas, *(x for state in kept for x in state), *params)
        return z_end, rho_end, total

    @staticmethod
    def backward(ctx, *cotangents):
        inputs, kept = ctx.saved_tensors[:4], ctx.saved_tensors[4 : 4 + 2 * ctx.n_kept]
        with ctx.run.again(), torch.no_grad(), requiring(ctx.params):
            # what is made in inference mode is no part of a graph
            cotangents = tuple(x.clone() if x.is_inference() else x for x in cotangents)
            sweep = _Sweep(ctx.run, *inputs, ctx.params, ctx.needs_input_grad[3])
            gradients = sweep.back(list(zip(kept[::2], kept[1::2], strict=True)), *(x.detach() for x in cotangents))
        if torch.is_grad_enabled():
            name = f"{FLOW}: memory='states' or 'reversible'"
            gradients = OnceDifferentiable.apply(name, len(gradients), *gradients, *ctx.saved_tensors, *cotangents)
        return (None, None, *gradients)


class _Sweep:
    """The backward pass, point by point from the end: each step again, with its graph, and back through it."""

    def __init__(
        self,
        run: Run,
        noise: Tensor,
        kicks: Tensor,
        mixing: Tensor,
        betas: Tensor,
        params: Sequence[Tensor],
        needs_noise: bool,
    ) -> None:
        self.run, self.noise, self.kicks, self.mixing, self.betas = run, noise, kicks, mixing, betas
        self.params, self.d_noise = params, torch.zeros_like(noise) if needs_noise else None
        self.d_kicks, self.d_mixing, self.d_betas = map(torch.zeros_like, (kicks, mixing, betas))
        self.d_params = [torch.zeros_like(x) for x in params]

    def back(
        self, states: list[tuple[Tensor, Tensor]], d_z: Tensor, d_rho: Tensor, d_total: Tensor
    ) -> list[Tensor | None]:
        """Gradients of ``z, noise, kicks, mixing, betas, *params``; ``states`` of all points, or the end alone."""
        end = states[-1][1]
        after = states.pop() if self.run.reversible else None
        for point in reversed(range(len(self.kicks))):
            z = states[-1][0].detach() if after is None else after[0] - self.kicks[point, 4] * after[1]
            z.requires_grad_()
            gradients = self.run.gradients(z, self.run.full)
            if after is None:
                rho = states.pop()[1]
            else:
                rho = self._rewound(point, after[1], *(g.detach() for g in gradients))
                after = z.detach(), rho
            if point == len(self.kicks) - 1:
                for field, gradient in zip(self.run.fields, gradients, strict=True):
                    field.check(gradient, self.noise[0])
            d_z, d_rho = self._point(point, (z, rho), gradients, d_z, d_rho, d_total)
        if after is not None:
            self._check_start(after[1], end)
        if self.d_noise is not None:
            self.d_noise[0] += d_rho
        return [d_z, self.d_noise, self.d_kicks, self.d_mixing, self.d_betas, *self.d_params]

    def _rewound(self, point: int, rho: Tensor, base_grad: Tensor, grad: Tensor) -> Tensor:
        kicks, (eta, sigma) = self.kicks[point], self.mixing[point].unbind()
        refreshed = rho + kicks[2] * base_grad + kicks[3] * grad
        return (refreshed - sigma * self._noise(point)) / eta + kicks[0] * base_grad + kicks[1] * grad

    def _check_start(self, rho: Tensor, end: Tensor) -> None:
        """Where the trajectory began is known of its momenta, whose errors grow the most."""
        if not rho.numel() or not _checks.values_readable(rho):
            return
        first, tolerance = self.noise[0], max(field.tolerance for field in self.run.fields)
        distance, size = (rho - first).abs().max().item(), first.abs().max().item()
        if not distance <= tolerance * max(size, 1.0) and bool(end.isfinite().all()):
            raise RuntimeError(
                f"{FLOW}: rebuilding the trajectory missed its first momenta, of up to {size:.2g}, by {distance:.2g}, "
                "as each bridge divides rounding errors by the refreshment: use memory='states'"
            )

    def _noise(self, point: int) -> Tensor:
        return reference.noise_at(self.noise, point, self.run.leapfrog_steps, len(self.kicks))

    def _point(
        self,
        point: int,
        state: tuple[Tensor, Tensor],
        gradients: Gradients,
        d_z: Tensor,
        d_rho: Tensor,
        d_total: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Cotangents of a state from those of the next, and this point's share of all others."""
        own = [x.detach().requires_grad_() for x in (self.kicks[point], self.mixing[point], self.betas)]
        noise, rho = self._noise(point).detach(), state[1].detach().requires_grad_()
        noise.requires_grad_(self.d_noise is not None)
        with torch.enable_grad():  # as a scalar: for grad_outputs torch imports sympy, a second and 36 MB
            z_next, rho_next, part = self.run.step(point, (state[0], rho), gradients, noise, *own)
            pairing = (z_next * d_z).sum() + (rho_next * d_rho).sum() + (part * d_total).sum()
        wanted = (state[0], rho, *own, *self.params, *([noise] if self.d_noise is not None else ()))
        sharing = (*self.run.fields, *([self.run.score] if self.run.score else ()))
        shared = any(x.shared for x in sharing)
        results = products(pairing, wanted, shared, f"{FLOW}: potential or base_potential")
        self.d_kicks[point], self.d_mixing[point] = results[2], results[3]
        self.d_betas += results[4]
        for total, product in zip(self.d_params, results[5:], strict=False):
            total += product
        if self.d_noise is not None:
            reference.noise_at(self.d_noise, point, self.run.leapfrog_steps, len(self.kicks)).add_(results[-1])
        return results[0], results[1]
