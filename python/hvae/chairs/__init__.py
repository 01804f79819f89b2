"""The chairs study: a network that draws chairs from class, view and transformation, and views it never saw.

``render`` draws boxes, ``styles`` makes chairs of them, ``data`` their pictures, ``models`` holds the network,
``study`` what is run, ``train`` the loop, ``measure`` the final figures, ``figures`` the pictures, ``report`` the
results, ``command`` the command line.
"""

from hvae.chairs.command import STUDY

__all__ = ["STUDY"]
