"""The gates: how a network's raw output ``s`` becomes a scale. Their plain formulas are the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import Tensor

from hvae_kernels import _checks

#: Of each gate its code in the kernels.
CODES = {"affine": 0, "clipped": 1, "soft-clipped": 2, "softplus": 3, "shifted-sigmoid": 4, "sigmoid": 5}
#: Of each gate its parameters, by name, with their defaults; the kernels take two numbers.
PARAMETERS: dict[str, dict[str, float]] = {
    "affine": {},
    "clipped": {"low": -5.0, "high": 3.0},
    "soft-clipped": {"bound": -math.log(1e-3)},
    "softplus": {"epsilon": 1e-3},
    "shifted-sigmoid": {"offset": 2.0, "epsilon": 1e-3},
    "sigmoid": {"offset": 0.0},
}
_NAMES = {code: name for name, code in CODES.items()}


@dataclass(frozen=True, repr=False)
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

    Each gate has a method of its name, with its parameters by theirs: ``Gate.clipped(low=-3.0)``.

    Args:
        name: one of the above.
        parameters: all of the gate's, in the order above; none are the defaults, those of the source.

    Raises:
        TypeError: the name is no string, or a parameter no number.
        ValueError: an unknown name, or parameters that make no scale.

    Equivalent to:
        >>> Gate("clipped")
        Gate.clipped(low=-5.0, high=3.0)
        >>> Gate("clipped", (-5.0, 3.0)) == Gate.clipped(low=-5.0) == Gate.clipped()
        True
    """

    name: str
    parameters: tuple[float, ...] = ()
    #: ``(code, first, second)``, as the kernels take it; 0 for a parameter that the gate has not.
    encoded: tuple[int, float, float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            got = _checks.describe(self.name)
            raise TypeError(f"gate must be a Gate or one of {', '.join(CODES)}, got {got}")
        if self.name not in CODES:
            raise ValueError(f"gate must be a Gate or one of {', '.join(CODES)}, got {self.name!r}")
        defaults = PARAMETERS[self.name]
        expected = f"gate {self.name!r}: parameters must be a tuple ({', '.join(defaults)})"
        if not isinstance(self.parameters, tuple):
            raise TypeError(f"{expected}, got {_checks.describe(self.parameters)}")
        given = self.parameters or tuple(defaults.values())
        if len(given) != len(defaults):
            raise ValueError(f"{expected}, got {given}")
        numbers = {label: _finite(self.name, label, number) for label, number in zip(defaults, given, strict=True)}
        _check(self.name, numbers)
        parameters = tuple(numbers.values())
        first, second = (*parameters, 0.0, 0.0)[:2]
        object.__setattr__(self, "parameters", parameters)
        object.__setattr__(self, "encoded", (CODES[self.name], first, second))

    def __reduce__(self) -> tuple[type[Gate], tuple[str, tuple[float, ...]]]:
        return Gate, (self.name, self.parameters)

    def __repr__(self) -> str:
        labels = PARAMETERS[self.name]
        named = ", ".join(f"{label}={number}" for label, number in zip(labels, self.parameters, strict=True))
        return f"Gate.{self.name.replace('-', '_')}({named})"

    @classmethod
    def affine(cls) -> Gate:
        """``exp(s)``."""
        return cls("affine")

    @classmethod
    def clipped(cls, low: float = -5.0, high: float = 3.0) -> Gate:
        """``exp(clamp(s, low, high))`` with a straight-through gradient."""
        return cls("clipped", (low, high))

    @classmethod
    def soft_clipped(cls, bound: float = PARAMETERS["soft-clipped"]["bound"]) -> Gate:
        """``exp(s / (1 + |s| / bound))``; zuko's ``slope`` is ``exp(-bound)``."""
        return cls("soft-clipped", (bound,))

    @classmethod
    def softplus(cls, epsilon: float = 1e-3) -> Gate:
        """``softplus(s) + epsilon``."""
        return cls("softplus", (epsilon,))

    @classmethod
    def shifted_sigmoid(cls, offset: float = 2.0, epsilon: float = 1e-3) -> Gate:
        """``sigmoid(s + offset) + epsilon``."""
        return cls("shifted-sigmoid", (offset, epsilon))

    @classmethod
    def sigmoid(cls, offset: float = 0.0) -> Gate:
        """``sigmoid(s + offset)``, blending with the shift; pyro's ``stable=True`` has an offset of 2."""
        return cls("sigmoid", (offset,))


def _finite(name: str, label: str, number: object) -> float:
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"gate {name!r}: {label} must be a number, got {_checks.describe(number)}")
    if not math.isfinite(number):
        raise ValueError(f"gate {name!r}: {label} must be finite, got {number}")
    return float(number)


#: Less would be 0 or denormal in float32: a logarithm or an inverse of it is not finite.
_LEAST = torch.finfo(torch.float32).tiny


def _check(name: str, numbers: dict[str, float]) -> None:
    if name == "clipped" and not numbers["low"] < numbers["high"]:
        raise ValueError(
            f"gate 'clipped': low must be below high, got low = {numbers['low']}, high = {numbers['high']}"
        )
    for label in ("bound", "epsilon"):
        if label in numbers and not numbers[label] >= _LEAST:
            got = numbers[label]
            raise ValueError(f"gate {name!r}: {label} must be positive, and a normal float32 number, got {got}")


#: The gates with the parameters of their sources: what a name alone means.
DEFAULTS = {name: Gate(name) for name in CODES}


def decoded(code: int, first: float, second: float) -> Gate:
    """The gate that is so ``encoded``."""
    name = _NAMES[code]
    return Gate(name, (first, second)[: len(PARAMETERS[name])])


def invert(gate: Gate, image: Tensor, shift: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(z, log_abs_det, scale)`` of the inverse map, element by element; a scale may have underflowed."""
    scale, rest, log = scale_of(gate, s)
    return (image - (shift if rest is None else rest * shift)) / scale, -log, scale


def refuse_underflow(function: str, scale: Tensor) -> None:
    """Raise where there is no inverse, if the values can be looked at."""
    if _checks.values_readable(scale) and bool((scale < torch.finfo(scale.dtype).tiny).any()):
        raise RuntimeError(
            f"{function}: a scale is below the least normal number, so the map has no inverse: "
            "use a gate with a bounded scale, as clipped, soft-clipped, softplus or shifted-sigmoid"
        )


def scale_of(gate: Gate, s: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """``(sigma, tau, log sigma)`` in plain PyTorch; tau is None where it is 1."""
    name = gate.name
    if name == "sigmoid":
        (offset,) = gate.parameters
        return _logistic(s + offset), _logistic(-s - offset), torch.nn.functional.logsigmoid(s + offset)
    if name == "softplus":
        (epsilon,) = gate.parameters
        # torch drops log1p(exp(-s)) above its threshold, which by default costs 1e-10 in float64
        scale = torch.nn.functional.softplus(s, threshold=40.0) + epsilon
        return scale, None, scale.log()
    if name == "shifted-sigmoid":
        offset, epsilon = gate.parameters
        scale = _logistic(s + offset) + epsilon
        return scale, None, scale.log()
    log_scale = s
    if name == "clipped":
        low, high = gate.parameters
        log_scale = s.clamp(low, high).detach() + (s - s.detach())
    if name == "soft-clipped":
        (bound,) = gate.parameters
        log_scale = s / (1 + s.abs() / bound)
    return log_scale.exp(), None, log_scale


def _logistic(x: Tensor) -> Tensor:
    """``sigmoid(x)`` whose derivative is exact above 0 too, where torch's ``y (1 - y)`` cancels."""
    return torch.where(x > 0, 1 - torch.sigmoid(-x), torch.sigmoid(x))
