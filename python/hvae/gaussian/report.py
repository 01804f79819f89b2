"""Rows of ``results.json`` from the state files of finished jobs; ``report.md`` and the figures from both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from hvae.gaussian import figures, published
from hvae.gaussian.data import BATCHES_PER_EPOCH
from hvae.gaussian.study import ERRORS, FLOORS, METHODS, Job, method_label
from hvae.gaussian.train import State
from hvae.runs import Row, finite, read_results, table, unreadable

NOTES = """Every figure is a mean over the data sets. Errors are sums of squares, Sigma's on standard deviations, and
Theta's is the sum of the two.

- *printed*: the figure in the documents that the project implements.
- *published*: ours, trained as the documents did (each mini-batch a data set of its own, gradients clipped).
- *corrected*: ours, trained on the bound of all 10,000 points.
- *floor*: the error of the maximum-likelihood estimate. Only z + Delta is identified, so Delta's floor, about |z|^2,
  belongs to the data set, not to a method; a smaller error means that Delta has not arrived.
- *optimum*: the error where the job's own expected bound is largest, known for K = 1; in the published setting for
  mini-batches of 256.
- *no flow*: the error where the flow leaves z at its prior.

Bounds are those of all points, with all constants, in both settings: a flow trained for mini-batches has steps too
long for the narrower posterior of all points, and its bound there can be far below anything useful.
"""


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


def write_report(directory: Path) -> str:
    """Write ``report.md`` and the figures of a run's directory; returns the report's text."""
    config, rows = read_results(directory)
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items())
    parts = ["# The Gaussian study", f"Seed {config['seed']}, {config['datasets']} data sets; {versions}.", NOTES]
    for name, title in ERRORS.items():
        parts += [f"## {title}", error_table(name, rows)]
    parts += ["## Bounds", bound_table(rows)]
    drawn = figures.draw(directory, finished_jobs(directory))
    if drawn:
        parts += ["## Against epochs", *(f"![{path.stem}]({path.name})" for path in drawn)]
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    (directory / "report.md").write_text(text)
    return text


def error_table(name: str, rows: list[Row]) -> str:
    """Printed, ours and exact figures side by side, one line a method and dimension."""
    exact: dict[str, Callable[[list[Row]], float | None]] = {
        "floor": lambda group: sum(_mean(floor, group) for floor in FLOORS[name])
    }
    if name == "sigma_error":
        for setting in ("published", "corrected"):
            exact[f"optimum, {setting}"] = lambda group, setting=setting: _mean("sigma_optimum", _of(group, setting))
        exact["no flow"] = lambda group: _mean("sigma_no_flow", group)
    lines = []
    for (dim, method, n_steps), group in _groups(rows):
        ours = [_mean(name, _of(group, setting)) for setting in ("published", "corrected")]
        printed = published.figure(name, method, n_steps, dim)
        lines.append([dim, method_label(method, n_steps), printed, *ours, *(value(group) for value in exact.values())])
    return table(["d", "method", "printed", "published", "corrected", *exact], lines)


def bound_table(rows: list[Row]) -> str:
    """Bounds of all points with all constants, against evidence and its maximum, and what they cost."""
    lines = []
    for (dim, method, n_steps), group in _groups(rows):
        for setting in ("published", "corrected"):
            some = _of(group, setting)
            if not some:
                continue
            elbo, evidence, ceiling = (_mean(name, some) for name in ("elbo", "log_evidence", "elbo_ceiling"))
            seconds, steps = _mean("seconds", some), some[0]["steps"]
            cost = [steps, seconds * len(some), seconds / steps * 1e6]
            gaps = [None, None] if elbo is None else [evidence - elbo, ceiling - elbo]
            lines.append([dim, method_label(method, n_steps), setting, elbo, *gaps, *cost])
    headers = [
        "d", "method", "setting", "bound", "evidence - bound", "ceiling - bound",
        "steps", "seconds in all", "us a step and data set",
    ]  # fmt: skip
    return table(headers, lines)


def finished_jobs(directory: Path) -> list[tuple[Job, State]]:
    """The finished jobs whose state the directory keeps, in the tables' order."""
    states = [(_job_of(path), State.load(path)) for path in (directory / "jobs").glob("*.pt")]
    done = [(job, state) for job, state in states if state.finished]
    return sorted(done, key=lambda item: (item[0].setting, _order(item[0].dim, item[0].method, item[0].n_steps)))


def state_path(directory: Path, job: Job) -> Path:
    """Where a job's state is kept."""
    return directory / "jobs" / f"{job.key}.pt"


def _job_of(path: Path) -> Job:
    """The job whose :func:`state_path` this is."""
    try:
        return Job.from_key(path.stem)
    except ValueError as error:
        raise unreadable(path) from error


def _order(dim: int, method: str, n_steps: int) -> tuple[int, int, int]:
    return dim, METHODS.index(method), n_steps


def _groups(rows: list[Row]) -> list[tuple[tuple[int, str, int], list[Row]]]:
    groups = defaultdict(list)
    for row in rows:
        groups[row["dim"], row["method"], row["leapfrog_steps"]].append(row)
    return sorted(groups.items(), key=lambda item: _order(*item[0]))


def _of(rows: list[Row], setting: str) -> list[Row]:
    return [row for row in rows if row["setting"] == setting]


def _mean(name: str, rows: list[Row]) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return _average(values) if values else None


def _average(values: list[float]) -> float:
    return sum(values) / len(values)
