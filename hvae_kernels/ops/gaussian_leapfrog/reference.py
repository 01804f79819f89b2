"""Reference: tempered leapfrog in plain PyTorch, beside its formula. Any dtype and device, differentiable to any order.

One step ``k`` of ``K`` (Neal 2011, section 5.5.7; Caterini, Doucet and Sejdinovic 2018, algorithm 1)::

    rho' = rho - step_size / 2 * grad U(z)
    z    = z + step_size * rho'
    rho  = tempering_k * (rho' - step_size / 2 * grad U(z))

The gradient at the end of step k is the gradient at the start of step k + 1, so a trajectory costs K + 1 gradients.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def trajectory(
    z: Tensor, rho: Tensor, gradient: Callable[[Tensor], Tensor], step_size: Tensor, tempering: Tensor
) -> tuple[Tensor, Tensor]:
    """The formula above for any ``gradient`` of the potential; shapes as in :func:`gaussian_leapfrog`."""
    n_steps = tempering.shape[-1]
    if n_steps == 0:
        return z.clone(), rho.clone()  # results never share memory with inputs
    grad = gradient(z)
    for k in range(n_steps):
        step = step_size_at(step_size, k)
        alpha = tempering[..., k] if tempering.dim() == 1 else tempering[:, k, None, None]
        rho = rho - step / 2 * grad
        z = z + step * rho
        grad = gradient(z)
        rho = alpha * (rho - step / 2 * grad)
    return z, rho


def step_size_at(step_size: Tensor, k: int) -> Tensor:
    """The step size of step ``k``, shaped to broadcast over ``z``: ``()``, ``(d,)`` or ``(R, 1, d)``."""
    if step_size.dim() < 2:
        return step_size
    if step_size.dim() == 2:
        return step_size[k]
    return step_size if step_size.shape[1] == 1 else step_size[:, k : k + 1]


def gaussian_leapfrog(
    z: Tensor, rho: Tensor, precision: Tensor, loc: Tensor, step_size: Tensor, tempering: Tensor
) -> tuple[Tensor, Tensor]:
    """``U(z) = 1/2 sum precision (z - loc)^2``: ``grad U(z) = precision (z - loc)``."""
    return trajectory(z, rho, lambda position: precision * (position - loc), step_size, tempering)


def dense_gaussian_leapfrog(
    z: Tensor, rho: Tensor, precision: Tensor, loc: Tensor, step_size: Tensor, tempering: Tensor
) -> tuple[Tensor, Tensor]:
    """``U(z) = 1/2 (z - loc)^T precision (z - loc)``: ``grad U(z) = (precision + precision^T) / 2 (z - loc)``."""
    symmetric = (precision + precision.mT) / 2
    return trajectory(z, rho, lambda position: (position - loc) @ symmetric, step_size, tempering)
