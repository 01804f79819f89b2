"""``grad U`` along one trajectory, and what must stay the same while it is evaluated again and again."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import register_module_forward_pre_hook

from hvae_kernels import _checks, _live
from hvae_kernels.ops.leapfrog import statistics
from hvae_kernels.ops.leapfrog.reference import Potential, functional_gradient, gradient_of
from hvae_kernels.ops.leapfrog.state import Context, Snapshot, tensors_held

NAME = "leapfrog"


class Field:
    """The gradient of ``potential``, at positions with their event dimensions flattened into one.

    :meth:`first` is eager and looks at the potential: which modules it calls, what it reads, whether it draws random
    numbers, which tensors it needs gradients of. It is also the one evaluation in which normalisations update their
    running statistics. All others run inside :meth:`held`, and are compiled if that is asked for; those that rebuild a
    trajectory inside :meth:`again`.
    """

    def __init__(
        self, potential: Potential, compile: bool = False, function: str = NAME, argument: str = "potential"
    ) -> None:
        self.potential, self.compile = potential, compile
        #: whose argument the potential is, for errors
        self.function, self.argument = function, argument
        self.modes: dict[nn.Module, bool] = {}
        self.shape: torch.Size
        self.dtype: torch.dtype
        #: whether evaluations share the graph of a tensor made before them
        self.shared = False
        #: of the first evaluation, until the forward pass is over: its energy, its position, the number of a node
        self.graph: tuple[Tensor, Tensor, int] | None = None
        self.context: Context
        self.snapshot: Snapshot
        self.power: Tensor

    def first(self, z: Tensor, record: bool = False) -> tuple[Tensor, torch.Size]:
        """``(gradient, shape of the energies)`` at the start of a trajectory that is kept."""
        grad, energy = self._first(z, z if record else z.detach().requires_grad_(), record)
        return grad, energy.shape

    def first_of_rebuilt(
        self, z: Tensor, params: Callable[[], Sequence[Tensor]] | None, full: bool
    ) -> tuple[Tensor, torch.Size, tuple[Tensor, ...]]:
        """The same and the ``params`` that need gradients, at the start of a trajectory that is going to be rebuilt.

        Its potential may not be random, and if ``full`` not need gradients of other tensors. Without ``params`` these
        are looked for.
        """
        position, device = z.detach().requires_grad_(), z.device
        self.context = Context(device.type)
        before = _random_state(device)
        mark = _sequence_number()
        grad, energy = self._first(z, position, False)
        if not _same(before, _random_state(device)):  # a lazy layer draws its parameters once, dropout a mask each time
            before, mark = _random_state(device), _sequence_number()
            with self.held():
                grad, energy = self._gradient(position, False)
            self._refuse_randomness(before, _random_state(device))
        watched: tuple[Tensor, ...] = ()
        if full:
            self.graph = energy, position, mark
            found = _read_by(self.potential, self.modes, energy, position) if params is None else params()
            watched = self._watch(found, *self.graph)
            refuse_dependent(self.function, watched)
        self.snapshot = Snapshot(self.potential, self.modes)
        return grad, energy.shape, watched

    def leaves(self) -> tuple[Tensor, ...]:
        """Those of the first evaluation, in place of ``params`` of which one is made from another potential's."""
        if self.graph is None:
            return ()
        energy, position, _ = self.graph
        return self._watch(_met(energy, position, {}), *self.graph)

    def _first(self, z: Tensor, position: Tensor, record: bool) -> tuple[Tensor, Tensor]:
        self.shape, self.dtype = z.shape, z.dtype
        with modules_called() as called:
            grad, energy = self._gradient(position, record)
        self.modes = {module: module.training for module in called}
        return grad, energy

    def _gradient(self, position: Tensor, record: bool) -> tuple[Tensor, Tensor]:
        return gradient_of(self.potential, position, record, self.function, self.argument)

    def __call__(self, z: Tensor, record: bool = False) -> Tensor:
        """The gradient at ``z``, event dimensions flattened, in ``z``'s dtype; the potential computes in its own."""
        with torch.set_grad_enabled(record):
            position = (z if record else z.detach()).to(self.dtype).reshape(self.shape)
            if self.compile:
                grad = _compiled_gradient(z.device.type)(self.potential, position)
            else:
                grad, _ = self._gradient(position, record)
            return grad.reshape(z.shape).to(z.dtype)

    def settle(self, grad: Tensor, rho: Tensor) -> None:
        """The forward pass is over, with this last gradient, and ``rho``, a momentum to compare it along."""
        self.graph = None
        self.snapshot.settle(self.function, self.argument)
        self.power = (grad.detach() * rho).sum()

    @property
    def tolerance(self) -> float:
        """How far, relatively, what is computed again may be off: rounding is far below, anything else above."""
        return torch.finfo(self.context.half or self.dtype).eps ** 0.5

    def check(self, grad: Tensor, rho: Tensor, advice: str = "") -> None:
        """Compare the first gradient of the backward pass with the last one of the forward pass, at the same position.

        Raises:
            RuntimeError: they differ by more than rounding (looked at on the CPU).
        """
        if not _checks.values_readable(rho):
            return
        power = grad.detach() * rho
        distance = abs((power.sum() - self.power).item())
        if not distance:  # as it is wherever the same kernels run
            return
        tolerance = torch.finfo(torch.bfloat16).eps ** 0.5 if self.compile else self.tolerance
        if distance > tolerance * power.abs().sum().item():
            raise RuntimeError(
                f"{self.function}: {self.argument} has another gradient in the backward pass than in the forward pass, "
                "at the same position, as something that it reads has changed: memory='store' keeps what it was"
                f"{advice}"
            )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold running statistics as the first evaluation left them."""
        with statistics.held(self.modes):
            yield

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """What the forward pass ran under and read, for evaluations in the backward pass.

        Raises:
            RuntimeError: a module has changed between training and evaluation since, or a tensor was written in place.
        """
        if any(module.training != training for module, training in self.modes.items()):
            words = f"a module of {self.argument} changed its mode before the trajectory was rebuilt"
            raise RuntimeError(f"{self.function}: {words}")
        with self.context.again(), self.snapshot.restored(self.function, self.argument), self.held():
            yield

    def _refuse_randomness(self, before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> None:
        if not _same(before, after):
            raise ValueError(
                f"{self.function}: {self.argument} draws random numbers (dropout in training mode?), so its trajectory "
                "cannot be rebuilt: make it deterministic, or use memory='store', where each evaluation draws anew"
            )

    def _watch(self, params: Iterable[Tensor], energy: Tensor, position: Tensor, mark: int) -> tuple[Tensor, ...]:
        """Those that need gradients, which must be all that the first evaluation met: others would silently get none.

        What is differentiable once may not lead to the position: torch notices only where its cotangent needs
        gradients, and takes it for linear elsewhere.
        """
        watched = tuple(x for x in params if x.requires_grad)
        start, self.shared = _edge(position), False
        for node in _nodes_above([(energy.grad_fn, 0)], {start, *map(_edge, watched)}):
            if hasattr(node, "variable"):
                expected = f"all tensors that need gradients through {self.argument} (by default those of a module)"
                got = f"all but {_checks.describe(node.variable)}"
                raise _checks.value_error(self.function, "params", expected, got)
            self.shared = self.shared or node._sequence_nr() < mark
            once = getattr(node, "_forward_cls", None)
            if once and getattr(once.backward, "__code__", None) is _ONCE and _leads_to(node, start):
                expected = "twice differentiable, or gradient 'detached'"
                got = f"{once.__name__}, which is once_differentiable"
                raise _checks.value_error(self.function, self.argument, expected, got)
        return watched


#: Inductor's C++ kernels over tensors of both memory layouts may write past their end (pytorch/pytorch#196681). A
#: convolution followed by nn.Upsample made one; without the pass that chooses layouts there is none, 6 % slower.
INDUCTOR_OPTIONS: dict[str, dict[str, str | int | bool | Callable]] = {"cpu": {"layout_optimization": False}}


@functools.cache
def _compiled_gradient(device: str) -> Callable[[Potential, Tensor], Tensor]:
    """One compiled function for all potentials: Dynamo guards on them. Its backward is what AOTAutograd makes of it."""
    options = INDUCTOR_OPTIONS.get(device)
    return torch.compile(lambda potential, z: functional_gradient(potential, z)[0], fullgraph=True, options=options)


@contextlib.contextmanager
def modules_called() -> Iterator[list[nn.Module]]:
    """Collect the modules that this thread calls, which update their running statistics, each when no thread is at it.

    A plain function does not tell in any other way.
    """
    called: list[nn.Module] = []
    thread, updates = threading.get_ident(), statistics.Updates()

    @_live.only_looks
    def collect(module: nn.Module, _: object) -> None:
        if threading.get_ident() == thread:
            updates.begin(module)
            called.append(module)

    handle = register_module_forward_pre_hook(collect)
    try:
        yield called
    finally:
        handle.remove()
        updates.end()


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    """States of the default generators; not the GPU's while a graph is captured, where it may not be read."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return (torch.get_rng_state(),)
    return torch.get_rng_state(), torch.cuda.get_rng_state(device)


def _same(before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, before, after))


def _sequence_number() -> int:
    """Of the next node that this thread makes, or a little less: nodes made before have smaller ones."""
    with torch.enable_grad():
        node: Any = torch.empty(0, requires_grad=True).view(0).grad_fn
        return node._sequence_nr()


_ONCE = once_differentiable(lambda ctx: None).__code__


def _read_by(potential: Potential, modules: Iterable[nn.Module], energy: Tensor, position: Tensor) -> Sequence[Tensor]:
    """The tensors that ``energy`` needs gradients of: those within reach of ``potential``, of the others the leaves.

    The leaves alone, where one within reach is made from another.
    """
    near = {_edge(x): x for x in tensors_held(potential, modules) if x.requires_grad}
    found = _met(energy, position, near)
    return found if dependent(found) is None else _met(energy, position, {})


def _met(energy: Tensor, position: Tensor, stops: dict[tuple, Tensor]) -> list[Tensor]:
    """The ``stops`` that ``energy`` leads to, but for ``position``, and the leaves on other ways."""
    start, met = _edge(position), set[tuple]()
    above = _nodes_above([(energy.grad_fn, 0)], {start, *stops}, met)
    found = [node.variable for node in above if hasattr(node, "variable")]
    found += [stops[edge] for edge in met if edge != start]
    return list({id(x): x for x in found}.values())


def leaves_above(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The leaves that tensors are made from, or are."""
    above = _nodes_above([_edge(x) for x in tensors], set())
    return [node.variable for node in above if hasattr(node, "variable")]


def _leads_to(node: torch.autograd.graph.Node, edge: tuple) -> bool:
    met: set[tuple] = set()
    for _ in _nodes_above(node.next_functions, {edge}, met):
        pass
    return bool(met)


def dependent(params: Sequence[Tensor]) -> Tensor | None:
    """One that is made from another one in the list: its way to that one would be gone twice."""
    edges = {_edge(x): x for x in params if x.requires_grad}
    for x in edges.values():
        found: set[tuple] = set()
        for _ in _nodes_above(x.grad_fn.next_functions if x.grad_fn else (), set(edges), found):
            pass
        if found:
            return x
    return None


def refuse_dependent(function: str, params: Sequence[Tensor]) -> None:
    """Require that none is made from another.

    Raises:
        ValueError: one is.
    """
    x = dependent(params)
    if x is not None:
        expected = "tensors of which none is made from another"
        raise _checks.value_error(function, "params", expected, f"{_checks.describe(x)} that is")


def _edge(x: Tensor) -> tuple:
    return tuple(torch.autograd.graph.get_gradient_edge(x))[:2]


def _nodes_above(
    edges: Iterable[tuple], stops: set[tuple], met: set[tuple] | None = None
) -> Iterator[torch.autograd.graph.Node]:
    """The graph's nodes that ``edges`` lead to, as far as the ``stops``, which are collected in ``met``."""
    waiting = list(edges)
    seen: set[tuple] = set()
    while waiting:
        edge = waiting.pop()
        if edge in stops and met is not None:
            met.add(edge)
        if edge in seen or edge in stops or edge[0] is None:
            continue
        seen.add(edge)
        yield edge[0]
        waiting.extend(edge[0].next_functions)
