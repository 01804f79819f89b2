"""The experiments, built on ``hvae_kernels``; the command is ``hvae``."""
