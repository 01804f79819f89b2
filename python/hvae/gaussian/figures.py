"""The study's pictures: bound and errors against epochs, methods compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from hvae.gaussian import published
from hvae.gaussian.study import ERRORS, FLOORS, Job, method_label
from hvae.gaussian.train import State


def draw(directory: Path, jobs: Sequence[tuple[Job, State]]) -> list[Path]:
    """One picture a setting and dimension, as ``{setting}-d{dim}.png`` in ``directory``; returns their paths."""
    from matplotlib.figure import Figure

    pictures = defaultdict(list)
    for job, state in jobs:
        pictures[job.setting, job.dim].append((job, state))
    drawn = []
    for (setting, dim), group in pictures.items():
        figure = Figure(figsize=(11, 8), layout="constrained")
        figure.suptitle(f"d = {dim}, {setting} setting, mean of the data sets")
        first, *others = figure.subplots(2, 2, sharex=True).flat
        _draw_bound(first, group)
        for axes, name in zip(others, ERRORS, strict=True):
            _draw_error(axes, name, group)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(group) + 1)
        drawn.append(directory / f"{setting}-d{dim}.png")
        figure.savefig(drawn[-1], dpi=120)
    return drawn


def _draw_bound(axes, jobs: Sequence[tuple[Job, State]]) -> None:
    """The bound of what a step trains on, as its distance from the largest evidence: a log scale needs a zero."""
    for job, state in jobs:
        ceiling = _mean(state.oracles["objective_ceiling"])
        _draw_line(axes, job, state, [ceiling - _mean(record["objective"]) for record in state.history])
    axes.set(xscale="log", yscale="log", xlabel="epochs", title="Bound of a step's data, nats below its ceiling")


def _draw_error(axes, name: str, jobs: Sequence[tuple[Job, State]]) -> None:
    for job, state in jobs:
        line = _draw_line(axes, job, state, [_mean(record[name]) for record in state.history])
        printed = published.figure(name, job.method, job.n_steps, job.dim)
        if printed is not None:
            axes.axhline(printed, color=line.get_color(), linestyle="--", linewidth=0.8)
    # the floors belong to the data, so any job's will do
    floor = sum(_mean(jobs[0][1].oracles[part]) for part in FLOORS[name])
    axes.axhline(floor, color="black", linestyle=":", label="floor")
    axes.set(xscale="log", yscale="log", xlabel="epochs", title=f"{ERRORS[name]} (printed figures dashed)")


def _draw_line(axes, job: Job, state: State, values: list[float]):
    epochs = [record["epoch"] for record in state.history[1:]]
    (line,) = axes.plot(epochs, values[1:], label=method_label(job.method, job.n_steps))
    return line


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
