"""The DRAW study: digits drawn step by step, with and without attention, and the likelihood that others do not print.

``models`` holds the network, ``study`` what is run, ``train`` the loop and the final figures, ``figures`` the pictures,
``report`` the results, ``command`` the command line.
"""

from hvae.draw.command import STUDY

__all__ = ["STUDY"]
