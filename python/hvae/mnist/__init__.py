"""The MNIST study: Hamiltonian, importance-weighted, autoregressive and plain auto-encoders, compared like for like.

``networks`` and ``models`` hold the auto-encoders and their bounds, ``likelihood`` the estimate that compares them,
``study`` what is run, ``train`` the loop, ``distributed`` how several processes share it, ``figures`` and ``report``
the results, ``command`` the command line.
"""

from hvae.mnist.command import STUDY

__all__ = ["STUDY"]
