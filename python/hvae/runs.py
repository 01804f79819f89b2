"""What every experiment shares: its directory, ``results.json``, state files, tables and kinds of arguments."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import hvae_kernels

Row = dict[str, Any]


class StudyError(Exception):
    """A mistake in the command or a run that cannot go on: one sentence for the user."""


def unreadable(path: Path) -> StudyError:
    """The error for a file in a run's directory that is corrupt or is not of a run."""
    return StudyError(f"{path} is corrupt or not a file of this run: delete it and run the command with --resume")


def integer(minimum: int = 1, maximum: float = math.inf) -> Callable[[str], int]:
    """An argument's type: an integer in a range."""

    def integer(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is below {minimum}")
        if int(text) > maximum:
            raise argparse.ArgumentTypeError(f"{text} is above {maximum}")
        return int(text)

    return integer


#: The type of ``--seed``.
seed = integer(0, 2**63 - 1)


def generator(*purpose: object) -> torch.Generator:
    """A stream of random numbers for each purpose (a seed, a job, an epoch...), so that a run can go on anywhere."""
    digest = hashlib.blake2b(" ".join(map(str, purpose)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def open_directory(args: argparse.Namespace, **fixed: Any) -> dict[str, Any]:
    """Make ``args.out``; returns its config, with ``fixed``, the seed among it, in which all its runs must agree.

    A directory that holds other results is refused.
    """
    plain = {name: value if isinstance(value, int | list | None) else str(value) for name, value in vars(args).items()}
    config = {
        "experiment": args.command,
        **fixed,
        "versions": {"hvae_kernels": hvae_kernels.__version__, "torch": torch.__version__},
        "arguments": {name: value for name, value in plain.items() if name not in ("run", "command")},
    }
    if args.out.exists() and not args.out.is_dir():
        raise StudyError(f"{args.out} is a file, not a directory: choose another --out")
    if (args.out / "results.json").exists():
        if not args.resume:
            raise StudyError(
                f"{args.out} holds results already: add --resume to go on with them, or choose another --out"
            )
        before, _ = read_results(args.out)
        for name in ("experiment", *fixed):
            if before.get(name) != config[name]:
                raise StudyError(f"{args.out} was made with {name} {before.get(name)}, not {config[name]}")
    (args.out / "jobs").mkdir(parents=True, exist_ok=True)
    return config


def write_results(directory: Path, config: dict[str, Any], rows: Iterable[Row]) -> None:
    """Write ``results.json``, whole or not at all; a number that is not finite is an error."""
    text = json.dumps({"config": config, "rows": list(rows)}, indent=1, allow_nan=False)
    partial = directory / "results.partial"
    partial.write_text(text + "\n")
    os.replace(partial, directory / "results.json")


def read_results(directory: Path) -> tuple[dict[str, Any], list[Row]]:
    """The config and the rows of ``results.json``."""
    path = directory / "results.json"
    if not path.is_file():
        raise StudyError(f"no results.json in {directory}")
    try:
        return _parsed(path.read_text())
    except (ValueError, KeyError, TypeError) as error:
        raise unreadable(path) from error


def _parsed(text: str) -> tuple[dict[str, Any], list[Row]]:
    results = json.loads(text)
    config, rows = results["config"], results["rows"]
    if not (isinstance(config, dict) and isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
        raise TypeError("config is an object and rows a list of them")
    if missing := {"experiment", "seed", "versions"} - config.keys():
        raise KeyError(*missing)
    return config, rows


def finite(value: float | None) -> float | None:
    """The value, None where it is not finite: JSON has no such number."""
    return value if value is not None and math.isfinite(value) else None


def save(value: Any, path: Path) -> None:
    """``torch.save``, whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    os.replace(partial, path)


def load(kind: Callable[..., Any], path: Path) -> Any:
    """``kind`` from the keyword arguments that :func:`save` wrote; StudyError where the file holds anything else."""
    try:
        return kind(**torch.load(path, weights_only=True))
    except OSError:
        raise
    except Exception as error:  # torch.load has no type of its own for a corrupt file
        raise unreadable(path) from error


def table(headers: list[str], lines: list[list[Any]]) -> str:
    """A Markdown table of four significant digits, without the columns in which nothing is known."""
    from tabulate import tabulate

    keep = [i for i in range(len(headers)) if any(line[i] is not None for line in lines)]
    body = [[_text(line[i]) for i in keep] for line in lines]
    align = ["left" if isinstance(lines[0][i], str) else "right" for i in keep] if lines else None
    return tabulate(body, [headers[i] for i in keep], tablefmt="github", disable_numparse=True, colalign=align)


def _text(value: float | str | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value
