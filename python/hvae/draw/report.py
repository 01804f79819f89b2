"""Rows of ``results.json`` from the state files of finished jobs; ``report.md`` from both."""

from __future__ import annotations

from typing import Any

from hvae import runs
from hvae.draw import models
from hvae.draw.study import BATCH_SIZE, PUBLISHED, Job, Setting
from hvae.draw.train import State
from hvae.experiment import Config, table, versions
from hvae.runs import Row

#: Names of models in ``results.json``, with attention and without.
METHODS = {True: "attention", False: "whole"}
NOTES = f"""\
Figures are means over images, in nats an image, with every constant: the divergence of a step is
`1/2 sum (mu^2 + sigma^2 - log sigma^2 - 1)`, so T steps of {models.LATENT} latent variables have the constant
`T {models.LATENT} / 2`.

- *train*: the bound averaged over the last epoch's steps; *validation*: that of the validation images after it.
- *log-likelihood*: of the first validation images, by importance sampling from q. No public program prints it.
- *seconds an epoch*: wall time, validation included, beside whatever else the machine did, its pauses too.
- *printed*: the paper's bounds, from memory, of another setting: T = 64, all of MNIST, some 50,000 updates, and there
  attention of {models.READ} x {models.READ} reads is ahead. Shown, not chased: steps and updates are fewer here.
- LSTMs of {models.HIDDEN} units, patches of {models.WRITE} x {models.WRITE} written; Adam at 1e-3, batches of
  {BATCH_SIZE}, gradients clipped to a norm of 10. The first canvas is learned, from the logits of how often a pixel is
  on. All jobs take the same batches.
- Attention begins in the middle: a read of 2 filters over {models.READ_STRIDE:g} of the side, of more over up to
  {models.READ_SPAN:g}, a write over {models.WRITE_SPAN:g}, filters as wide as half of the distance between them. A
  write begins as strong as its patch. Begun over the whole image with a gamma of 1 it is 45 times weaker, as filters
  sum to 1, and after 800 updates of T = 10 the bound is 33 nats worse."""


def row_of(job: Job, state: State, setting: Setting) -> Row:
    """A finished job's row."""
    last = state.history[-1]
    estimates = state.log_likelihoods
    figures = {
        "train_bound": last["train"],
        "validation_bound": last["validation"],
        "log_likelihood": estimates.mean().item() if len(estimates) else None,
    }
    return {
        **{
            "method": METHODS[job.attention],
            "dim": models.LATENT,
            "draw_steps": job.steps,
            "read": job.read,
        },
        **{name: value if value is None else runs.finite(value) for name, value in figures.items()},
        **{"likelihood_images": len(estimates), "likelihood_samples": setting.likelihood_samples},
        **{"epochs": state.epoch, "steps": state.epoch * setting.steps_per_epoch, "seconds": state.seconds},
    }


def tables(config: Config, rows: list[Row]) -> list[str]:
    """The report but for its figures."""
    about = (
        f"Seed {config['seed']}; data {config['data']}: {config['n_train']:,} digits for training, "
        f"{config['n_validation']:,} for validation, rounded to bits; {versions(config)}."
    )
    return ["# DRAW", about, NOTES, bound_table(config, rows)]


def summary(config: Config, rows: list[Row]) -> tuple[list[str], list[list[Any]]]:
    """Of the table that the command prints."""
    lines = []
    for row in rows:
        job = Job.from_key(row["job"], config["seed"])
        figures = [row[name] for name in ("train_bound", "validation_bound", "log_likelihood")]
        lines.append([job.label, *figures, PUBLISHED.get(job.read), row["seconds"]])
    return ["model", "train", "validation", "log-likelihood", "printed, T = 64", "seconds"], lines


def bound_table(config: Config, rows: list[Row]) -> str:
    """One line a model, beside the printed figure."""
    lines = []
    for row in rows:
        job = Job.from_key(row["job"], config["seed"])
        ours = [row[name] for name in ("train_bound", "validation_bound", "log_likelihood")]
        cost = [row["likelihood_images"], row["likelihood_samples"], row["epochs"], row["seconds"] / row["epochs"]]
        lines.append([job.label, *ours, PUBLISHED.get(job.read), *cost])
    headers = ["model", "train", "validation", "log-likelihood", "printed, T = 64"]
    return table([*headers, "images", "samples", "epochs", "seconds an epoch"], lines)
