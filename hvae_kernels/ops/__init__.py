"""One folder an op family; :mod:`hvae_kernels.functional` is the way in."""
