"""GPU kernels of whole autoregressive networks: ``small`` forward, ``sweep`` the inverse and the solve."""

from hvae_kernels.ops.autoregressive_network.triton.small import autoregressive_forward
from hvae_kernels.ops.autoregressive_network.triton.sweep import autoregressive_inverse, autoregressive_solve

__all__ = ["autoregressive_forward", "autoregressive_inverse", "autoregressive_solve"]
