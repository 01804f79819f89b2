"""One RMSProp step in one pass: clipping, moving average and update."""

from hvae_kernels.ops.rmsprop.api import rmsprop_step_

__all__ = ["rmsprop_step_"]
