"""The study's pictures: views never seen, lines between chairs, features added and taken away, new chairs, curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hvae.chairs.study import Job
from hvae.chairs.train import State
from hvae.runs import writing

Jobs = Sequence[tuple[Job, State]]

TITLES = {
    "unseen": "Views never seen: the nearest view seen, what the network draws, the truth",
    "interpolation": "From one chair to another",
    "arithmetic": "Feature arithmetic: two chairs a row, each as it is, with the other feature, and the truth",
    "samples": "New chairs, z from the prior",
}


def draw(directory: Path, jobs: Jobs) -> list[str]:
    """Draw the figures in ``directory``; returns the report's part of each."""
    if not jobs:
        return []
    path = directory / "curves.png"
    with writing(path) as partial:
        _curves(jobs).savefig(partial, dpi=80)
    parts = [f"## Training\n\n![Bound and error of unseen views against epochs]({path.name})"]
    for name, title in TITLES.items():
        shown = [(job, state) for job, state in jobs if name in state.pictures]
        if shown:
            parts.append(f"## {title}")
        for job, state in shown:
            path = directory / f"{name}-{job.key}.png"
            with writing(path) as partial:
                _rows(state.pictures[name], job.label).savefig(partial, dpi=80)
            parts.append(f"![{job.label}]({path.name})")
    return parts


def _curves(jobs: Jobs):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for job, state in jobs:
        epochs = [record["epoch"] for record in state.history]
        left.plot(epochs, [record["bound"] for record in state.history], label=job.label)
        right.plot(epochs, [record["unseen"] for record in state.history], label=job.label)
    left.set(xlabel="epochs", ylabel="bound, nats a picture", title="Training")
    right.set(xlabel="epochs", ylabel="error", title="Views never seen", ylim=(0, None))
    right.legend()
    return figure


def _rows(pictures: Tensor, label: str):
    """Rows of pictures ``(rows, columns, S, S, 3)`` as one."""
    from matplotlib.figure import Figure

    rows, columns = pictures.shape[:2]
    whole = torch.cat([torch.cat(list(row), 1) for row in pictures], 0)
    figure = Figure(figsize=(0.8 * columns, 0.8 * rows + 0.25), layout="constrained")
    axes = figure.subplots()
    axes.imshow(whole.numpy(), interpolation="nearest", aspect="equal")
    axes.set_axis_off()
    axes.set_title(label, fontsize="small")
    return figure
