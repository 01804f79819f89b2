"""``hvae gaussian``: plan the jobs, train what is not finished, keep ``results.json`` up to date, report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from hvae import runs
from hvae.gaussian import data, report, study, train
from hvae.gaussian.study import Job
from hvae.gaussian.train import State
from hvae.runs import StudyError


def register(commands: Any) -> None:
    """Add ``hvae gaussian`` to the command line's subcommands."""
    command = commands.add_parser(
        "gaussian",
        help="learn a Gaussian model's shift and scales by several variational methods",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    add("--dims", type=runs.integer(2), nargs="+", default=list(study.DIMS), help="dimensions")
    add("--methods", nargs="+", choices=study.METHODS, default=list(study.METHODS), help="methods")
    add("--leapfrog-steps", type=runs.integer(), nargs="+", default=[1, 10], metavar="K", help="for the hvae methods")
    add("--setting", choices=study.SETTINGS, default="corrected", help="corrected bounds, or the printed tables' own")
    add("--datasets", type=runs.integer(), default=3, help="how many data sets, trained side by side")
    add("--epochs", type=runs.integer(), help="of 40 steps; by default the setting's own number")
    add("--seed", type=runs.seed, default=12345, help="of data and training noise")
    add("--out", type=Path, default=Path("runs/gaussian"), help="directory for results, report and figures")
    add("--resume", action="store_true", help="go on with what --out holds, and add to it")
    add("--threads", type=runs.integer(), default=1, help="torch's; the tensors are too small to share")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    config = runs.open_directory(args, datasets=args.datasets)
    _write_results(args.out, config)
    jobs = study.plan(args.setting, *(list(dict.fromkeys(x)) for x in (args.dims, args.methods, args.leapfrog_steps)))
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        for dim in dict.fromkeys(job.dim for job in jobs):
            _run_dimension([job for job in jobs if job.dim == dim], args, config)
    finally:
        torch.set_num_threads(threads)
    print(report.write_report(args.out))


def _run_dimension(jobs: list[Job], args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Train the jobs of one dimension on one drawing of the data sets."""
    data_sets = None
    for job in jobs:
        path, epochs = report.state_path(args.out, job), args.epochs or job.default_epochs
        state = State.load(path) if path.exists() else None
        if state is not None and state.epochs != epochs:
            raise StudyError(f"{job.key} in {args.out} is a run of {state.epochs} epochs, not {epochs}")
        if state is not None and state.finished:
            print(f"{job.key}: finished before", file=sys.stderr)
            continue
        if data_sets is None:
            data_sets = data.data_sets(job.dim, args.datasets, args.seed)
        _train(job, data_sets, state or train.initial_state(job, data_sets, epochs), args.seed, path)
        _write_results(args.out, config)


def _train(job: Job, data_sets: data.DataSets, state: State, seed: int, path: Path) -> None:
    from tqdm import tqdm

    with tqdm(desc=job.key, total=state.epochs, initial=state.epoch, unit="epoch") as bar:

        def progress(state: State) -> None:
            bound = state.history[-1]["objective"]
            bar.set_postfix(bound=f"{sum(bound) / len(bound):.1f}", refresh=False)
            bar.update()

        train.train(job, data_sets, state, seed, path, progress)


def _write_results(directory: Path, config: dict[str, Any]) -> None:
    """Collect every finished job in the directory, of this and of earlier commands."""
    rows = [row for job, state in report.finished_jobs(directory) for row in report.rows_of(job, state)]
    runs.write_results(directory, config, rows)
