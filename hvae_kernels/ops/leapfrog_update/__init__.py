"""The fused momentum and position update between two gradient evaluations (internal)."""

from hvae_kernels.ops.leapfrog_update.api import leapfrog_update, leapfrog_update_vjp

__all__ = ["leapfrog_update", "leapfrog_update_vjp"]
