"""GPU kernels of ``rational_quadratic_spline``.

The formulas, in ``bins``, are those of csrc/kernels/rational_quadratic_spline.h, under the same names.
"""

from hvae_kernels.ops.rational_quadratic_spline.triton.launch import (
    rational_quadratic_spline,
    rational_quadratic_spline_backward,
    rational_quadratic_spline_double_backward,
)

__all__ = [
    "rational_quadratic_spline",
    "rational_quadratic_spline_backward",
    "rational_quadratic_spline_double_backward",
]
