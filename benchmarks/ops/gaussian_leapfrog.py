"""``gaussian_leapfrog`` and ``dense_gaussian_leapfrog``."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from benchmarks.ops._row import Row, steps_case
from hvae_kernels import functional
from hvae_kernels.ops.gaussian_leapfrog import reference


def leapfrog_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, features: int, steps: int
) -> tuple[Tensor, ...]:
    """Random arguments of ``gaussian_leapfrog`` for which K steps stay of order 1, whatever K."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    z, rho = torch.randn(2, batch, features, generator=generator, dtype=torch.float64)
    precision, loc = uniform(0.5, 2.0, features), uniform(-1.0, 1.0, features)
    step_size = uniform(0.02, 0.2, features)
    tempering = uniform(0.8, 1.0, steps) ** (1 / steps)
    return tuple(x.to(dtype).to(device).contiguous() for x in (z, rho, precision, loc, step_size, tempering))


def printed_leapfrog(
    z: Tensor, rho: Tensor, precision: Tensor, loc: Tensor, step_size: Tensor, tempering: Tensor
) -> tuple[Tensor, Tensor]:
    """The step as the literature prints it and as people write it: the gradient twice a step, 2 K in all."""
    for alpha in tempering:
        rho = rho - step_size / 2 * precision * (z - loc)
        z = z + step_size * rho
        rho = alpha * (rho - step_size / 2 * precision * (z - loc))
    return z, rho


def dense_inputs(
    dtype: torch.dtype, device: torch.device | str, seed: int, batch: int, features: int, steps: int
) -> tuple[Tensor, ...]:
    """Random arguments of ``dense_gaussian_leapfrog``: eigenvalues of the precision between 0.5 and about 4.5."""
    z, rho, _, *rest = leapfrog_inputs(dtype, device, seed, batch, features, steps)
    noise = torch.randn(features, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    precision = 0.5 * torch.eye(features, dtype=torch.float64) + noise @ noise.T / features
    return z, rho, precision.to(dtype).to(device), *rest


def printed_dense_leapfrog(
    z: Tensor, rho: Tensor, precision: Tensor, loc: Tensor, step_size: Tensor, tempering: Tensor
) -> tuple[Tensor, Tensor]:
    """As :func:`printed_leapfrog`: two matrix products a step."""
    symmetric = (precision + precision.T) / 2
    for alpha in tempering:
        rho = rho - step_size / 2 * ((z - loc) @ symmetric)
        z = z + step_size * rho
        rho = alpha * (rho - step_size / 2 * ((z - loc) @ symmetric))
    return z, rho


def dense_flops(direction: str, batch: int, features: int, steps: int) -> int:
    """Stepping or composing, whichever takes fewer; the backward pass takes each product twice."""
    stepping = (steps + 1) * batch * features**2
    composing = 2 * steps * features**3 + 4 * batch * features**2
    return {"forward": 2, "backward": 4}[direction] * min(stepping, composing)


def leapfrog_flops(direction: str, batch: int, features: int, steps: int) -> int:
    """Collapsed to one 2x2 affine map a feature: composed once over K, applied to (or reduced over) the batch."""
    composing = 20 * steps * features
    per_element = {"forward": 8, "backward": 18}[direction]
    return composing + per_element * batch * features


GAUSSIAN_LEAPFROG = Row(
    name="gaussian_leapfrog",
    op=functional.gaussian_leapfrog,
    formula=printed_leapfrog,
    peers={"eager, K + 1 gradients": reference.gaussian_leapfrog},
    inputs=leapfrog_inputs,
    # read z, rho; write z_K, rho_K
    forward_bytes=lambda element_size, batch, features, steps: 4 * element_size * batch * features,
    # read both cotangents, z, rho; write two gradients
    backward_bytes=lambda element_size, batch, features, steps: 6 * element_size * batch * features,
    flops=leapfrog_flops,
    cases=(
        steps_case(4096, 400, 10),
        steps_case(10, 25, 10),
        steps_case(4096, 400, 1),
        steps_case(4096, 400, 100, stock=False, gate={"batch": 257}),
        # a GPU's launch costs as much as the whole of the cases above; this one fills it
        steps_case(65536, 400, 10, devices=("cuda",), gate={"batch": 16384}),
    ),
)

DENSE_GAUSSIAN_LEAPFROG = dataclasses.replace(
    GAUSSIAN_LEAPFROG,
    name="dense_gaussian_leapfrog",
    op=functional.dense_gaussian_leapfrog,
    formula=printed_dense_leapfrog,
    peers={"eager, K + 1 gradients": reference.dense_gaussian_leapfrog},
    inputs=dense_inputs,
    flops=dense_flops,
    cases=(steps_case(4096, 400, 10, gate={"batch": 1200}), steps_case(10, 400, 10)),
)

ROWS = (GAUSSIAN_LEAPFROG, DENSE_GAUSSIAN_LEAPFROG)
