"""``hvae mnist``: plan the jobs, train what is not finished, keep ``results.json`` up to date, report."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvae import experiment, runs
from hvae.data import mnist
from hvae.experiment import Study, integer
from hvae.mnist import distributed, networks, report, study
from hvae.mnist.state import State
from hvae.mnist.study import Job, Setting
from hvae.mnist.train import Trainer
from hvae.runs import StudyError
from hvae.terminal import Screen

Watcher = Callable[[Trainer], None]
MEMORY = ("reversible", "store")
SANDWICH_BRIDGES = 200


def arguments(add: Callable[..., Any]) -> None:
    """The command's own."""
    _model_arguments(functools.partial(add, group="models"))
    _data_arguments(functools.partial(add, group="data"))
    _training_arguments(functools.partial(add, group="training"))
    _evaluation_arguments(functools.partial(add, group="evaluation"))
    _running_arguments(functools.partial(add, group="running"))


def _model_arguments(add: Callable[..., Any]) -> None:
    models = {"nargs": "+", "choices": study.ALL_MODELS, "metavar": "MODEL"}
    add("--model", **models, default=list(study.MODELS), help=", ".join(study.ALL_MODELS))
    add(
        "--network",
        choices=networks.NETWORKS,
        help="the report's, without batch norm, perceptrons, maxout ones; by default conv, maxout with a dlgm or hvi",
    )
    add("--prior", choices=study.PRIORS, default="normal", help="a standard normal, or a VampPrior")
    add("--components", type=integer(), metavar="C", help=f"of a VampPrior, by default {study.COMPONENTS}")
    add(
        "--leapfrog-steps",
        nargs="+",
        type=integer(0),
        metavar="K",
        help="or bridges, of uha and ldvi; by default 15, 20 for hvae-iaf, 8 for hvi, uha and ldvi; a model for each",
    )
    add("--flow-layers", type=integer(0), metavar="K", help=f"of planar and NICE, by default {study.FLOW_LAYERS}")
    add("--momenta", type=integer(), metavar="T", help="how often hvi draws one, each with K steps; by default 1")
    add("--units", nargs="+", type=integer(), metavar="N", help="of helmholtz' layers, from below; by default 200 10")


def _data_arguments(add: Callable[..., Any]) -> None:
    add("--data", default="sample", help="'sample' in the package, 'torchvision', or a folder of IDX files")
    add("--train-size", type=integer(), default=mnist.N_TRAIN, metavar="N", help="how many of the training digits")
    add(
        "--validation-size", type=integer(), default=mnist.N_VALIDATION, metavar="N", help="how many of the test digits"
    )
    add("--binarisation", choices=mnist.BINARISATIONS, default="round", help="drawn never, once, or every epoch")


def _training_arguments(add: Callable[..., Any]) -> None:
    add("--epochs", type=integer(), default=study.EPOCHS, metavar="N", help="of training")
    add("--batch-size", type=integer(), default=study.BATCH_SIZE, metavar="N", help="images a step")
    add(
        "--importance-samples",
        type=integer(),
        metavar="S",
        help=f"of the bounds of iwae and its kin, by default {study.IMPORTANCE_SAMPLES}",
    )
    add(
        "--gate-epochs",
        type=integer(),
        metavar="N",
        help="in which structured models learn their gates, by default a quarter",
    )
    add("--annealing", type=integer(0), default=0, metavar="STEPS", help="in which the log joint's weight grows to 1")
    clipped = f"of gradients; 0: any; by default 100 for {', '.join(study.CLIP_NORM)}"
    add("--clip-norm", type=integer(0), metavar="NORM", help=clipped)
    add("--decoder", type=Path, metavar="FILE", help="a finished job's, whose decoder all models take and keep")


def _evaluation_arguments(add: Callable[..., Any]) -> None:
    add("--likelihood-samples", type=integer(), default=5000, metavar="S", help="for the log-likelihood of an image")
    add(
        "--likelihood-images",
        type=integer(0),
        metavar="N",
        help="how many have theirs estimated; by default all of validation",
    )
    sandwich = functools.partial(add, metavar="N")
    sandwich("--sandwich-images", type=integer(0), default=0, help="drawn from each model, whose likelihood is bounded")
    bridges = f"of annealed importance sampling, for that; by default {SANDWICH_BRIDGES}"
    sandwich("--sandwich-bridges", type=integer(), help=bridges)


def _running_arguments(add: Callable[..., Any]) -> None:
    experiment.add_common(add, "mnist", "parameters, order of data and noise")
    add("--tensorboard", action="store_true", help="write the curves for TensorBoard, too")
    add("--device", type=_device, default="cpu", help="to compute on")
    add("--memory", choices=MEMORY, default="reversible", help="of leapfrog steps and bridges; stored ones are faster")
    add("--compile", action="store_true", help="compile the gradient of leapfrog steps")
    add("--threads", type=integer(), metavar="N", help="torch's; by default its own choice")


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text} is no device") from error


def _require_device(device: torch.device) -> None:
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise StudyError(f"--device {device} is not available here: {reason}") from error


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    setting = Setting(
        seed=args.seed,
        data=args.data,
        n_train=args.train_size,
        n_validation=args.validation_size,
        binarisation=args.binarisation,
        network=args.network or ("maxout" if set(args.model) & set(study.DEEP) else "conv"),
        batch_size=args.batch_size,
        epochs=args.epochs,
        likelihood_images=args.validation_size if args.likelihood_images is None else args.likelihood_images,
        likelihood_samples=args.likelihood_samples,
    )
    _require_device(args.device)
    if args.data == "sample" and args.binarisation != "round":
        raise StudyError(f"the sample holds rounded pixels: --binarisation {args.binarisation} needs --data DIR")
    if setting.likelihood_images > setting.n_validation:
        raise StudyError(f"--likelihood-images {setting.likelihood_images} is more than --validation-size")
    digits, jobs = setting.digits(), _plan(args)
    decoder, about = _decoder(args, setting)
    train = functools.partial(_train, setting=setting, digits=digits, args=args, decoder=decoder)
    with experiment.threads(args.threads), distributed.processes():
        if distributed.rank() != 0:
            for _ in STUDY.train_jobs(args.out, jobs, train, Screen(quiet=True)):
                pass
            return
        names = ("sandwich_images", "sandwich_bridges")
        sandwich = dict(zip(names, _sandwich(args), strict=True)) if args.sandwich_images else {}
        with runs.open_directory(args, **asdict(setting), **sandwich, **about) as config:
            STUDY.run_jobs(args, config, jobs, train)


def _sandwich(args: argparse.Namespace) -> tuple[int, int]:
    """Images and bridges."""
    return args.sandwich_images, args.sandwich_bridges or SANDWICH_BRIDGES


def _decoder(args: argparse.Namespace, setting: Setting) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    """The state dict of ``--decoder``, and what a run's config says of it; None and nothing without."""
    if args.decoder is None:
        return None, {}
    if others := [model for model in args.model if model not in study.SANDWICHED]:
        raise StudyError(f"--decoder: {others[0]} has its own; for {' '.join(study.SANDWICHED)}")
    if not args.decoder.is_file():
        raise StudyError(f"--decoder {args.decoder}: no such file; expected a job's, DIR/jobs/vae-K0-S1.pt")
    try:
        state = State.load(args.decoder)
    except runs.UnreadableError as error:
        raise StudyError(f"--decoder {args.decoder}: corrupt, or no job's of hvae mnist") from error
    if not state.finished:
        raise StudyError(f"--decoder {args.decoder}: that job is not finished; go on with its run, with --resume")
    prefix = "decoder."
    decoder = {name.removeprefix(prefix): x for name, x in state.model.items() if name.startswith(prefix)}
    try:
        networks.decoder(setting.network, setting.latent).load_state_dict(decoder)
    except RuntimeError as error:
        said = f"is of another network than --network {setting.network} with {setting.latent} latent dimensions"
        raise StudyError(f"--decoder {args.decoder}: {said}") from error
    about = {"job": args.decoder.stem, "epochs": state.epoch, "sha256": runs.checksum(decoder)}
    return decoder, {"decoder": about}


def _plan(args: argparse.Namespace) -> list[Job]:
    components = (args.components or study.COMPONENTS) if args.prior == "vamp" else 0
    if args.components and not components:
        raise StudyError("--components: only --prior vamp has any")
    if components > args.train_size:
        raise StudyError(f"--components {components} is more than --train-size, where pseudo-inputs start")
    structured = set(args.model) & set(study.STRUCTURED)
    if args.gate_epochs and not structured:
        raise StudyError(f"--gate-epochs: only --model {' '.join(study.STRUCTURED)} has gates")
    for option, given, models in (
        ("--leapfrog-steps", args.leapfrog_steps is not None, tuple(study.LEAPFROG_STEPS)),
        ("--importance-samples", args.importance_samples is not None, study.IMPORTANCE_WEIGHTED),
        ("--flow-layers", args.flow_layers is not None, study.LAYERED),
        ("--momenta", args.momenta is not None, ("hvi",)),
        ("--units", args.units is not None, ("helmholtz",)),
    ):
        if given and not set(args.model) & set(models):
            raise StudyError(f"{option}: only --model {' '.join(models)} has any")
    if args.sandwich_bridges and not args.sandwich_images:
        raise StudyError("--sandwich-bridges: only --sandwich-images have any")
    if args.sandwich_images and (others := [model for model in args.model if model not in study.SANDWICHED]):
        raise StudyError(f"--sandwich-images: {others[0]} has none; there is for {' '.join(study.SANDWICHED)}")
    for option, given in (("--sandwich-images", args.sandwich_images), ("--decoder", args.decoder)):
        if given and components:
            raise StudyError(f"{option}: with --prior normal alone")
    gate_epochs = args.gate_epochs or max(args.epochs // 4, 1)
    if structured and gate_epochs > args.epochs:
        raise StudyError(f"--gate-epochs {gate_epochs} is more than --epochs")
    try:
        return study.plan(
            args.model,
            args.leapfrog_steps,
            args.importance_samples or study.IMPORTANCE_SAMPLES,
            components,
            gate_epochs,
            flow_layers=study.FLOW_LAYERS if args.flow_layers is None else args.flow_layers,
            momenta=args.momenta or 1,
            annealing=args.annealing,
            clip_norm=args.clip_norm,
            units=tuple(args.units or study.UNITS),
        )
    except ValueError as error:
        raise StudyError(str(error)) from error


def _train(
    job: Job,
    state: State,
    path: Path,
    screen: Screen,
    *,
    setting: Setting,
    digits: mnist.Digits,
    args: argparse.Namespace,
    decoder: dict[str, Tensor] | None,
) -> None:
    leapfrog = {"memory": args.memory, "compile": args.compile}
    trainer = Trainer(job, setting, state, path, args.device, leapfrog, decoder, _sandwich(args))
    with ExitStack() as stack:
        if distributed.rank() == 0:
            trainer.watchers.append(_shown(screen, trainer))
            if args.tensorboard:
                trainer.watchers.append(_scalars(stack, args.out / "tensorboard" / job.key, state))
        trainer.run(digits)


def _shown(screen: Screen, trainer: Trainer) -> Watcher:
    """Shows the training, then the log-likelihoods."""
    state, setting, key = trainer.state, trainer.setting, trainer.job.key
    n_steps = setting.epochs * setting.steps_per_epoch

    def show(trainer: Trainer) -> None:
        if state.epoch < setting.epochs:
            said = {"validation": f"{state.history[-1]['validation']:.2f}"} if state.history else {}
            screen.step(key, trainer.step, n_steps, "step", figures=said)
        elif setting.likelihood_images:
            done = len(state.log_likelihoods)
            screen.step(f"{key}: log-likelihood", done, setting.likelihood_images, "image")

    return show


def _scalars(stack: ExitStack, directory: Path, state: State) -> Watcher:
    """Writes each new record of the history for TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise StudyError("--tensorboard: tensorboard not found; pip install tensorboard") from error
    writer = stack.enter_context(SummaryWriter(str(directory), purge_step=state.epoch + 1))
    written = state.epoch

    def write(trainer: Trainer) -> None:
        nonlocal written
        for record in state.history[written:]:
            for name in ("train", "validation", "elbo"):
                if record[name] is not None:
                    writer.add_scalar(f"bound/{name}", record[name], record["epoch"])
        written = len(state.history)

    return write


STUDY = Study(
    name="mnist",
    help="variational auto-encoders on MNIST: Hamiltonian, importance-weighted, structured; flows, priors, wake-sleep",
    epilog="Under torchrun every process takes its part of each batch and of the importance samples.",
    arguments=arguments,
    run=run,
    state=State,
    job=lambda key, config: Job.from_key(key),
    rows=lambda job, state, config: [report.row_of(job, state, Setting.of(config))],
    tables=report.tables,
    summary=report.summary,
    figures=report.drawn,
)
