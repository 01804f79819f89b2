"""What a study is, and what all do alike: jobs, states that go on after a kill, results, report, the command's frame.

A study gives its models, what an epoch does and its report; a :class:`Study` lists what that comes to. ``runs`` keeps
the files, ``terminal`` shows what people see.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from hvae import runs, terminal
from hvae.runs import Row
from hvae.terminal import Screen

SECONDS_BETWEEN_CHECKPOINTS = 20.0

Config = dict[str, Any]
T = TypeVar("T")


class Job(Protocol):
    """One thing to train."""

    @property
    def key(self) -> str:
        """The name of the job and of its files."""

    @property
    def order(self) -> tuple[Any, ...]:
        """Where the job stands in tables."""


@dataclass(frozen=True)
class NamedJob:
    """A job that is one of a study's ``methods``, which stand in the order of its tables."""

    methods: ClassVar[Mapping[str, Any]] = {}
    name: str
    seed: int

    def __post_init__(self):
        if self.name not in self.methods:
            raise ValueError(f"no job is named {self.name}")

    @property
    def key(self) -> str:
        """The name of the job and of its files."""
        return self.name

    @property
    def order(self) -> tuple[int]:
        """Where the job stands in tables."""
        return (list(self.methods).index(self.name),)

    def generator(self, *purpose: object) -> torch.Generator:
        """A stream of random numbers for each purpose, the same for all jobs."""
        return generator(self.seed, *purpose)

    def noise(self, shape: tuple[int, ...], *purpose: object) -> Tensor:
        """Standard normals of the job's own."""
        return torch.randn(shape, generator=self.generator(self.key, *purpose))


@dataclass(frozen=True)
class Setting:
    """What all jobs of a run share: fields of its config."""

    @classmethod
    def of(cls: type[T], config: Config) -> T:
        """A run's, from its config."""
        return cls(**{field.name: config[field.name] for field in fields(cls)})  # type: ignore[arg-type]


@dataclass(kw_only=True)
class State:
    """Everything a job needs to go on, as it is kept in a file.

    Noise is a function of where it is used, so no generator is among it.

    Attributes:
        epoch: how many are done.
        seconds: of training so far.
        processor_seconds: of all threads in these.
        history: records of what the study follows, each with its ``epoch``.
    """

    epoch: int = 0
    seconds: float = 0.0
    processor_seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        raise NotImplementedError

    def save(self, path: Path) -> None:
        """Write to ``path``, whole or not at all."""
        runs.save(vars(self), path)

    @classmethod
    def load(cls: type[S], path: Path) -> S:
        """What :meth:`save` wrote; StudyError where it is anything else."""
        return runs.load(cls, path)


J = TypeVar("J", bound=Job)
S = TypeVar("S", bound=State)


class Checkpoints:
    """Saves a state from time to time on its way to the end.

    Args:
        state: where the job stands.
        path: of its file.
        watch: called with the state whenever it could be saved, after each epoch among others.
        parts: modules and optimisers, each by the name of the state's field for its state dict; if the job has begun
            they are brought to where it stands.
    """

    def __init__(self, state: State, path: Path, watch: Callable[[Any], None], **parts: Any):
        self.state, self.path, self.watch, self.parts = state, path, watch, parts
        self._saved = time.perf_counter()
        try:
            for name, part in parts.items() if state.epoch else ():
                part.load_state_dict(getattr(state, name))
        except (RuntimeError, ValueError, KeyError) as error:
            raise runs.unreadable(path) from error

    def __call__(self, force: bool = False) -> None:
        """Save now, or if the last time is long ago; and tell the watcher."""
        if force or time.perf_counter() - self._saved > SECONDS_BETWEEN_CHECKPOINTS:
            for name, part in self.parts.items():
                setattr(self.state, name, part.state_dict())
            self.state.save(self.path)
            self._saved = time.perf_counter()
        self.watch(self.state)

    def epochs(self, count: int) -> Iterator[int]:
        """The epochs that are left of ``count``; each is timed, and is done when the next one is asked for."""
        while self.state.epoch < count:
            start, processor = time.perf_counter(), time.process_time()
            yield self.state.epoch
            self.state.epoch += 1
            self.state.seconds += time.perf_counter() - start
            self.state.processor_seconds += time.process_time() - processor
            self(force=self.state.epoch == count)


class Help(argparse.HelpFormatter):
    """Help that names defaults, where an option has any to name."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not action.help or action.default in (None, argparse.SUPPRESS) or action.default is False:
            return action.help
        default = action.default if isinstance(action.default, list) else [action.default]
        text = " ".join(map(str, default)).replace("%", "%%")
        return f"{action.help} (default: {text})"


@dataclass(frozen=True)
class Study(Generic[J, S]):
    """A subcommand of ``hvae``.

    Args:
        name: of the subcommand, and of the experiment in ``results.json``.
        help: a line on it.
        arguments: adds its arguments, :func:`add_common` among them, through ``add_argument``, which takes the title of
            a ``group`` of the help, too.
        run: runs the command, in the end by :meth:`keep_results`.
        state: the kind of its jobs' states; those of :meth:`train_jobs` begin without arguments.
        job: the job of a key in a run of this config; ValueError or IndexError where there is none.
        rows: of a finished job, for ``results.json``, where each is given the job's key, too.
        tables: the report's parts, from the config and the rows.
        summary: headers and lines of the table that the command prints, from the same.
        figures: draws in a directory, from its finished jobs; returns the report's last parts, each with its heading.
        epilog: below the help.
    """

    name: str
    help: str
    arguments: Callable[[Callable[..., Any]], None]
    run: Callable[[argparse.Namespace], None]
    state: type[S]
    job: Callable[[str, Config], J]
    rows: Callable[[J, S, Config], list[Row]]
    tables: Callable[[Config, list[Row]], list[str]]
    summary: Callable[[Config, list[Row]], tuple[list[str], list[list[Any]]]]
    figures: Callable[[Path, list[tuple[J, S]]], list[str]]
    epilog: str | None = None

    def register(self, commands: Any) -> None:
        """Add the study to the command line's subcommands."""
        command = commands.add_parser(self.name, help=self.help, formatter_class=Help, epilog=self.epilog)
        groups: dict[str, Any] = {}

        def add(*flags: str, group: str | None = None, **options: Any) -> None:
            if group is not None and group not in groups:
                groups[group] = command.add_argument_group(group)
            (command if group is None else groups[group]).add_argument(*flags, **options)

        self.arguments(add)
        command.set_defaults(run=self.run)

    def run_jobs(
        self, args: argparse.Namespace, config: Config, jobs: list[J], train: Callable[[J, S, Path, Screen], None]
    ) -> None:
        """Bring all jobs to their end, and show how they come along and what came of them."""
        self.keep_results(args, config, jobs, lambda screen: self.train_jobs(args.out, jobs, train, screen))

    def train_jobs(
        self, directory: Path, jobs: list[J], train: Callable[[J, S, Path, Screen], None], screen: Screen
    ) -> Iterator[J]:
        """Bring one job after another to its end from wherever it stands; ``train`` is told its state's file, too."""
        for job in jobs:
            path = state_path(directory, job)
            state = self.state.load(path) if path.exists() else self.state()
            if not state.finished:
                train(job, state, path, screen)
                screen.ended(job.key, state.seconds)
            yield job

    def keep_results(
        self, args: argparse.Namespace, config: Config, jobs: list[J], work: Callable[[Screen], Iterable[Any]]
    ) -> None:
        """Write ``results.json`` first and at every item of ``work``; the report and the table in the end."""
        finished = self.write_results(args.out, config) & {job.key for job in jobs}
        count = f"{len(jobs)} job{'s' * (len(jobs) > 1)}, {len(finished)} finished before"
        screen = Screen(args.quiet)
        with screen.jobs(f"hvae {self.name}: {count}; results go to {args.out}", len(jobs), finished):
            for _ in work(screen):
                self.write_results(args.out, config)
        self.report(args.out, args.quiet)

    def write_results(self, directory: Path, config: Config) -> set[str]:
        """Collect every finished job in the directory, of this and of earlier commands; returns the keys of those.

        Rows outlive the state files of their jobs.
        """
        finished = self.finished_jobs(directory, config)
        keys = {job.key for job, _ in finished}
        rows = [{"job": job.key, **row} for job, state in finished for row in self.rows(job, state, config)]
        path = directory / "results.json"
        if path.exists():
            with runs.understood(path):
                before = runs.read_results(directory)[1]
                if sum("job" not in row for row in before) > len(rows):
                    said = "is of an earlier version and has rows whose state files are not here"
                    raise runs.StudyError(f"{path} {said}: choose another --out")
                kept = [row for row in before if "job" in row and row["job"] not in keys]
                rows = sorted([*rows, *kept], key=lambda row: self.job(row["job"], config).order)
        runs.write_results(directory, config, rows)
        return keys

    def report(self, directory: Path, quiet: bool = False) -> None:
        """Write the report and the figures of a run's directory; print the table and, unless ``quiet``, where it is."""
        config, rows = runs.read_results(directory)
        with runs.understood(directory / "results.json"):
            headers, lines = self.summary(config, rows)
        self.write_report(directory)
        terminal.show(headers, lines, None if quiet else directory / "report.md")

    def write_report(self, directory: Path) -> None:
        """Write ``report.md`` and the figures of a run's directory, these anew only from the states of all its jobs."""
        config, rows = runs.read_results(directory)
        path = directory / "report.md"
        with runs.understood(directory / "results.json"):
            parts, keys = self.tables(config, rows), {row["job"] for row in rows}
        jobs = self.finished_jobs(directory, config)
        if keys <= {job.key for job, _ in jobs}:
            parts += self.figures(directory, jobs)
        else:
            parts.append(_figures_in(path.read_text(encoding="utf-8")) if path.exists() else _pictures_of(directory))
        text = "\n\n".join(part.strip() for part in parts) + "\n"
        runs.write(path, text.encode())

    def finished_jobs(self, directory: Path, config: Config) -> list[tuple[J, S]]:
        """The finished jobs whose state the directory keeps, in the tables' order."""
        paths = runs.state_files(directory)
        states = [(self._job_of(path, config), self.state.load(path)) for path in paths]
        return sorted(((job, state) for job, state in states if state.finished), key=lambda item: item[0].order)

    def _job_of(self, path: Path, config: Config) -> J:
        """The job whose :func:`state_path` this is."""
        try:
            return self.job(path.stem, config)
        except (ValueError, IndexError) as error:
            raise runs.unreadable(path) from error


def _figures_in(report: str) -> str:
    """A report's figures, which come last, from their first heading on."""
    tables, picture, _ = report.partition("![")
    return report[tables.rfind("\n## ") :] if picture else ""


def _pictures_of(directory: Path) -> str:
    """A report's part of the pictures that lie beside it."""
    names = sorted(path.name for path in directory.glob("*.png"))
    return "\n\n".join(["## Figures", *(f"![{name}]({name})" for name in names)]) if names else ""


def state_path(directory: Path, job: Job) -> Path:
    """Where a job's state is kept."""
    return directory / "jobs" / f"{job.key}.pt"


# ---- The command's frame ----


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


def add_common(add: Callable[..., Any], name: str, seeded: str, seed: Callable[[str], int] = seed) -> None:
    """``--seed``, of what is ``seeded``, ``--out``, ``--resume`` and ``--quiet``, through ``add_argument``."""
    add("--seed", type=seed, default=12345, help=f"of {seeded}")
    add("--out", type=Path, default=Path("runs", name), help="directory for results, report and figures")
    add("--resume", action="store_true", help="go on with what --out holds, and add to it")
    add_quiet(add)


def add_quiet(add: Callable[..., Any]) -> None:
    """``--quiet``, through ``add_argument``."""
    add("--quiet", action="store_true", help="print nothing but the table in the end, and errors")


def generator(*purpose: object) -> torch.Generator:
    """A stream of random numbers for each purpose (a seed, a job, an epoch...), so that a run can go on anywhere."""
    digest = hashlib.blake2b(" ".join(map(str, purpose)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@contextlib.contextmanager
def drawing_from(generator: torch.Generator) -> Iterator[None]:
    """What draws from torch's own stream, as layers do their first parameters, draws from this one."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(generator.get_state())
        yield


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """As many of torch's threads, or as there are; then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def epochs(
    screen: Screen, job: Job, state: State, count: int, **figures: Callable[[dict[str, Any]], str]
) -> Callable[[State], None]:
    """A watcher of :class:`Checkpoints` that shows a job's epochs, and ``figures`` of the last record."""

    def watch(state: State) -> None:
        said = {name: figure(record) for name, figure in figures.items() for record in state.history[-1:]}
        screen.step(job.key, state.epoch, count, figures=said)

    watch(state)
    return watch


# ---- Reports ----


def versions(config: Config) -> str:
    """Of what a run was made with."""
    return ", ".join(f"{name} {version}" for name, version in config["versions"].items())


def table(headers: list[str], lines: list[list[Any]]) -> str:
    """A Markdown table of four significant digits, without the columns in which nothing is known."""
    from tabulate import tabulate

    keep = [i for i in range(len(headers)) if any(line[i] is not None for line in lines)]
    body = [[terminal.text(line[i]) for i in keep] for line in lines]
    align = ["left" if isinstance(lines[0][i], str) else "right" for i in keep] if lines else None
    return tabulate(body, [headers[i] for i in keep], tablefmt="github", disable_numparse=True, colalign=align)
