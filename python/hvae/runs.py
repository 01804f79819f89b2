"""A run's directory and its files: held by one command, whole, tied to their run, checked before believed."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hvae_kernels

Row = dict[str, Any]

#: Of a command's arguments, those that no result depends on.
UNTOLD = ("run", "command", "quiet")
#: In a directory of state files: what they were all made with.
RUN = "run.json"
#: In the names of files that are being written.
PARTIAL = ".partial"


class StudyError(Exception):
    """A mistake in the command or a run that cannot go on: one sentence for the user."""


class UnreadableError(StudyError):
    """A file that is corrupt or not of a run."""


def unreadable(path: Path) -> StudyError:
    """The error for a file in a run's directory that is corrupt or is not of a run."""
    return UnreadableError(f"{path} is corrupt or not a file of this run: delete it and run the command with --resume")


@contextlib.contextmanager
def understood(path: Path) -> Iterator[None]:
    """Around code that only reads what a file held: what it does not know there is the file's fault."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise unreadable(path) from error


@contextlib.contextmanager
def open_directory(args: argparse.Namespace, **fixed: Any) -> Iterator[dict[str, Any]]:
    """Make ``args.out`` and hold it; gives its config, with ``fixed``, the seed among it, in which all its runs agree.

    A directory that holds other results, or at which another command is at work, is refused. State files that a killed
    command left half written are removed.
    """
    plain = {name: value if isinstance(value, int | list | None) else str(value) for name, value in vars(args).items()}
    config = {
        "experiment": args.command,
        **fixed,
        "versions": {"hvae_kernels": hvae_kernels.__version__, "torch": torch.__version__},
        "arguments": {name: value for name, value in plain.items() if name not in UNTOLD},
    }
    if args.out.exists() and not args.out.is_dir():
        raise StudyError(f"{args.out} is a file, not a directory: choose another --out")
    jobs = args.out / "jobs"
    jobs.mkdir(parents=True, exist_ok=True)
    from filelock import FileLock, Timeout

    try:
        with FileLock(args.out / "lock", timeout=0):
            _require_agreement(args, config, fixed)
            for partial in jobs.glob(f"*{PARTIAL}*"):
                partial.unlink()
            write(jobs / RUN, json.dumps({name: config[name] for name in ("experiment", *fixed)}, indent=1).encode())
            yield config
    except Timeout as error:
        message = f"another command is at work in {args.out}: wait for it to end, or choose another --out"
        raise StudyError(message) from error


def _require_agreement(args: argparse.Namespace, config: dict[str, Any], fixed: dict[str, Any]) -> None:
    jobs = args.out / "jobs"
    has_results = (args.out / "results.json").exists()
    if not args.resume and (has_results or state_files(args.out)):
        raise StudyError(f"{args.out} holds results already: add --resume to go on with them, or choose another --out")
    made = _run_of(jobs) or {}
    for before in (read_results(args.out)[0] if has_results else {}, made):
        # with the names of before: a config without them would leave rows that the report cannot read
        for name in ("experiment", *fixed, *made) if before else ():
            if before.get(name) != config.get(name):
                raise StudyError(f"{args.out} was made with {name} {before.get(name)}, not {config.get(name)}")


def _run_of(jobs: Path) -> dict[str, Any] | None:
    """What all state files of a directory were made with; None where nothing says so."""
    path = jobs / RUN
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        return dict(run)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise unreadable(path) from error


def state_files(directory: Path) -> list[Path]:
    """Of the jobs of a run."""
    return [path for path in (directory / "jobs").glob("*.pt") if not path.stem.endswith(PARTIAL)]


# ---- Files, whole or not at all ----


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write, which takes its place in the end; a failure leaves nothing behind.

    Raises:
        StudyError: the system would not write it: no space, no permission.
    """
    partial = path.with_name(f"{path.stem}.{os.getpid()}-{threading.get_ident()}{PARTIAL}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise StudyError(f"could not write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """A whole file at once; see :func:`writing`."""
    with writing(path) as partial:
        partial.write_bytes(content)


def write_results(directory: Path, config: dict[str, Any], rows: Iterable[Row]) -> None:
    """Write ``results.json``; a number that is not finite is an error."""
    text = json.dumps({"config": config, "rows": list(rows)}, indent=1, allow_nan=False)
    write(directory / "results.json", (text + "\n").encode())


def read_results(directory: Path) -> tuple[dict[str, Any], list[Row]]:
    """The config and the rows of ``results.json``."""
    path = directory / "results.json"
    if not path.is_file():
        raise StudyError(f"no results.json in {directory}")
    try:
        return _parsed(path.read_text(encoding="utf-8"))
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


def save(state: dict[str, Any], path: Path) -> None:
    """``torch.save``, with a checksum and what the directory's run was made with."""
    file = io.BytesIO()
    whole = {**state, "run": json.dumps(_run_of(path.parent))}
    torch.save({**whole, "sha256": checksum(whole)}, file)
    write(path, file.getvalue())


def load(kind: Callable[..., Any], path: Path) -> Any:
    """``kind`` from the keyword arguments that :func:`save` wrote.

    Raises:
        StudyError: the file is damaged or holds anything else, or is of a run with another seed, other data...
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state.pop("sha256") != checksum(state):
            raise ValueError("the checksum differs")
        run = json.loads(state.pop("run"))
        result = kind(**state)
    except OSError:
        raise
    except Exception as error:  # torch.load has no type of its own for a corrupt file
        raise unreadable(path) from error
    for name, value in (_run_of(path.parent) or {}).items():
        before = (run or {}).get(name)
        if before != value:
            raise StudyError(f"{path} was made with {name} {before}, not {value}: it is of another run, remove it")
    return result


def checksum(value: Any) -> str:
    """SHA-256 of every name, number and shape, which torch.load itself does not compare with anything."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            add([str(value.dtype), tuple(value.shape)])
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            add(list(value.items()))
        elif isinstance(value, list | tuple):
            digest.update(f"{len(value)} ".encode())
            for item in value:
                add(item)
        else:
            digest.update(f"{value!r} ".encode())

    add(value)
    return digest.hexdigest()
