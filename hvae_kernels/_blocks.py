"""What ``with`` blocks set for the whole process, however those of several threads overlap."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Blocks:
    """``with blocks(value):`` sets a value of the whole process.

    The block entered last of those that are open decides; after the last one everything is as it was before the first.

    Args:
        read: the present value.
        apply: makes a value the present one; a block whose value it refuses is not entered.
    """

    def __init__(self, read: Callable[[], Any], apply: Callable[[Any], object]) -> None:
        self._read, self._apply = read, apply
        self._lock = threading.Lock()
        self._open: dict[object, Any] = {}
        self._before: Any = None

    @contextlib.contextmanager
    def __call__(self, value: Any) -> Iterator[None]:
        block = object()
        with self._lock:
            before = self._before if self._open else self._read()
            self._apply(value)
            self._before, self._open[block] = before, value
        try:
            yield
        finally:
            with self._lock:
                del self._open[block]
                self._apply(next(reversed(self._open.values())) if self._open else self._before)
