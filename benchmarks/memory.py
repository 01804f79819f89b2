"""Memory that a call takes beyond its inputs, and what it keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def peak_bytes(call: Callable[[], object], device_type: str) -> int:
    """The most tensor memory that ``call`` holds at one time beyond what existed before; its results count."""
    call()
    return _peak_cuda(call) if device_type == "cuda" else _peak_cpu(call)


def _peak_cuda(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_cpu(call: Callable[[], object]) -> int:
    """Follow the allocator's events; the resident set would miss what reuses freed pages."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def saved_bytes(function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> int:
    """Bytes of the storages that ``function`` saves for its backward pass, those of its inputs left out."""
    own = {x.untyped_storage().data_ptr() for x in inputs}
    kept: dict[int, Tensor] = {}  # keeping the tensor alive keeps its address unique

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function(*inputs)
    return sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in own)
