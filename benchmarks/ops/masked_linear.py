"""``masked_linear``."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.ops._row import Row, linear_case
from hvae_kernels import functional


@functools.cache
def _staircase(inputs: int, outputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Degrees that rise evenly: half of all connections."""
    return torch.arange(inputs, device=device) * outputs, torch.arange(outputs, device=device) * inputs


def masked_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, inputs: int, outputs: int
) -> tuple[Tensor, ...]:
    """Random arguments of ``masked_linear``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, inputs), (outputs, inputs), (outputs,))
    tensors = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(x.to(dtype).to(device) for x in tensors)


def staircase_linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    """The op on degrees that rise evenly."""
    return (functional.masked_linear(x, weight, bias, *_staircase(x.shape[1], weight.shape[0], x.device)),)


def printed_masked_linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    """As libraries write it: weight times mask, at every call."""
    ins = torch.arange(x.shape[1], device=x.device) * weight.shape[0]
    outs = torch.arange(weight.shape[0], device=x.device) * x.shape[1]
    return (linear(x, weight * (outs[:, None] >= ins), bias),)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor]:
    """The yardstick: no mask at all, twice the operations."""
    return (linear(x, weight, bias),)


def masked_flops(direction: str, batch: int, inputs: int, outputs: int) -> int:
    """Half of the dense product's; backward has two of them."""
    return {"forward": 1, "backward": 2}[direction] * batch * inputs * outputs


ROWS = (
    Row(
        name="masked_linear",
        op=staircase_linear,
        formula=printed_masked_linear,
        peers={"no mask": dense_linear},
        inputs=masked_inputs,
        # read x, half of the weight; write y
        forward_bytes=lambda size, batch, inputs, outputs: size * (batch * (inputs + outputs) + inputs * outputs // 2),
        # read the cotangent and x, half of the weight; write the gradients, that of the weight whole
        backward_bytes=lambda size, batch, inputs, outputs: (
            size * (batch * (2 * inputs + outputs) + 3 * inputs * outputs // 2)
        ),
        flops=masked_flops,
        cases=(
            linear_case(128, 1024, 1024),
            linear_case(256, 64, 640),
            linear_case(4096, 1024, 1024, devices=("cuda",)),
            linear_case(8192, 4096, 4096, devices=("cuda",), dtype=torch.bfloat16, gate={"batch": 1024}),
        ),
    ),
)
