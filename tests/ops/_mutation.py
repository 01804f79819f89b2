"""A row of the mutation check."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutation:
    """Replace ``before`` (which must stand exactly once in ``path``) by ``after``; ``tests`` must then fail."""

    path: str
    before: str
    after: str
    tests: str

    def stands(self, tree: Path = ROOT) -> int:
        """How often ``before`` stands in the tree."""
        file = tree / self.path
        return file.read_text().count(self.before) if file.exists() else 0
