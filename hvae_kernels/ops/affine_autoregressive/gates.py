"""The gates: how a network's raw output ``s`` becomes a scale. Their plain formulas are the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hvae_kernels import _checks

#: Of each gate its numbers, by name, with their defaults; a gate's place is its code in the kernels.
NUMBERS: dict[str, dict[str, float]] = {
    "affine": {},
    "clipped": {"low": -5.0, "high": 3.0},
    "soft-clipped": {"bound": -math.log(1e-3)},
    "softplus": {"epsilon": 1e-3},
    "shifted-sigmoid": {"offset": 2.0, "epsilon": 1e-3},
    "sigmoid": {"offset": 0.0},
}
CODES = {name: code for code, name in enumerate(NUMBERS)}


@dataclass(frozen=True)
class Gate:
    r"""How the raw output ``s`` of an autoregressive network becomes the scale :math:`\sigma(s)`.

    ============================  ==============================================  ============================
    gate                          :math:`\sigma`                                  source
    ============================  ==============================================  ============================
    ``affine``                    :math:`e^s`                                     MAF, arXiv 1705.07057, eq. 4
    ``clipped(low, high)``        :math:`e^{\min(\max(s, low), high)}`            pyro
    ``soft-clipped(bound)``       :math:`e^{s / (1 + |s| / bound)}`               zuko
    ``softplus(epsilon)``         :math:`\log(1 + e^s) + \epsilon`                nflows
    ``shifted-sigmoid(offset,     :math:`1 / (1 + e^{-s - offset}) + \epsilon`    normflows
    epsilon)``
    ``sigmoid(offset)``           :math:`1 / (1 + e^{-s - offset})`               IAF, arXiv 1606.04934, eq. 14
    ============================  ==============================================  ============================

    The shift's weight :math:`\tau` is 1, and :math:`1 - \sigma` for ``sigmoid``. The clamp of ``clipped`` passes
    gradients straight through: its derivative counts as 1 everywhere.

    Args:
        name: one of the above.
        first: its first number; None is the default, the one of the source.
        second: its second number.

    Raises:
        ValueError: an unknown name, or numbers that make no scale.

    Equivalent to:
        >>> Gate("clipped") == Gate.clipped(low=-5.0, high=3.0)
        True
    """

    name: str
    first: float | None = None
    second: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            got = _checks.describe(self.name)
            raise TypeError(f"gate must be a Gate or one of {', '.join(NUMBERS)}, got {got}")
        if self.name not in NUMBERS:
            raise ValueError(f"gate must be a Gate or one of {', '.join(NUMBERS)}, got {self.name!r}")
        defaults, numbers = list(NUMBERS[self.name].items()), []
        for place, attribute in enumerate(("first", "second")):
            given = getattr(self, attribute)
            if place >= len(defaults):
                if given is not None and _finite(self.name, attribute, given):
                    raise ValueError(f"gate {self.name!r} takes {len(defaults)} numbers, got {attribute} = {given!r}")
                number = 0.0
            else:
                label, default = defaults[place]
                number = default if given is None else _finite(self.name, label, given)
            object.__setattr__(self, attribute, number)
            numbers.append(number)
        _check(self.name, *numbers)

    @classmethod
    def affine(cls) -> Gate:
        """``exp(s)``."""
        return cls("affine")

    @classmethod
    def clipped(cls, low: float = -5.0, high: float = 3.0) -> Gate:
        """``exp(clamp(s, low, high))`` with a straight-through gradient."""
        return cls("clipped", low, high)

    @classmethod
    def soft_clipped(cls, bound: float = NUMBERS["soft-clipped"]["bound"]) -> Gate:
        """``exp(s / (1 + |s| / bound))``; zuko's ``slope`` is ``exp(-bound)``."""
        return cls("soft-clipped", bound)

    @classmethod
    def softplus(cls, epsilon: float = 1e-3) -> Gate:
        """``softplus(s) + epsilon``."""
        return cls("softplus", epsilon)

    @classmethod
    def shifted_sigmoid(cls, offset: float = 2.0, epsilon: float = 1e-3) -> Gate:
        """``sigmoid(s + offset) + epsilon``."""
        return cls("shifted-sigmoid", offset, epsilon)

    @classmethod
    def sigmoid(cls, offset: float = 0.0) -> Gate:
        """``sigmoid(s + offset)``, blending with the shift; pyro's ``stable=True`` has an offset of 2."""
        return cls("sigmoid", offset)


def _finite(name: str, label: str, number: object) -> float:
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"gate {name!r}: {label} must be a number, got {_checks.describe(number)}")
    if not math.isfinite(number):
        raise ValueError(f"gate {name!r}: {label} must be finite, got {number}")
    return float(number)


#: Less would be 0 or denormal in float32: a logarithm or an inverse of it is not finite.
_LEAST = torch.finfo(torch.float32).tiny


def _check(name: str, first: float, second: float) -> None:
    if name == "clipped" and not first < second:
        raise ValueError(f"gate 'clipped': low must be below high, got low = {first}, high = {second}")
    positive = {
        "soft-clipped": ("bound", first),
        "softplus": ("epsilon", first),
        "shifted-sigmoid": ("epsilon", second),
    }
    if name in positive:
        label, number = positive[name]
        if not number >= _LEAST:
            raise ValueError(f"gate {name!r}: {label} must be positive, and a normal float32 number, got {number}")


#: The gates with the numbers of their sources: what a name alone means.
DEFAULTS = {name: Gate(name) for name in NUMBERS}


def scale_of(gate: Gate, s: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(sigma, tau, log sigma)`` in plain PyTorch; tau is None where it is 1."""
    first: Any  # no gate has None
    second: Any
    name, first, second = gate.name, gate.first, gate.second
    if name == "sigmoid":
        return _logistic(s + first), _logistic(-s - first), torch.nn.functional.logsigmoid(s + first)
    if name == "softplus":
        # torch drops log1p(exp(-s)) above its threshold, which by default costs 1e-10 in float64
        scale = torch.nn.functional.softplus(s, threshold=40.0) + first
        return scale, None, scale.log()
    if name == "shifted-sigmoid":
        scale = _logistic(s + first) + second
        return scale, None, scale.log()
    log_scale = s
    if name == "clipped":
        log_scale = s.clamp(first, second).detach() + (s - s.detach())
    if name == "soft-clipped":
        log_scale = s / (1 + s.abs() / first)
    return log_scale.exp(), None, log_scale


def _logistic(x: Tensor) -> Tensor:
    """``sigmoid(x)`` whose derivative is exact above 0 too, where torch's ``y (1 - y)`` cancels."""
    return torch.where(x > 0, 1 - torch.sigmoid(-x), torch.sigmoid(x))
