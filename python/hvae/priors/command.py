"""``hvae priors``: train what is not finished, keep ``results.json`` up to date, report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from hvae import runs
from hvae.priors import report, study, train
from hvae.priors.study import Job
from hvae.priors.train import State


def register(commands: Any) -> None:
    """Add ``hvae priors`` to the command line's subcommands."""
    command = commands.add_parser(
        "priors",
        help="variational auto-encoders with a normal, a mixture and a VampPrior on points from two Gaussians",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    add("--priors", nargs="+", choices=study.PRIORS, default=list(study.PRIORS), help="priors")
    add("--components", type=runs.integer(maximum=study.N_TRAIN), default=50, help="pseudo-inputs of the VampPrior")
    add("--datasets", type=runs.integer(), default=1, help="how many data sets")
    add("--epochs", type=runs.integer(), default=study.EPOCHS, help=f"of {study.STEPS_PER_EPOCH} steps")
    add("--seed", type=runs.seed, default=12345, help="of data, initial values and training noise")
    add("--out", type=Path, default=Path("runs/priors"), help="directory for results, report and figures")
    add("--resume", action="store_true", help="go on with what --out holds, and add to it")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    with runs.open_directory(args, seed=args.seed, components=args.components, epochs=args.epochs) as config:
        _run(args, config)


def _run(args: argparse.Namespace, config: dict[str, Any]) -> None:
    _write_results(args.out, config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are too small to share
    try:
        for dataset in range(args.datasets):
            for prior in dict.fromkeys(args.priors):
                _run_job(Job(prior, dataset, args.components, args.seed), args.out, args.epochs)
                _write_results(args.out, config)
    finally:
        torch.set_num_threads(threads)
    print(report.write_report(args.out))


def _run_job(job: Job, out: Path, epochs: int) -> None:
    """Bring a job to its end, from its checkpoint if there is one."""
    from tqdm import tqdm

    path = report.state_path(out, job)
    state = runs.load(State, path) if path.exists() else State()
    if state.finished:
        print(f"{job.key}: finished before", file=sys.stderr)
        return
    with tqdm(desc=job.key, total=epochs, initial=state.epoch, unit="epoch", mininterval=0.5) as bar:

        def progress(state: State) -> None:
            bar.set_postfix(bound=f"{state.history[-1]['bound']:.3f}", refresh=False)
            bar.update()

        train.train(job, job.points(), state, epochs, path, progress)


def _write_results(directory: Path, config: dict[str, Any]) -> None:
    """Collect every finished job in the directory, of this and of earlier commands."""
    rows = [report.row_of(job, state) for job, state in report.finished_jobs(directory, config)]
    runs.write_results(directory, config, rows)
