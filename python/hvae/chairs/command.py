"""``hvae chairs``: train what is not finished, keep ``results.json`` up to date, report."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hvae import experiment, runs
from hvae.chairs import figures, report, study, train
from hvae.chairs.data import Gallery
from hvae.chairs.study import METHODS, Job, Setting
from hvae.chairs.train import State
from hvae.experiment import Study, integer
from hvae.terminal import Screen


def side(text: str) -> int:
    """An argument's type."""
    if integer(16)(text) % 8:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of 8")
    return int(text)


def arguments(add: Callable[..., Any]) -> None:
    """The command's own."""
    add("--models", nargs="+", choices=METHODS, default=list(METHODS), help="what q(z | chair) is")
    add("--chairs", type=integer(2), default=study.N_CHAIRS, help="how many")
    add("--azimuths", type=integer(8), default=study.N_AZIMUTHS, help="from how many sides each is drawn")
    add("--size", type=side, default=study.SIZE, help="pixels along a picture's side, a multiple of 8")
    add("--epochs", type=integer(), default=study.EPOCHS, help="of training")
    add("--latent", type=integer(), default=study.LATENT, help="dimensions of z")
    experiment.add_common(add, "chairs", "chairs, parameters, order of pictures and noise")
    add("--threads", type=integer(), default=1, help="torch's")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    setting = Setting(
        seed=args.seed,
        n_chairs=args.chairs,
        n_azimuths=args.azimuths,
        size=args.size,
        epochs=args.epochs,
        latent=args.latent,
    )
    gallery = functools.cache(lambda screen: setting.gallery(functools.partial(screen.each, "drawing", "chair")))
    jobs = [Job(name, args.seed) for name in dict.fromkeys(args.models)]
    with experiment.threads(args.threads), runs.open_directory(args, **asdict(setting)) as config:
        STUDY.run_jobs(args, config, jobs, functools.partial(_train, setting=setting, gallery=gallery))


def _train(
    job: Job, state: State, path: Path, screen: Screen, *, setting: Setting, gallery: Callable[[Screen], Gallery]
) -> None:
    pictures = gallery(screen)  # drawn when a job needs it
    watch = experiment.epochs(screen, job, state, setting.epochs, bound=lambda record: f"{record['bound']:.0f}")
    train.train(job, setting, pictures, state, path, watch)


STUDY = Study(
    name="chairs",
    help="chairs drawn from class, view and transformation by up-convolutions, from sides never seen",
    arguments=arguments,
    run=run,
    state=State,
    job=lambda key, config: Job(key, config["seed"]),
    rows=lambda job, state, config: [report.row_of(job, state, Setting.of(config))],
    tables=report.tables,
    summary=report.summary,
    figures=figures.draw,
)
