"""What this machine can do at best: copy bandwidth and matrix-product rate, measured in the same run as the ops."""

from __future__ import annotations

import torch

from benchmarks.timing import Candidate


def copy(n_bytes: int, dtype: torch.dtype, device: torch.device, n_sets: int, name: str = "copy") -> Candidate:
    """A copy that moves ``n_bytes``, half of them read and half written, between existing tensors.

    It moves as much as the op has to and works on as large a set, so it sits in the same level of the caches; and it
    allocates nothing, so it is the stricter yardstick for ops that do.
    """
    numel = max(1, n_bytes // 2 // dtype.itemsize)
    pairs = [
        (torch.empty(numel, dtype=dtype, device=device), torch.randn(numel, device=device).to(dtype))
        for _ in range(n_sets)
    ]
    return Candidate(name, lambda pair: pair[0].copy_(pair[1]), lambda i: pairs[i % n_sets])


def matrix_product(dtype: torch.dtype, device: torch.device, name: str = "matrix product") -> tuple[Candidate, int]:
    """A square matrix product and its FLOPs: the most arithmetic that can be had from this device."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return Candidate(name, lambda _: torch.mm(a, b, out=out), lambda i: None), 2 * n**3


def input_sets(n_bytes: int, device: torch.device) -> int:
    """How many input sets to rotate through, so that a GPU's cache does not serve what memory should.

    On a CPU one: the op and its yardstick both run with whatever their working set leaves in the caches.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(16, -(-3 * cache // max(n_bytes, 1))))
