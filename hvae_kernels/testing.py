"""What the tests of an op need, public so that users can hold their own kernels to the same law.

Error budgets compare an implementation with the float64 oracle, and allow it at most twice the error that the plain
formula makes in the same precision. One draw of the inputs may be luck, on which the formula happens to round better
than it does: :func:`assert_as_exact` then asks more draws, :func:`assert_within_budget` judges what it is given.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from hvae_kernels._blocks import Blocks

#: However well the plain formula happens to do, this many units in the last place are always allowed.
FLOOR_ULP = 4
#: Fresh draws of the inputs that are asked where the first one exceeds its budget; odd, so that one is the median.
DRAWS = 15
#: Neighbours of the inputs are asked then too: numbers off by 1, 2, 4, ... units in the last place, up to this share.
FARTHEST = 2.0**-8


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
        _require(index, "relative error", relative_error(result, exact), budget)


def assert_as_exact(
    op: Callable[..., Sequence[Tensor]],
    formula: Callable[..., Sequence[Tensor]],
    make: Callable[[], Sequence[Tensor]],
    *,
    factor: float = 2.0,
) -> None:
    """Require ``op`` to be as exact as the plain ``formula``; no verdict hangs on one draw of the inputs.

    On the first draw every result has to stay within the budget of :func:`assert_within_budget`. This is all that is
    computed if it does. Otherwise more draws decide whether the op is worse, or the formula was lucky:

    - The median of each result's error over :data:`DRAWS` fresh draws must stay within ``factor`` times the formula's
      median: the op is not worse in general.
    - The error that exceeded its budget must stay within ``factor`` times the largest error of the formula on any draw,
      or on a neighbour of the first one; or be what :data:`FLOOR_ULP` units in the last place of the inputs do to
      the oracle, its condition: the op does not fail at this point.

    Args:
        op: from the inputs to the results to check.
        formula: the same plainly; called with float64 copies of the inputs it is the oracle.
        make: makes inputs out of torch's random numbers, once as these stand, and then again for seeds 1, 2, ...; the
            state of the random numbers is put back. Repeatable if it depends on nothing else.
        factor: how much worse than the plain formula an implementation may be.

    Raises:
        AssertionError: naming the result, its error and its budget.
    """
    inputs = make()
    results, plain, oracle = op(*inputs), formula(*inputs), formula(*_doubled(inputs))
    first = _errors(results, plain, oracle)
    floors = [FLOOR_ULP * torch.finfo(result.dtype).eps for result in results]
    budgets = [max(factor * rival, floor) for (_, rival), floor in zip(first, floors, strict=True)]
    exceeded = [i for i, (error, _) in enumerate(first) if not error <= budgets[i]]
    if not exceeded:
        return

    draws = []
    for seed in range(1, DRAWS + 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            fresh = make()
        draws.append(_errors(op(*fresh), formula(*fresh), formula(*_doubled(fresh))))
    for i, floor in enumerate(floors):
        error, rival = (statistics.median(draw[i][which] for draw in draws) for which in (0, 1))
        _require(i, f"median relative error of {DRAWS} draws", error, max(factor * rival, floor))

    rivals = [[rival for _, rival in draw] for draw in draws]
    conditions = []
    unit = max(torch.finfo(x.dtype).eps for x in inputs if x.is_floating_point())
    for ulps in (2**power for power in range(1 + max(0, math.floor(math.log2(FARTHEST / unit))))):
        near = _neighbour(inputs, ulps)
        moved = formula(*_doubled(near))
        rivals.append(list(map(relative_error, formula(*near), moved)))
        conditions.append([relative_error(x, y) / ulps for x, y in zip(moved, oracle, strict=True)])
    for i in exceeded:
        largest, condition = (
            max((draw[i] for draw in every if math.isfinite(draw[i])), default=0.0) for every in (rivals, conditions)
        )
        _require(i, "relative error", first[i][0], max(budgets[i], factor * largest, FLOOR_ULP * condition))


def _doubled(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.double() if x.is_floating_point() else x for x in inputs]


def _errors(results: Sequence[Tensor], plain: Sequence[Tensor], oracle: Sequence[Tensor]) -> list[tuple[float, float]]:
    """Of each result the error, and that of the plain formula."""
    return [(relative_error(x, z), relative_error(y, z)) for x, y, z in zip(results, plain, oracle, strict=True)]


def _neighbour(inputs: Sequence[Tensor], ulps: int) -> list[Tensor]:
    """The inputs with every number up or down by about so many units in the last place."""
    generator = torch.Generator().manual_seed(ulps)

    def moved(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        signs = 2 * torch.randint(2, x.shape, generator=generator) - 1
        return (x.detach().double() * (1 + ulps * torch.finfo(x.dtype).eps * signs.to(x.device))).to(x.dtype)

    return [moved(x) for x in inputs]


def _require(index: int, what: str, error: float, budget: float) -> None:
    if not error <= budget:
        raise AssertionError(f"result {index}: {what} {error:.3g} exceeds its budget {budget:.3g}")


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Give torch, and with it the kernels of CPUs, so many threads; then as many as before."""
    with _threads(number):
        yield


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every freshly allocated tensor with NaN, so that a result that was never written shows."""
    with _filled((True, True)):
        yield


#: Its attribute is a property that torch gives the module, which types do not know.
_DETERMINISTIC: Any = torch.utils.deterministic


def _is_filled() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), _DETERMINISTIC.fill_uninitialized_memory


def _fill(choice: tuple[bool, bool]) -> None:
    deterministic, _DETERMINISTIC.fill_uninitialized_memory = choice
    torch.use_deterministic_algorithms(deterministic)


_threads = Blocks(torch.get_num_threads, torch.set_num_threads)
_filled = Blocks(_is_filled, _fill)


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

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
