"""The compiled extension: loaded on first use, and when it is absent, remembered why."""

from __future__ import annotations

import functools
import importlib


@functools.cache
def why_absent() -> str | None:
    """Load the extension; ``None`` when its kernels are there, otherwise one sentence saying why not."""
    try:
        importlib.import_module("hvae_kernels._C")
    except ModuleNotFoundError:
        return "the extension was not built (installed without a compiler or with HVAE_KERNELS_SKIP_BUILD=1)"
    except ImportError as error:
        return f"the extension does not load: {error}"
    return None
