"""What autoregressive and coupling flows do to a feature, given its parameters from a network."""

from __future__ import annotations

import functools

from torch import Tensor

from hvae_kernels import _checks, _library
from hvae_kernels.ops.affine_autoregressive import Gate, affine_autoregressive, gates
from hvae_kernels.ops.rational_quadratic_spline import Spline, rational_quadratic_spline


def checked(name: str, gate: str | Gate | Spline) -> Gate | Spline:
    """The gate of this name, or the gate or spline itself."""
    if not isinstance(gate, (str, Gate, Spline)):
        raise _checks.type_error(name, "gate", "a name, a Gate or a Spline", gate)
    return Gate(gate) if isinstance(gate, str) else gate


def outputs_of(gate: Gate | Spline) -> int:
    """How many parameters a feature has: shift and raw scale, or the spline's."""
    return gate.parameters if isinstance(gate, Spline) else 2


def apply(gate: Gate | Spline, z: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
    """``z (..., d)`` by ``parameters (..., outputs, d)`` to ``(z', log_abs_det)``."""
    if isinstance(gate, Spline):
        return rational_quadratic_spline(z, parameters.mT, gate)
    shift, raw = parameters.unbind(-2)
    return affine_autoregressive(z, shift, raw, gate=gate)


def invert(gate: Gate | Spline, image: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(z, log_abs_det)`` of the inverse map, and the scale of an affine one, which may have underflowed."""
    if isinstance(gate, Spline):
        return *rational_quadratic_spline(image, parameters.mT, gate, inverse=True), None
    if _library.autocasts(image):
        return _library.in_float32(functools.partial(invert, gate), image, parameters)
    z, logs, scale = gates.invert(gate, image, *parameters.unbind(-2))
    return z, logs.sum(-1), scale


def refuse_underflow(function: str, scale: Tensor | None) -> None:
    """Raise where an affine map has no inverse, if the values can be looked at."""
    if scale is not None:
        gates.refuse_underflow(function, scale)
