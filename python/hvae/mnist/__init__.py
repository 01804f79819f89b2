"""The MNIST study: Hamiltonian, importance-weighted, autoregressive and plain auto-encoders, compared like for like.

``networks`` and ``models`` hold the auto-encoders and their bounds, ``deep`` the posteriors of deep latent Gaussian
models, ``helmholtz`` the machine of bits, ``likelihood`` the estimate that compares them,
``study`` what is run, ``train`` the loop, ``distributed`` how several processes share it, ``figures`` and ``report``
the results, ``command`` the command line.
"""

from hvae.mnist.command import STUDY

__all__ = ["STUDY"]
