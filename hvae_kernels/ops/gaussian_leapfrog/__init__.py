"""Tempered leapfrog through Gaussian potentials."""

from hvae_kernels.ops.gaussian_leapfrog.api import (
    dense_gaussian_leapfrog,
    gaussian_leapfrog,
    gaussian_leapfrog_with_vjp,
)

__all__ = ["dense_gaussian_leapfrog", "gaussian_leapfrog", "gaussian_leapfrog_with_vjp"]
