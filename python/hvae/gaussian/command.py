"""``hvae gaussian``: plan the jobs, train what is not finished, keep ``results.json`` up to date, report."""

from __future__ import annotations

import argparse
import functools
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from hvae import experiment, runs
from hvae.experiment import Study, integer
from hvae.gaussian import report, study, train
from hvae.gaussian.study import Job
from hvae.gaussian.train import State
from hvae.runs import StudyError

#: For each of some jobs a line to print, or its error.
Outcome = list[str | StudyError]


def arguments(add: Callable[..., Any]) -> None:
    """The command's own."""
    add("--dims", type=integer(2), nargs="+", default=list(study.DIMS), help="dimensions")
    add("--methods", nargs="+", choices=study.ALL_METHODS, default=list(study.METHODS), help="methods")
    add(
        "--leapfrog-steps",
        type=integer(),
        nargs="+",
        default=[1, 10],
        metavar="K",
        help="of the hvae methods; bridges of uha",
    )
    add("--planar-layers", type=integer(), nargs="+", default=[1, 30], metavar="K", help="for the planar flow")
    add(
        "--setting", choices=study.SETTINGS, nargs="+", default=["corrected"],
        help="corrected bounds, or the printed tables' own",
    )  # fmt: skip
    add("--datasets", type=integer(), default=3, help="how many data sets, trained side by side")
    add("--epochs", type=integer(), help="of 40 steps; by default the setting's own number")
    experiment.add_common(add, "gaussian", "data, initial values and training noise", seed=integer(0, 2**32 - 1))
    add("--workers", type=integer(), default=os.cpu_count() or 1, help="processes, each training one job")


def run(args: argparse.Namespace) -> None:
    """Run the command. A job that fails does not stop the others; its error is told in the end."""
    if "uha" in args.methods and "published" in args.setting:
        raise StudyError("--methods uha: nothing was printed of it; --setting corrected alone has it")
    with runs.open_directory(args, seed=args.seed, datasets=args.datasets) as config:
        _run(args, config)


def _run(args: argparse.Namespace, config: dict[str, Any]) -> None:
    steps = {"planar": args.planar_layers, "iaf": [1], "vb": [0]}
    steps |= dict.fromkeys(("hvae", "hvae-untempered", "uha"), args.leapfrog_steps)
    jobs = [job for setting in args.setting for job in study.plan(setting, args.dims, args.methods, steps)]
    jobs = sorted(set(jobs), key=lambda job: (-job.dim, job.method != "planar", -job.n_steps, job.key))
    one = functools.partial(_run_job, out=args.out, datasets=args.datasets, epochs=args.epochs, seed=args.seed)
    errors: list[StudyError] = []
    STUDY.keep_results(args.out, config, _told(_outcomes(one, _tasks(jobs), args.workers), errors))
    if errors:
        raise StudyError("; ".join(map(str, errors)))


def _told(outcomes: Iterator[Outcome], errors: list[StudyError]) -> Iterator[Outcome]:
    """The outcomes, with lines printed and errors collected."""
    for outcome in outcomes:
        for line in outcome:
            if isinstance(line, StudyError):
                errors.append(line)
            else:
                print(line, file=sys.stderr)
        yield outcome


def _tasks(jobs: list[Job]) -> list[tuple[Job, ...]]:
    """Jobs for one process each, which come with the longest first: else one process would wait for another's last.

    Those of IAF follow one another: their weights fit no core's cache, and two at a time would wait for memory.
    """
    heavy = tuple(job for job in jobs if job.method == "iaf")
    others = [(job,) for job in jobs if job.method != "iaf"]
    return [heavy, *others] if heavy else others


def _outcomes(one: Callable[[Job], str], tasks: list[tuple[Job, ...]], workers: int) -> Iterator[Outcome]:
    """What comes of the tasks, as they end; in processes of their own if there are to be several."""
    if min(workers, len(tasks)) > 1:
        yield from _outcomes_of_processes(one, tasks, min(workers, len(tasks)))
        return
    with experiment.threads(1):  # the tensors are too small to share
        yield from (_attempt(one, (job,)) for task in tasks for job in task)


def _outcomes_of_processes(one: Callable[[Job], str], tasks: list[tuple[Job, ...]], workers: int) -> Iterator[Outcome]:
    """Processes that take one task after another; they end with the command, however it ends."""
    context, waiting = multiprocessing.get_context("spawn"), deque(tasks)
    lock, processes = context.RLock(), {}
    try:
        for place in range(workers):
            pipe, theirs = context.Pipe()
            processes[pipe] = context.Process(target=_work, args=(theirs, one, lock, place), daemon=True)
            processes[pipe].start()
            theirs.close()
            pipe.send(waiting.popleft())
        working = set(processes)
        while working:
            for pipe in multiprocessing.connection.wait(working):
                try:
                    yield pipe.recv()
                except EOFError:
                    yield [StudyError("a training process died; the same command with --resume goes on")]
                    working.remove(pipe)
                    continue
                if waiting:
                    pipe.send(waiting.popleft())
                else:
                    working.remove(pipe)
    finally:
        for process in processes.values():
            process.terminate()
            process.join()


def _work(pipe: Connection, one: Callable[[Job], str], lock: Any, place: int) -> None:
    """The life of a process: tasks in, outcomes out."""
    global _PLACE
    from tqdm import tqdm

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command's to handle
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    torch.set_num_threads(1)
    tqdm.set_lock(lock)
    _PLACE = place
    gc.freeze()  # what is imported stays: no collection need look at it again
    while True:
        pipe.send(_attempt(one, pipe.recv()))


def _end_with_the_command() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


_PLACE = 0  # of this process's progress bar on the screen


def _attempt(one: Callable[[Job], str], task: tuple[Job, ...]) -> Outcome:
    outcome: Outcome = []
    for job in task:
        try:
            outcome.append(one(job))
        except StudyError as error:
            outcome.append(error)
        except Exception as error:
            traceback.print_exc()
            outcome.append(StudyError(f"{job.key}: {type(error).__name__}: {error}"))
    return outcome


def _run_job(job: Job, *, out: Path, datasets: int, epochs: int | None, seed: int) -> str:
    """Bring a job to its end, from its checkpoint if there is one; returns a line to print."""
    path, epochs = experiment.state_path(out, job), epochs or job.default_epochs
    state = State.load(path) if path.exists() else None
    if state is not None and state.epochs != epochs:
        raise StudyError(f"{job.key} in {out} is a run of {state.epochs} epochs, not {epochs}")
    if state is not None and state.finished:
        return f"{job.key}: finished before"
    data_sets = job.data_sets(datasets, seed)
    state = state or train.initial_state(job, data_sets, epochs, seed)
    with experiment.epoch_bar(job, state, epochs, _mean_bound, position=_PLACE, leave=False) as progress:
        train.train(job, data_sets, state, seed, path, progress)
    return f"{job.key}: {state.seconds:.1f} s"


def _mean_bound(record: dict[str, Any]) -> str:
    bound = record["objective"]
    return f"{sum(bound) / len(bound):.1f}"


STUDY = Study(
    name="gaussian",
    help="learn a Gaussian model's shift and scales by several variational methods",
    arguments=arguments,
    run=run,
    state=State,
    job=lambda key, config: Job.from_key(key),
    rows=lambda job, state, config: report.rows_of(job, state),
    tables=report.tables,
    figures=report.drawn,
    job_of_row=report.job_of,
)
