"""Fast, exact building blocks for variational inference in PyTorch.

``hvae_kernels.functional`` holds the ops, ``hvae_kernels.nn`` the modules; ``accelerate`` swaps the slow parts of other
libraries' flows; ``show_config()`` says what runs where.
"""

__version__ = "0.1.0"

from hvae_kernels import functional
from hvae_kernels._dispatch import config, show_config, use_impl
from hvae_kernels._extension import use_cpu

__all__ = [
    "__version__",
    "accelerate",
    "config",
    "functional",
    "nn",
    "path_log_prob",
    "restore",
    "show_config",
    "use_cpu",
    "use_impl",
]

from hvae_kernels import _flops, nn
from hvae_kernels.compat import accelerate, restore
from hvae_kernels.nn.path import path_log_prob

_flops.tell_torch()
