"""``hvae densities``: fit what is not finished, keep ``results.json`` up to date, report."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hvae import experiment, runs
from hvae.energies import figures, report, study, train
from hvae.energies.models import FLOWS
from hvae.energies.study import Job, Setting
from hvae.energies.targets import ENERGIES
from hvae.energies.train import State
from hvae.experiment import Study, integer
from hvae.terminal import Screen


def arguments(add: Callable[..., Any]) -> None:
    """The command's own."""
    add("--flows", nargs="+", choices=list(FLOWS), default=list(FLOWS), help="which")
    add("--layers", nargs="+", type=integer(), metavar="K", default=list(study.LAYERS), help="of each flow")
    add("--energies", nargs="+", type=int, choices=list(ENERGIES), default=list(ENERGIES), help="their numbers")
    add("--epochs", type=integer(), default=study.EPOCHS, help=f"of {study.UPDATES} updates")
    add("--samples", type=integer(2), default=1_000_000, help="for a divergence")
    experiment.add_common(add, "densities", "parameters and noise")
    add("--threads", type=integer(), help="torch's; by default its own choice")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    setting = Setting(seed=args.seed, epochs=args.epochs, samples=args.samples)
    flows, layers, energies = (dict.fromkeys(x) for x in (args.flows, args.layers, args.energies))
    jobs = [Job(flow, k, energy, args.seed) for flow in flows for k in layers for energy in energies]
    with experiment.threads(args.threads), runs.open_directory(args, **asdict(setting)) as config:
        STUDY.run_jobs(args, config, jobs, functools.partial(_train, setting=setting))


def _train(job: Job, state: State, path: Path, screen: Screen, *, setting: Setting) -> None:
    watch = experiment.epochs(screen, job, state, setting.epochs, bound=lambda record: f"{-record['loss']:.3f}")
    train.train(job, setting, state, path, watch)


STUDY = Study(
    name="densities",
    help="planar, radial and NICE flows fitted to two-dimensional energies",
    arguments=arguments,
    run=run,
    state=State,
    job=lambda key, config: Job.from_key(key, config["seed"]),
    rows=lambda job, state, config: [report.row_of(job, state)],
    tables=report.tables,
    summary=report.summary,
    figures=figures.draw,
)
