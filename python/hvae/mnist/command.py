"""``hvae mnist``: plan the jobs, train what is not finished, keep ``results.json`` up to date, report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hvae import runs
from hvae.data import mnist
from hvae.mnist import distributed, networks, report, study
from hvae.mnist.state import State
from hvae.mnist.study import Job, Setting
from hvae.mnist.train import Trainer
from hvae.runs import StudyError

Watcher = Callable[[Trainer], None]
MEMORY = ("reversible", "store")


def register(commands: Any) -> None:
    """Add ``hvae mnist`` to the command line's subcommands."""
    command = commands.add_parser(
        "mnist",
        help="variational auto-encoders on MNIST: Hamiltonian, importance-weighted, structured; flows and priors",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Under torchrun every process takes its part of each batch and of the importance samples.",
    )
    add = command.add_argument
    add("--model", nargs="+", choices=study.ALL_MODELS, default=list(study.MODELS), help="models")
    add("--prior", choices=study.PRIORS, default="normal", help="a standard normal, or a VampPrior")
    add("--components", type=runs.integer(), help=f"of a VampPrior, by default {study.COMPONENTS}")
    add("--gate-epochs", type=runs.integer(), help="in which structured models learn their gates, by default a quarter")
    add("--data", default="sample", help="'sample' in the package, 'torchvision', or a folder of IDX files")
    add("--train-size", type=runs.integer(), default=mnist.N_TRAIN, help="how many of the training digits")
    add("--validation-size", type=runs.integer(), default=mnist.N_VALIDATION, help="how many of the test digits")
    add("--binarisation", choices=mnist.BINARISATIONS, default="round", help="drawn never, once, or every epoch")
    add("--network", choices=networks.NETWORKS, default="conv", help="the report's, without batch norm, perceptrons")
    add("--epochs", type=runs.integer(), default=study.EPOCHS, help="of training")
    add("--batch-size", type=runs.integer(), default=study.BATCH_SIZE, help="images a step")
    add("--leapfrog-steps", type=runs.integer(0), metavar="K", help="by default 15, and 20 for hvae-iaf")
    add(
        "--importance-samples",
        type=runs.integer(),
        default=study.IMPORTANCE_SAMPLES,
        help="of the bounds of iwae and its kin",
    )
    add("--likelihood-samples", type=runs.integer(), default=5000, help="for the log-likelihood of an image")
    add(
        "--likelihood-images", type=runs.integer(0), help="how many have theirs estimated; by default all of validation"
    )
    add("--seed", type=runs.integer(0, 2**63 - 1), default=12345, help="of parameters, order of data and noise")
    add("--out", type=Path, default=Path("runs/mnist"), help="directory for results, report and figures")
    add("--resume", action="store_true", help="go on with what --out holds, and add to it")
    add("--tensorboard", action="store_true", help="write the curves for TensorBoard, too")
    add("--device", type=_device, default="cpu", help="to compute on")
    add("--memory", choices=MEMORY, default="reversible", help="of leapfrog steps; stored ones are faster")
    add("--compile", action="store_true", help="compile the gradient of leapfrog steps")
    add("--threads", type=runs.integer(), help="torch's; by default its own choice")
    command.set_defaults(run=run)


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
        network=args.network,
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
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        with distributed.processes():
            _run_jobs(jobs, setting, digits, args)
    finally:
        torch.set_num_threads(threads)


def _plan(args: argparse.Namespace) -> list[Job]:
    components = (args.components or study.COMPONENTS) if args.prior == "vamp" else 0
    if args.components and not components:
        raise StudyError("--components: only --prior vamp has any")
    if components > args.train_size:
        raise StudyError(f"--components {components} is more than --train-size, where pseudo-inputs start")
    structured = set(args.model) & set(study.STRUCTURED)
    if args.gate_epochs and not structured:
        raise StudyError(f"--gate-epochs: only --model {' '.join(study.STRUCTURED)} has gates")
    gate_epochs = args.gate_epochs or max(args.epochs // 4, 1)
    if structured and gate_epochs > args.epochs:
        raise StudyError(f"--gate-epochs {gate_epochs} is more than --epochs")
    try:
        return study.plan(args.model, args.leapfrog_steps, args.importance_samples, components, gate_epochs)
    except ValueError as error:
        raise StudyError(str(error)) from error


def _run_jobs(jobs: list[Job], setting: Setting, digits: mnist.Digits, args: argparse.Namespace) -> None:
    if distributed.rank() != 0:
        for job in jobs:
            _train(job, setting, digits, args)
        return
    with runs.open_directory(args, **asdict(setting)) as config:
        _write_results(args.out, config, setting)
        for job in jobs:
            _train(job, setting, digits, args)
            _write_results(args.out, config, setting)
        print(report.write_report(args.out))


def _train(job: Job, setting: Setting, digits: mnist.Digits, args: argparse.Namespace) -> None:
    """Bring a job to its end from wherever it stands."""
    path = report.state_path(args.out, job)
    state = runs.load(State, path) if path.exists() else State(epoch=0)
    if state.finished:
        print(f"{job.key}: finished before", file=sys.stderr)
        return
    trainer = Trainer(job, setting, state, path, args.device, {"memory": args.memory, "compile": args.compile})
    with ExitStack() as stack:
        if distributed.rank() == 0:
            trainer.watchers.append(_bars(stack, trainer))
            if args.tensorboard:
                trainer.watchers.append(_scalars(stack, args.out / "tensorboard" / job.key, state))
        trainer.run(digits)


def _bars(stack: ExitStack, trainer: Trainer) -> Watcher:
    """Progress bars of the training and of the log-likelihoods."""
    from tqdm import tqdm

    state, setting = trainer.state, trainer.setting
    n_steps = setting.epochs * setting.steps_per_epoch
    training = stack.enter_context(tqdm(desc=trainer.job.key, total=n_steps, unit="step"))
    likelihood = stack.enter_context(tqdm(desc="log-likelihood", total=setting.likelihood_images, unit="image"))

    def show(trainer: Trainer) -> None:
        if state.history:
            training.set_postfix(validation=f"{state.history[-1]['validation']:.2f}", refresh=False)
        training.update(trainer.step - training.n)
        likelihood.update(len(state.log_likelihoods) - likelihood.n)

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
                writer.add_scalar(f"bound/{name}", record[name], record["epoch"])
        written = len(state.history)

    return write


def _write_results(directory: Path, config: dict[str, Any], setting: Setting) -> None:
    """Collect every finished job in the directory, of this and of earlier commands."""
    rows = [report.row_of(job, state, setting) for job, state in report.finished_jobs(directory)]
    runs.write_results(directory, config, rows)
