"""The shapes that the Gaussian leapfrog takes, read in one place."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Layout(NamedTuple):
    """Every call is ``replicas`` independent problems of ``rows`` rows of ``features``, over ``n_steps`` steps.

    ``replicated`` tells the form of the arguments: ``z (R, B, d)`` with parameters of their own for each replica,
    or ``z (..., d)`` with shared ones. ``step_rows`` is how many step-size rows there are: 1, or ``n_steps``.
    """

    replicated: bool
    replicas: int
    rows: int
    features: int
    n_steps: int
    step_rows: int
    scalar_step: bool


def layout(z: Tensor, precision: Tensor, step_size: Tensor, tempering: Tensor) -> Layout:
    """Read the layout of validated arguments."""
    features = z.shape[-1]
    n_steps = tempering.shape[-1]
    replicated = tempering.dim() == 2
    if replicated:
        return Layout(True, z.shape[0], z.shape[1], features, n_steps, step_size.shape[1], False)
    rows = 1
    for size in z.shape[:-1]:
        rows *= size
    step_rows = n_steps if step_size.dim() == 2 else 1
    return Layout(False, 1, rows, features, n_steps, step_rows, step_size.dim() == 0)
