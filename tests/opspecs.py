"""The table of ops, from the files of ``ops``; ``test_contract.py`` runs every check on every row."""

from __future__ import annotations

from ops import collected
from ops._spec import OpSpec

OPSPECS: tuple[OpSpec, ...] = collected("SPECS")
