"""Monotone rational-quadratic splines, element by element; see README.md."""

from hvae_kernels.ops.rational_quadratic_spline.api import rational_quadratic_spline
from hvae_kernels.ops.rational_quadratic_spline.spline import Spline

__all__ = ["Spline", "rational_quadratic_spline"]
