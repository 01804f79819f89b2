"""The Gaussian study: which variational method recovers the parameters of a Gaussian model, and which bound it reaches.

``data`` and ``exact`` hold the problem and its closed forms, ``models`` the bounds and their gradients, ``study`` what
is run in the two settings, ``train`` the loop, ``report`` the results, ``command`` the command line.
"""

from hvae.gaussian.command import STUDY

__all__ = ["STUDY"]
