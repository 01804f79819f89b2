"""The study's picture: every flow's samples, a row a flow and K and a column an energy, below the energies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hvae.energies.report import NAMES
from hvae.energies.study import Job
from hvae.energies.targets import ENERGIES, WINDOW, Energy
from hvae.energies.train import PIXELS, State
from hvae.runs import writing

TITLE = "Targets and samples"


def draw(directory: Path, jobs: Sequence[tuple[Job, State]]) -> list[str]:
    """Draw the figure in ``directory``; returns the report's part of it, if there is anything to show."""
    if not jobs:
        return []
    path = directory / "densities.png"
    with writing(path) as partial:
        _pictures(jobs).savefig(partial, dpi=70)
    about = f"Above the targets, in [-{WINDOW:g}, {WINDOW:g}] both ways; below, where samples of q fall."
    return [f"## {TITLE}\n\n{about}\n\n![{TITLE}]({path.name})"]


def target(energy: Energy) -> Tensor:
    """``exp(-U)`` at the pixels' middles."""
    line = ((torch.arange(PIXELS) + 0.5) / PIXELS * 2 - 1) * WINDOW
    return torch.exp(-energy(torch.stack(torch.meshgrid(line, line, indexing="ij"), -1)))


def _pictures(jobs: Sequence[tuple[Job, State]]):
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys((job.flow, job.layers) for job, _ in jobs))
    size = 1.6 * len(ENERGIES) + 0.6, 1.6 * (1 + len(rows))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1 + len(rows), len(ENERGIES), squeeze=False)
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
        axes.set_frame_on(False)
    for axes, (number, energy) in zip(panels[0], ENERGIES.items(), strict=True):
        _show(axes, target(energy))
        axes.set_title(f"U{number}")
    panels[0, 0].set_ylabel("target")
    for row, (flow, layers) in enumerate(rows, 1):
        panels[row, 0].set_ylabel(f"{NAMES[flow]}, K = {layers}", fontsize=8)
    for job, state in jobs:
        _show(panels[1 + rows.index((job.flow, job.layers)), list(ENERGIES).index(job.energy)], state.picture)
    return figure


def _show(axes, picture: Tensor) -> None:
    """The first coordinate to the right, the second one up."""
    axes.imshow(picture.mT.numpy(), origin="lower", cmap="magma", interpolation="nearest")
