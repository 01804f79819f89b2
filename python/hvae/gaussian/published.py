"""The printed figures, each by dimension; None where the tables stop. Sigma errors are on standard deviations."""

from __future__ import annotations

_DIMS = (25, 50, 100, 200, 300, 400)
_FIGURES: dict[str, dict[tuple[str, int], tuple[float | None, ...]]] = {
    "theta_error": {
        ("hvae", 1): (22.3, 51.3, 101.3, 196.8, 331.3, 390.2),
        ("hvae", 10): (22.2, 51.2, 101.4, 196.7, 331.7, 390.5),
        ("hvae-untempered", 1): (26.1, 59.1, 117.5, 228.6, 379.5, None),
        ("hvae-untempered", 10): (34.8, 76.4, 152.5, 298.8, 485.5, None),
        ("vb", 0): (17.3, 43.8, 112.3, 270.1, 679.9, 926.5),
    },
    "delta_error": {
        ("hvae", 1): (22.2, 51.3, 101.2, 196.5, 330.8, 389.6),
        ("hvae", 10): (22.2, 51.1, 101.3, 196.4, 331.3, 389.9),
        ("vb", 0): (17.3, 43.8, 112.3, 270.1, 679.9, 926.5),
    },
    "sigma_error": {
        ("hvae", 1): (0.04, 0.08, 0.17, 0.33, 0.5, 0.61),
        ("hvae", 10): (0.04, 0.08, 0.15, 0.31, 0.45, 0.61),
        ("vb", 0): (0.0003, 0.0008, 0.0015, 0.0029, 0.0039, 0.0052),
    },
}


def figure(name: str, method: str, n_steps: int, dim: int) -> float | None:
    """The printed ``name`` ("theta_error", "delta_error", "sigma_error"), a mean over three data sets."""
    row = _FIGURES[name].get((method, n_steps))
    return row[_DIMS.index(dim)] if row and dim in _DIMS else None
