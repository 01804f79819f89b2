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
from hvae.draw import figures, report, study, train
from hvae.draw.study import Job, Setting
from hvae.draw.train import State
from hvae.experiment import Study, integer
from hvae.runs import StudyError


def arguments(add: Callable[..., Any]) -> None:
    """The command's own."""
    add("--attention", action=argparse.BooleanOptionalAction, help="with attention alone, or without; by default both")
    add("--draw-steps", nargs="+", type=integer(), metavar="T", default=list(study.STEPS), help="steps of a drawing")
    add("--data", default="sample", help="'sample' in the package, 'torchvision', or a folder of IDX files")
    add("--train-size", type=integer(), default=mnist.N_TRAIN, help="how many of the training digits")
    add("--validation-size", type=integer(), default=mnist.N_VALIDATION, help="how many of the test digits")
    add("--epochs", type=integer(), default=study.EPOCHS, help="of training")
    add("--likelihood-samples", type=integer(), default=1000, help="for the log-likelihood of an image")
    add("--likelihood-images", type=integer(0), default=100, help="how many have theirs estimated")
    experiment.add_common(add, "draw", "parameters, order of data and noise")
    add("--threads", type=integer(), help="torch's; by default its own choice")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    setting = Setting(
        seed=args.seed,
        data=args.data,
        n_train=args.train_size,
        n_validation=args.validation_size,
        epochs=args.epochs,
        likelihood_images=args.likelihood_images,
        likelihood_samples=args.likelihood_samples,
    )
    if setting.likelihood_images > setting.n_validation:
        raise StudyError(f"--likelihood-images {setting.likelihood_images} is more than --validation-size")
    pixels = setting.pixels()
    kinds = (True, False) if args.attention is None else (args.attention,)
    jobs = [Job(attention, steps, args.seed) for steps in dict.fromkeys(args.draw_steps) for attention in kinds]
    trained = STUDY.train_jobs(args.out, jobs, functools.partial(_train, setting=setting, pixels=pixels))
    with experiment.threads(args.threads), runs.open_directory(args, **asdict(setting)) as config:
        STUDY.keep_results(args.out, config, trained)


def _train(job: Job, state: State, path: Path, *, setting: Setting, pixels: tuple[Tensor, Tensor]) -> None:
    bar = experiment.epoch_bar(job, state, setting.epochs, lambda record: f"{record['validation']:.2f}")
    with bar as progress:
        train.train(job, setting, pixels, state, path, progress)


STUDY = Study(
    name="draw",
    help="DRAW: digits drawn step by step, with and without attention",
    arguments=arguments,
    run=run,
    state=State,
    job=lambda key, config: Job.from_key(key, config["seed"]),
    rows=lambda job, state, config: [report.row_of(job, state, Setting.of(config))],
    tables=report.tables,
    figures=lambda directory, jobs, rows: figures.draw(directory, jobs),
)
