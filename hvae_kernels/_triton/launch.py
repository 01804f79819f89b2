"""Host-side helpers of the Triton launchers: plain Python, no Triton."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def lazy(module: str, function: str) -> Callable[..., Any]:
    """``module.function``, imported at the first call: ops stay defined where Triton is absent."""
    resolved: list[Callable[..., Any]] = []

    def launch(*args):
        if not resolved:
            resolved.append(getattr(importlib.import_module(module), function))
        return resolved[0](*args)

    return launch


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Make ``tensor``'s GPU current, as Triton launches on the current one; free when it already is."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which multiplies half-precision numbers wrongly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()
