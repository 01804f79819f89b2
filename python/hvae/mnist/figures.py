"""The study's pictures: training curves, samples, reconstructions, and digits along the leapfrog steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvae.data.mnist import SIDE
from hvae.mnist.models import Model
from hvae.mnist.study import Job

if TYPE_CHECKING:
    from hvae.mnist.train import State

N_SAMPLES, N_RECONSTRUCTIONS, N_TRAJECTORIES = 64, 16, 8
TITLES = {
    "samples": "Samples of the model",
    "reconstructions": "Validation digits, and below each its reconstruction",
    "trajectories": "Along the leapfrog steps, from left to right",
}


@torch.no_grad()
def pictures(model: Model, pixels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Grids ``(rows, columns, 784)`` of intensities, uint8, from validation images ``(N, 784)``."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(pixels.device)

    logits = model.decoder(noise(N_SAMPLES, model.latent))
    grids = {"samples": _intensities(logits).view(8, -1, SIDE**2)}
    shown = pixels[:N_RECONSTRUCTIONS]
    z, *_, decode = model.transport(shown, model.encode(shown), noise(1, len(shown), model.noise_features))
    grids["reconstructions"] = torch.stack([shown.cpu() * 255, _intensities(decode(z[0]))])
    if model.hamiltonian is not None:
        shown = shown[:N_TRAJECTORIES]
        logits = model.trajectory(shown, noise(1, len(shown), model.noise_features))
        grids["trajectories"] = _intensities(logits).transpose(0, 1)
    return grids


def _intensities(logits: Tensor) -> Tensor:
    return (torch.sigmoid(logits) * 255).round().to(torch.uint8).cpu()


def draw(directory: Path, jobs: Sequence[tuple[Job, State]]) -> dict[str, list[Path]]:
    """Write every picture to the directory; returns their paths under a title each."""
    drawn = {"Training curves": [draw_curves(directory / "curves.png", jobs)]} if jobs else {}
    for name, title in TITLES.items():
        for job, state in jobs:
            if name in state.pictures:
                path = directory / f"{name}-{job.key}.png"
                draw_grid(path, state.pictures[name], f"{job.label}, {state.epoch} epochs")
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
        axes.plot(epochs, [-record["train"] for record in state.history], color=line.get_color(), linestyle="--")
    lowest = min(-record["validation"] for _, state in jobs for record in state.history)
    axes.set(xlabel="epochs", ylabel="negative bound, nats an image", title="Validation, and training dashed")
    axes.set_ylim(bottom=lowest - 8, top=lowest + 60)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


def draw_grid(path: Path, grid: Tensor, title: str) -> None:
    """A grid ``(rows, columns, 784)`` of intensities as one picture."""
    from matplotlib.figure import Figure

    rows, columns, _ = grid.shape
    image = grid.view(rows, columns, SIDE, SIDE).transpose(1, 2).reshape(rows * SIDE, columns * SIDE)
    figure = Figure(figsize=(columns * 0.6, rows * 0.6 + 0.4), layout="constrained")
    axes = figure.subplots()
    axes.imshow(image.tolist(), cmap="gray_r", vmin=0, vmax=255)
    axes.set_axis_off()
    axes.set_title(title, fontsize="small")
    figure.savefig(path, dpi=120)
