"""Tempered leapfrog through any differentiable potential."""

from hvae_kernels.ops.leapfrog_potential.api import leapfrog

__all__ = ["leapfrog"]
