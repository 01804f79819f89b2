"""Rows of ``results.json`` from the state files of finished jobs; ``report.md`` from both."""

from __future__ import annotations

from typing import Any

from hvae import runs
from hvae.energies import models
from hvae.energies.study import BATCH_SIZE, UPDATES, Job
from hvae.energies.targets import ENERGIES, STEP, WALL, WINDOW
from hvae.energies.train import State
from hvae.experiment import Config, table, versions
from hvae.runs import Row

NAMES = {"planar": "planar", "radial": "radial", "nice": "NICE"}
NOTES = f"""\
Planar, radial and volume-preserving (NICE: additive couplings, networks of {models.HIDDEN} tanh units) flows of K
layers over a Gaussian whose means and scales are learned too, fitted to the energies of Rezende and Mohamed (2015),
Table 1. The paper shows pictures alone; here is `KL(q | p)`, in nats: the mean of `log q(z) + U(z)` over samples of q,
± two standard errors, plus the logarithm of the integral of `exp(-U)`, by quadrature on a grid of step {STEP:g}.

- U2, U3 and U4 do not grow along the first coordinate: as printed, their `exp(-U)` has no finite integral, and no flow
  can come near. They get walls at the sides of the printed window: `1/2 (max(|z_1| - {WINDOW:g}, 0) / {WALL:g})^2` is
  added. Inside of [-{WINDOW:g}, {WINDOW:g}] nothing changes.
- Adam at 5e-3, to nothing over the second half; batches of {BATCH_SIZE}; the energy is multiplied by a factor that
  rises from 0.01 to 1 over the first half. One run each: a flow of more layers may still end in a worse optimum."""


def row_of(job: Job, state: State) -> Row:
    """A finished job's row."""
    return {
        **{"method": job.flow, "dim": 2, "layers": job.layers, "energy": job.energy},
        **{name: runs.finite(value) for name, value in state.figures.items()},
        **{"samples_shown": int(state.picture.sum())},
        **{"epochs": state.epoch, "steps": state.epoch * UPDATES, "seconds": state.seconds},
    }


def tables(config: Config, rows: list[Row]) -> list[str]:
    """The report but for its figures."""
    about = f"Seed {config['seed']}, {config['epochs'] * UPDATES:,} updates, {config['samples']:,} samples"
    return ["# Densities", f"{about}; {versions(config)}.", NOTES, "## Divergences", divergences(rows)]


def summary(config: Config, rows: list[Row]) -> tuple[list[str], list[list[Any]]]:
    """Of the table that the command prints: divergences ± two standard errors."""
    headers, lines = _divergences(rows, "{:.3g} ± {:.1g}")
    return [*headers, "seconds"], lines


def divergences(rows: list[Row]) -> str:
    """One line a flow and K, one column an energy."""
    headers, lines = _divergences(rows, "{:.4f} ± {:.4f}")
    return table(headers, [line[:-1] for line in lines])


def _divergences(rows: list[Row], form: str) -> tuple[list[str], list[list[Any]]]:
    """With the seconds of all energies in the last column, which has no header."""
    found = {(row["method"], row["layers"], row["energy"]): row for row in rows}
    lines: list[list[Any]] = []
    for method, layers in dict.fromkeys((row["method"], row["layers"]) for row in rows):
        cells = [found.get((method, layers, energy)) for energy in ENERGIES]
        texts = [
            form.format(row["divergence"], 2 * row["divergence_error"])
            if row and None not in (row["divergence"], row["divergence_error"])
            else None
            for row in cells
        ]
        lines.append([f"{NAMES[method]}, K = {layers}", *texts, sum(row["seconds"] for row in cells if row)])
    return ["flow", *(f"U{energy}" for energy in ENERGIES)], lines
