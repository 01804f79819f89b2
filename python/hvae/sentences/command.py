"""``hvae sentences``: train what is not finished, keep ``results.json`` up to date, report."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hvae import experiment, runs
from hvae.experiment import Study, integer
from hvae.runs import StudyError
from hvae.sentences import figures, report, study, train
from hvae.sentences.data import Corpus
from hvae.sentences.study import METHODS, Job, Setting
from hvae.sentences.train import State
from hvae.terminal import Screen


def probability(text: str) -> float:
    """An argument's type."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def arguments(add: Callable[..., Any]) -> None:
    """The command's own."""
    add("--models", nargs="+", choices=METHODS, default=list(METHODS), metavar="MODEL", help=", ".join(METHODS))
    add("--data", default="grammar", help="'grammar', whose probabilities are known, or a text, one sentence a line")
    of_grammar, of_text = functools.partial(add, group="the grammar"), functools.partial(add, group="a text")
    of_grammar("--train-size", type=integer(), help=f"sentences for training, by default {study.N_TRAIN}")
    of_grammar("--held-out-size", type=integer(2), help=f"sentences held out, by default {study.N_HELD_OUT}")
    of_text("--min-count", type=integer(), help=f"rarer words are unknown, by default {study.MIN_COUNT}")
    limit = f"longer sentences are left out, by default {study.MAX_WORDS}"
    of_text("--max-words", type=integer(maximum=1000), help=limit)
    add("--epochs", type=integer(), default=study.EPOCHS, help="of training")
    add("--hidden", type=integer(), default=study.HIDDEN, help="units of the LSTMs")
    add("--latent", type=integer(), default=study.LATENT, help="dimensions of z")
    add("--word-dropout", type=probability, default=study.WORD_DROPOUT, help="share of words hidden from the decoder")
    add("--annealing", choices=study.ANNEALINGS, default="linear", help="of the divergence's weight, from 0 to 1")
    add("--annealing-epochs", type=integer(), help=f"how long; by default {study.ANNEALING_EPOCHS}, or --epochs")
    add("--likelihood-samples", type=integer(), default=500, help="for the log-likelihood of a sentence")
    add("--likelihood-sentences", type=integer(), default=500, help="how many have theirs estimated, at most")
    experiment.add_common(add, "sentences", "sentences, parameters, order of data and noise")
    add("--threads", type=integer(), default=1, help="torch's")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    for option, given, grammar in (
        ("--train-size", args.train_size, True),
        ("--held-out-size", args.held_out_size, True),
        ("--min-count", args.min_count, False),
        ("--max-words", args.max_words, False),
    ):
        if given and grammar != (args.data == "grammar"):
            raise StudyError(f"{option}: only {'--data grammar' if grammar else 'a text, --data FILE,'} has any")
    sizes = args.train_size or study.N_TRAIN, args.held_out_size or study.N_HELD_OUT
    limits = args.min_count or study.MIN_COUNT, args.max_words or study.MAX_WORDS
    corpus = study.corpus(args.data, args.seed, *sizes, *limits)
    setting = Setting(
        seed=args.seed,
        data=args.data,
        checksum=corpus.checksum,
        n_train=len(corpus.train),
        n_held_out=len(corpus.held_out),
        epochs=args.epochs,
        hidden=args.hidden,
        latent=args.latent,
        word_dropout=args.word_dropout,
        annealing=args.annealing,
        annealing_epochs=args.annealing_epochs or min(study.ANNEALING_EPOCHS, args.epochs),
        likelihood_sentences=args.likelihood_sentences,
        likelihood_samples=args.likelihood_samples,
    )
    if setting.annealing_epochs > setting.epochs:
        raise StudyError(f"--annealing-epochs {setting.annealing_epochs} is more than --epochs {setting.epochs}")
    said = {
        **{"vocabulary": len(corpus.vocabulary), "unknown": corpus.unknown, "left_out": corpus.left_out},
        **dict(zip(("min_count", "max_words"), limits, strict=True)),
    }
    jobs = [Job(name, args.seed) for name in dict.fromkeys(args.models)]
    with experiment.threads(args.threads), runs.open_directory(args, **asdict(setting), corpus=said) as config:
        STUDY.run_jobs(args, config, jobs, functools.partial(_train, setting=setting, corpus=corpus))


def _train(job: Job, state: State, path: Path, screen: Screen, *, setting: Setting, corpus: Corpus) -> None:
    watch = experiment.epochs(screen, job, state, setting.epochs, bound=lambda record: f"{record['held_out']:.2f}")
    train.train(job, setting, corpus, state, path, watch)


STUDY = Study(
    name="sentences",
    help="an auto-encoder of sentences: what annealing and word dropout are worth to z",
    arguments=arguments,
    run=run,
    state=State,
    job=lambda key, config: Job(key, config["seed"]),
    rows=lambda job, state, config: [report.row_of(job, state, Setting.of(config))],
    tables=report.tables,
    summary=report.summary,
    figures=figures.draw,
)
