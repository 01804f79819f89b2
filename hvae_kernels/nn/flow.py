"""What all flows share, and a flow as a transform of ``torch.distributions``."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from hvae_kernels import _checks, _live, _torch


class Flow(nn.Module):
    """A flow with ``forward`` and ``inverse``, both ``(z, context) -> (z', log_abs_det)``."""

    features: int
    inverse: Callable[..., tuple[Tensor, Tensor]]
    #: Whether ``forward`` is the cheap direction when both are at hand; else ``inverse``.
    forward_is_parallel = True

    @property
    def is_conditional(self) -> bool:
        """Whether a stack hands its context on to this flow."""
        return True

    def as_transform(self, context: Tensor | None = None, *, cache_size: int = 0) -> FlowTransform:
        """The flow as a ``torch.distributions`` transform from z to z', given the context."""
        return FlowTransform(self, context, cache_size=cache_size)


class ForwardFlow(Flow):
    """A flow that goes one way only.

    ``as_transform()`` is a bijection to ``torch.distributions``, as it is one in mathematics and as
    ``TransformedDistribution.log_prob`` asks for ``log_abs_det_jacobian``. Samples drawn with ``cache_size=1`` can be
    scored, as the point that they came from is remembered as long as :class:`FlowTransform` keeps the pair; anything
    else needs the inverse, and raises.
    """

    def __init__(self, features: int, n_layers: int) -> None:
        super().__init__()
        for argument, value, least in (("features", features, 1), ("n_layers", n_layers, 0)):
            _checks.integer(type(self).__name__, argument, value, least)
        self.features, self.n_layers = features, n_layers

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """There is no formula for it: raises ``NotImplementedError``."""
        raise NotImplementedError(
            f"{type(self).__name__}: the inverse has no closed form; score samples as they are drawn, with the "
            "log_abs_det of forward, or with as_transform(cache_size=1) before anything changes: rsample where "
            "gradients are wanted, or log_prob under torch.no_grad()"
        )

    def _check(self, z: Tensor, context: Tensor | None) -> None:
        name = type(self).__name__
        _checks.features(name, "z", z, self.features)
        if context is not None:
            raise _checks.value_error(name, "context", "None, as the layers take none", context)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"features={self.features}, n_layers={self.n_layers}"


class FlowTransform(Transform):
    """A flow as a bijection of ``torch.distributions``, on vectors.

    With ``cache_size=1`` the last pair of points is kept, and the log-determinant found on the way. They are computed
    anew when a point, the context, or a parameter or buffer of the flow has changed, its ``requires_grad`` too, and
    where gradients are on that were not recorded or that a backward pass has used up. Changes in place through
    ``.data`` are not seen: :meth:`clear_cache` after them.

    Example:
        >>> import torch, hvae_kernels as hk
        >>> base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(5), 1.0), 1)
        >>> flow = hk.nn.MaskedAutoregressiveFlow(5, [32])
        >>> model = torch.distributions.TransformedDistribution(base, [flow.as_transform(cache_size=1)])
        >>> model.log_prob(model.rsample((8,))).shape
        torch.Size([8])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    # tensors, or None without a pair
    _cached_x_y: tuple[Any, Any]
    _cached_log_abs_det: Any
    _seen: _live.Seen | None
    _is_recorded: bool

    def __init__(self, flow: Flow, context: Tensor | None = None, *, cache_size: int = 0) -> None:
        if not isinstance(flow, Flow):
            raise _checks.type_error("FlowTransform", "flow", "a flow of hvae_kernels.nn", flow)
        if context is not None:
            _checks.tensors("FlowTransform", context=context)
        _checks.integer("FlowTransform", "cache_size", cache_size, 0)
        super().__init__(cache_size=cache_size)
        self.flow, self.context = flow, context
        self.clear_cache()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlowTransform) and self.flow is other.flow and self.context is other.context

    def with_cache(self, cache_size: int = 1) -> FlowTransform:
        """The same transform with another cache."""
        return self if self._cache_size == cache_size else FlowTransform(self.flow, self.context, cache_size=cache_size)

    def clear_cache(self) -> None:
        """Forget the pair of points."""
        self.__dict__.update(_NO_PAIR)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | _NO_PAIR

    def __call__(self, x: Tensor) -> Tensor:
        """``y``, from the cache if it holds."""
        self._forget_what_changed()
        known, y = self._cached_x_y
        if x is not known:
            y, log_abs_det = self.flow(x, self.context)
            self._keep(x, y, y, log_abs_det)
        return y

    def _inv_call(self, y: Tensor) -> Tensor:
        self._forget_what_changed()
        x, known = self._cached_x_y
        if y is not known:
            x, minus = self.flow.inverse(y, self.context)
            self._keep(x, y, x, -minus)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log |det dy/dx|``, ``(...)``; recomputed from the pair's cheaper side unless it is the cached pair."""
        self._forget_what_changed()
        known_x, known_y = self._cached_x_y
        if x is known_x and y is known_y:
            return self._cached_log_abs_det
        if self.flow.forward_is_parallel:
            return self.flow(x, self.context)[1]
        return -self.flow.inverse(y, self.context)[1]

    def _keep(self, x: Tensor, y: Tensor, found: Tensor, log_abs_det: Tensor) -> None:
        if not self._cache_size:
            return
        self._cached_x_y, self._cached_log_abs_det, self._seen = (x, y), log_abs_det, None
        if _is_transformed():
            return
        read = self._read()
        self._seen = _live.Seen(read)
        self._is_recorded = torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in read)
        transform, seen = weakref.ref(self), weakref.ref(self._seen)  # a graph must not hold its own results

        def spend(_: object) -> None:
            kept = transform()
            if kept is not None and kept._seen is seen():
                kept._is_recorded = False

        for node in {found.grad_fn, log_abs_det.grad_fn}:
            if node is not None:
                node.register_prehook(spend)

    def _read(self) -> list[Tensor]:
        """What the pair depends on, and itself."""
        context = () if self.context is None else (self.context,)
        return [*self._cached_x_y, self._cached_log_abs_det, *context, *_live.tensors_of(self.flow)]

    def _forget_what_changed(self) -> None:
        if self._cached_log_abs_det is None:
            return
        if _is_transformed():
            holds = self._seen is None  # of the same trace
        else:
            usable = self._is_recorded or not torch.is_grad_enabled()
            foreign = self._cached_log_abs_det.is_inference() and not torch.is_inference_mode_enabled()
            holds = self._seen is not None and usable and not foreign and self._seen.again(self._read())
        if not holds:
            self.clear_cache()


#: A :class:`FlowTransform` that keeps no pair.
_NO_PAIR = {"_cached_x_y": (None, None), "_cached_log_abs_det": None, "_seen": None, "_is_recorded": False}


def _is_transformed() -> bool:
    """Whether tensors stand for others, whose changes and graphs cannot be looked at."""
    return torch.compiler.is_compiling() or _torch.functorch_is_active()
