"""Rows of ``results.json`` from the state files of finished jobs; ``report.md`` and the figures from both."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvae.experiment import Config, table, versions
from hvae.gaussian import figures, published, texts
from hvae.gaussian.data import BATCHES_PER_EPOCH
from hvae.gaussian.study import ALL_METHODS, FLOORS, SETTINGS, Job, method_label
from hvae.gaussian.train import State
from hvae.runs import Row, finite


def rows_of(job: Job, state: State) -> list[Row]:
    """A finished job as rows, one a data set; ``seconds`` is each data set's share of the training time.

    A figure that is not finite (the bound of a flow far out of its stability region) becomes None.
    """
    measured = {name: values for name, values in state.history[-1].items() if name != "epoch"} | state.oracles
    n_sets = len(state.flat)
    common = {"method": job.method, "dim": job.dim, "leapfrog_steps": job.n_steps, "setting": job.setting}
    cost = {"epochs": state.epochs, "steps": state.epochs * BATCHES_PER_EPOCH, "seconds": state.seconds / n_sets}
    return [
        {**common, "dataset": i, **{name: finite(values[i]) for name, values in measured.items()}, **cost}
        for i in range(n_sets)
    ]


def tables(config: Config, rows: list[Row]) -> list[str]:
    """The report but for its figures."""
    about = f"Seed {config['seed']}, {config['datasets']} data sets; {versions(config)}."
    parts = ["# The Gaussian study", about, texts.NOTES]
    for heading, name, methods, text in texts.TABLES:
        some = [row for row in rows if row["method"] in methods]
        if some:
            parts += [f"## {heading}", text, error_table(name, some)]
    parts += ["## Bounds", texts.BOUNDS, bound_table(rows), "## Time", texts.TIME, time_table(rows)]
    return parts


def summary(config: Config, rows: list[Row]) -> tuple[list[str], list[list[Any]]]:
    """Of the table that the command prints: each error beside the exact floor of it."""
    dims, settings = ({row[name] for row in rows} for name in ("dim", "setting"))
    names = [name for error in ("delta_error", "sigma_error") for name in (error, *FLOORS[error])]
    lines = []
    for (dim, method, n_steps), group in _groups(rows):
        for setting in SETTINGS:
            if some := _of(group, setting):
                case = [dim if len(dims) > 1 else None, setting if len(settings) > 1 else None]
                figures = [_mean(name, some) for name in (*names, "elbo")]
                seconds = sum(row["seconds"] for row in some)
                lines.append([method_label(method, n_steps), *case, *figures, seconds])
    errors = ["Delta error", "exact floor", "Sigma error", "exact floor"]
    return ["method", "d", "setting", *errors, "bound", "seconds"], lines


def drawn(directory: Path, jobs: figures.Jobs) -> list[str]:
    """The report's figures."""
    shown = [(number, title) for number, title in enumerate(figures.draw(directory, jobs), 1) if title]
    return [f"## Figure {number}. {title}\n\n![{title}]({figures.name(number)})" for number, title in shown]


def error_table(name: str, rows: list[Row]) -> str:
    """Printed, ours and exact figures side by side, one line a method and dimension."""
    exact: dict[str, Callable[[list[Row]], float | None]] = {"floor": lambda group: _floor(name, group)}
    if name == "sigma_error":
        exact |= {
            "optimum": functools.partial(_mean, "sigma_optimum"),
            "no flow": functools.partial(_mean, "sigma_no_flow"),
        }
    lines = []
    for (dim, method, n_steps), group in _groups(rows):
        line = [dim, method_label(method, n_steps), *_printed(name, group)]
        for setting in ("published", "corrected"):
            own = _of(group, setting)
            line += [_mean(name, own), *(value(own) for value in exact.values())]
        lines.append(line)
    columns = ["d", "method", "printed", "off"]
    for setting in ("published", "corrected"):
        columns += [setting, *(f"{setting} {column}" for column in exact)]
    return table(columns, lines)


def _printed(name: str, group: list[Row]) -> tuple[float | str | None, str | None]:
    """The printed figure, and how far our published one is from it (or from what it would have been)."""
    case = group[0]["method"], group[0]["leapfrog_steps"], group[0]["dim"]
    printed, expected = published.figure(name, *case), published.expected(name, *case)
    ours = _mean(name, _of(group, "published"))
    off = f"{100 * (ours / expected - 1):+.2f} %" if ours is not None and expected is not None else None
    return printed if printed == expected else f"{printed} (NaN: {expected})", off


def _floor(name: str, group: list[Row]) -> float | None:
    floors = [_mean(floor, group) for floor in FLOORS[name]]
    known = [floor for floor in floors if floor is not None]
    return sum(known) if len(known) == len(floors) else None


def bound_table(rows: list[Row]) -> str:
    """Bounds of all points with all constants, against evidence and its maximum."""
    lines = []
    for (dim, method, n_steps), group in _groups(rows):
        for setting in ("published", "corrected"):
            some = _of(group, setting)
            if not some:
                continue
            elbo, evidence, ceiling = (_mean(name, some) for name in ("elbo", "log_evidence", "elbo_ceiling"))
            gap = None if elbo is None or evidence is None else evidence - elbo
            lost = None if evidence is None or ceiling is None else ceiling - evidence
            lines.append([dim, method_label(method, n_steps), setting, elbo, evidence, gap, lost])
    headers = ["d", "method", "setting", "bound", "log p(D)", "log p(D) - bound", "ceiling - log p(D)"]
    return table(headers, lines)


def time_table(rows: list[Row]) -> str:
    """Seconds of training, all data sets of a row together, a column a dimension."""
    dims = sorted({row["dim"] for row in rows})
    seconds: dict[tuple, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for job, row in sorted(((Job.from_key(row["job"]), row) for row in rows), key=lambda item: item[0].order):
        for label in (method_label(job.method, job.n_steps), "all"):
            seconds[job.setting, label][job.dim] += row["seconds"]
    lines = [
        [*line, *(own.get(dim) for dim in dims), sum(own.values())]
        for line, own in sorted(seconds.items(), key=lambda item: (item[0][0], item[0][1] == "all"))
    ]
    return table(["setting", "method", *(f"d = {dim}" for dim in dims), "seconds"], lines)


def _case(row: Row) -> tuple[int, str, int]:
    return row["dim"], row["method"], row["leapfrog_steps"]


def _groups(rows: list[Row]) -> list[tuple[tuple[int, str, int], list[Row]]]:
    groups = defaultdict(list)
    for row in rows:
        groups[_case(row)].append(row)
    return sorted(groups.items(), key=lambda item: (item[0][0], ALL_METHODS.index(item[0][1]), item[0][2]))


def _of(rows: list[Row], setting: str) -> list[Row]:
    return [row for row in rows if row["setting"] == setting]


def _mean(name: str, rows: list[Row]) -> float | None:
    """None where it is unknown of any row."""
    values = [row[name] for row in rows]
    return sum(values) / len(values) if values and None not in values else None
