"""``hvae draw``: train what is not finished, keep ``results.json`` up to date, report."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from hvae import experiment, runs
from hvae.data import mnist
from hvae.draw import classify, figures, glimpses, report, study, train
from hvae.draw.models import READ
from hvae.draw.study import Job, Setting
from hvae.draw.train import State
from hvae.experiment import Config, Study, integer
from hvae.runs import Row, StudyError
from hvae.terminal import Screen

TASKS = ("generate", "classify")
#: Options that a task alone has; they are None where they are not given.
OWN = {
    "generate": ("attention", "read", "draw_steps", "likelihood_samples", "likelihood_images"),
    "classify": ("glimpses", "convolutional", "side", "pieces"),
}


def arguments(add: Callable[..., Any]) -> None:
    """The command's own."""
    add("--task", choices=TASKS, default="generate", help="draw digits, or classify them among clutter")
    add("--attention", action=argparse.BooleanOptionalAction, help="with attention alone, or without; by default both")
    add("--read", nargs="+", type=integer(), metavar="N", help="filters a side of what attention reads, by default 2")
    add("--draw-steps", nargs="+", type=integer(), metavar="T", help="steps of a drawing, by default 10 and 25")
    add("--glimpses", nargs="+", type=integer(), metavar="T", help="of classification, by default 4 and 8")
    add("--convolutional", action=argparse.BooleanOptionalAction, help="train classification's baseline, too, or not")
    add("--side", type=integer(mnist.SIDE), help="pixels of a cluttered image's side, by default 100")
    add("--pieces", type=integer(0), help="of clutter in an image, by default 8")
    add("--data", default="sample", help="'sample' in the package, 'torchvision', or a folder of IDX files")
    add("--train-size", type=integer(), default=mnist.N_TRAIN, help="how many of the training digits")
    add("--validation-size", type=integer(), default=mnist.N_VALIDATION, help="how many of the test digits")
    add("--epochs", type=integer(), default=study.EPOCHS, help="of training")
    add("--likelihood-samples", type=integer(), help="for the log-likelihood of an image, by default 1000")
    add("--likelihood-images", type=integer(0), help="how many have theirs estimated, by default 100")
    experiment.add_common(add, "draw", "parameters, order of data and noise")
    add("--threads", type=integer(), help="torch's; by default its own choice")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    for task, names in OWN.items():
        for name in names:
            if task != args.task and getattr(args, name) is not None:
                raise StudyError(f"--{name.replace('_', '-')} is an option of --task {task} alone")
    if args.task == "classify":
        _classify(args)
    else:
        _generate(args)


def _classify(args: argparse.Namespace) -> None:
    setting = classify.Setting(
        seed=args.seed,
        task=args.task,
        data=args.data,
        n_train=args.train_size,
        n_validation=args.validation_size,
        epochs=args.epochs,
        side=args.side or classify.SIDE,
        pieces=classify.PIECES if args.pieces is None else args.pieces,
    )
    digits = setting.digits()
    numbers = [0] * (args.convolutional is not False) + (args.glimpses or list(classify.GLIMPSES))
    jobs = [classify.Job(number) for number in dict.fromkeys(numbers)]

    def train_job(job: classify.Job, state: State, path: Path, screen: Screen) -> None:
        error = {"error": lambda record: f"{100 * record['validation']:.2f} %"}
        watch = experiment.epochs(screen, job, state, setting.epochs, **error)
        classify.train(job, setting, digits, state, path, watch)

    with experiment.threads(args.threads), runs.open_directory(args, **asdict(setting)) as config:
        STUDY.run_jobs(args, config, jobs, train_job)


def _generate(args: argparse.Namespace) -> None:
    setting = Setting(
        seed=args.seed,
        data=args.data,
        n_train=args.train_size,
        n_validation=args.validation_size,
        epochs=args.epochs,
        likelihood_images=study.LIKELIHOOD_IMAGES if args.likelihood_images is None else args.likelihood_images,
        likelihood_samples=args.likelihood_samples or study.LIKELIHOOD_SAMPLES,
    )
    if setting.likelihood_images > setting.n_validation:
        raise StudyError(f"--likelihood-images {setting.likelihood_images} is more than --validation-size")
    pixels = setting.pixels()
    if args.read and args.attention is False:
        raise StudyError("--read: --no-attention has none")
    reads = [] if args.attention is False else args.read or [READ]
    whole = [] if args.attention else [0]
    jobs = [
        Job(read, steps, args.seed)
        for steps in dict.fromkeys(args.draw_steps or study.STEPS)
        for read in (*dict.fromkeys(reads), *whole)
    ]
    with experiment.threads(args.threads), runs.open_directory(args, **asdict(setting)) as config:
        STUDY.run_jobs(args, config, jobs, functools.partial(_train, setting=setting, pixels=pixels))


def _train(
    job: Job, state: State, path: Path, screen: Screen, *, setting: Setting, pixels: tuple[Tensor, Tensor]
) -> None:
    watch = experiment.epochs(screen, job, state, setting.epochs, bound=lambda record: f"{record['validation']:.2f}")
    train.train(job, setting, pixels, state, path, watch)


def _is_classified(config: Config) -> bool:
    """Runs that are older than tasks generate."""
    return config.get("task") == "classify"


def _job(key: str, config: Config) -> Any:
    return classify.Job.from_key(key) if _is_classified(config) else Job.from_key(key, config["seed"])


def _rows(job: Any, state: State, config: Config) -> list[Row]:
    if _is_classified(config):
        return [glimpses.row_of(job, state, classify.Setting.of(config))]
    return [report.row_of(job, state, Setting.of(config))]


def _figures(directory: Path, jobs: list[tuple[Any, State]]) -> list[str]:
    if jobs and isinstance(jobs[0][0], classify.Job):
        return glimpses.draw(directory, jobs)
    return figures.draw(directory, jobs)


STUDY = Study(
    name="draw",
    help="DRAW: digits drawn step by step, with and without attention, or classified among clutter",
    arguments=arguments,
    run=run,
    state=State,
    job=_job,
    rows=_rows,
    tables=lambda config, rows: (glimpses if _is_classified(config) else report).tables(config, rows),
    summary=lambda config, rows: (glimpses if _is_classified(config) else report).summary(config, rows),
    figures=_figures,
)
