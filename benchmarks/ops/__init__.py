"""One file an op folder of ``hvae_kernels/ops``, with its ``ROWS``; ``_row.py`` is what those of several share."""

from __future__ import annotations

import pkgutil

NAMES = tuple(sorted(name for _, name, _ in pkgutil.iter_modules(__path__) if not name.startswith("_")))
