"""Argument checks: every message names the function, the argument, what was expected and what came."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvae_kernels import _torch

FULL_PRECISION = (torch.float32, torch.float64)
HALF_PRECISION = (torch.bfloat16, torch.float16)


def describe(value: object) -> str:
    """Describe ``value`` for an error message: shape, dtype and device of a tensor, type and repr of anything else."""
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        return f"a {layout}{value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    text = " ".join(repr(value).split())
    return f"{type(value).__name__} {text if len(text) <= 100 else text[:97] + '...'}"


def value_error(function: str, argument: str, expected: str, got: object) -> ValueError:
    """Build (not raise) the ValueError for an argument with a wrong shape or value."""
    return ValueError(
        f"{function}: {argument} must be {expected}, got {got if isinstance(got, str) else describe(got)}"
    )


def type_error(function: str, argument: str, expected: str, got: object) -> TypeError:
    """Build (not raise) the TypeError for an argument that is nothing of the kind."""
    return TypeError(f"{function}: {argument} must be {expected}, got {describe(got)}")


def tensors(function: str, **arguments: Tensor) -> None:
    """Require tensors, of any kind."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise type_error(function, name, "a tensor", value)


def tensors_among(function: str, argument: str, value: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """Require tensors one after the other; a tensor alone would be taken row by row."""
    expected = "tensors, as [tensor] or module.parameters()"
    if isinstance(value, Tensor):
        raise TypeError(f"{function}: {argument} must be {expected}, got one tensor alone")
    if not isinstance(value, Iterable):
        raise type_error(function, argument, expected, value)
    value = tuple(value)
    for tensor in value:
        if not isinstance(tensor, Tensor):
            raise type_error(function, argument, expected, tensor)
    return value


def features(function: str, argument: str, x: Tensor, size: int) -> None:
    """Require a floating-point tensor with this many features, its last dimension."""
    if not isinstance(x, Tensor):
        raise type_error(function, argument, f"a tensor of shape (..., {size})", x)
    if not x.is_floating_point() or x.layout is not torch.strided:
        raise type_error(function, argument, "a dense floating-point tensor", x)
    if x.shape[-1:] != (size,):
        raise value_error(function, argument, f"a tensor of shape (..., {size})", x)


def broadcasts(function: str, argument: str, x: Tensor, batch: torch.Size) -> None:
    """Require dimensions but for the last that broadcast to these."""
    try:
        shape: torch.Size | None = torch.broadcast_shapes(batch, x.shape[:-1])
    except RuntimeError:
        shape = None
    if shape != batch:
        expected = f"of a batch shape that broadcasts to {tuple(batch)}, that of the features"
        raise value_error(function, argument, expected, x)


def has_shape(x: Tensor, *shapes: tuple[int, ...]) -> bool:
    """Whether it is one of these; Dynamo does not compare symbolic sizes for ``in``."""
    return any(x.shape == shape for shape in shapes)


def flag(function: str, argument: str, value: bool) -> None:
    """Require True or False: any other object would count as one of them, silently."""
    if not isinstance(value, bool):
        raise type_error(function, argument, "True or False", value)


def generator(function: str, value: torch.Generator | None) -> None:
    """Require a generator of random numbers, or None."""
    if not (value is None or isinstance(value, torch.Generator)):
        raise type_error(function, "generator", "a torch.Generator or None", value)


def integer(function: str, argument: str, value: int, least: int | None = None) -> None:
    """Require an integer, of at least ``least``."""
    expected = "an integer" if least is None else f"an integer of at least {least}"
    if not is_integer(value):
        raise type_error(function, argument, expected, value)
    if least is not None and value < least:
        raise value_error(function, argument, expected, value)


def is_integer(value: object) -> bool:
    """Python's, or NumPy's; not True and False."""
    return isinstance(value, (int, numbers.Integral)) and not isinstance(value, bool)


def widths(function: str, hidden_features: int | Sequence[int]) -> list[int]:
    """Of hidden layers: one, or one for each."""
    given: Any = [hidden_features] if is_integer(hidden_features) else hidden_features
    if not isinstance(given, (list, tuple)):
        expected = "an integer of at least 1, or a list or tuple of them"
        raise type_error(function, "hidden_features", expected, hidden_features)
    for width in given:
        integer(function, "hidden_features", width, 1)
    return list(given)


def real(function: str, argument: str, value: float) -> None:
    """Require a number, not a tensor or a string."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise type_error(function, argument, "a number", value)


def finite_real(function: str, argument: str, value: float) -> None:
    """Require a number that is neither infinite nor NaN."""
    real(function, argument, value)
    if not math.isfinite(value):
        raise value_error(function, argument, "finite", value)


def one_of(function: str, argument: str, value: str, options: Sequence[str]) -> None:
    """Require one of these names."""
    expected = f"one of {', '.join(options)}"
    if not isinstance(value, str):
        raise type_error(function, argument, expected, value)
    if value not in options:
        raise value_error(function, argument, expected, value)


def same_kind(function: str, **tensors: Tensor) -> None:
    """Require dense float tensors of one dtype on one device; the first one sets the standard."""
    items = iter(tensors.items())
    first_name, first = next(items)
    if not isinstance(first, Tensor):
        raise type_error(function, first_name, "a tensor", first)
    dtype, device = first.dtype, first.device
    if dtype not in FULL_PRECISION and dtype not in HALF_PRECISION:
        expected = "a float32 or float64 tensor (bfloat16 and float16 where a GPU kernel exists)"
        raise type_error(function, first_name, expected, first)
    if first.layout is not torch.strided:
        raise type_error(function, first_name, "a dense tensor", first)
    for name, tensor in items:
        if not isinstance(tensor, Tensor):
            raise type_error(function, name, "a tensor", tensor)
        if tensor.dtype != dtype:
            raise TypeError(f"{function}: {name} must have the dtype of {first_name}, {dtype}, got {describe(tensor)}")
        if tensor.layout is not torch.strided:
            raise type_error(function, name, "a dense tensor", tensor)
        if tensor.device != device:
            raise ValueError(
                f"{function}: {name} must be on the device of {first_name}, {device}, got {describe(tensor)}"
            )


def factory(function: str, device: object, dtype: object) -> dict[str, Any]:
    """What a module's new tensors are made with; None stands for torch's default."""
    if device is not None and not isinstance(device, (str, int, torch.device)):
        raise type_error(function, "device", "a torch.device or its name", device)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise type_error(function, "dtype", "a torch.dtype", dtype)
    if dtype is not None and not dtype.is_floating_point:
        raise value_error(function, "dtype", "a floating-point one", str(dtype))
    return {"device": device, "dtype": dtype}


def values_readable(tensor: Tensor) -> bool:
    """Whether looking at ``tensor``'s values costs no device sync and is possible at all (not traced, not vmapped)."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not _torch.functorch_is_active()
        and not _torch.n_dispatch_modes()
    )


def finite(function: str, argument: str, tensor: Tensor) -> None:
    """Require finite values where they can be read without a sync."""
    if not values_readable(tensor):
        return
    values = tensor.detach().flatten()
    wrong = values[~torch.isfinite(values)]
    if wrong.numel():
        raise value_error(function, argument, "finite", f"{wrong[0].item()} among its {values.numel()} values")
