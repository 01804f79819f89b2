"""Path gradients: the density of a flow at its own points, without the gradient's score term."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from hvae_kernels import _checks, _library, _live, _torch
from hvae_kernels.nn.maps import Map, opened
from hvae_kernels.nn.planar import PlanarFlow
from hvae_kernels.nn.radial import RadialFlow
from hvae_kernels.ops.planar_flow.constraint import constrained

_NAME = "path_log_prob"


def path_log_prob(
    flow: Any, z: Tensor, context: Tensor | None = None, base: Any | None = None
) -> tuple[Tensor, Tensor]:
    r"""The point :math:`x = f_\theta(z)` and :math:`\log q_\theta(x)`, whose gradient is the path gradient alone.

    The value is :math:`\log b(z) - \log |\det \partial f_\theta / \partial z|`, from one pass forward, and the gradient

    .. math:: \nabla_\theta \log q = (\partial x / \partial \theta)^\top \, \nabla_x \log q_{\theta'}(x),
        \quad \theta' = \theta \text{ held},

    without the score :math:`\nabla_\theta \log q_\theta(x)` at x held, whose expectation is zero; by the context, by z
    and by what z depends on just so. ``x`` has its ordinary gradient. So
    ``(log_q - log_p(x)).mean().backward()`` is the path-gradient estimator of the reverse KL divergence ("sticking the
    landing"): the same gradient on the average, and zero for every single z where q equals p.

    :math:`s = \nabla_x \log q` is found on the way through the flow's maps :math:`y = f_k(x)`, from :math:`s = \nabla_z
    \log b(z)` on: :math:`s \leftarrow J_k^{-\top} (s - \nabla \log |\det J_k|)`.

    ====================================== ======================================================================
    map                                    cost on top of the ordinary forward and backward pass
    ====================================== ======================================================================
    with an inverse                        one inverse pass and its derivative by the points alone: no gradients of
                                           weights. An autoregressive flow's is one pass of work; at most one
                                           map's graph is held at a time
    ``PlanarFlow``, ``RadialFlow``         O(K d) a point, in closed form: each layer's J is rank one off diagonal
    any other                              one more forward pass, d + 1 backward passes and a d x d solve a point;
                                           memory for d^2 numbers a point. Points must not depend on one another
    ====================================== ======================================================================

    Without gradients, or where x has none, it is the forward pass alone. ``log_q`` is differentiable once: the
    estimator says nothing of second derivatives.

    Args:
        flow: a flow module of ``hvae_kernels.nn`` on z, or any module whose ``forward`` (from noise to points) and
            ``inverse`` take ``(z)``, or ``(z, context)``, and return a point and the ``log_abs_det`` of that
            direction, or whose inverse raises ``NotImplementedError``; a transform of ``torch.distributions``,
            ``as_transform()`` and compositions among them, or of pyro, conditional or not; a list or ``ModuleList`` of
            these, applied in order. Or what holds its own base: a ``TransformedDistribution``; of zuko a ``Flow``, or
            the ``NormalizingFlow`` that it returns; an nflows or glasflow ``Flow``; a normflows ``NormalizingFlow``,
            conditional or not. Accelerated or not. Random maps (dropout in training mode) have no density: call
            ``eval()``. While the inverse is taken held tensors stand for the parameters, as under
            ``torch.func.functional_call``: one thread at a time.
        z: points of the base ``(..., d)``, by reparameterisation where the base learns.
        context: what the flow is conditioned on; its gradient is the path's too.
        base: the distribution of z, with ``log_prob`` of vectors ``(..., d) -> (...)``; None is the standard normal, or
            what the flow holds. Its own parameters count as held: they get gradients through z.

    Returns:
        ``(x, log_q)``, ``(..., d)`` and ``(...)``.

    Raises:
        TypeError: ``flow`` is nothing of the kind, or a ``HamiltonianFlow``: the density of its positions without their
            momenta has no formula. ``base`` has no ``log_prob``, or z is no floating-point tensor.
        ValueError: ``base`` scores no vectors, is given beside the flow's own, or nobody takes the context.
        RuntimeError: under transforms of ``torch.func``; or ``log_q`` is differentiated twice.

    References:
        Roeder, Wu and Duvenaud, Sticking the landing, 2017; Vaitl, Nicoli, Nakajima and Kessel, Gradients should stay
        on path, 2022; Vaitl, Winkler, Richter and Kessel, Fast and unified path gradient estimators for normalizing
        flows, 2024.

    Equivalent to:
        >>> import copy, torch, hvae_kernels as hk
        >>> normal = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(5), 1.0), 1)
        >>> flow, z = hk.nn.InverseAutoregressiveFlow(5, [32]), torch.randn(8, 5)
        >>> held = copy.deepcopy(flow).requires_grad_(False)
        >>> x, log_abs_det = flow(z)
        >>> back, minus = held.inverse(x)
        >>> log_q = normal.log_prob(back) + minus
        >>> expected = torch.autograd.grad(log_q.sum(), flow.made.layers[0].weight)
        >>> point, found = hk.path_log_prob(flow, z)
        >>> torch.testing.assert_close((point, found), (x, log_q))
        >>> gradient = torch.autograd.grad(found.sum(), flow.made.layers[0].weight)
        >>> torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
    """
    _check(z)
    if context is not None:
        _checks.tensors(_NAME, context=context)
    maps, log_prob = opened(_NAME, flow, context)
    if base is not None:
        if log_prob is not None:
            raise _checks.value_error(_NAME, "base", "None, as the flow has its own", base)
        if isinstance(base, type) or not callable(getattr(base, "log_prob", None)):
            raise _checks.type_error(_NAME, "base", "None or a distribution, with a log_prob", base)
        log_prob = base.log_prob

    x, total, starts = z, z.new_zeros(z.shape[:-1]), []
    for one in maps:
        start = x
        x, log_abs_det = one.forward(start)
        if log_abs_det.shape != total.shape:
            raise _checks.value_error(_NAME, "flow", f"one with log_abs_det of shape {tuple(total.shape)}", log_abs_det)
        starts.append((start, x))
        total = total + log_abs_det.detach()

    wanted = torch.is_grad_enabled() and x.requires_grad
    if wanted and _torch.functorch_is_active():
        raise RuntimeError(f"{_NAME}: transforms of torch.func cannot see which gradient it drops: use torch.autograd")
    log_b, score = _of_base(log_prob, z, wanted)
    value = log_b - total
    if score is None:
        return x, value
    for one, (start, end) in zip(maps, starts, strict=True):
        score = _carried(one, start.detach(), end.detach(), score)
    return x, _AlongThePath.apply(x, score, value)


def _check(z: Tensor) -> None:
    expected = "a dense floating-point tensor of shape (..., d)"
    if not isinstance(z, Tensor) or not z.is_floating_point() or z.layout is not torch.strided:
        raise _checks.type_error(_NAME, "z", expected, z)
    if not z.dim():
        raise _checks.value_error(_NAME, "z", expected, z)


def _of_base(log_prob: Callable[[Tensor], Tensor] | None, z: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """``log b(z)`` and, where wanted, its gradient by z."""
    z = z.detach()
    if log_prob is None:
        if _library.autocasts(z) and z.dtype in _checks.HALF_PRECISION:
            z = z.float()
        log_b = -0.5 * (z.square().sum(-1) + z.shape[-1] * math.log(2 * math.pi))
        return log_b, -z if wanted else None
    with torch.set_grad_enabled(wanted):
        z = z.requires_grad_(wanted)
        log_b = log_prob(z)
        if log_b.shape != z.shape[:-1]:
            expected = (
                f"over vectors, with log_prob of shape {tuple(z.shape[:-1])}: see torch.distributions.Independent"
            )
            raise _checks.value_error(_NAME, "base", expected, log_b)
        return log_b.detach(), _gradient([(log_b, torch.ones_like(log_b))], z) if wanted else None


def _carried(one: Map, start: Tensor, end: Tensor, score: Tensor) -> Tensor:
    """The gradient of log q by where a map ends, from that by where it starts."""
    flow = one.flow
    with torch.no_grad():
        if isinstance(flow, PlanarFlow) and _live.runs_only(flow, PlanarFlow.forward):
            return _exactly(functools.partial(_through_planar, flow), start, score, flow.u, flow.w, flow.b)
        if isinstance(flow, RadialFlow) and _live.runs_only(flow, RadialFlow.forward):
            return _exactly(
                functools.partial(_through_radial, flow), start, score, flow.center, flow.raw_alpha, flow.raw_beta
            )
    with torch.enable_grad():
        x = end.requires_grad_()
        try:
            z, log_abs_det = _held(one, one.inverse, x)
        except NotImplementedError:
            return _solved(one, start, score)
        return _gradient([(z, score), (log_abs_det, torch.ones_like(log_abs_det))], x)


def _exactly(formula: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """As the flows themselves compute: autocast would make products half-precision ones."""
    return _library.in_float32(formula, *tensors) if _library.autocasts(tensors[0]) else formula(*tensors)


def _solved(one: Map, start: Tensor, score: Tensor) -> Tensor:
    """By the whole Jacobian."""
    z = start.requires_grad_()
    x, log_abs_det = _held(one, one.forward, z)
    rows = [_gradient([(column, torch.ones_like(column))], z) for column in x.unbind(-1)]
    score = score - _gradient([(log_abs_det, torch.ones_like(log_abs_det))], z)
    return _exactly(_solution, torch.stack(rows, -1), score)


def _solution(jacobian: Tensor, score: Tensor) -> Tensor:
    return torch.linalg.solve(jacobian, score.unsqueeze(-1)).squeeze(-1)


def _through_planar(flow: PlanarFlow, z: Tensor, score: Tensor, u: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """``J = I + (1 - t^2) u w^T``, its determinant ``D = t^2 + (1 - t^2)(1 + u.w)`` without cancellation."""
    u, one_plus = constrained(u, w)
    for layer in range(flow.n_layers):
        k = 0 if flow.shared else layer
        t = torch.tanh(z @ w[k] + b[k])
        slope = 1 - t * t
        det = t * t + slope * one_plus[k]
        own = -2 * t * slope * (one_plus[k] - 1) / det  # the gradient of log D, times w
        along = (score @ u[k] - own * (one_plus[k] - 1)) / det
        score = score - (own + slope * along).unsqueeze(-1) * w[k]
        z = z + t.unsqueeze(-1) * u[k]
    return score


def _through_radial(
    flow: RadialFlow, z: Tensor, score: Tensor, center: Tensor, raw_alpha: Tensor, raw_beta: Tensor
) -> Tensor:
    """``J`` stretches by ``a = 1 + beta h`` across and by ``b = 1 + alpha beta h^2`` along the radius."""
    alpha, total = softplus(raw_alpha), softplus(raw_beta)
    beta = total - alpha
    for k in range(flow.n_layers):
        y = z - center[k]
        r = y.norm(dim=-1)
        h = 1 / (alpha[k] + r)
        across = (r + total[k]) * h
        along = (r * r + alpha[k] * (2 * r + total[k])) * h * h  # both without cancellation
        own = -beta[k] * h * h * ((z.shape[-1] - 1) / across + 2 * alpha[k] * h / along)
        unit = y / r.clamp_min(torch.finfo(r.dtype).tiny).unsqueeze(-1)
        radial = (score * unit).sum(-1)
        score = score / across.unsqueeze(-1) + ((radial - own) / along - radial / across).unsqueeze(-1) * unit
        z = z + (beta[k] * h).unsqueeze(-1) * y
    return score


def _gradient(outputs: list[tuple[Tensor, Tensor]], x: Tensor) -> Tensor:
    """By x, zero where nothing depends on it; the graph is kept for others."""
    live = [(output, grad) for output, grad in outputs if output.requires_grad]
    if not live:
        return torch.zeros_like(x)
    results, grads = zip(*live, strict=True)
    (found,) = torch.autograd.grad(results, x, grads, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x) if found is None else found


class _Holder(nn.Module):
    """Something that ``functional_call`` can call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, direction: Callable[[Tensor], Any], x: Tensor) -> Any:
        return direction(x)


def _held(one: Map, direction: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """A direction of a map that records nothing for its parameters, so that no gradients of weights are computed."""
    if one.module is None:
        return direction(x)
    holder = _Holder(one.module)
    learned = {name: value.detach() for name, value in holder.named_parameters() if value.requires_grad}
    if not learned:
        return direction(x)
    # Names of one parameter: a module that stands in two places would not get its own back, were both filled.
    return torch.func.functional_call(holder, learned, (direction, x), tie_weights=False)


class _AlongThePath(torch.autograd.Function):
    """``value``, with the gradient ``score`` by x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, score: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(x, score)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, score = ctx.saved_tensors
        with torch.no_grad():
            found = grad.unsqueeze(-1) * score
        return _Once.apply(found, x, grad) if torch.is_grad_enabled() else found, None, None


class _Once(torch.autograd.Function):
    """A gradient that says so when it is to be differentiated."""

    @staticmethod
    def forward(ctx: Any, found: Tensor, *sources: Tensor) -> Tensor:
        return found.view_as(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"{_NAME}: log_q is differentiable once: a path gradient says nothing of second derivatives")
