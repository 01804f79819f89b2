"""The quick tests on an installed wheel, not on the tree: ``python tests/wheel_check.py [--torch SPEC] [WHEEL]``.

Copies the tests, and what they read of the tree, to a folder without the package, makes a fresh environment with the
wheel (of ``dist`` by default), and runs ``pytest --quick`` there. Prints size and import times before. ``--python`` and
``--torch`` choose what the fresh environment has; ``--here`` takes the one that runs this file, with its wheel and
what ``tests/peers.txt`` names.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: What the quick tests read of the tree; of the package itself only the pages, which are not in the wheel.
COPIED = (
    "tests",
    "benchmarks",
    "csrc",
    "examples",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "CONTRIBUTING.md",
    "docs/ops.md",
)
#: Tests of how the tree is laid out and built, not of what is installed.
OF_THE_TREE = ("test_layers.py", "test_machine_code.py", "test_mutation_check.py", "test_docs.py")
DESELECTED = "not setup_ and not readmes_links"
PACKAGES = ("pytest", "pytest-xdist", "hypothesis", "setuptools>=77", "wheel")

IMPORTS = """
import sys, time
sys.path = [entry for entry in sys.path if entry not in ("", {root!r})]
now = lambda: (time.perf_counter(), time.process_time())
start = now(); import torch; middle = now(); import hvae_kernels as hk; end = now()
assert "site-packages" in hk.__file__, f"not the installed package: {{hk.__file__}}"
found = hk.config()
assert found["extension"] is None, found["extension"]
print(f"Python {{sys.version.split()[0]}}, torch {{torch.__version__}}, {{found['cpu']['chosen']}}: {{hk.__file__}}")
for name, a, b in (("torch", start, middle), ("hvae_kernels after it", middle, end)):
    print(f"import {{name}}: {{b[0] - a[0]:.3f}} s, of which the processor worked {{b[1] - a[1]:.3f}} s")
"""


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """Run a command, without the tree on Python's path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([str(part) for part in command], cwd=cwd, env=environment, check=True)


def fresh(folder: Path, python: str, torch: str, wheel: Path) -> Path:
    """The interpreter of a new environment that has torch, the wheel and what runs tests."""
    run(python, "-m", "venv", folder)
    inside = folder / "bin" / "python"
    run(inside, "-m", "pip", "install", "--quiet", torch, "numpy")
    run(inside, "-m", "pip", "install", "--quiet", f"{wheel}[study]", *PACKAGES)
    peers = ROOT / "tests" / "peers.txt"  # one quick test compares with them
    run(inside, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--requirement", peers)
    return inside


def copy(folder: Path) -> Path:
    """The tests where no ``hvae_kernels`` stands beside them."""
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".hypothesis"))
        elif source.exists():
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy(source, folder / name)
    for name in OF_THE_TREE:
        (folder / "tests" / name).unlink(missing_ok=True)
    return folder


def main() -> None:
    """The whole check; raises at what fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", nargs="?", type=Path, help="default: the one in dist")
    parser.add_argument("--here", action="store_true", help="in this environment, which has the wheel")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the fresh environment")
    parser.add_argument("--torch", default="torch>=2.10", metavar="SPEC", help="as pip takes it")
    parser.add_argument("--processes", default="auto", help="of pytest-xdist")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wheel-check-") as name:
        folder = Path(name)
        if options.here:
            inside = Path(sys.executable)
        else:
            found = [options.wheel] if options.wheel else sorted((ROOT / "dist").glob("*.whl"))
            if len(found) != 1:
                parser.error(f"dist has {len(found)} wheels, name one (make wheel writes it)")
            print(f"{found[0].name}: {found[0].stat().st_size / 1e6:.2f} MB", flush=True)
            inside = fresh(folder / "venv", options.python, options.torch, found[0].resolve())
        tree = copy(folder / "tree")
        for _ in range(2):  # the second time from warm caches
            run(inside, "-c", IMPORTS.format(root=str(ROOT)), cwd=folder)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        pytest = (inside, "-m", "pytest", "--quick", "-q", "--numprocesses", options.processes)
        run(*pytest, "-p", "no:cacheprovider", "-k", DESELECTED, cwd=tree)


if __name__ == "__main__":
    main()
