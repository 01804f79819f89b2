"""The compiled extension: loaded on first use, when absent remembered why; and the instruction set of its kernels."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os

from hvae_kernels import _checks
from hvae_kernels._blocks import Blocks

#: What ``HVAE_KERNELS_CPU`` and ``use_cpu`` take: the sets in ascending order, as in ``csrc/kernels/sets.h``.
CHOICES = ("auto", "baseline", "avx2", "avx512")


def _validate(choice: str, source: str) -> str:
    if not isinstance(choice, str):
        got = _checks.describe(choice)
        raise TypeError(f"{source}: instruction set must be one of {', '.join(CHOICES)}, got {got}")
    if choice not in CHOICES:
        raise ValueError(f"{source}: instruction set must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


#: Of the environment: what the kernels use from the extension's loading on.
REQUESTED_CPU = _validate(os.environ.get("HVAE_KERNELS_CPU") or "auto", "HVAE_KERNELS_CPU")


@functools.cache
def _absence() -> str | None:
    try:
        importlib.import_module("hvae_kernels._C")
    except ModuleNotFoundError:
        return "the extension was not built (installed without a compiler or with HVAE_KERNELS_SKIP_BUILD=1)"
    except ImportError as error:
        return f"the extension does not load: {error}"
    return None


@functools.cache
def why_absent() -> str | None:
    """Load the extension; ``None`` when its kernels are there, otherwise one sentence saying why not.

    Raises:
        RuntimeError: the instruction set that ``HVAE_KERNELS_CPU`` names cannot be used here.
    """
    if _absence() is None:
        _choose(REQUESTED_CPU, "HVAE_KERNELS_CPU")
    return _absence()


def cpu_sets() -> dict[str, str | None]:
    """The kernels' instruction sets in ascending order, each with why it cannot be used here, ``None`` where it can.

    None at all without the extension.
    """
    if _absence() is not None:
        return {}
    return dict(importlib.import_module("hvae_kernels._C").cpu_sets())


def cpu_set() -> str | None:
    """The instruction set that the kernels use now, ``None`` when there are no kernels.

    Raises:
        RuntimeError: the one that ``HVAE_KERNELS_CPU`` names cannot be used here.
    """
    return None if why_absent() else importlib.import_module("hvae_kernels._C").cpu_set()


def _choose(choice: str, source: str) -> None:
    sets = cpu_sets()
    usable = [name for name, reason in sets.items() if reason is None]
    chosen = usable[-1] if choice == "auto" else choice
    if chosen not in usable:
        raise RuntimeError(
            f"{source}: instruction set {chosen!r} was asked for but cannot be used: {sets[chosen]}; "
            f"usable here: {', '.join(usable)}"
        )
    importlib.import_module("hvae_kernels._C").use_cpu_set(chosen)


_blocks = Blocks(cpu_set, lambda choice: _choose(choice, "use_cpu"))


def use_cpu(instruction_set: str) -> contextlib.AbstractContextManager[None]:
    """Choose the instruction set of the C++ kernels inside the ``with`` block, for the whole process.

    Nothing is chosen before the block is entered.

    For tests and benchmarks: a set below the best shows what machines without it get. Results of two sets differ by
    rounding; calls that are under way in other threads while the set changes are of either. Where blocks of several
    threads overlap, the one entered last counts for all of them while it is open.

    Args:
        instruction_set: ``"auto"`` (the best here), ``"baseline"`` (SSE2 on x86, NEON on ARM), ``"avx2"`` or
            ``"avx512"``. The environment variable ``HVAE_KERNELS_CPU`` sets the initial choice.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: this CPU lacks the set, it was not compiled, or the whole extension is absent.

    Example:
        >>> import hvae_kernels as hk
        >>> with hk.use_cpu("baseline"):
        ...     hk.config()["cpu"]["chosen"]
        'baseline'
    """
    _validate(instruction_set, "use_cpu")
    if cpu_set() is None:
        raise RuntimeError(f"use_cpu: instruction set {instruction_set!r} was asked for, but {why_absent()}")
    return _blocks(instruction_set)
