"""The study's pictures: canvases step by step with the windows that are read and written, and the curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hvae.data.mnist import SIDE
from hvae.draw.models import WRITE, window
from hvae.draw.study import Job
from hvae.draw.train import State
from hvae.runs import writing

#: How many canvases of a digit are shown.
N_SHOWN = 10


def draw(directory: Path, jobs: Sequence[tuple[Job, State]]) -> list[str]:
    """Draw the figures in ``directory``; returns the report's part of each."""
    if not jobs:
        return []
    parts = [f"## Training\n\n![Bounds against epochs]({_curves(directory / 'curves.png', jobs).name})"]
    for title, name in (
        ("Digits drawn step by step; the window that is written is red", "samples"),
        ("Validation digits, left, drawn again; windows read are green, written red", "reconstructions"),
    ):
        parts.append(f"## {title}")
        for job, state in jobs:
            path = directory / f"{name}-{job.key}.png"
            _steps(path, job, state, name)
            parts.append(f"![{job.label}]({path.name})")
    return parts


def _curves(path: Path, jobs: Sequence[tuple[Job, State]]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for job, state in jobs:
        epochs = [record["epoch"] for record in state.history]
        (line,) = axes.plot(epochs, [-record["validation"] for record in state.history], label=job.label)
        axes.plot(epochs, [-record["train"] for record in state.history], color=line.get_color(), linestyle="--")
    axes.set(xlabel="epochs", ylabel="negative bound, nats an image", title="Validation, and training dashed")
    axes.legend()
    with writing(path) as partial:
        figure.savefig(partial, dpi=72)
    return path


def _steps(path: Path, job: Job, state: State, name: str) -> None:
    """A row a digit, a column a step; of reconstructions the digit itself comes first."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from PIL import Image

    canvases = state.pictures[name]
    steps = torch.linspace(0, job.steps - 1, min(job.steps, N_SHOWN)).round().long().tolist()
    own = name == "reconstructions"
    rows, columns = canvases.shape[1], len(steps) + own
    figure = Figure(figsize=(0.7 * columns, 0.7 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        if own:
            _show(panels[row][0], state.pictures["images"][row])
        for axes, step in zip(panels[row][own:], steps, strict=True):
            _show(axes, canvases[step, row])
            for part, size, colour in (("reads", job.read, "tab:green"), ("writes", WRITE, "tab:red")):
                if (windows := state.pictures.get(f"{name}-{part}")) is not None:
                    left, top, side = window(windows[step, row], size).tolist()
                    axes.add_patch(Rectangle((left, top), side, side, fill=False, edgecolor=colour, linewidth=0.8))
    figure.suptitle(f"{job.label}, {state.epoch} epochs", fontsize="small")
    with writing(path) as partial:
        figure.savefig(partial, dpi=100)
        with Image.open(partial) as image:  # a third of the bytes: greys, and two colours
            image.convert("RGB").quantize(64).save(partial, optimize=True)


def _show(axes, pixels: Tensor) -> None:
    axes.imshow(pixels.view(SIDE, SIDE).tolist(), cmap="gray_r", vmin=0, vmax=255, interpolation="nearest")
    axes.set(xticks=[], yticks=[], xlim=(-0.5, SIDE - 0.5), ylim=(SIDE - 0.5, -0.5))
