"""``grad U`` along one trajectory, and what must stay the same while it is evaluated again and again."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from hvae_kernels import _checks, _live
from hvae_kernels.ops.leapfrog_potential.reference import Potential, gradient_of

NAME = "leapfrog"


class Field:
    """The gradient of ``potential``, at positions with their event dimensions flattened into one.

    :meth:`first` is eager and looks at the potential: which modules it calls, whether it draws random numbers, which
    tensors it needs gradients of. It is also the one evaluation in which batch norm updates its running statistics.
    All others run inside :meth:`held`, and are compiled if that is asked for.
    """

    def __init__(self, potential: Potential, compile: bool = False):
        self.potential, self.compile = potential, compile
        self.modes: dict[nn.Module, bool] = {}
        self.autocast: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        self.shape: torch.Size
        self.dtype: torch.dtype

    def first(
        self, z: Tensor, record: bool = False, rebuilt: bool = False, params: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, torch.Size]:
        """``(gradient, shape of the energies)`` at the start.

        A trajectory that is going to be ``rebuilt`` takes no random potential; with ``params`` it takes none that needs
        gradients of other tensors.
        """
        device = z.device.type
        self.shape, self.dtype = z.shape, z.dtype
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self.autocast = functools.partial(torch.autocast, device, dtype, enabled)
        before = _random_state(z.device) if rebuilt else ()
        with _modules_called() as called:
            position = z if record else z.detach().requires_grad_()
            grad, energy = gradient_of(self.potential, position, record)
        self.modes = {module: module.training for module in called}
        if rebuilt:
            _refuse_randomness(before, _random_state(z.device))
        if params is not None:
            _refuse_missing(energy, (position, *params))
            _refuse_dependent(params)
        return grad, energy.shape

    def __call__(self, z: Tensor, record: bool = False) -> Tensor:
        """The gradient at ``z``, event dimensions flattened, in ``z``'s dtype; the potential computes in its own."""
        with torch.set_grad_enabled(record):
            position = (z if record else z.detach()).to(self.dtype).reshape(self.shape)
            if self.compile:
                grad = _compiled_gradient(z.device.type)(self.potential, position)
            else:
                grad, _ = gradient_of(self.potential, position, record)
            return grad.reshape(z.shape).to(z.dtype)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold running statistics and autocast's state as the first evaluation left them.

        Raises:
            RuntimeError: a module has changed between training and evaluation since.
        """
        if any(module.training != training for module, training in self.modes.items()):
            raise RuntimeError(f"{NAME}: a module of potential changed its mode before the trajectory was rebuilt")
        with untracked(self.modes), self.autocast():
            yield


@contextlib.contextmanager
def untracked(modules: Iterable[nn.Module]) -> Iterator[bool]:
    """Batch norm that leaves its running statistics alone; says whether there is any that would not."""
    tracking = [m for m in modules if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield bool(tracking)
    finally:
        for module in tracking:
            module.track_running_stats = True


def functional_gradient(potential: Potential, z: Tensor) -> tuple[Tensor, Tensor]:
    """``(grad U(z), U(z))`` for ``torch.func`` and ``torch.compile``, which do not take ``torch.autograd.grad``."""

    def total(position: Tensor) -> tuple[Tensor, Tensor]:
        energy = potential(position)
        return energy.sum(), energy

    return torch.func.grad(total, has_aux=True)(z)


#: Inductor's C++ kernels over tensors of both memory layouts may write past their end (pytorch/pytorch#196681). A
#: convolution followed by nn.Upsample made one; without the pass that chooses layouts there is none, 6 % slower.
INDUCTOR_OPTIONS = {"cpu": {"layout_optimization": False}}


@functools.cache
def _compiled_gradient(device: str) -> Callable[[Potential, Tensor], Tensor]:
    """One compiled function for all potentials: Dynamo guards on them. Its backward is what AOTAutograd makes of it."""
    options = INDUCTOR_OPTIONS.get(device)
    return torch.compile(lambda potential, z: functional_gradient(potential, z)[0], fullgraph=True, options=options)


@contextlib.contextmanager
def _modules_called() -> Iterator[list[nn.Module]]:
    """Collect the modules that this thread calls; a plain function does not tell in any other way."""
    called: list[nn.Module] = []
    thread = threading.get_ident()

    @_live.only_looks
    def collect(module: nn.Module, _) -> None:
        if threading.get_ident() == thread:
            called.append(module)

    handle = register_module_forward_pre_hook(collect)
    try:
        yield called
    finally:
        handle.remove()


def _random_state(device: torch.device) -> tuple[Tensor, ...]:
    """States of the default generators; not the GPU's while a graph is captured, where it may not be read."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return (torch.get_rng_state(),)
    return torch.get_rng_state(), torch.cuda.get_rng_state(device)


def _refuse_randomness(before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> None:
    if not all(map(torch.equal, before, after)):
        raise ValueError(
            f"{NAME}: potential draws random numbers (dropout in training mode?), so its trajectory cannot be rebuilt: "
            "make it deterministic, or use memory='store', where each evaluation draws anew"
        )


def _refuse_missing(energy: Tensor, known: Sequence[Tensor]) -> None:
    """Follow the graph of ``energy`` to its leaves: each must be known, or it would silently get no gradient."""
    edges = {_edge(x) for x in known if x.requires_grad}
    for node in _nodes_above([(energy.grad_fn, 0)], edges):
        if hasattr(node, "variable"):
            expected = "all tensors that need gradients through potential (by default those of a module)"
            raise _checks.fail(NAME, "params", expected, f"all but {_checks.describe(node.variable)}")


def _refuse_dependent(params: Sequence[Tensor]) -> None:
    """A tensor made from another one in the list: its way to that one would be gone twice."""
    edges = {_edge(x): x for x in params if x.requires_grad}
    for x in edges.values():
        found: set[tuple] = set()
        for _ in _nodes_above(x.grad_fn.next_functions if x.grad_fn else (), set(edges), found):
            pass
        if found:
            expected = "tensors of which none is made from another"
            raise _checks.fail(NAME, "params", expected, f"{_checks.describe(x)} that is")


def _edge(x: Tensor) -> tuple:
    return tuple(torch.autograd.graph.get_gradient_edge(x))[:2]


def _nodes_above(
    edges: Iterable[tuple], stops: set[tuple], met: set[tuple] | None = None
) -> Iterator[torch.autograd.graph.Node]:
    """The graph's nodes that ``edges`` lead to, as far as the ``stops``, which are collected in ``met``."""
    waiting, seen = list(edges), set()
    while waiting:
        edge = waiting.pop()
        if edge in stops and met is not None:
            met.add(edge)
        if edge in seen or edge in stops or edge[0] is None:
            continue
        seen.add(edge)
        yield edge[0]
        waiting.extend(edge[0].next_functions)
