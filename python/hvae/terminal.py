"""What people see of a command: on stderr what is at work, on stdout a table in the end; Markdown is for files."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

T = TypeVar("T")

#: Columns of the widest table.
WIDTH = 100
GAP = "  "
NO_FIGURES: Mapping[str, str] = {}


class Screen:
    """Shows jobs at work, on stderr: a line, then a bar of all jobs, and below it one of what each worker is at.

    Where stderr is no terminal, a line for each job that ends stands for the bars; where ``quiet``, nothing does. Only
    one process draws: bars of several would write over each other.
    """

    def __init__(self, quiet: bool = False):
        self._tells = not quiet
        self._draws = not quiet and sys.stderr.isatty()
        self._finished: Collection[str] = ()
        self._jobs: Any = None
        self._below: dict[int, tuple[str, Any]] = {}

    @contextlib.contextmanager
    def jobs(self, line: str, count: int, finished: Collection[str]) -> Iterator[None]:
        """While ``count`` jobs are at work, the keys of some of which are ``finished``; ``line`` says so."""
        if self._tells:
            print(line, file=sys.stderr, flush=True)
        self._finished = finished
        if self._draws:
            self._jobs = self._bar(0, "jobs", count, len(finished), "job")
        try:
            yield
        finally:
            for place in list(self._below):
                self._clear(place)
            if self._draws:
                self._jobs.close()
                print(file=sys.stderr)

    def step(
        self,
        what: str,
        done: int,
        total: int,
        unit: str = "epoch",
        place: int = 0,
        figures: Mapping[str, str] = NO_FIGURES,
    ) -> None:
        """The worker at a ``place`` is so far with ``what`` it does; ``figures`` stand behind the bar."""
        if not self._draws:
            return
        if place not in self._below or self._below[place][0] != what:
            self._clear(place)
            self._below[place] = what, self._bar(1 + place, what, total, done, unit)
        _, bar = self._below[place]
        bar.set_postfix(figures, refresh=False)
        bar.update(done - bar.n)
        self._jobs.update(0)  # its clock goes on

    def each(self, what: str, unit: str, things: Sequence[T]) -> Iterator[T]:
        """The things, each a step."""
        for done, thing in enumerate(things):
            self.step(what, done, len(things), unit)
            yield thing

    def ended(self, key: str, seconds: float | None, place: int = 0) -> None:
        """The job at a ``place`` is at its end; None seconds tell nothing of it."""
        self._clear(place)
        if self._draws:
            self._jobs.update(key not in self._finished)
            self._jobs.refresh()
        elif self._tells and seconds is not None:
            print(f"{key}: {seconds:.1f} s", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Of an error, quiet or not; above the bars."""
        if self._draws:
            from tqdm import tqdm

            tqdm.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr)

    def _bar(self, position: int, what: str, total: int, done: int, unit: str) -> Any:
        from tqdm import tqdm

        # without miniters that of the jobs is drawn where one ends alone; smoothed, its rate is since the last drawing
        pace = {"mininterval": 0.5, "miniters": 0, "smoothing": 0.3 if position else 0}
        style = {"leave": position == 0, "dynamic_ncols": True, **pace}
        return tqdm(desc=what, total=total, initial=done, unit=unit, position=position, **style)

    def _clear(self, place: int) -> None:
        if place in self._below:
            _, bar = self._below.pop(place)
            bar.close()


def show(headers: list[str], lines: list[list[Any]], report: Path | None = None) -> None:
    """Print the table, and where the ``report`` and its figures lie."""
    if lines:
        print(table(headers, lines, bold=_in_colour(sys.stdout)))
    else:
        print("No job is finished.")
    if report:
        count = len(re.findall(r"!\[[^]]*\]\(", report.read_text(encoding="utf-8")))
        figures = f"; {count} figure{'s lie' if count > 1 else ' lies'} beside it" if count else ""
        print(f"\nReport: {report}{figures}.")


def table(headers: list[str], lines: list[list[Any]], bold: bool = False) -> str:
    """In plain text of at most ``WIDTH`` columns, without those in which nothing is known.

    Where it is too wide, headers wider than their columns are broken, then labels, which are the first column.
    """
    keep = [i for i in range(len(headers)) if any(line[i] is not None for line in lines)]
    heads, body = [headers[i] for i in keep], [[_short(line[i]) for i in keep] for line in lines]
    right = [not isinstance(lines[0][i], str) for i in keep]
    if _width(heads, *body) > WIDTH:
        longest = [max(map(len, head.split())) for head in heads]
        heads = [_broken(*head) for head in zip(heads, map(max, longest, _widths(*body)), strict=True)]
    if (excess := _width(heads, *body) - WIDTH) > 0:
        room = max(1, max(len(line[0]) for line in body) - excess)
        body = [[_broken(line[0], room, at=", "), *line[1:]] for line in body]
    widths = _widths(heads, *body)
    top = [f"\033[1m{line}\033[0m" if bold else line for line in _drawn(heads, widths, right)]
    rule = GAP.join("-" * width for width in widths)
    return "\n".join([*top, rule, *(line for row in body for line in _drawn(row, widths, right))])


def _widths(*rows: list[str]) -> list[int]:
    return [max(len(line) for cell in column for line in cell.split("\n")) for column in zip(*rows, strict=True)]


def _width(*rows: list[str]) -> int:
    widths = _widths(*rows)
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _drawn(row: list[str], widths: list[int], right: list[bool]) -> list[str]:
    """A row's lines, as many as its cells have."""
    lines = itertools.zip_longest(*(cell.split("\n") for cell in row), fillvalue="")
    return [GAP.join(map(_placed, line, widths, right)).rstrip() for line in lines]


def _placed(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)


def text(value: float | str | None) -> str:
    """A table's cell, of four significant digits."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else value


def _short(value: float | str | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) and abs(value) >= 1e8 else text(value)


def _broken(text: str, width: int, at: str = " ") -> str:
    """Lines that are no wider, if need be with words cut; broken after ``at`` where that is enough."""
    tied = text.replace(" ", "\xa0").replace(at.replace(" ", "\xa0"), at)
    parts = textwrap.wrap(tied, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(line for part in parts for line in textwrap.wrap(part.replace("\xa0", " "), width))


def _in_colour(stream: TextIO) -> bool:
    """See no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
