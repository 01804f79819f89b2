"""Stacked radial layers: each row stays in the cache, or in registers, through all of them."""

from hvae_kernels.ops.radial_flow.api import radial_flow

__all__ = ["radial_flow"]
