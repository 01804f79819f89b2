"""One file an op folder of ``hvae_kernels/ops``: its rows of the contract and the mutations that break its files.

Each has ``SPECS`` and ``MUTATIONS``. Files whose name begins with an underscore are what those of ops share.
"""

from __future__ import annotations

import importlib
import pkgutil

NAMES = tuple(sorted(name for _, name, _ in pkgutil.iter_modules(__path__) if not name.startswith("_")))


def collected(attribute: str) -> tuple:
    """What the files have under this name, by file, in a file as it stands there."""
    return tuple(row for name in NAMES for row in getattr(importlib.import_module(f"{__name__}.{name}"), attribute))
