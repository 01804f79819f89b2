"""What compilers make of the kernels: loops in vectors, and vectors that stay in vector registers."""

import os
import platform
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from hvae_kernels import _extension

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "csrc" / "kernels"
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="reads x86's instructions")


def marked_loops():
    """The kernels with HK_IVDEP, and where the loops are that it marks: (header, line)."""
    names, lines = [], set()
    for header in sorted(KERNELS.glob("*.h")):
        text = header.read_text()
        namespace = re.search(r"namespace (hk(?:::\w+)?) \{", text)[1]
        parts = re.split(r"^struct (\w+) \{$", text, flags=re.MULTILINE)
        names += [
            f"{namespace}::{n}" for n, body in zip(parts[1::2], parts[2::2], strict=True) if "  HK_IVDEP\n" in body
        ]
        lines |= {(header.name, n + 2) for n, line in enumerate(text.splitlines()) if line.strip() == "HK_IVDEP"}
    return names, lines


@on_x86
def test_marked_loops_are_in_vectors():
    """Where GCC cannot see that arrays lie apart it gives up in silence: as correct, a quarter as fast."""
    names, lines = marked_loops()
    assert len(lines) > 5
    forms = ", ".join(f"(void*)&hk::Compiled<{name}<float>>::avx2" for name in names)
    source = "".join(f'#include "{KERNELS / name}"\n' for name in {name for name, _ in lines})
    source += f"void* forms[] = {{{forms}}};\n"
    flags = runpy.run_path(str(ROOT / "setup.py"), run_name="flags")["FLAGS"]
    command = [*os.environ.get("CXX", "c++").split(), *flags, "-fopt-info-vec-optimized", "-S", "-o", os.devnull]
    result = subprocess.run([*command, "-x", "c++", "-"], input=source, capture_output=True, text=True)
    if "fopt-info" in result.stderr:
        pytest.skip("only GCC tells which loops it vectorises")
    assert result.returncode == 0, result.stderr
    found = re.findall(r"(\w+\.h):(\d+):\d+: optimized: loop vectorized using 32 byte vectors", result.stderr)
    assert lines - {(header, int(line)) for header, line in found} == set()


@on_x86
def test_vectors_stay_in_vector_registers():
    """Of the kernels that name their vectors: lane by lane through general registers costs more than the arithmetic."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump not found")
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", _extension_file()]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kernels = r"StaircaseProduct|Transpose|mixture::\w+|planar::\w+|annealed::LongForward"
    functions = re.findall(
        rf"^\w+ <(.*Compiled<hk::(?:{kernels})<.*::avx\w+\(.*)>:\n((?:.+\n)*)", text, flags=re.MULTILINE
    )
    if not functions:
        pytest.skip("the extension is stripped of its symbols")
    assert [name for name, body in functions if re.search(r"\tvp(?:ins|ext)r[dq] ", body)] == []


def _extension_file():
    assert _extension.why_absent() is None
    import hvae_kernels._C

    return hvae_kernels._C.__file__
