"""Tempered leapfrog through any differentiable potential."""

from hvae_kernels.ops.leapfrog.api import leapfrog

__all__ = ["leapfrog"]
