"""One process or several under ``torchrun``: what each does of a batch, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce as differentiable_all_reduce
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def processes() -> Iterator[None]:
    """Joins ``torchrun``'s processes for as long as it lasts; does nothing in a process of its own."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """This process' number; 0 is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(x: Tensor, dim: int = 0) -> Tensor:
    """This process' part of a tensor."""
    return x.tensor_split(size(), dim)[rank()]


def all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce over all processes, in place; returns the tensor."""
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


def total(x: Tensor) -> Tensor:
    """The sum over all processes; gradients flow through it."""
    return differentiable_all_reduce(x) if dist.is_initialized() else x


def parallel(model: nn.Module) -> nn.Module:
    """The model with gradients averaged over all processes."""
    return DistributedDataParallel(model) if dist.is_initialized() else model
