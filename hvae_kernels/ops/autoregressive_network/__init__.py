"""Whole autoregressive networks: the map, its inverse in one pass of work, and the implicit derivative."""

from hvae_kernels.ops.autoregressive_network.api import autoregressive_forward, autoregressive_inverse
from hvae_kernels.ops.autoregressive_network.network import ACTIVATIONS, FEATURES, NONE, Network, Stage

__all__ = [
    "ACTIVATIONS",
    "FEATURES",
    "NONE",
    "Network",
    "Stage",
    "autoregressive_forward",
    "autoregressive_inverse",
]
