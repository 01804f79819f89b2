"""``gaussian_mixture_log_prob``."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.ops._row import Case, Row
from hvae_kernels import functional
from hvae_kernels.ops.gaussian_mixture import reference


def mixture_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, components: int, features: int
) -> tuple[Tensor, ...]:
    """Random arguments of ``gaussian_mixture_log_prob``: components that overlap, so that many share a row."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    value, loc = normal(batch, features), 0.5 * normal(components, features)
    log_scale = 0.1 * normal(components, features)
    return tuple(x.to(dtype).to(device).contiguous() for x in (value, normal(components), loc, log_scale))


def mixture_log_prob(*inputs: Tensor) -> tuple[Tensor]:
    """The op."""
    return (functional.gaussian_mixture_log_prob(*inputs),)


def printed_mixture(value: Tensor, mixture_logits: Tensor, loc: Tensor, log_scale: Tensor) -> tuple[Tensor]:
    """As one writes it."""
    return (reference.gaussian_mixture_log_prob(value, mixture_logits, loc, log_scale),)


def _mixture_case(batch: int, components: int, features: int, **options) -> Case:
    sizes = {"batch": batch, "components": components, "features": features}
    return Case(f"({batch}, {features}), C = {components}", sizes, **options)


ROWS = (
    Row(
        name="gaussian_mixture_log_prob",
        op=mixture_log_prob,
        formula=printed_mixture,
        inputs=mixture_inputs,
        # read value and the parameters; write a number a row
        forward_bytes=lambda element_size, batch, components, features: (
            element_size * (batch * (features + 1) + components * (2 * features + 1))
        ),
        # read the cotangent, value and the parameters; write their gradients
        backward_bytes=lambda element_size, batch, components, features: (
            element_size * (batch * (2 * features + 1) + 2 * components * (2 * features + 1))
        ),
        # a difference, its scaling and its square's sum; the same again and, weighted, three sums more
        flops=lambda direction, batch, components, features: (
            {"forward": 4, "backward": 4 + 9}[direction] * batch * components * features
        ),
        cases=(
            _mixture_case(4096, 500, 40, gate={"batch": 257}),
            _mixture_case(256, 2, 2),
            _mixture_case(4096, 5000, 40, stock=False, gate={"batch": 65}),
            _mixture_case(65536, 1000, 64, stock=False, devices=("cuda",), gate={"batch": 1024}),
        ),
    ),
)
