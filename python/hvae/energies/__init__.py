"""Normalising flows fitted to the four two-dimensional energies of Rezende and Mohamed (2015), with the exact KL.

``targets`` holds the energies, ``models`` the flows, ``study`` what is run, ``train`` the loop and the final figures,
``figures`` the pictures, ``report`` the results, ``command`` the command line, ``hvae densities``.
"""

from hvae.energies.command import STUDY

__all__ = ["STUDY"]
