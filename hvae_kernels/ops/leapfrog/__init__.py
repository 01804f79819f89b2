"""Tempered leapfrog through Gaussian potentials."""

from hvae_kernels.ops.leapfrog.api import dense_gaussian_leapfrog, gaussian_leapfrog

__all__ = ["dense_gaussian_leapfrog", "gaussian_leapfrog"]
