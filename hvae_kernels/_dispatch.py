"""Which implementation an op uses, and why not the others."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from hvae_kernels import _checks, _extension, _library, _torch
from hvae_kernels._checks import FULL_PRECISION, HALF_PRECISION

#: In the order in which ``auto`` prefers them.
IMPLEMENTATIONS = ("triton", "cpp", "reference")
CHOICES = ("auto", *IMPLEMENTATIONS)
#: Names that may be chosen already, for what no op has yet, and what calls say to that.
RESERVED = {"cuda": "no op has a CUDA C++ implementation in this version; on GPUs it is 'triton' that runs"}


@dataclass(frozen=True)
class Op:
    """An op's name and the implementations it has."""

    name: str
    implementations: tuple[str, ...]
    half_precision: tuple[str, ...] = field(default=("triton", "reference"))


OPS: dict[str, Op] = {}


def register(op: Op) -> None:
    """Announce an op; called once by its ``api.py``."""
    OPS[op.name] = op


def validate(choice: str, source: str) -> str:
    """Require a name of an implementation, or ``"auto"``; returns it."""
    if not isinstance(choice, str):
        raise TypeError(f"{source}: implementation must be one of {', '.join(CHOICES)}, got {_checks.describe(choice)}")
    if choice not in CHOICES and choice not in RESERVED:
        raise ValueError(f"{source}: implementation must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


class _Choice:
    """Not a string, as each is equal to itself alone; nor a frozen dataclass, which Dynamo cannot make again."""

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation


class _State:
    """The process-wide choices: the initial one, then one for each open block of :func:`use_impl`; the last counts.

    An attribute, not a context variable: Dynamo guards on it, and the threads of a backward pass see it. A list that
    blocks put themselves on and take themselves off, as those of several threads end in any order.
    """

    choices: ClassVar = [_Choice(validate(os.environ.get("HVAE_KERNELS_IMPL") or "auto", "HVAE_KERNELS_IMPL"))]


def use_impl(implementation: str) -> contextlib.AbstractContextManager[None]:
    """Choose the implementation of every op called inside the ``with`` block, for the whole process.

    Nothing is chosen before the block is entered.

    Where blocks of several threads overlap, the one entered last counts for all of them while it is open. For one call,
    and whatever other threads do, every function takes ``implementation=``.

    Args:
        implementation: ``"auto"`` (the fastest there is for the tensors' device), ``"cpp"``, ``"triton"`` or
            ``"reference"``; ``"cuda"`` is reserved, no op has it in this version. Only ``"auto"`` ever falls back; an
            explicit choice that cannot be met raises ``RuntimeError`` at the call, saying why. The environment
            variable ``HVAE_KERNELS_IMPL`` sets the initial choice.

    Raises:
        ValueError: the name is none of these.

    Example:
        >>> import torch, hvae_kernels as hk
        >>> one = torch.ones(1)
        >>> with hk.use_impl("reference"):
        ...     z, rho = hk.functional.gaussian_leapfrog(one, one, one, 0 * one, 0.1 * one, one)
    """
    return _chosen(validate(implementation, "use_impl"))


@contextlib.contextmanager
def _chosen(implementation: str) -> Iterator[None]:
    choice = _Choice(implementation)
    _State.choices.append(choice)
    try:
        yield
    finally:
        _State.choices.remove(choice)


def requested() -> str:
    """The present choice of :func:`use_impl`."""
    return _State.choices[-1].implementation


def why_not(op: Op, implementation: str, device_type: str, dtype: torch.dtype) -> str | None:
    """``None`` when ``implementation`` serves ``op`` on such tensors here, otherwise the reason why not."""
    if implementation in RESERVED:
        return RESERVED[implementation]
    if implementation not in op.implementations:
        return "not written for this op"
    if dtype in HALF_PRECISION and implementation not in op.half_precision:
        return f"no {str(dtype).removeprefix('torch.')} kernel, only float32 and float64"
    if implementation == "cpp":
        return _extension.why_absent() if device_type == "cpu" else f"runs on the CPU, the tensors are on {device_type}"
    if implementation == "triton":
        return _why_no_triton(device_type)
    return None


@functools.cache
def _why_no_triton(device_type: str) -> str | None:
    if device_type not in ("cpu", "cuda"):
        return f"runs on CUDA devices, the tensors are on {device_type}"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are on the CPU and TRITON_INTERPRET=1 was not set before Python started"
    try:
        import triton  # noqa: F401 - availability only
    except ImportError as error:
        return f"Triton does not import: {error}"
    return None


@functools.cache
def _lookup(name: str, requested: str, device_type: str, dtype: torch.dtype) -> str:
    op = OPS[name]
    if requested != "auto":
        reason = why_not(op, requested, device_type, dtype)
        if reason is not None:
            raise RuntimeError(f"{name}: implementation {requested!r} was asked for but cannot be used: {reason}")
        return requested
    for implementation in IMPLEMENTATIONS:
        interpreted = implementation == "triton" and device_type == "cpu"  # for proofs, never for speed
        if not interpreted and why_not(op, implementation, device_type, dtype) is None:
            return implementation
    raise RuntimeError(f"{name}: no implementation for {dtype} tensors on {device_type}")


def _lookup_in_transforms(name: str, requested: str, device_type: str, dtype: torch.dtype) -> str:
    """The same where transforms of ``torch.func`` are at work."""
    if not _torch.forward_within_forward():
        return _lookup(name, requested, device_type, dtype)
    if requested not in ("auto", "reference"):
        reason = _library.FORWARD_WITHIN_FORWARD
        raise RuntimeError(f"{name}: implementation {requested!r} was asked for but cannot be used: {reason}")
    return "reference"


@_torch.constant_in_graph
def _lookup_in_graph(name: str, requested: str, device_type: str, dtype: torch.dtype) -> str:
    """The same for Dynamo."""
    _library.register_opaque()
    return _lookup_in_transforms(name, requested, device_type, dtype)


def resolve(name: str, tensor: torch.Tensor, implementation: str | None = None) -> str:
    """What the op ``name`` uses for ``tensor``'s device and dtype: ``implementation``, or else the present choice."""
    choice = _State.choices[-1].implementation if implementation is None else validate(implementation, name)
    if torch.compiler.is_compiling():
        return _lookup_in_graph(name, choice, tensor.device.type, tensor.dtype)
    lookup = _lookup_in_transforms if _torch.functorch_is_active() else _lookup
    return lookup(name, choice, tensor.device.type, tensor.dtype)


def config() -> dict[str, Any]:
    """Versions, and what runs where: the same facts that :func:`show_config` prints.

    Returns:
        A dict with these entries.

    - ``"versions"``: of ``"hvae_kernels"``, ``"python"``, ``"torch"`` and ``"triton"`` (None where there is none);
    - ``"extension"``: why there are no C++ kernels, None where they are there;
    - ``"cpu"``: their instruction set: ``"requested"`` by ``HVAE_KERNELS_CPU``, ``"chosen"`` (None where there are
      no kernels or the request cannot be met), and by name the ``"others"``, each with the reason against it;
    - ``"implementation"``: the present choice of :func:`use_impl`;
    - ``"ops"``: by name and device, for float32, the implementation ``"chosen"`` (None where the choice cannot be
      met), and by name the ``"others"``, each with the reason against it.

    Example:
        >>> import hvae_kernels as hk
        >>> hk.config()["ops"]["gaussian_leapfrog"]["cpu"]["chosen"]
        'cpp'
    """
    from hvae_kernels import __version__

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "versions": {
            "hvae_kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _triton_version(),
        },
        "extension": _or_error(_extension.why_absent),
        "cpu": _cpu(),
        "implementation": requested(),
        "ops": {name: {device: _choice(op, device) for device in devices} for name, op in OPS.items()},
    }


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _or_error(function: Callable[..., str | None], *args: Any) -> str | None:
    """What ``function`` returns, or what it says when it refuses a choice."""
    try:
        return function(*args)
    except RuntimeError as error:
        return str(error)


def _cpu() -> dict[str, Any]:
    sets = _extension.cpu_sets()
    try:
        chosen = _extension.cpu_set()
    except RuntimeError:
        chosen = None
    others = {
        name: reason or f"available: `with use_cpu({name!r}):` selects it"
        for name, reason in sets.items()
        if name != chosen
    }
    return {"requested": _extension.REQUESTED_CPU, "chosen": chosen, "others": others}


def _choice(op: Op, device: str) -> dict[str, Any]:
    try:
        chosen: str | None = _lookup(op.name, requested(), device, FULL_PRECISION[0])
    except RuntimeError:
        chosen = None
    others = {
        name: _or_error(why_not, op, name, device, FULL_PRECISION[0])
        or f"available: `with use_impl({name!r}):` selects it"
        for name in IMPLEMENTATIONS
        if name != chosen
    }
    return {"chosen": chosen, "others": others}


def show_config() -> None:
    """Print :func:`config`: versions, what the CPU kernels and each op would use here, and why not the others."""
    found = config()
    versions = (f"{'Python' if name == 'python' else name} {version}" for name, version in found["versions"].items())
    print(", ".join(versions))
    print(f"CPU kernels: {_cpu_text(found)}")
    print(f"requested implementation: {found['implementation']}")
    alike: dict[tuple[str, ...], list[str]] = {}  # most ops say the same, which is read once
    for name, devices in found["ops"].items():
        for device, choice in devices.items():
            reasons = (f"    not {other}: {reason}" for other, reason in choice["others"].items())
            alike.setdefault((f"{choice['chosen'] or 'none'} on {device}", *reasons), []).append(name)
    for (here, *others), names in alike.items():
        print(f"{here}:", *textwrap.wrap(", ".join(names), 110), sep="\n    ")
        print(*others, sep="\n")


def _cpu_text(found: dict[str, Any]) -> str:
    """The instruction set, and why none that is better."""
    if found["extension"] is not None:
        return f"none ({found['extension']})"
    chosen = found["cpu"]["chosen"]
    if platform.machine().lower() in ("aarch64", "arm64"):
        return f"{chosen} (NEON)"
    better = _extension.CHOICES[_extension.CHOICES.index(chosen) + 1 :]
    reasons = "; ".join(f"{name}: {found['cpu']['others'][name]}" for name in better)
    return f"{chosen} ({reasons})" if reasons else chosen
