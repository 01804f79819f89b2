"""Fast, exact building blocks for variational inference in PyTorch.

``hvae_kernels.functional`` holds the ops, ``hvae_kernels.nn`` the modules; ``show_config()`` says what runs where.
"""

__version__ = "0.1.0"

from hvae_kernels import functional
from hvae_kernels._dispatch import show_config, use_impl

__all__ = ["__version__", "functional", "nn", "show_config", "use_impl"]

from hvae_kernels import nn
