"""Counts the cases of the contract into docs/contract.csv: ``python docs/_hooks/contract.py``.

In the environment of the tests. Collected, not run: the suite runs them, and what it holds is red or green there.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CASE = re.compile(r"test_contract\.py::test_(\w+)\[(\w+)/(cpp|triton|reference)[\w-]*/cpu")


def collected() -> Counter[tuple[str, str, str]]:
    """Cases by op, implementation and check, all instruction sets of this machine together."""
    command = [sys.executable, "-m", "pytest", "tests/test_contract.py", "--collect-only", "-q"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return Counter((op, implementation, check) for check, op, implementation in CASE.findall(done.stdout))


if __name__ == "__main__":
    with (ROOT / "docs" / "contract.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("op", "implementation", "check", "cases"))
        writer.writerows((*key, count) for key, count in sorted(collected().items()))
