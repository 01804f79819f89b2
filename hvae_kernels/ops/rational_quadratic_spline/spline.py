"""What a spline is, apart from its parameters: bins, interval, tails, and how raw parameters become knots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from hvae_kernels import _checks

NAME = "Spline"
#: A style's place, and that of the tails, is its code in the kernels.
STYLES = ("nflows", "zuko", "pyro")
TAILS = ("linear", "circular", None)


@dataclass(frozen=True)
class Spline:
    r"""A monotone rational-quadratic spline: its bins, its interval, its tails, and its parameterisation by name.

    Of the ``parameters`` of a feature the first ``bins`` are raw widths, the next ``bins`` raw heights, the rest raw
    derivatives at knots. With :math:`P = \mathrm{floor} + (1 - K \, \mathrm{floor}) \, \mathrm{softmax}(\text{raw})`
    times the interval's length for widths and heights, and derivatives :math:`d`:

    ==========  =======================================  ==========================================  ================
    style       softmax of                               :math:`d`                                   outer slope of
                                                                                                     linear tails
    ==========  =======================================  ==========================================  ================
    ``nflows``  the raw values                           ``min_derivative + softplus(raw)``          1
    ``pyro``    the raw values                           ``min_derivative + softplus(raw)``          ``1 -
                                                                                                     min_derivative``
    ``zuko``    :math:`r / (1 + |2 r / \log m|)`, no     :math:`\exp(r / (1 + |r / \log m|))`,       1
                floors                                   :math:`m` = ``min_derivative``
    ==========  =======================================  ==========================================  ================

    ``nflows`` is the parameterisation of nflows, glasflow and normflows, ``zuko``'s ``slope`` is ``min_derivative``.

    Args:
        bins: K, at least 2.
        bound: B of the interval [-B, B] on both axes, or ``(left, right, bottom, top)``.
        tails: ``"linear"``: the identity outside the interval, K - 1 raw derivatives, of the inner knots.
            ``"circular"``: the same outside, K raw derivatives, the first of which is the last knot's too. None:
            undefined outside (NaN), K + 1 raw derivatives.
        style: ``"nflows"``, ``"zuko"`` or ``"pyro"``.
        min_width: floor of a bin's share of the interval; ``"zuko"`` has none and takes no other.
        min_height: the same of its height.
        min_derivative: floor of the derivatives.
        logit_scale: raw widths and heights are multiplied by it first. nflows' layers have ``1 / sqrt(hidden
            features)``.

    Attributes:
        parameters: P, how many a feature has: 3 K - 1 for linear tails, 3 K for circular ones, 3 K + 1 for none.

    Raises:
        TypeError: an argument of another type.
        ValueError: fewer than 2 bins, bounds out of order, tails that do not fit the interval, an unknown name, a floor
            below 0, floors that leave nothing to distribute, a scale that is not positive.

    Source: Durkan et al., Neural spline flows, arXiv 1906.04032, section 3.

    Equivalent to:
        >>> from hvae_kernels.functional import Spline
        >>> Spline(8).parameters, Spline(8, tails="circular").parameters, Spline(8, tails=None).parameters
        (23, 24, 25)
    """

    bins: int
    bound: float | tuple[float, float, float, float] = 3.0
    tails: str | None = "linear"
    style: str = "nflows"
    min_width: float = 1e-3
    min_height: float = 1e-3
    min_derivative: float = 1e-3
    _: KW_ONLY
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        _checks.integer(NAME, "bins", self.bins, 2)
        _checks.one_of(NAME, "style", self.style, STYLES)
        if self.tails is not None:
            _checks.one_of(NAME, "tails", self.tails, ("linear", "circular"))
        object.__setattr__(self, "bins", int(self.bins))
        object.__setattr__(self, "bound", self._checked_bound())
        for name in ("min_width", "min_height", "min_derivative", "logit_scale"):
            object.__setattr__(self, name, _finite(name, getattr(self, name)))
        for name in ("min_width", "min_height"):
            floor = getattr(self, name)
            if self.style == "zuko":
                if floor not in (0, getattr(Spline, name)):
                    expected = "left as it is for 'zuko', which has no such floor"
                    raise _checks.value_error(NAME, name, expected, str(floor))
            elif not 0 <= floor * self.bins < 1:
                raise _checks.value_error(NAME, name, f"at least 0 and below 1 / bins = {1 / self.bins:g}", floor)
        if self.min_derivative < 0:
            raise _checks.value_error(NAME, "min_derivative", "at least 0", self.min_derivative)
        if self.style == "zuko" and not 0 < self.min_derivative < 1:
            raise _checks.value_error(
                NAME, "min_derivative", "between 0 and 1 for 'zuko', its slope", self.min_derivative
            )
        if not self.outer_slope > 0:
            raise _checks.value_error(
                NAME, "min_derivative", "below 1 for 'pyro', whose outer slope is the rest", self.min_derivative
            )
        if not self.logit_scale > 0:
            raise _checks.value_error(NAME, "logit_scale", "positive", self.logit_scale)

    def _checked_bound(self) -> float | tuple[float, float, float, float]:
        if not isinstance(self.bound, (tuple, list)):
            bound = _finite("bound", self.bound)
            if not bound > 0:
                raise _checks.value_error(NAME, "bound", "positive, or (left, right, bottom, top)", bound)
            return bound
        if len(self.bound) != 4:
            raise _checks.value_error(NAME, "bound", "one number or (left, right, bottom, top)", self.bound)
        left, right, bottom, top = (_finite("bound", x) for x in self.bound)
        if not (left < right and bottom < top):
            raise _checks.value_error(
                NAME, "bound", "in order, left < right and bottom < top", (left, right, bottom, top)
            )
        if self.tails is not None and (left, right) != (bottom, top):
            expected = f"of one interval on both axes, as {self.tails} tails are the identity outside"
            raise _checks.value_error(NAME, "bound", expected, str((left, right, bottom, top)))
        return left, right, bottom, top

    @property
    def interval(self) -> tuple[float, float, float, float]:
        """``(left, right, bottom, top)``."""
        if isinstance(self.bound, tuple):
            return self.bound
        return -self.bound, self.bound, -self.bound, self.bound

    @property
    def parameters(self) -> int:
        """How many parameters a feature has."""
        return 3 * self.bins + {"linear": -1, "circular": 0, None: 1}[self.tails]

    @property
    def encoded(self) -> tuple[tuple[int, int, int], tuple[float, ...]]:
        """``((bins, tails, style), numbers)``, as the kernels take it."""
        floors = self.min_width, self.min_height, self.min_derivative, self.logit_scale
        return (self.bins, TAILS.index(self.tails), STYLES.index(self.style)), (*self.interval, *floors)

    @property
    def outer_slope(self) -> float:
        """Of linear tails: the derivative at the outer knots."""
        return 1 - self.min_derivative if self.style == "pyro" else 1.0


def decoded(codes: Sequence[int], numbers: Sequence[float]) -> Spline:
    """The spline that is so ``encoded``; a compiler for many sizes has symbols for numbers, but there is one spline."""
    bins, tails, style = codes
    left, right, bottom, top, *rest = map(float, numbers)
    named = dict(zip(("min_width", "min_height", "min_derivative", "logit_scale"), rest, strict=True))
    return Spline(bins, (left, right, bottom, top), tails=TAILS[tails], style=STYLES[style], **named)


def _finite(name: str, number: float) -> float:
    _checks.real(NAME, name, number)
    if not math.isfinite(number):
        raise _checks.value_error(NAME, name, "finite", number)
    return float(number)
