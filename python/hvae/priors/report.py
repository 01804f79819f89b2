"""Rows of ``results.json`` from the state files of finished jobs; ``report.md`` and the figures from both."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hvae import runs
from hvae.experiment import Config, table, versions
from hvae.priors import models, study
from hvae.priors.study import PRIORS, PUBLISHED, Job
from hvae.priors.train import State
from hvae.runs import Row

MODEL = """\
10,000 points of `0.3 N((2, 2), I) + 0.7 N((-2, -2), I)`. The decoder's covariance is I, so a model equals the truth
only where its decoder takes 30 % of the prior to one mean and the rest to the other. From one Gaussian that takes a
step in the decoder, in whose reach a Gaussian `q(z | x)` fits badly. A prior of two Gaussians can hold them apart, with
a decoder constant on each; q is then one of the two, whichever the point came from, and the bound is highest where
the weights are the shares of the points: that is what identifies them. All else about the prior is free, as any
smooth change of z can be undone in the decoder."""

CHOICES = """\
Encoder and decoder have two hidden layers of 64, the latent space has two dimensions; Adam at 1e-3, batches of 256.
Left open by the documents, and chosen: both mixtures learn their means and scales, from means (2, 0) and (-2, 0), unit
scales and equal weights (from closer means they part dozens of epochs later); pseudo-inputs begin as points of the
training set; networks begin the same for all priors of a data set."""

LIKELIHOOD = """\
Means over 5,000 test points, in nats, with all constants. *log p(x)* is by 2,000 importance samples, *bound* the mean
of their log weights, *truth* the true density's own, the ceiling of all, *below* the distance to it with two paired
standard errors. *from the prior* is log p(x) by 20,000 samples of the prior (good to about 0.005), without the encoder:
it would lie above if q were too narrow for importance sampling. No mixture of Gaussians with identity covariance
reaches the printed figures (its ceiling is -2.84): shown, not chased."""

SANDWICH = """\
Of points drawn from each model itself, for which the latents are exact samples of the posterior: annealed importance
sampling along {bridges} bridges from the encoder's Gaussian bounds `log p(x)` from below, its reverse from above. The
latent space is a plane, so *log p(x)* itself is known, by quadrature: *below* is how far the lower bound lies below it,
*above* the upper one above it, with two paired standard errors. Means over points, which differ from model to model."""

WEIGHT = """\
*learned* is the smaller weight of the prior (the two may swap), 0.3 in truth; *in the data* the share of the training
points that came from the rarer Gaussian; *generated* the share of the prior that the decoder takes to that Gaussian's
side."""


def row_of(job: Job, state: State) -> Row:
    """A finished job's row."""
    return {
        **{"method": job.prior, "dim": models.LATENT, "dataset": job.dataset},
        **{name: runs.finite(value) for name, value in state.figures.items()},
        **{"epochs": state.epoch, "steps": state.epoch * study.STEPS_PER_EPOCH, "seconds": state.seconds},
        **_sandwich(state.sandwich),
    }


def _sandwich(points: Tensor) -> Row:
    """Means over points, and standard errors of the distances from bounds to exact values; nothing of no points."""
    if not points.shape[1]:
        return {}
    lower, upper, exact = points
    means = {"lower": lower.mean(), "upper": upper.mean(), "exact": exact.mean()}
    distances = {"below": exact - lower, "above": upper - exact}
    errors = {f"{name}_error": (d.var(correction=0) / (len(d) - 1)).sqrt() for name, d in distances.items()}
    figures = {f"sandwich_{name}": runs.finite(value.item()) for name, value in {**means, **errors}.items()}
    return {**figures, "sandwich_points": points.shape[1]}


def tables(config: Config, rows: list[Row]) -> list[str]:
    """The report but for its figures."""
    about = f"Seed {config['seed']}, {config['epochs']} epochs, {config['components']} pseudo-inputs"
    parts = ["# Priors", f"{about}; {versions(config)}.", MODEL, CHOICES]
    parts += ["## Log-likelihood", LIKELIHOOD, likelihood_table(rows)]
    return [*parts, *sandwich_table(config, rows), "## The weight", WEIGHT, weight_table(rows)]


def summary(config: Config, rows: list[Row]) -> tuple[list[str], list[list[Any]]]:
    """Of the table that the command prints."""
    several = len({row["dataset"] for row in rows}) > 1
    lines = []
    for row in rows:
        estimates = [row[name] for name in ("elbo", "log_likelihood", "true_log_likelihood")]
        line = [PRIORS[row["method"]], row["dataset"] if several else None, *estimates, _below(row)]
        lines.append([*line, row["weight"], row["seconds"]])
    return ["prior", "data set", "bound", "log p(x)", "truth", "below", "learned weight", "seconds"], lines


def _below(row: Row) -> str:
    return _with_error(row["gap"], row["gap_error"])


def _with_error(value: float, error: float | None) -> str:
    """With two standard errors, where they are known."""
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {2 * error:.4f}"


def likelihood_table(rows: list[Row]) -> str:
    """One line a prior and data set, beside the truth and the printed figure."""
    lines = []
    for row in rows:
        printed = PUBLISHED.get(row["method"])
        estimates = [row[name] for name in ("elbo", "log_likelihood_by_prior_samples", "log_likelihood")]
        line = [PRIORS[row["method"]], row["dataset"], *estimates, row["true_log_likelihood"], _below(row)]
        lines.append([*line, printed and "{} ± {}".format(*printed)])
    headers = ["prior", "data set", "bound", "from the prior", "log p(x)", "truth", "below", "printed"]
    return table(headers, lines)


def sandwich_table(config: Config, rows: list[Row]) -> list[str]:
    """Bounds of the likelihood of points that each model draws, and the exact value; nothing where there are none."""
    lines = []
    for row in rows:
        if "sandwich_lower" in row:
            lower, upper, exact = (row[f"sandwich_{name}"] for name in ("lower", "upper", "exact"))
            distances = [
                _with_error(distance, row[f"sandwich_{name}_error"])
                for name, distance in (("below", exact - lower), ("above", upper - exact))
            ]
            line = [PRIORS[row["method"]], row["dataset"], lower, exact, upper, upper - lower]
            lines.append([*line, *distances, row["sandwich_points"]])
    if not lines:
        return []
    headers = ["prior", "data set", "lower", "log p(x)", "upper", "gap", "below", "above", "points"]
    about = SANDWICH.format(bridges=config["sandwich_bridges"])
    return ["## The likelihood between two bounds", about, table(headers, lines)]


def weight_table(rows: list[Row]) -> str:
    """One line a prior and data set."""
    lines = [
        [PRIORS[row["method"]], row["dataset"], row["weight"], row["generated_weight"], row["training_weight"]]
        for row in rows
    ]
    return table(["prior", "data set", "learned", "generated", "in the data"], lines)
