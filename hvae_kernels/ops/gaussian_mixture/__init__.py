"""Densities of diagonal Gaussian mixtures, with nothing of size (batch, components, features) in memory."""

from hvae_kernels.ops.gaussian_mixture.api import gaussian_mixture_log_prob, gaussian_mixture_responsibilities

__all__ = ["gaussian_mixture_log_prob", "gaussian_mixture_responsibilities"]
