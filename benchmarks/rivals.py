"""Everything that is timed for one row: ours, the plain formula, that compiled, peers, and the copy."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import roofline
from benchmarks.registry import Case, Row
from benchmarks.timing import Candidate

OURS, EAGER, COMPILE, COPY = "hvae_kernels", "eager", "torch.compile", "copy"

Function = Callable[..., tuple[Tensor, ...]]


def functions(row: Row, case: Case) -> dict[str, Function]:
    """The implementations of ``row`` that run at ``case``, by name."""
    stock = {EAGER: row.formula, COMPILE: compiled(row.formula), **row.peers} if case.stock else {}
    return {OURS: row.op, **stock}


def compiled(function: Function) -> Function:
    """``torch.compile`` at fixed shapes, with a cache of its own: Dynamo keeps one for each code object."""
    code = function.__code__.replace()
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__ = function.__kwdefaults__
    return torch.compile(own, fullgraph=True, dynamic=False)


class Problem:
    """The inputs and cotangents of one case, as many sets of them as are rotated through."""

    def __init__(self, row: Row, case: Case, dtype: torch.dtype, device: torch.device):
        self.row, self.case, self.dtype, self.device = row, case, dtype, device
        self.functions = functions(row, case)
        self.n_sets = roofline.input_sets(self.bytes("forward"), device)
        self.inputs = [row.inputs(dtype=dtype, device=device, seed=i, **case.sizes) for i in range(self.n_sets)]
        self.leaves = [row.leaves(inputs) for inputs in self.inputs]
        self.cotangents = tuple(torch.randn_like(y) for y in row.op(*self.inputs[0]))

    def bytes(self, direction: str) -> int:
        """Bytes that the direction has to move at least."""
        return self.row.bytes(direction, self.dtype.itemsize, self.case.sizes)

    def candidate(self, name: str, direction: str) -> Candidate:
        """The implementation ``name`` in one direction, ready to be timed."""
        function, cotangents, n_sets = self.functions[name], self.cotangents, self.n_sets

        def forward(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return function(*inputs)

        def backward(recorded: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
            outputs, leaves = recorded
            return torch.autograd.grad(outputs, _variables(leaves), cotangents)

        def both(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(function(*leaves), _variables(leaves), cotangents)

        def record(i: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            leaves = self.leaves[i % n_sets]
            return function(*leaves), leaves

        call, prepare = {
            "forward": (forward, lambda i: self.inputs[i % n_sets]),
            "backward": (backward, record),
            "forward+backward": (both, lambda i: self.leaves[i % n_sets]),
        }[direction]
        return Candidate(name, call, prepare)

    def candidates(self, direction: str, graphs: bool = False) -> list[Candidate]:
        """Everything that is timed in this direction; with ``graphs`` also as CUDA graphs, without the launches."""
        found = [self.candidate(name, direction) for name in self.functions]
        found.append(roofline.copy(self.bytes(direction), self.dtype, self.device, self.n_sets, COPY))
        if graphs:
            # a captured backward pass would go on reading what eager autograd saved, and freed since
            replayable = (OURS, COPY) if direction == "backward" else (OURS, EAGER, COPY)
            wanted = [candidate for candidate in found if candidate.name in replayable]
            found += [replayed for candidate in wanted if (replayed := as_graph(candidate, self.n_sets)) is not None]
        return found


def _variables(leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(x for x in leaves if x.requires_grad)


def as_graph(candidate: Candidate, n_sets: int) -> Candidate | None:
    """The candidate as a CUDA graph over all input sets: the kernels' time without the launches; None if it fails."""
    stream = torch.cuda.Stream()
    try:
        with torch.cuda.stream(stream):
            for i in range(3):  # warm-up: compilation and workspaces stay out of the capture
                candidate.call(candidate.prepare(i))
            # what is recorded here must run on the capturing stream: the engine goes back along the forward's stream
            arguments = [candidate.prepare(i) for i in range(n_sets)]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for argument in arguments:
                candidate.call(argument)
    except RuntimeError as error:
        print(f"  no CUDA graph of {candidate.name}: {str(error).splitlines()[0]}")
        return None
    # the arguments stay alive with the candidate: the graph reads them
    replay = functools.partial(_replay, graph, arguments)
    return Candidate(f"{candidate.name} (graph)", replay, lambda i: None, calls=n_sets)


def _replay(graph: torch.cuda.CUDAGraph, arguments: Sequence[object], _: object) -> None:
    graph.replay()
