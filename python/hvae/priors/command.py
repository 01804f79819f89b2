"""``hvae priors``: train what is not finished, keep ``results.json`` up to date, report."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hvae import experiment, runs
from hvae.experiment import Study, integer
from hvae.priors import figures, report, study, train
from hvae.priors.study import Job
from hvae.priors.train import State
from hvae.runs import StudyError
from hvae.terminal import Screen

#: In a run's config where there is a sandwich.
SANDWICH = ("sandwich_points", "sandwich_bridges")
BRIDGES = 200


def arguments(add: Callable[..., Any]) -> None:
    """The command's own."""
    add("--priors", nargs="+", choices=study.PRIORS, default=list(study.PRIORS), help="priors")
    add("--components", type=integer(maximum=study.N_TRAIN), default=50, help="pseudo-inputs of the VampPrior")
    add("--datasets", type=integer(), default=1, help="how many data sets")
    add("--epochs", type=integer(), default=study.EPOCHS, help=f"of {study.STEPS_PER_EPOCH} steps")
    sandwich = functools.partial(add, metavar="N")
    sandwich("--sandwich-points", type=integer(0), default=0, help="drawn from each model, whose likelihood is bounded")
    bridges = f"of annealed importance sampling, for that; by default {BRIDGES}"
    sandwich("--sandwich-bridges", type=integer(), help=bridges)
    experiment.add_common(add, "priors", "data, initial values and training noise")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.sandwich_bridges and not args.sandwich_points:
        raise StudyError("--sandwich-bridges: only --sandwich-points have any")
    bridges = args.sandwich_bridges or BRIDGES
    kinds = [(prior, dataset) for dataset in range(args.datasets) for prior in dict.fromkeys(args.priors)]
    jobs = [Job(*kind, args.components, args.seed) for kind in kinds]
    sandwich = dict(zip(SANDWICH, (args.sandwich_points, bridges), strict=True)) if args.sandwich_points else {}
    fixed = {"seed": args.seed, "components": args.components, "epochs": args.epochs, **sandwich}
    with runs.open_directory(args, **fixed) as config:
        train = functools.partial(_train, epochs=args.epochs, sandwich=(args.sandwich_points, bridges))
        STUDY.run_jobs(args, config, jobs, train)


def _train(job: Job, state: State, path: Path, screen: Screen, *, epochs: int, sandwich: tuple[int, int]) -> None:
    watch = experiment.epochs(screen, job, state, epochs, bound=lambda record: f"{record['bound']:.3f}")
    with experiment.threads(1):  # the tensors are too small to share
        train.train(job, job.points(), state, epochs, path, watch, sandwich)


STUDY = Study(
    name="priors",
    help="variational auto-encoders with a normal, a mixture and a VampPrior on points from two Gaussians",
    arguments=arguments,
    run=run,
    state=State,
    job=lambda key, config: Job.from_key(key, config["components"], config["seed"]),
    rows=lambda job, state, config: [report.row_of(job, state)],
    tables=report.tables,
    summary=report.summary,
    figures=figures.draw,
)
