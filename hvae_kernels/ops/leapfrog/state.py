"""What a potential reads beside ``z``, and under which settings: watched, and brought back for the backward pass."""

from __future__ import annotations

import contextlib
import dis
import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from hvae_kernels import _checks, _dispatch, _torch
from hvae_kernels._torch import NormBase

#: Longer lists and dicts are data, whose entries are not looked at one by one.
_MANY = 64
_ABSENT = object()
#: What a normalisation in training mode writes and does not read, and whether it does: statistics.py cares for that.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "track_running_stats")
_HOLDERS = (nn.Module, types.FunctionType, types.MethodType, functools.partial, Distribution, list, tuple, dict)
_SCOPES = (types.FunctionType, types.MethodType)


#: ``(place, key, value, version, registered)``: ``place[key]`` is ``value``, and ``place`` is None where nothing else
#: can come to be; ``version`` is that of a tensor which is read for all we know, and not only within reach;
#: ``registered`` is what a module has in its tables, unlike an attribute that every call may set anew.
_Entry = tuple[Any, Any, Any, "int | None", bool]


class Snapshot:
    """What ``potential`` reads: tensors, modules and numbers, by the places that hold them.

    A place is a module's table or attributes, a function's closure or globals, a list or a dict. What has come into a
    place since the forward pass, as by the end of ``torch.func.functional_call`` or a loop over batches, goes out of
    it inside :meth:`restored`. What was written in place is gone, and an error.
    """

    def __init__(self, potential: Callable, called: Iterable[nn.Module]) -> None:
        self.entries = _entries(potential, set(called))

    def settle(self, function: str, argument: str) -> None:
        """Once the forward pass is over: keep what all its evaluations found the same.

        An attribute that each evaluation sets anew is its own business: what it computed, or counts.

        Raises:
            ValueError: an evaluation writes tensors, or puts other ones in the place of a module's buffers.
        """
        kept = []
        for entry in self.entries:
            _, _, value, version, registered = entry
            same = _read(entry) is value
            if (version is not None and value._version != version) if same else registered:
                raise ValueError(
                    f"{function}: {argument} changes {_words(entry)} at every evaluation (spectral norm in training "
                    "mode?), so its trajectory cannot be rebuilt: put that module into evaluation mode, or use "
                    "memory='store'"
                )
            if same:
                kept.append(entry)
        self.entries = kept

    @contextlib.contextmanager
    def restored(self, function: str, argument: str) -> Iterator[None]:
        """Everything in its place, as it was in the forward pass.

        Raises:
            RuntimeError: a tensor has been written in place since.
        """
        later = []
        for entry in self.entries:
            place, _, value, version, _ = entry
            if version is not None and value._version != version:
                raise RuntimeError(
                    f"{function}: {_words(entry)}, which {argument} reads, was modified by an inplace operation before "
                    "the trajectory was rebuilt: put a new tensor in its place instead, or copy before the forward pass"
                )
            now = _read(entry)
            if now is not value and not (now is _ABSENT and isinstance(place, list)):
                later.append((entry, now))
        try:
            for entry, _ in later:
                _write(entry, entry[2])
            yield
        finally:
            for entry, now in later:
                _write(entry, now)


def tensors_held(potential: Callable, called: Iterable[nn.Module]) -> list[Tensor]:
    """The tensors within reach of ``potential``, of the modules that it calls, too."""
    return [value for _, _, value, _, _ in _entries(potential, set(called)) if isinstance(value, Tensor)]


def _version(x: object) -> int | None:
    return x._version if isinstance(x, Tensor) and not x.is_inference() else None


def _words(entry: _Entry) -> str:
    place, key, value, *_ = entry
    what = _checks.describe(value) if isinstance(value, Tensor) else type(value).__name__
    return what if isinstance(place, types.CellType) else f"{key!r} ({what})"


def _read(entry: _Entry) -> object:
    place, key, value, *_ = entry
    if place is None:
        return value
    try:
        return place.cell_contents if isinstance(place, types.CellType) else place[key]
    except (KeyError, IndexError, ValueError):
        return _ABSENT


def _write(entry: _Entry, value: object) -> None:
    place, key, *_ = entry
    if isinstance(place, types.CellType):
        if value is not _ABSENT:
            place.cell_contents = value
        else:
            del place.cell_contents
    elif value is not _ABSENT:
        place[key] = value
    else:
        place.pop(key, None)


def _entries(potential: Callable, called: set[nn.Module]) -> list[_Entry]:
    """Breadth first, from the modules called and ``potential``.

    A child that is not called may be read all the same, or be the encoder of the model that ``potential`` belongs to:
    its tensors come last, and are not watched.
    """
    roots = (potential,) if isinstance(potential, _HOLDERS) else (_attributes(potential), type(potential).__call__)
    near: list[Any] = [*called, *(x for x in roots if isinstance(x, _HOLDERS))]
    far: list[Any] = []
    seen: set[int] = set()
    entries: list[_Entry] = []
    for waiting in (near, far):
        for holder in waiting:
            if id(holder) in seen:
                continue
            seen.add(id(holder))
            if isinstance(holder, nn.Module):
                far += _tables(holder, waiting is near, entries)
                held = _public(holder) if waiting is near else ()
            else:
                held = _held(holder)
            for place, key, value in held:
                entries.append((place, key, value, _version(value) if waiting is near else None, False))
                if isinstance(value, _HOLDERS):
                    waiting.append(value)
                elif isinstance(holder, _SCOPES) and (attributes := _attributes(value)):
                    waiting.append(attributes)
    return entries


def _tables(module: nn.Module, near: bool, entries: list[_Entry]) -> Iterable[nn.Module]:
    """Add what ``module`` has registered, and return its children."""
    attributes, unread = vars(module), _unread(module)
    for table in (attributes.get("_parameters"), attributes.get("_buffers")):
        if table and isinstance(table, dict):  # a scripted module's is not
            for key, value in table.items():
                if value is not None and key not in unread:
                    entries.append((table, key, value, _version(value) if near else None, True))
    children = attributes.get("_modules")
    if not isinstance(children, dict):
        return ()
    entries.extend((children, key, child, None, True) for key, child in children.items())
    return children.values()


def _unread(module: nn.Module) -> tuple[str, ...]:
    return _STATISTICS if isinstance(module, NormBase) and module.training else ()


def _public(module: nn.Module) -> Iterator[tuple[Any, Any, Any]]:
    attributes, unread = vars(module), ("training", *_unread(module))
    for key, value in list(attributes.items()):
        if key[0] != "_" and key not in unread:
            yield attributes, key, value
    yield None, "forward", type(module).forward


def _attributes(value: object) -> dict[str, Any] | None:
    """Those of an object that is no tensor, class, or Python module."""
    if isinstance(value, (Tensor, type, types.ModuleType)):
        return None
    attributes = getattr(value, "__dict__", None)
    return attributes if isinstance(attributes, dict) else None


def _held(holder: Any) -> Iterator[tuple[Any, Any, Any]]:
    """``(place, key, value)`` of what ``holder`` holds itself."""
    if isinstance(holder, types.FunctionType):
        if not holder.__module__ or holder.__module__.partition(".")[0] in ("torch", "hvae_kernels"):
            return
        for cell in holder.__closure__ or ():
            with contextlib.suppress(ValueError):  # still empty
                yield cell, "cell_contents", cell.cell_contents
        for key in _globals_read(holder.__code__):
            if key in holder.__globals__:
                yield holder.__globals__, key, holder.__globals__[key]
        for value in (*(holder.__defaults__ or ()), *(holder.__kwdefaults__ or {}).values()):
            yield None, "default", value
    elif isinstance(holder, types.MethodType):
        yield None, "self", holder.__self__
        yield None, "function", holder.__func__
    elif isinstance(holder, functools.partial):
        for value in (holder.func, *holder.args, *holder.keywords.values()):
            yield None, "argument", value
    elif isinstance(holder, Distribution):
        yield None, "attributes", vars(holder)
    elif isinstance(holder, tuple):
        for value in holder[:_MANY]:
            yield None, "item", value
    elif len(holder) <= _MANY:
        for key, value in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
            yield holder, key, value


@functools.lru_cache(maxsize=1024)
def _globals_read(code: types.CodeType) -> tuple[str, ...]:
    names = dict.fromkeys(i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= dict.fromkeys(_globals_read(constant))
    return tuple(names)


#: What decides which kernels run and what they may do, and is not passed to the backward pass by torch.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], None]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
    *_torch.SETTINGS,
)


class Context:
    """The settings in force where this is made, for evaluations elsewhere on the device type ``device``."""

    def __init__(self, device: str) -> None:
        self.type, self.autocast = device, _autocast(device)
        self.half = self.autocast[1] if self.autocast[0] else None
        self.settings = [get() for get, _ in _SETTINGS]
        self.device, self.implementation = torch.get_default_device(), _dispatch.requested()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Under these settings again; a backward pass may also be asked for under inference mode."""
        changed = [
            (put, then, now)
            for (get, put), then in zip(_SETTINGS, self.settings, strict=True)
            if (now := get()) != then
        ]
        with contextlib.ExitStack() as stack:
            for put, then, now in changed:
                stack.callback(put, now)
                put(then)
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            if torch.get_default_device() != self.device:
                stack.enter_context(self.device)
            if _dispatch.requested() != self.implementation:
                stack.enter_context(_dispatch.use_impl(self.implementation))
            if _autocast(self.type) != self.autocast:
                enabled, dtype = self.autocast
                stack.enter_context(torch.autocast(self.type, dtype, enabled))
            yield


def _autocast(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
