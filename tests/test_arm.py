"""The kernels on an emulated ARM machine, where its compiler and the emulator are there: arm/check.py."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from arm import cases, check

KERNELS = Path(__file__).parents[1] / "csrc" / "kernels"
TABLE = check.DRIVER.read_text()


def test_kernels_on_arm(tmp_path):
    if reason := check.ARM.absent():
        pytest.skip(f"the kernels were not checked on ARM: {reason}")
    assert check.beyond(list(check.outcomes(check.ARM, tmp_path))) == []


@pytest.mark.parametrize("compiler", ["clang++-16", "clang++"])
def test_kernels_are_cpp_for_clang(compiler):
    """The same table, for this machine; `check.py --native clang++` runs it, too."""
    if shutil.which(compiler) is None:
        pytest.skip(f"the kernels were not read by {compiler}, which is not here")
    flags = [flag for flag in check.build_flags() if flag.startswith(("-std", "-W"))]
    subprocess.run([compiler, "-fsyntax-only", *flags, check.DRIVER], check=True)


@pytest.mark.parametrize("header", sorted(KERNELS.glob("*.h")), ids=lambda path: path.stem)
def test_every_kernel_has_a_row(header):
    """A kernel is a struct with a body, ``operator()``, for an instruction set."""
    text = header.read_text()
    namespace = re.search(r"namespace hk(?:::(\w+))? \{", text)[1]
    bodies = re.split(r"^struct (\w+) \{$", text, flags=re.MULTILINE)[1:]
    for name, body in zip(bodies[::2], bodies[1::2], strict=True):
        if re.search(r"operator\(\)\((auto|Set)\)", body.partition("\n};")[0]):
            qualified = f"{namespace}::{name}" if namespace else name
            assert re.search(rf"\b{qualified}\b[<;)]", TABLE), f"{qualified} is not in driver.cpp"


def test_every_row_has_cases():
    rows = re.findall(r'^    (?:ROW|FUNCTION|ACTIVATION)\("?([\w:]+)', TABLE, flags=re.MULTILINE)
    activations = re.findall(r'^    ACTIVATION\("(\w+)', TABLE, flags=re.MULTILINE)
    assert {case.kernel for case in cases.cases()} == {*rows, *(f"{name}_derivative" for name in activations)}


def test_absence_is_told_in_one_sentence():
    target = check.Target(("no-such-compiler", "-static"), ("no-such-emulator",), ("one", "another"))
    assert target.absent() == "no-such-compiler and no-such-emulator not found: apt-get install one another"
