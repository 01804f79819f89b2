"""A row of the mutation check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutation:
    """Replace ``before`` (which must stand exactly once in ``path``) by ``after``; ``tests`` must then fail.

    ``sources`` are, of a header that many files of ``csrc/cpu`` include, those that the tests reach: only they are
    built anew. By default it is the one of the header's name, or all. They are built for one instruction set, in half
    the time, and with ``every_set`` for all: where a line is of one set alone.
    """

    path: str
    before: str
    after: str
    tests: str
    sources: tuple[str, ...] | None = None
    every_set: bool = False

    @property
    def files(self) -> list[str]:
        """Of the tests."""
        return self.tests.partition(" -k ")[0].split()

    @property
    def arguments(self) -> list[str]:
        """For pytest: the selector, which may have blanks, is one."""
        selector = self.tests.partition(" -k ")[2]
        return [*self.files, *(["-k", selector] if selector else [])]

    def stands(self, tree: Path = ROOT) -> int:
        """How often ``before`` stands in the tree."""
        file = tree / self.path
        return file.read_text().count(self.before) if file.exists() else 0
