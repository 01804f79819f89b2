"""The printed figures, each by dimension; None where the tables stop. Sigma errors are on standard deviations."""

from __future__ import annotations

_DIMS = (25, 50, 100, 200, 300, 400)
_FIGURES: dict[str, dict[tuple[str, int], tuple[float | None, ...]]] = {
    "theta_error": {
        ("hvae", 1): (22.3, 51.3, 101.3, 196.8, 331.3, 390.2),
        ("hvae", 10): (22.2, 51.2, 101.4, 196.7, 331.7, 390.5),
        ("hvae-untempered", 1): (26.1, 59.1, 117.5, 228.6, 379.5, None),
        ("hvae-untempered", 10): (34.8, 76.4, 152.5, 298.8, 485.5, None),
        ("planar", 1): (37.2, 81.8, 163.5, 322.5, 558.2, 641.7),
        ("planar", 30): (37.3, 81.9, 163.2, 322.3, 520.3, 641.8),
        ("iaf", 1): (23.2, 52.0, 108.3, 219.0, 283.3, 394.3),
        ("vb", 0): (17.3, 43.8, 112.3, 270.1, 679.9, 926.5),
    },
    "delta_error": {
        ("hvae", 1): (22.2, 51.3, 101.2, 196.5, 330.8, 389.6),
        ("hvae", 10): (22.2, 51.1, 101.3, 196.4, 331.3, 389.9),
        ("planar", 1): (22.3, 51.2, 101.1, 196.6, 335.4, 389.6),
        ("planar", 30): (22.3, 51.2, 101.2, 196.9, 331.4, 389.3),
        ("iaf", 1): (22.0, 49.9, 104.1, 210.8, 271.1, 378.0),
        ("vb", 0): (17.3, 43.8, 112.3, 270.1, 679.9, 926.5),
    },
    "sigma_error": {
        ("hvae", 1): (0.04, 0.08, 0.17, 0.33, 0.5, 0.61),
        ("hvae", 10): (0.04, 0.08, 0.15, 0.31, 0.45, 0.61),
        ("planar", 1): (14.97, 30.64, 62.38, 125.9, 222.84, 252.11),
        ("planar", 30): (14.97, 30.74, 62.07, 125.42, 188.87, 252.44),
        ("iaf", 1): (1.14, 2.16, 4.18, 8.18, 12.21, 16.33),
        ("vb", 0): (0.0003, 0.0008, 0.0015, 0.0029, 0.0039, 0.0052),
    },
}
#: Where a printed run turned NaN and its last finite value was printed: what it would have reached.
EXPECTED_AFTER_NAN = {
    ("theta_error", "planar", 1, 300): 520.8,
    ("delta_error", "planar", 1, 300): 331.2,
    ("sigma_error", "planar", 1, 300): 189.6,
}


def figure(name: str, method: str, n_steps: int, dim: int) -> float | None:
    """The printed ``name`` ("theta_error", "delta_error", "sigma_error"), a mean over three data sets."""
    row = _FIGURES[name].get((method, n_steps))
    return row[_DIMS.index(dim)] if row and dim in _DIMS else None


def expected(name: str, method: str, n_steps: int, dim: int) -> float | None:
    """The printed figure, or what stood in its place if the run had not turned NaN."""
    return EXPECTED_AFTER_NAN.get((name, method, n_steps, dim), figure(name, method, n_steps, dim))
