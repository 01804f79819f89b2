"""Linear layers with Gaussian weights, sampled where they act: in the activations."""

from hvae_kernels.ops.local_reparam_linear.api import local_reparam_linear

__all__ = ["local_reparam_linear"]
