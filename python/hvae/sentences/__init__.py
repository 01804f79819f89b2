"""The sentences study: an auto-encoder of sentences beside the recurrent network without z, and the truth beside both.

``grammar`` holds sentences whose probabilities are known, ``data`` those and any text's as numbers, ``models`` the
networks, ``study`` what is run, ``train`` the loop, ``measure`` the final figures, ``figures`` pictures and texts,
``report`` the results, ``command`` the command line.
"""

from hvae.sentences.command import STUDY

__all__ = ["STUDY"]
