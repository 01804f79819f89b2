"""Which implementation an op uses, and why not the others."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from hvae_kernels import _extension, _library
from hvae_kernels._checks import FULL_PRECISION, HALF_PRECISION

#: In the order in which ``auto`` prefers them.
IMPLEMENTATIONS = ("cuda", "triton", "cpp", "reference")
CHOICES = ("auto", *IMPLEMENTATIONS)


@dataclass(frozen=True)
class Op:
    """An op's name and the implementations that its room has."""

    name: str
    implementations: tuple[str, ...]
    half_precision: tuple[str, ...] = field(default=("triton", "cuda", "reference"))


OPS: dict[str, Op] = {}


def register(op: Op) -> None:
    """Announce an op; called once by its room's ``api.py``."""
    OPS[op.name] = op


def _validate(choice: str, source: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{source}: implementation must be one of {', '.join(CHOICES)}, got {choice!r}")
    return choice


class _State:
    """The process-wide choice. An attribute, not a context variable, because Dynamo guards on attributes."""

    requested = _validate(os.environ.get("HVAE_KERNELS_IMPL", "auto"), "HVAE_KERNELS_IMPL")


@contextlib.contextmanager
def use_impl(implementation: str) -> Iterator[None]:
    """Choose the implementation of every op called inside the ``with`` block, for the whole process.

    Args:
        implementation: ``"auto"`` (the fastest there is for the tensors' device), ``"cpp"``, ``"triton"``,
            ``"cuda"`` or ``"reference"``. Only ``"auto"`` ever falls back; an explicit choice that cannot be met
            raises ``RuntimeError`` at the call, saying why. The environment variable ``HVAE_KERNELS_IMPL`` sets the
            initial choice.

    Raises:
        ValueError: the name is none of these.

    Example:
        >>> import torch, hvae_kernels as hk
        >>> one = torch.ones(1)
        >>> with hk.use_impl("reference"):
        ...     z, rho = hk.functional.gaussian_leapfrog(one, one, one, 0 * one, 0.1 * one, one)
    """
    before, _State.requested = _State.requested, _validate(implementation, "use_impl")
    try:
        yield
    finally:
        _State.requested = before


def requested() -> str:
    """The present choice of :func:`use_impl`."""
    return _State.requested


def why_not(op: Op, implementation: str, device_type: str, dtype: torch.dtype) -> str | None:
    """``None`` when ``implementation`` serves ``op`` on such tensors here, otherwise the reason why not."""
    if implementation not in op.implementations:
        return "not written for this op"
    if dtype in HALF_PRECISION and implementation not in op.half_precision:
        return f"no {str(dtype).removeprefix('torch.')} kernel, only float32 and float64"
    if implementation == "cpp":
        return _extension.why_absent() if device_type == "cpu" else f"runs on the CPU, the tensors are on {device_type}"
    if implementation == "triton":
        return _why_no_triton(device_type)
    if implementation == "cuda":
        return None if device_type == "cuda" else f"runs on CUDA devices, the tensors are on {device_type}"
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


def _lookup_in_graph(name: str, requested: str, device_type: str, dtype: torch.dtype) -> str:
    """The same for Dynamo, which runs this function while it traces and takes the result as a constant."""
    _library.tell_dynamo()
    return _lookup(name, requested, device_type, dtype)


# What torch._dynamo.assume_constant_result does, without importing Dynamo.
_lookup_in_graph._dynamo_marked_constant = True


def resolve(name: str, tensor: torch.Tensor) -> str:
    """The implementation that the op ``name`` uses for ``tensor``'s device and dtype under the present choice."""
    if torch.compiler.is_compiling():
        return _lookup_in_graph(name, _State.requested, tensor.device.type, tensor.dtype)
    return _lookup(name, _State.requested, tensor.device.type, tensor.dtype)


def config() -> str:
    """Versions, and for each op the implementation used here and the reasons against the others, as text."""
    from hvae_kernels import __version__

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines = [
        f"hvae_kernels {__version__}, torch {torch.__version__}, devices: {', '.join(devices)}",
        f"compiled extension: {_extension.why_absent() or 'loaded'}",
        f"requested implementation: {_State.requested}",
    ]
    for op in OPS.values():
        for device in devices:
            try:
                chosen = _lookup(op.name, _State.requested, device, FULL_PRECISION[0])
            except RuntimeError as error:
                chosen = f"none ({error})"
            lines.append(f"{op.name} on {device}: {chosen}")
            for other in IMPLEMENTATIONS:
                if other != chosen:
                    reason = why_not(op, other, device, FULL_PRECISION[0])
                    lines.append(f"    not {other}: {reason or 'available, slower here'}")
    return "\n".join(lines)


def show_config() -> None:
    """Print versions, which implementation each op would use here, and why not the others."""
    print(config())
