"""The DRAW study: digits drawn step by step, with and without attention, and the likelihood that others do not print.

``models`` holds the network, ``study`` what is run, ``train`` the loop and the final figures, ``figures`` the pictures,
``report`` the results, ``command`` the command line. The same reader classifies cluttered digits: ``classifiers`` holds
the networks, ``classify`` what is run and how, ``glimpses`` the results.
"""

from hvae.draw.command import STUDY

__all__ = ["STUDY"]
