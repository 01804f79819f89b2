"""The task ``classify``: rows of ``results.json``, the report's tables and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvae import runs
from hvae.data.clutter import PIECE
from hvae.draw.classifiers import GLIMPSE
from hvae.draw.classify import LEARNING_RATE, Job, Setting
from hvae.draw.models import HIDDEN, window
from hvae.draw.study import BATCH_SIZE
from hvae.draw.train import State
from hvae.experiment import Config, table, versions
from hvae.runs import Row, writing

NOTES = f"""\
A digit lies somewhere on a dark image, among pieces of {PIECE} x {PIECE} pixels of other digits; in training all places
and pieces are drawn anew in every epoch. Errors are in per cent of the images.

- *train*: over the last epoch's steps; *validation*: of held-out digits after it, among pieces of held-out digits.
- *printed*: the papers' errors, from memory: 100 x 100 pixels, 8 pieces, all of MNIST, many more updates; of RAM, whose
  glimpses are not differentiable, beside that of differentiable ones. Shown, not chased.
- A reader sees {GLIMPSE} x {GLIMPSE} filters of each glimpse, with an LSTM of {HIDDEN} units. The convolutional network
  is RAM's baseline. Adam at {LEARNING_RATE:g}, batches of {BATCH_SIZE}, gradients clipped to a norm of 10. All jobs
  take the same images."""


def row_of(job: Job, state: State, setting: Setting) -> Row:
    """A finished job's row."""
    last = state.history[-1]
    return {
        **{"method": "reader" if job.glimpses else "convolutional", "glimpses": job.glimpses},
        **{"train_error": last["train"], "validation_error": last["validation"]},
        **{name: runs.finite(last[name]) for name in ("train_loss", "validation_loss")},
        **{"epochs": state.epoch, "steps": state.epoch * setting.steps_per_epoch, "seconds": state.seconds},
    }


def tables(config: Config, rows: list[Row]) -> list[str]:
    """The report but for its figures."""
    rounded = ", pixels rounded to black or white" if config["data"] == "sample" else ""
    about = (
        f"Seed {config['seed']}; data {config['data']}: {config['n_train']:,} digits for training, "
        f"{config['n_validation']:,} for validation{rounded}, on {config['side']} x {config['side']} pixels with "
        f"{config['pieces']} pieces; {versions(config)}."
    )
    return ["# Cluttered digits", about, NOTES, error_table(rows)]


def summary(config: Config, rows: list[Row]) -> tuple[list[str], list[list[Any]]]:
    """Of the table that the command prints."""
    lines = []
    for row in rows:
        job = Job.from_key(row["job"])
        errors = [100 * row[name] for name in ("train_error", "validation_error")]
        lines.append([job.label, *errors, *job.published, row["seconds"]])
    return ["model", "train error, %", "validation error, %", "printed", "printed, RAM", "seconds"], lines


def error_table(rows: list[Row]) -> str:
    """One line a model, beside the printed figures."""
    lines = []
    for row in rows:
        job = Job.from_key(row["job"])
        errors = [100 * row[name] for name in ("train_error", "validation_error")]
        lines.append([job.label, *errors, *job.published, row["epochs"], row["seconds"] / row["epochs"]])
    headers = ["model", "train", "validation", "printed", "printed, RAM", "epochs", "seconds an epoch"]
    return table(headers, lines)


def draw(directory: Path, jobs: Sequence[tuple[Job, State]]) -> list[str]:
    """Draw the figures in ``directory``; returns the report's part of each."""
    parts = [f"## Training\n\n![Errors against epochs]({_curves(directory / 'curves.png', jobs).name})"]
    parts.append("## Where it looks: glimpses from the first, blue, to the last, red")
    for job, state in jobs:
        if job.glimpses:
            path = directory / f"glimpses-{job.key}.png"
            _glimpses(path, job, state)
            parts.append(f"![{job.label}]({path.name})")
    return parts


def _curves(path: Path, jobs: Sequence[tuple[Job, State]]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for job, state in jobs:
        epochs = [record["epoch"] for record in state.history]
        errors = {name: [100 * record[name] for record in state.history] for name in ("train", "validation")}
        (line,) = axes.plot(epochs, errors["validation"], label=job.label, marker=".")
        axes.plot(epochs, errors["train"], color=line.get_color(), linestyle="--")
    axes.set(xlabel="epochs", ylabel="error, per cent", title="Validation, and training dashed")
    axes.set_ylim(bottom=0)
    axes.legend()
    with writing(path) as partial:
        figure.savefig(partial, dpi=100)
    return path


def _glimpses(path: Path, job: Job, state: State) -> None:
    """Validation images with the squares of filters' centres, and what they were taken for."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    images, reads = state.pictures["images"], state.pictures["reads"]
    count, side = images.shape[:2]
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(2.4 * columns, 2.6 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels:
        axes.set_axis_off()
    for place, axes in enumerate(panels[:count]):
        axes.imshow(images[place].tolist(), cmap="gray", vmin=0, vmax=255)
        for step, numbers in enumerate(reads[:, place]):
            left, top, width = window(numbers, GLIMPSE, side).tolist()
            colour = colormaps["coolwarm"](step / max(job.glimpses - 1, 1))
            axes.add_patch(Rectangle((left, top), width, width, fill=False, edgecolor=colour, linewidth=1.2))
        label, predicted = (state.pictures[name][place].item() for name in ("labels", "predicted"))
        axes.set(xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5))
        axes.set_title(f"{label}, taken for {predicted}", fontsize="small")
    figure.suptitle(f"{job.label}, {state.epoch} epochs", fontsize="small")
    with writing(path) as partial:
        figure.savefig(partial, dpi=100)
