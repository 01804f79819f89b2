"""Argument checks: every message names the function, the argument, what was expected and what came."""

from __future__ import annotations

import torch
from torch import Tensor

FULL_PRECISION = (torch.float32, torch.float64)
HALF_PRECISION = (torch.bfloat16, torch.float16)


def describe(value: object) -> str:
    """Describe ``value`` for an error message: shape, dtype and device of a tensor, type and repr of anything else."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def fail(function: str, argument: str, expected: str, got: object) -> ValueError:
    """Build (not raise) the ValueError for an argument with a wrong shape or value."""
    return ValueError(
        f"{function}: {argument} must be {expected}, got {got if isinstance(got, str) else describe(got)}"
    )


def same_kind(function: str, **tensors: Tensor) -> None:
    """Require float tensors of one dtype on one device; the first one sets the standard."""
    items = iter(tensors.items())
    first_name, first = next(items)
    if not isinstance(first, Tensor):
        raise TypeError(f"{function}: {first_name} must be a tensor, got {describe(first)}")
    dtype, device = first.dtype, first.device
    if dtype not in FULL_PRECISION and dtype not in HALF_PRECISION:
        raise TypeError(
            f"{function}: {first_name} must be a float32 or float64 tensor "
            f"(bfloat16 and float16 where a GPU kernel exists), got {describe(first)}"
        )
    for name, tensor in items:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor, got {describe(tensor)}")
        if tensor.dtype != dtype:
            raise TypeError(f"{function}: {name} must have the dtype of {first_name}, {dtype}, got {describe(tensor)}")
        if tensor.device != device:
            raise ValueError(
                f"{function}: {name} must be on the device of {first_name}, {device}, got {describe(tensor)}"
            )


def values_readable(tensor: Tensor) -> bool:
    """Whether looking at ``tensor``'s values costs no device sync and is possible at all (not traced, not vmapped)."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


def finite(function: str, argument: str, tensor: Tensor) -> None:
    """Require finite values where they can be read without a sync."""
    if not values_readable(tensor):
        return
    values = tensor.detach().flatten()
    wrong = values[~torch.isfinite(values)]
    if wrong.numel():
        raise fail(function, argument, "finite", f"{wrong[0].item()} among its {values.numel()} values")
