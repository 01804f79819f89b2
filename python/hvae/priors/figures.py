"""The study's pictures: points and latent spaces of the first data set, then weight and bound against epochs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hvae.priors import data
from hvae.priors.study import PRIORS, Job, Points
from hvae.priors.train import State
from hvae.runs import writing

Jobs = Sequence[tuple[Job, State]]

N_SHOWN = 1_000
COLOURS = ("tab:orange", "tab:blue")


def draw(directory: Path, jobs: Jobs) -> list[str]:
    """Draw the figures in ``directory``; returns the report's part of each, those with nothing to show left out."""
    first = [(job, state) for job, state in jobs if job.dataset == 0]
    mixtures = [(job, state) for job, state in jobs if job.prior == "mixture"]
    pictures = [
        ("Reconstruction and generation", "points", _points, first),
        ("Latent space and prior", "latent", _latent, first),
        ("The learned weight", "weight", _weights, mixtures),
        ("The training bound", "bound", _bounds, jobs),
    ]
    drawn = []
    for title, name, picture, shown in pictures:
        if shown:
            path = directory / f"{name}.png"
            with writing(path) as partial:
                picture(shown).savefig(partial, dpi=80)
            drawn.append(f"## {title}\n\n![{title}]({path.name})")
    return drawn


@torch.no_grad()
def _points(jobs: Jobs):
    """Above: test points, and the means to which one sample of q decodes. Below: the same of samples of the prior."""
    figure, panels = _panels(2, len(jobs))
    for (job, state), above, below in zip(jobs, *panels, strict=True):
        points, model, generator = _restored(job, state)
        x, component = points.test[:N_SHOWN], points.test_component[:N_SHOWN]
        noise = torch.randn(2, *x.shape, generator=generator)
        loc, log_scale = model.encode(x)
        decoded = model.decoder(loc + log_scale.exp() * noise[0])
        _scatter(above, x, component, s=3, alpha=0.3)
        _scatter(above, decoded, component, s=6, edgecolors="black", linewidths=0.2)
        above.set(title=PRIORS[job.prior])
        decoded = model.decoder(model.mixture().sample(N_SHOWN, generator))
        below.scatter(*(decoded + noise[1]).mT, s=3, color="tab:gray", alpha=0.5)
        below.scatter(*decoded.mT, s=6, color="black")
        for axes in (above, below):
            axes.plot(*data.MEANS.mT, "r+", markersize=12)
            axes.set(xlim=(-6, 6), ylim=(-6, 6), aspect="equal")
    panels[0, 0].set_ylabel("reconstruction")
    panels[1, 0].set_ylabel("generation")
    return figure


@torch.no_grad()
def _latent(jobs: Jobs):
    """Samples of q for test points in their Gaussian's colour, over the contours of the prior's density."""
    figure, panels = _panels(1, len(jobs))
    for (job, state), axes in zip(jobs, panels[0], strict=True):
        points, model, generator = _restored(job, state)
        x = points.test[:N_SHOWN]
        loc, log_scale = model.encode(x)
        z = loc + log_scale.exp() * torch.randn(x.shape, generator=generator)
        _scatter(axes, z, points.test_component[:N_SHOWN], s=4, alpha=0.5)
        low, high = z.amin(0) - 0.5, z.amax(0) + 0.5
        grid = [torch.linspace(low[i].item(), high[i].item(), 120) for i in range(2)]
        density = model.mixture().log_prob(torch.cartesian_prod(*grid)).exp().view(120, 120).mT
        axes.contour(*grid, density, levels=8, colors="black", linewidths=0.7)
        axes.set(title=PRIORS[job.prior])
    return figure


def _weights(jobs: Jobs):
    """The smaller learned weight against epochs, a line a data set."""
    figure, ((axes,),) = _panels(1, 1)
    for job, state in jobs:
        axes.plot(*_history(state, "weight"), label=f"data set {job.dataset}")
    axes.axhline(data.WEIGHT, color="black", linestyle=":", label="truth")
    axes.set(xlabel="epochs", ylabel="smaller weight")
    axes.legend()
    return figure


def _bounds(jobs: Jobs):
    """Nats from the mean training bound to the true density of the points, against epochs, a colour a prior."""
    figure, ((axes,),) = _panels(1, 1)
    for job, state in jobs:
        epochs, bounds = _history(state, "bound")
        truth = data.log_prob(job.points().train).mean().item()
        label = PRIORS[job.prior] if job.dataset == jobs[0][0].dataset else None
        colour = f"C{list(PRIORS).index(job.prior)}"
        axes.plot(epochs, [truth - bound for bound in bounds], color=colour, linewidth=1, label=label)
    axes.set(xlabel="epochs", ylabel="truth - bound", yscale="log")
    axes.legend()
    return figure


def _panels(rows: int, columns: int):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * max(columns, 1.5), 4 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _restored(job: Job, state: State):
    """The data set, the trained model, and random numbers for its pictures."""
    points: Points = job.points()
    model = job.model(points)
    model.load_state_dict(state.model)
    return points, model, job.generator(job.prior, "pictures")


def _scatter(axes, x: torch.Tensor, component: torch.Tensor, **style) -> None:
    axes.scatter(*x.mT, c=[COLOURS[c] for c in component.tolist()], **style)


def _history(state: State, name: str) -> tuple[list[int], list[float]]:
    return [record["epoch"] for record in state.history], [record[name] for record in state.history]
