"""``hvae gaussian``: plan the jobs, train what is not finished, keep ``results.json`` up to date, report."""

from __future__ import annotations

import argparse
import functools
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
from hvae.terminal import NO_FIGURES, Screen

SECONDS_BETWEEN_STEPS = 0.3
LEAPFROG_METHODS = ("hvae", "hvae-untempered", "uha")


@dataclass(frozen=True)
class Outcome:
    """Of a job: the seconds of its training, None where it was finished before, or its error."""

    key: str = ""
    seconds: float | None = None
    error: StudyError | None = None
    traceback: str | None = None


#: Brings a job to its end, and shows it on the screen.
One = Callable[[Job, Screen], Outcome]


def arguments(add: Callable[..., Any]) -> None:
    """The command's own."""
    add("--dims", type=integer(2), nargs="+", default=list(study.DIMS), help="dimensions")
    add("--methods", nargs="+", choices=study.ALL_METHODS, default=list(study.METHODS), help="methods")
    add(
        "--leapfrog-steps",
        type=integer(),
        nargs="+",
        metavar="K",
        help="of the hvae methods; bridges of uha; by default 1 and 10",
    )
    add("--planar-layers", type=integer(), nargs="+", metavar="K", help="of the planar flow, by default 1 and 30")
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
    for option, given, methods in (
        ("--leapfrog-steps", args.leapfrog_steps, LEAPFROG_METHODS),
        ("--planar-layers", args.planar_layers, ("planar",)),
    ):
        if given and not set(args.methods) & set(methods):
            raise StudyError(f"{option}: only --methods {' '.join(methods)} has any")
    with runs.open_directory(args, seed=args.seed, datasets=args.datasets) as config:
        _run(args, config)


def _run(args: argparse.Namespace, config: dict[str, Any]) -> None:
    steps = {"planar": args.planar_layers or [1, 30], "iaf": [1], "vb": [0]}
    steps |= dict.fromkeys(LEAPFROG_METHODS, args.leapfrog_steps or [1, 10])
    jobs = [job for setting in args.setting for job in study.plan(setting, args.dims, args.methods, steps)]
    jobs = sorted(set(jobs), key=lambda job: (-job.dim, job.method != "planar", -job.n_steps, job.key))
    one = functools.partial(_run_job, out=args.out, datasets=args.datasets, epochs=args.epochs, seed=args.seed)
    errors: list[StudyError] = []
    work = functools.partial(_outcomes, one, _tasks(jobs), args.workers)
    STUDY.keep_results(args, config, jobs, lambda screen: _told(work(screen), screen, errors))
    if errors:
        raise StudyError("; ".join(map(str, errors)))


def _told(outcomes: Iterator[tuple[int, Outcome]], screen: Screen, errors: list[StudyError]) -> Iterator[Outcome]:
    """The outcomes, from workers at places of the screen, shown there and their errors collected."""
    for place, outcome in outcomes:
        screen.ended(outcome.key, outcome.seconds, place)
        if outcome.traceback:
            screen.say(outcome.traceback)
        if outcome.error:
            errors.append(outcome.error)
        yield outcome


def _tasks(jobs: list[Job]) -> list[tuple[Job, ...]]:
    """Jobs for one process each, which come with the longest first: else one process would wait for another's last.

    Those of IAF follow one another: their weights fit no core's cache, and two at a time would wait for memory.
    """
    heavy = tuple(job for job in jobs if job.method == "iaf")
    others: list[tuple[Job, ...]] = [(job,) for job in jobs if job.method != "iaf"]
    return [heavy, *others] if heavy else others


def _outcomes(one: One, tasks: list[tuple[Job, ...]], workers: int, screen: Screen) -> Iterator[tuple[int, Outcome]]:
    """What comes of the tasks, as they end; in processes of their own if there are to be several."""
    if min(workers, len(tasks)) > 1:
        yield from _outcomes_of_processes(one, tasks, min(workers, len(tasks)), screen)
        return
    with experiment.threads(1):  # the tensors are too small to share
        yield from ((0, _attempt(one, job, screen)) for task in tasks for job in task)


def _outcomes_of_processes(
    one: One, tasks: list[tuple[Job, ...]], workers: int, screen: Screen
) -> Iterator[tuple[int, Outcome]]:
    """Processes that take one task after another; they end with the command, however it ends."""
    context, waiting = multiprocessing.get_context("spawn"), deque(tasks)
    processes: dict[Connection, Any] = {}
    try:
        for _ in range(workers):
            pipe, theirs = context.Pipe()
            processes[pipe] = context.Process(target=_work, args=(theirs, one), daemon=True)
            processes[pipe].start()
            theirs.close()
            pipe.send(waiting.popleft())
        places = {pipe: place for place, pipe in enumerate(processes)}
        while places:
            ready = multiprocessing.connection.wait(list(places))
            for pipe in [pipe for pipe in places if pipe in ready]:
                place = places[pipe]
                try:
                    message = pipe.recv()
                except EOFError:
                    del places[pipe]
                    error = StudyError("a training process died; the same command with --resume goes on")
                    yield place, Outcome(error=error)
                    continue
                if isinstance(message, Outcome):
                    yield place, message
                elif message is not None:
                    what, done, total, unit, figures = message
                    screen.step(what, done, total, unit, place, figures)
                elif waiting:
                    pipe.send(waiting.popleft())
                else:
                    del places[pipe]
    finally:
        for process in processes.values():
            process.terminate()
            process.join()


class _FarScreen(Screen):
    """A process's, which tells the command what to show."""

    def __init__(self, pipe: Connection):
        super().__init__(quiet=True)
        self._pipe = pipe
        self._last = "", 0.0

    def step(
        self,
        what: str,
        done: int,
        total: int,
        unit: str = "epoch",
        place: int = 0,
        figures: Mapping[str, str] = NO_FIGURES,
    ) -> None:
        """Tell it, from time to time; the place is the command's to know."""
        now, (before, then) = time.monotonic(), self._last
        if what != before or now - then > SECONDS_BETWEEN_STEPS:
            self._pipe.send((what, done, total, unit, figures))
            self._last = what, now


def _work(pipe: Connection, one: One) -> None:
    """The life of a process: tasks in; out come steps, outcomes, and None after a task."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command's to handle
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    torch.set_num_threads(1)
    screen = _FarScreen(pipe)
    gc.freeze()  # what is imported stays: no collection need look at it again
    while True:
        for job in pipe.recv():
            pipe.send(_attempt(one, job, screen))
        pipe.send(None)


def _end_with_the_command() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _attempt(one: One, job: Job, screen: Screen) -> Outcome:
    try:
        return one(job, screen)
    except StudyError as error:
        return Outcome(job.key, error=error)
    except Exception as error:
        said = StudyError(f"{job.key}: {type(error).__name__}: {error}")
        return Outcome(job.key, error=said, traceback=traceback.format_exc())


def _run_job(job: Job, screen: Screen, *, out: Path, datasets: int, epochs: int | None, seed: int) -> Outcome:
    """Bring a job to its end, from its checkpoint if there is one."""
    path, epochs = experiment.state_path(out, job), epochs or job.default_epochs
    state = State.load(path) if path.exists() else None
    if state is not None and state.epochs != epochs:
        raise StudyError(f"{job.key} in {out} is a run of {state.epochs} epochs, not {epochs}")
    if state is not None and state.finished:
        return Outcome(job.key)
    data_sets = job.data_sets(datasets, seed)
    state = state or train.initial_state(job, data_sets, epochs, seed)
    watch = experiment.epochs(screen, job, state, epochs, bound=_mean_bound)
    train.train(job, data_sets, state, seed, path, watch)
    return Outcome(job.key, state.seconds)


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
    summary=report.summary,
    figures=report.drawn,
)
