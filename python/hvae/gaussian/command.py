"""``hvae gaussian``: plan the jobs, train what is not finished, keep ``results.json`` up to date, report."""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from hvae import runs
from hvae.gaussian import report, study, train
from hvae.gaussian.study import Job
from hvae.gaussian.train import State
from hvae.runs import StudyError

#: For each of some jobs a line to print, or its error.
Outcome = list[str | StudyError]


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
    add("--planar-layers", type=runs.integer(), nargs="+", default=[1, 30], metavar="K", help="for the planar flow")
    add(
        "--setting", choices=study.SETTINGS, nargs="+", default=["corrected"],
        help="corrected bounds, or the printed tables' own",
    )  # fmt: skip
    add("--datasets", type=runs.integer(), default=3, help="how many data sets, trained side by side")
    add("--epochs", type=runs.integer(), help="of 40 steps; by default the setting's own number")
    add("--seed", type=runs.integer(0, 2**32 - 1), default=12345, help="of data, initial values and training noise")
    add("--out", type=Path, default=Path("runs/gaussian"), help="directory for results, report and figures")
    add("--resume", action="store_true", help="go on with what --out holds, and add to it")
    add("--workers", type=runs.integer(), default=os.cpu_count() or 1, help="processes, each training one job")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Run the command. A job that fails does not stop the others; its error is told in the end."""
    config = runs.open_directory(args, seed=args.seed, datasets=args.datasets)
    _write_results(args.out, config)
    steps = {"planar": args.planar_layers, "iaf": [1], "vb": [0]}
    steps |= dict.fromkeys(("hvae", "hvae-untempered"), args.leapfrog_steps)
    jobs = [job for setting in args.setting for job in study.plan(setting, args.dims, args.methods, steps)]
    jobs = sorted(set(jobs), key=lambda job: (-job.dim, job.key))
    one = functools.partial(_run_job, out=args.out, datasets=args.datasets, epochs=args.epochs, seed=args.seed)
    errors = []
    for outcome in _outcomes(one, jobs, args.workers):
        for line in outcome:
            if isinstance(line, StudyError):
                errors.append(line)
            else:
                print(line, file=sys.stderr)
        _write_results(args.out, config)
    if errors:
        raise StudyError("; ".join(map(str, errors)))
    print(report.write_report(args.out))


def _outcomes(one: Callable[[Job], str], jobs: list[Job], workers: int) -> Iterator[Outcome]:
    """What ``one`` says of jobs, or their StudyErrors, as they end; in processes of their own if there are several."""
    tasks = _tasks(jobs)
    workers = min(workers, len(tasks))
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the tensors are too small to share
        try:
            yield from (_attempt(one, (job,)) for job in jobs)
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for place in range(workers):
        places.put(place)
    with ProcessPoolExecutor(workers, context, _start_worker, (context.RLock(), places)) as pool:
        futures = [pool.submit(_attempt, one, task) for task in tasks]
        try:
            yield from (future.result() for future in as_completed(futures))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _tasks(jobs: list[Job]) -> list[tuple[Job, ...]]:
    """Jobs for one process each, the longest first.

    Those of IAF follow one another: their weights fit no core's cache, and two at a time would wait for memory.
    """
    heavy = tuple(job for job in jobs if job.method == "iaf")
    others = [(job,) for job in jobs if job.method != "iaf"]
    return [heavy, *others] if heavy else others


def _attempt(one: Callable[[Job], str], jobs: tuple[Job, ...]) -> Outcome:
    outcome: Outcome = []
    for job in jobs:
        try:
            outcome.append(one(job))
        except StudyError as error:
            outcome.append(error)
    return outcome


_PLACE = 0  # of this process's progress bar on the screen


def _start_worker(lock: Any, places: Any) -> None:
    global _PLACE
    from tqdm import tqdm

    torch.set_num_threads(1)
    tqdm.set_lock(lock)
    _PLACE = places.get()


def _run_job(job: Job, *, out: Path, datasets: int, epochs: int | None, seed: int) -> str:
    """Bring a job to its end, from its checkpoint if there is one; returns a line to print."""
    path, epochs = report.state_path(out, job), epochs or job.default_epochs
    state = State.load(path) if path.exists() else None
    if state is not None and state.epochs != epochs:
        raise StudyError(f"{job.key} in {out} is a run of {state.epochs} epochs, not {epochs}")
    if state is not None and state.finished:
        return f"{job.key}: finished before"
    data_sets = job.data_sets(datasets, seed)
    state = state or train.initial_state(job, data_sets, epochs, seed)
    parent = os.getppid()
    from tqdm import tqdm

    with tqdm(
        desc=job.key, total=epochs, initial=state.epoch, unit="epoch", position=_PLACE, leave=False, mininterval=0.5
    ) as bar:

        def progress(state: State) -> None:
            bound = state.history[-1]["objective"]
            bar.set_postfix(bound=f"{sum(bound) / len(bound):.1f}", refresh=False)
            bar.update()
            if os.getppid() != parent:
                raise SystemExit(f"{job.key}: the command that started this process is gone")

        train.train(job, data_sets, state, seed, path, progress)
    return f"{job.key}: {state.seconds:.1f} s"


def _write_results(directory: Path, config: dict[str, Any]) -> None:
    """Collect every finished job in the directory, of this and of earlier commands."""
    rows = [row for job, state in report.finished_jobs(directory) for row in report.rows_of(job, state)]
    runs.write_results(directory, config, rows)
