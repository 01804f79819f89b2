"""What the tests of an op need, public so that users can hold their own kernels to the same law.

Error budgets compare an implementation with the float64 oracle, and allow it at most twice the error that the plain
formula makes in the same precision.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

#: However well the plain formula happens to do, this many units in the last place are always allowed.
FLOOR_ULP = 4


def relative_error(result: Tensor, oracle: Tensor) -> float:
    """``|result - oracle| / |oracle|`` in float64; infinite where either is not finite and they differ.

    Args:
        result: any floating dtype.
        oracle: float64, of the same shape.
    """
    if result.shape != oracle.shape:
        raise AssertionError(f"result has shape {tuple(result.shape)}, the oracle {tuple(oracle.shape)}")
    difference = (result.detach().double() - oracle.detach()).norm().item()
    scale = oracle.detach().norm().item()
    if difference != difference:
        return float("inf")
    return difference / scale if scale else difference


def assert_within_budget(
    results: Sequence[Tensor], plain: Sequence[Tensor], oracle: Sequence[Tensor], *, factor: float = 2.0
) -> None:
    """Require every result's error against the float64 ``oracle`` to stay within ``factor`` times ``plain``'s error.

    Args:
        results: the implementation's results.
        plain: the plain formula's results in the same precision.
        oracle: the plain formula's results in float64.
        factor: how much worse than the plain formula an implementation may be.

    Raises:
        AssertionError: naming the result, its error and its budget.
    """
    for index, (result, rival, exact) in enumerate(zip(results, plain, oracle, strict=True)):
        floor = FLOOR_ULP * torch.finfo(result.dtype).eps
        budget = max(factor * relative_error(rival, exact), floor)
        error = relative_error(result, exact)
        if not error <= budget:
            raise AssertionError(f"result {index}: relative error {error:.3g} exceeds its budget {budget:.3g}")


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every freshly allocated tensor with NaN, so that a result that was never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def saved_bytes(function: Callable[[], object], inputs: Sequence[Tensor]) -> int:
    """Bytes that ``function()`` keeps for its backward pass beyond the storages of ``inputs``.

    What it saves for gradients that it takes itself, and has let go when it returns, does not count.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    kept: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        kept.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = function()  # held, and with it all that its graph keeps
    storages = {s.data_ptr(): s.nbytes() for s in (saved.tensor.untyped_storage() for saved in kept)}
    del result
    return sum(size for address, size in storages.items() if address not in known)


class _Saved:
    """A saved tensor: it lives as long as the graph that saved it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
