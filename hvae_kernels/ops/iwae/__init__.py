"""The importance-weighted bound, and surrogates for the encoder's gradient."""

from hvae_kernels.ops.iwae.api import dreg_surrogate, iwae_bound, stl_surrogate

__all__ = ["dreg_surrogate", "iwae_bound", "stl_surrogate"]
