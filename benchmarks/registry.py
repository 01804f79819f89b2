"""The table of ops that are timed, from the files of ``ops``."""

from __future__ import annotations

import importlib

from benchmarks import ops
from benchmarks.ops._row import DIRECTIONS, Case, Row

__all__ = ["DIRECTIONS", "FIRST", "ROWS", "Case", "Row", "select"]

#: The files whose rows tables begin with, in their order; those of all others follow by name.
FIRST = (
    "gaussian_leapfrog",
    "masked_linear",
    "local_reparam_linear",
    "affine_autoregressive",
    "bernoulli_log_prob",
    "iwae",
    "planar_flow",
    "radial_flow",
    "rational_quadratic_spline",
    "gaussian_mixture",
)

ROWS: tuple[Row, ...] = tuple(
    row
    for name in (*FIRST, *(name for name in ops.NAMES if name not in FIRST))
    for row in importlib.import_module(f"{ops.__name__}.{name}").ROWS
)


def select(pattern: str | None) -> list[Row]:
    """Rows whose name contains ``pattern``; all without one.

    Raises:
        ValueError: there is none.
    """
    rows = [row for row in ROWS if not pattern or pattern in row.name]
    if not rows:
        raise ValueError(f"no op's name contains {pattern!r}; there are: {', '.join(row.name for row in ROWS)}")
    return rows
