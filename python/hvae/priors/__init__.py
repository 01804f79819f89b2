"""The priors study: what a variational auto-encoder's prior is worth on points from two Gaussians.

``data`` holds the problem, ``models`` the auto-encoder and its priors, ``likelihood`` estimates and bounds
of its log-likelihood, ``study`` what is run, ``train`` the loop, ``report`` the results, ``command`` the command line.
"""

from hvae.priors.command import STUDY

__all__ = ["STUDY"]
