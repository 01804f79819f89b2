"""Linear layers whose connections are given by degrees (autoregressive networks)."""

from hvae_kernels.ops.masked_linear.api import masked_linear

__all__ = ["masked_linear"]
