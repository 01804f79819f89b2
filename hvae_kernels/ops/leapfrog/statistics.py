"""Running statistics of normalisations: one update a trajectory, whatever other threads do with the same modules."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hvae_kernels._torch import InstanceNorm, NormBase

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
    norms = [module for module in modules if isinstance(module, NormBase)]
    if torch.compiler.is_compiling():  # in one thread
        norms = [module for module in norms if _tracks(module)]
        kept = [_stop(module) for module in norms]
        try:
            yield bool(norms)
        finally:
            for module, statistics in zip(norms, kept, strict=True):
                _go_on(module, statistics)
        return
    tracking = _hold(norms) if norms else []
    try:
        yield bool(tracking)
    finally:
        if tracking:
            _release(tracking)


class Updates:
    """The one evaluation of a trajectory that updates: one thread at a time a module, and while nobody holds it.

    A thread has one module at a time, from its call to the next one's: so none waits for another that waits for it.
    """

    def __init__(self) -> None:
        self._module: nn.Module | None = None

    def begin(self, module: nn.Module) -> None:
        """This thread is about to call a module."""
        self.end()
        if not isinstance(module, NormBase):
            return
        thread = threading.get_ident()
        with _CHANGED:
            hold = _HELD.get(module)
            within = (hold is not None and thread in hold.threads) or _UPDATING.get(module) == thread
            if within or not _tracks(module):  # within: a trajectory inside an evaluation of another one
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


def _tracks(module: NormBase) -> bool:
    """Whether a call of it updates statistics, or would if nobody held them; to be asked while nothing changes."""
    return module.training and (module.track_running_stats or module in _HELD)


def _hold(norms: list[NormBase]) -> list[NormBase]:
    thread = threading.get_ident()
    with _CHANGED:
        _CHANGED.wait_for(lambda: all(_UPDATING.get(module, thread) == thread for module in norms))
        tracking = [module for module in norms if _tracks(module)]
        for module in tracking:
            if module not in _HELD:
                _HELD[module] = _Hold(_stop(module))
            _HELD[module].threads[thread] += 1
    return tracking


def _release(tracking: list[NormBase]) -> None:
    thread = threading.get_ident()
    with _CHANGED:
        for module in tracking:
            hold = _HELD[module]
            hold.threads -= Counter({thread: 1})
            if not hold.threads:
                _go_on(module, hold.kept)
                del _HELD[module]
        _CHANGED.notify_all()


def _stop(module: NormBase) -> _Kept:
    module.track_running_stats = False
    if not isinstance(module, InstanceNorm):
        return None
    buffers = module._buffers  # instance norm updates what it holds in any case
    kept = buffers["running_mean"], buffers["running_var"]
    buffers["running_mean"] = buffers["running_var"] = None
    return kept


def _go_on(module: NormBase, kept: _Kept) -> None:
    if kept is not None:
        module._buffers["running_mean"], module._buffers["running_var"] = kept
    module.track_running_stats = True
