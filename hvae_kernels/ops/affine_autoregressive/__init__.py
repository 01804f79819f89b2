"""The affine tail of autoregressive flows (IAF, MAF): scale, shift and log-determinant in one pass."""

from hvae_kernels.ops.affine_autoregressive.api import affine_autoregressive
from hvae_kernels.ops.affine_autoregressive.gates import Gate

__all__ = ["Gate", "affine_autoregressive"]
