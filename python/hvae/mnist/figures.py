"""The study's pictures: training curves, samples, reconstructions, and digits along the leapfrog steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvae.autoencoder import AutoEncoder
from hvae.data.mnist import SIDE
from hvae.mnist.study import Job
from hvae.runs import writing
from hvae.structured.figures import draw_graph

if TYPE_CHECKING:
    from hvae.mnist.state import State

N_SAMPLES, N_RECONSTRUCTIONS = 64, 16
TITLES = {
    "samples": "Samples of the model",
    "reconstructions": "Validation digits, and below each its reconstruction",
    "pseudo-inputs": "Pseudo-inputs",
    "graph": "Learned dependencies",
    "trajectories": "Along the leapfrog steps, from left to right",
}


@torch.no_grad()
def pictures(model: AutoEncoder, pixels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Grids ``(rows, columns, 784)`` of intensities, uint8, from validation images ``(N, 784)``; and the graph."""
    samples = torch.sigmoid(model.decoder(model.sample_prior(N_SAMPLES, generator).to(pixels.device)))
    grids = {"samples": samples.view(8, -1, SIDE**2)}
    shown = pixels[:N_RECONSTRUCTIONS]
    noise = torch.randn(1, len(shown), model.noise_features, generator=generator).to(pixels.device)
    reconstructions = torch.sigmoid(model.reconstruct(shown, noise))
    grids["reconstructions"] = torch.stack([shown.to(reconstructions.dtype), reconstructions])
    grids |= model.pictures(pixels, generator)
    intensities = {name: (grid * 255).round().to(torch.uint8).cpu() for name, grid in grids.items()}
    graph = model.graph()
    return intensities if graph is None else intensities | {"graph": graph.cpu()}


def draw(directory: Path, jobs: Sequence[tuple[Job, State]]) -> dict[str, list[Path]]:
    """Write every picture to the directory; returns their paths under a title each."""
    drawn = {"Training curves": [draw_curves(directory / "curves.png", jobs)]} if jobs else {}
    if timed := [(job, state) for job, state in jobs if state.processor_seconds]:
        drawn["What a bound costs"] = [draw_costs(directory / "costs.png", timed)]
    for name, title in TITLES.items():
        for job, state in jobs:
            if name in state.pictures:
                path = directory / f"{name}-{job.key}.png"
                draw_picture = draw_graph if name == "graph" else draw_grid
                draw_picture(path, state.pictures[name], f"{job.label}, {state.epoch} epochs")
                drawn.setdefault(title, []).append(path)
    return drawn


def draw_curves(path: Path, jobs: Sequence[tuple[Job, State]]) -> Path:
    """Negative bounds against epochs, those of training dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for job, state in jobs:
        epochs = [record["epoch"] for record in state.history]
        (line,) = axes.plot(epochs, [-record["validation"] for record in state.history], label=job.label, marker=".")
        trained = [(record["epoch"], -record["train"]) for record in state.history if record["train"] is not None]
        axes.plot(*zip(*trained, strict=True), color=line.get_color(), linestyle="--")
    lowest = min(-record["validation"] for _, state in jobs for record in state.history)
    axes.set(xlabel="epochs", ylabel="negative bound, nats an image", title="Validation, and training dashed")
    axes.set_ylim(bottom=lowest - 8, top=lowest + 60)
    axes.legend()
    with writing(path) as partial:
        figure.savefig(partial, dpi=120)
    return path


def draw_costs(path: Path, jobs: Sequence[tuple[Job, State]]) -> Path:
    """Negative bounds of validation images against the processor's seconds until then, all epochs taken as alike."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    bounds = [-record["validation"] for _, state in jobs for record in state.history]
    for job, state in jobs:
        seconds = [record["epoch"] * state.processor_seconds / state.epoch for record in state.history]
        axes.plot(seconds, [-record["validation"] for record in state.history], label=job.label, marker=".")
    axes.set(xlabel="seconds of processor", ylabel="negative bound, nats an image", title="Validation", xscale="log")
    axes.set_ylim(bottom=min(bounds) - 2, top=min(bounds) + 40)
    axes.legend()
    with writing(path) as partial:
        figure.savefig(partial, dpi=120)
    return path


def draw_grid(path: Path, grid: Tensor, title: str) -> None:
    """A grid ``(rows, columns, 784)`` of intensities as one picture."""
    from matplotlib.figure import Figure

    rows, columns, _ = grid.shape
    image = grid.view(rows, columns, SIDE, SIDE).transpose(1, 2).reshape(rows * SIDE, columns * SIDE)
    figure = Figure(figsize=(max(columns * 0.6, 4.0), rows * 0.6 + 0.4), layout="constrained")  # room for the title
    axes = figure.subplots()
    axes.imshow(image.tolist(), cmap="gray_r", vmin=0, vmax=255)
    axes.set_axis_off()
    axes.set_title(title, fontsize="small")
    with writing(path) as partial:
        figure.savefig(partial, dpi=120)
