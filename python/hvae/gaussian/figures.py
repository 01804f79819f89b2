"""The study's pictures: errors over dimensions, then bound and errors against epochs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hvae.gaussian import published
from hvae.gaussian.study import ALL_METHODS, ERRORS, FLOORS, SETTINGS, Job, method_label
from hvae.gaussian.train import State
from hvae.runs import writing

Jobs = Sequence[tuple[Job, State]]

#: Figures 1 to 4: title, error and methods.
COMPARISONS = (
    ("Theta error of all methods", "theta_error", tuple(m for m in ALL_METHODS if m != "hvae-untempered")),
    ("Theta error with and without tempering", "theta_error", ("hvae", "hvae-untempered")),
    ("Delta error", "delta_error", ALL_METHODS),
    ("Sigma error", "sigma_error", ALL_METHODS),
)
#: Figures 5 to 8: title and what :func:`~hvae.gaussian.study.measure` calls it.
CURVES = (("Bound", "objective"), *((title, name) for name, title in ERRORS.items()))


TITLES = (*(title for title, *_ in COMPARISONS), *(f"{title} against epochs" for title, _ in CURVES))


def name(number: int) -> str:
    """A figure's file."""
    return f"figure{number}.png"


def draw(directory: Path, jobs: Jobs) -> list[str | None]:
    """Draw the figures in ``directory``, means over the data sets; returns titles, None where nothing is to show."""
    pictures = [
        *(functools.partial(_compare, error, methods) for _, error, methods in COMPARISONS),
        *(functools.partial(_curves, measured) for _, measured in CURVES),
    ]
    drawn: list[str | None] = []
    for number, (title, picture) in enumerate(zip(TITLES, pictures, strict=True), 1):
        figure = picture(jobs)
        drawn.append(title if figure else None)
        if figure:
            figure.suptitle(f"Figure {number}. {title}")
            with writing(directory / name(number)) as partial:
                figure.savefig(partial, dpi=90)
    return drawn


def _compare(name: str, methods: Sequence[str], jobs: Jobs):
    """An error over d, a panel a setting: ours as lines, the floor dotted, printed figures as crosses."""
    shown = [(job, state) for job, state in jobs if job.method in methods]
    settings = [setting for setting in SETTINGS if any(job.setting == setting for job, _ in shown)]
    if not settings:
        return None
    figure, panels = _panels(1, len(settings), 6.5, 5.5)
    for axes, setting in zip(panels[0], settings, strict=True):
        own = [(job, state) for job, state in shown if job.setting == setting]
        for (method, n_steps), group in _by(own, lambda job: (job.method, job.n_steps)).items():
            dims = [job.dim for job, _ in group]
            values = [_mean(state.history[-1][name]) for _, state in group]
            (line,) = axes.plot(dims, values, "o-", markersize=4, label=method_label(method, n_steps))
            if setting == "published":
                printed = [published.figure(name, method, n_steps, dim) or math.nan for dim in dims]
                axes.plot(dims, printed, "x", color=line.get_color(), markersize=8)
        floors = {job.dim: _floor(name, state) for job, state in own if not job.doubles_variance}
        axes.plot(list(floors), list(floors.values()), "k:", label="floor")
        axes.set(xscale="log", yscale="log", xlabel="d", title=setting + " (printed: x)" * (setting == "published"))
        axes.set_xticks(sorted({job.dim for job, _ in own}), [str(d) for d in sorted({job.dim for job, _ in own})])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    _legend(figure, panels[0])
    return figure


def _curves(name: str, jobs: Jobs):
    """A figure against epochs, a row a setting, a column a dimension.

    The bound is that of what a step trains on, as its distance from the largest evidence: a log scale needs a zero.
    """
    if not jobs:
        return None
    settings = [setting for setting in SETTINGS if any(job.setting == setting for job, _ in jobs)]
    dims = sorted({job.dim for job, _ in jobs})
    figure, panels = _panels(len(settings), len(dims), 3.6, 3.6)
    for row, setting in zip(panels, settings, strict=True):
        for axes, dim in zip(row, dims, strict=True):
            group = [(job, state) for job, state in jobs if (job.setting, job.dim) == (setting, dim)]
            for job, state in group:
                records = state.history[1:]
                values = [_mean(record[name]) for record in records]
                if name == "objective":
                    values = [_mean(state.oracles["objective_ceiling"]) - value for value in values]
                epochs = [record["epoch"] for record in records]
                if not any(math.isfinite(value) and value > 0 for value in values):
                    continue  # matplotlib refuses a log scale of nothing
                axes.plot(epochs, values, label=method_label(job.method, job.n_steps), linewidth=1)
            if name in FLOORS and group:
                axes.axhline(_floor(name, group[0][1]), color="black", linestyle=":", label="floor")
            axes.set(xscale="log", yscale="log", title=f"{setting}, d = {dim}")
    for axes in panels[-1]:
        axes.set_xlabel("epochs")
    if name == "objective":
        for row in panels:
            row[0].set_ylabel("nats below the ceiling")
    _legend(figure, panels.flat)
    return figure


def _panels(rows: int, columns: int, width: float, height: float):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows + 0.8), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _legend(figure, panels) -> None:
    handles: dict[str, Any] = {}
    for axes in panels:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(handles), int(figure.get_figwidth() / 2)),
    )


def _by(jobs: Jobs, key: Callable[[Job], tuple]) -> dict[tuple, list[tuple[Job, State]]]:
    groups: dict[tuple, list[tuple[Job, State]]] = {}
    for job, state in jobs:
        groups.setdefault(key(job), []).append((job, state))
    return groups


def _floor(name: str, state: State) -> float:
    return sum(_mean(state.oracles[part]) for part in FLOORS[name])


def _mean(values: Sequence[float | None]) -> float:
    """NaN, which pictures leave out, where one is unknown."""
    return sum(math.nan if value is None else value for value in values) / len(values)
