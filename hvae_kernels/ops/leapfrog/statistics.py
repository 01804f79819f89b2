"""Running statistics of normalisations: one update a trajectory, whatever other threads do with the same modules."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

_Kept = tuple[Tensor | None, Tensor | None] | None


@dataclass
class _Hold:
    """Of one module: what is put back in the end, and how often each thread holds it."""

    kept: _Kept
    threads: Counter[int] = field(default_factory=Counter)


_CHANGED = threading.Condition()
_HELD: WeakKeyDictionary[nn.Module, _Hold] = WeakKeyDictionary()
_UPDATING: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # by which thread


@contextlib.contextmanager
def held(modules: Iterable[nn.Module]) -> Iterator[bool]:
    """Leave running statistics alone, after the updates of other threads; says whether there are any."""
    tracking = [module for module in modules if _tracks(module)]
    enter, leave = (_stop_all, _go_on_with_all) if torch.compiler.is_compiling() else (_hold, _release)
    kept: Any = enter(tracking) if tracking else None
    try:
        yield bool(tracking)
    finally:
        if tracking:
            leave(tracking, kept)


class Updates:
    """The one evaluation of a trajectory that updates: one thread at a time a module, and while nobody holds it.

    A thread has one module at a time, from its call to the next one's: so none waits for another that waits for it.
    """

    def __init__(self) -> None:
        self._module: nn.Module | None = None

    def begin(self, module: nn.Module) -> None:
        """This thread is about to call a module."""
        self.end()
        if not _tracks(module):
            return
        thread = threading.get_ident()
        with _CHANGED:
            hold = _HELD.get(module)
            if hold is not None and thread in hold.threads:  # a trajectory within an evaluation of another one
                return
            _CHANGED.wait_for(lambda: module not in _HELD and module not in _UPDATING)
            _UPDATING[module] = thread
        self._module = module

    def end(self) -> None:
        """The last one has returned."""
        if self._module is not None:
            with _CHANGED:
                del _UPDATING[self._module]
                _CHANGED.notify_all()
            self._module = None


def _tracks(module: nn.Module) -> TypeGuard[_NormBase]:
    """Whether a call of it updates statistics, or would if nobody held them."""
    return isinstance(module, _NormBase) and module.training and (module.track_running_stats or module in _HELD)


def _hold(modules: list[_NormBase]) -> None:
    thread = threading.get_ident()
    with _CHANGED:
        _CHANGED.wait_for(lambda: all(_UPDATING.get(module, thread) == thread for module in modules))
        for module in modules:
            if module not in _HELD:
                _HELD[module] = _Hold(_stop(module))
            _HELD[module].threads[thread] += 1


def _release(modules: list[_NormBase], _: None) -> None:
    thread = threading.get_ident()
    with _CHANGED:
        for module in modules:
            hold = _HELD[module]
            hold.threads -= Counter({thread: 1})
            if not hold.threads:
                _go_on(module, hold.kept)
                del _HELD[module]
        _CHANGED.notify_all()


def _stop_all(modules: list[_NormBase]) -> list[_Kept]:
    return [_stop(module) for module in modules]


def _go_on_with_all(modules: list[_NormBase], kept: list[_Kept]) -> None:
    for module, statistics in zip(modules, kept, strict=True):
        _go_on(module, statistics)


def _stop(module: _NormBase) -> _Kept:
    module.track_running_stats = False
    if not isinstance(module, _InstanceNorm):
        return None
    buffers = module._buffers  # instance norm updates what it holds in any case
    kept = buffers["running_mean"], buffers["running_var"]
    buffers["running_mean"] = buffers["running_var"] = None
    return kept


def _go_on(module: _NormBase, kept: _Kept) -> None:
    if kept is not None:
        module._buffers["running_mean"], module._buffers["running_var"] = kept
    module.track_running_stats = True
