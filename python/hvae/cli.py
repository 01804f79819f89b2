"""The command ``hvae``: one subcommand an experiment, and ``hvae report DIR`` for what earlier runs wrote."""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hvae import chairs, draw, energies, experiment, gaussian, mnist, priors, runs, sentences

EXTRA = ("matplotlib", "numpy", "tabulate", "tqdm")
#: In the order of the help.
STUDIES = {
    study.name: study
    for study in (
        *(gaussian.STUDY, mnist.STUDY, priors.STUDY, draw.STUDY, energies.STUDY),
        *(sentences.STUDY, chairs.STUDY),
    )
}


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(
        prog="hvae", description="Experiments with variational auto-encoders, Hamiltonian and others."
    )
    commands = root.add_subparsers(dest="command", required=True)
    for study in STUDIES.values():
        study.register(commands)
    report = commands.add_parser("report", help="tables and figures from what earlier runs wrote")
    report.add_argument("directory", type=Path, metavar="DIR", help="the --out of an earlier run")
    experiment.add_quiet(report.add_argument)
    report.set_defaults(run=lambda args: write_report(args.directory, args.quiet))
    return root


def write_report(directory: Path, quiet: bool = False) -> None:
    """Write and show the report of whichever experiment the directory holds."""
    config, _ = runs.read_results(directory)
    if config["experiment"] not in STUDIES:
        raise runs.StudyError(f"{directory} holds no experiment that is known here: {config['experiment']}")
    STUDIES[config["experiment"]].report(directory, quiet)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # reports are UTF-8, terminals need not be
            stream.reconfigure(errors="replace")
    args = parser().parse_args(argv)
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        print(f"hvae: {', '.join(missing)} not found; pip install 'hvae-kernels[study]'", file=sys.stderr)
        return 1
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # who reads has enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (runs.StudyError, OSError) as error:
        print(f"hvae: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hvae: interrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0
