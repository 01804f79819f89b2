"""What may be read off live modules and tensors: whether a call would add anything, whether they are as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hvae_kernels import _torch

_BEFORE, _AFTER = _torch.FORWARD_HOOKS
_BACKWARD_BEFORE, _BACKWARD = _torch.BACKWARD_HOOKS


def only_looks(hook: Any) -> Any:
    """Mark a global forward pre-hook that changes nothing and may miss modules that are read."""
    hook.only_looks = True
    return hook


def _only_looks(hook: Callable) -> bool:
    """So marked, or torch's own that keep track of which module is called, as its FLOP counter has."""
    owner = type(getattr(hook, "__self__", None))
    return getattr(hook, "only_looks", False) or owner.__module__ == "torch.utils.module_tracker"


def hooked_everywhere() -> bool:
    """Whether there are hooks on every module of the process."""
    if not (_BEFORE or _AFTER or _BACKWARD_BEFORE or _BACKWARD):
        return False
    looking = all(_only_looks(hook) for hooks in (_BEFORE, _AFTER) for hook in hooks.values())
    return bool(_BACKWARD_BEFORE or _BACKWARD) or not looking


def untouched(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs its class's ``forward`` and nothing else, but for :func:`hooked_everywhere`."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    own = module.__dict__.get("forward")  # as what restores a forward leaves behind: the class's, bound
    return own is None or (getattr(own, "__func__", None) is type(module).forward and own.__self__ is module)


def runs_only(module: nn.Module, forward: Callable) -> bool:
    """The same, and whether that is this ``forward``: not that of a subclass."""
    kind = type(module)
    return kind.forward is forward and kind.__call__ is nn.Module.__call__ and untouched(module)


class Seen:
    """Tensors, as they are now.

    What torch does not count cannot be seen: changes in place through ``.data`` or through memory shared with others.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._marks = [_mark(tensor) for tensor in self._tensors]

    def again(self, tensors: Iterable[Tensor]) -> bool:
        """Whether these are the very same tensors, with the same values."""
        tensors = list(tensors)
        if len(tensors) != len(self._tensors):
            return False
        for now, then, mark in zip(tensors, self._tensors, self._marks, strict=True):
            if now is not then:
                return False
            if not isinstance(mark, tuple):
                if not torch.equal(now, mark):
                    return False
                continue
            version, where, asks = mark
            if now._version != version or now.requires_grad != asks or (where and now.data_ptr() != where):
                return False
        return True


def _mark(tensor: Tensor) -> Tensor | tuple[int, int, bool]:
    """Versions of inference tensors are not counted: their values are kept."""
    if tensor.is_inference():
        return tensor.clone()
    where = tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else 0  # fake tensors refuse to tell
    return tensor._version, where, tensor.requires_grad


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Its parameters and buffers, some perhaps twice; four times as fast as ``parameters`` and ``buffers``."""
    found: list[Tensor | None] = []
    waiting = [module]
    for part in waiting:
        tables = part.__dict__
        if "_parameters" not in tables:  # a scripted module's are elsewhere
            found += [*part.parameters(), *part.buffers()]
            continue
        found += tables["_parameters"].values()
        found += tables["_buffers"].values()
        waiting += [x for x in tables["_modules"].values() if x is not None]
    return [x for x in found if x is not None]
