"""``local_reparam_linear``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.ops._row import Row, linear_case
from hvae_kernels import functional


def local_reparam_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, inputs: int, outputs: int
) -> tuple[Tensor, ...]:
    """Random arguments of ``local_reparam_linear``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, inputs), (outputs, inputs), (outputs, inputs), (outputs,), (outputs,), (batch, outputs))
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    for log_scale in (tensors[2], tensors[4]):
        log_scale.mul_(0.1).sub_(3.0)
    return tuple(x.to(dtype).to(device) for x in tensors)


def printed_local_reparam(
    x: Tensor, loc: Tensor, log_scale: Tensor, bias: Tensor, bias_log_scale: Tensor, noise: Tensor
) -> tuple[Tensor]:
    """As one writes it."""
    variance = linear(x**2, torch.exp(2 * log_scale), torch.exp(2 * bias_log_scale))
    return (linear(x, loc, bias) + variance.sqrt() * noise,)


class _TwoProducts(torch.autograd.Function):
    """The yardstick: the matrix products of the op and of its gradients, and nothing else."""

    @staticmethod
    def forward(ctx, x, loc, log_scale, bias, bias_log_scale, noise):
        ctx.save_for_backward(x, loc, log_scale)
        linear(x, log_scale, bias_log_scale)
        return linear(x, loc, bias)

    @staticmethod
    def backward(ctx, grad):
        x, loc, log_scale = ctx.saved_tensors
        _, d_x = grad @ log_scale, grad @ loc
        return d_x, grad.mT @ x, grad.mT @ x, grad.sum(0), grad.sum(0), grad


def two_products(*arguments: Tensor) -> tuple[Tensor]:
    """Both linear maps on operands that need no preparation."""
    return (_TwoProducts.apply(*arguments),)


ROWS = (
    Row(
        name="local_reparam_linear",
        op=lambda *arguments: (functional.local_reparam_linear(*arguments),),
        formula=printed_local_reparam,
        peers={"two products": two_products},
        inputs=local_reparam_inputs,
        # read x, two weights and the noise; write y
        forward_bytes=lambda size, batch, inputs, outputs: (
            size * (batch * (inputs + 2 * outputs) + 2 * inputs * outputs)
        ),
        # read the cotangent, x, the weight, its scale, the noise; write four gradients
        backward_bytes=lambda size, batch, inputs, outputs: (
            size * (batch * (2 * inputs + 3 * outputs) + 4 * inputs * outputs)
        ),
        flops=lambda direction, batch, inputs, outputs: (
            {"forward": 4, "backward": 8}[direction] * batch * inputs * outputs
        ),
        cases=(
            linear_case(1024, 1024, 1024),
            linear_case(128, 784, 400),
            linear_case(8192, 1024, 1024, devices=("cuda",)),
        ),
    ),
)
