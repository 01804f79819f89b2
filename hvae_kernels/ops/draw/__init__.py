"""DRAW's attention: patches of images through grids of Gaussian filters, which are never in memory."""

from hvae_kernels.ops.draw.api import draw_read, draw_write

__all__ = ["draw_read", "draw_write"]
