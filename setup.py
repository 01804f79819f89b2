"""Builds the one extension: CPU kernels through torch's ABI-stable API, so one binary serves many torch and Pythons.

``HVAE_KERNELS_SKIP_BUILD=1`` installs without a compiler: the reference and the Triton kernels remain.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

MINIMUM_TORCH = "2.10"
TARGET_VERSION = "0x020a000000000000"  # torch 2.10 in the form of TORCH_TARGET_VERSION
# For GCC and clang alike. No -march=native and no -ffast-math: the kernels choose their instruction set at run time and
# respect NaN. GCC fuses products and sums unasked, clang only within an expression. -Wno-pass-failed is clang's: loops
# in double that call the C library cannot be vectorised.
FLAGS = [
    "-O3",
    "-std=c++20",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wno-psabi",
    "-Wno-pass-failed",
]


def lacks_sets(compiler: list[str]) -> bool:
    """Whether it compiles for x86 and cannot make all instruction sets, by the rule of ``csrc/kernels/sets.h``."""
    source = '#include "csrc/kernels/sets.h"\n#if defined(__x86_64__) && !HK_X86_SETS\nlacks_sets\n#endif\n'
    command = [*compiler, "-std=c++20", "-E", "-P", "-x", "c++", "-"]
    return "\nlacks_sets\n" in subprocess.run(command, input=source, capture_output=True, text=True).stdout


def extension() -> dict:
    """The ``setup`` arguments that build the extension, or none of them when the build is skipped."""
    if os.environ.get("HVAE_KERNELS_SKIP_BUILD") == "1" or {"egg_info", "dist_info", "sdist"} & set(sys.argv):
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        sys.exit(
            f"hvae_kernels: building needs torch >= {MINIMUM_TORCH} in this environment: install torch first, then use "
            "`pip install --no-build-isolation .` (HVAE_KERNELS_SKIP_BUILD=1 installs without the C++ kernels)"
        )
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[0]) is None:
        sys.exit(
            f"hvae_kernels: no C++ compiler ({compiler[0]!r} not found): install g++ or set CXX, or set "
            "HVAE_KERNELS_SKIP_BUILD=1 to install without the C++ kernels"
        )
    if lacks_sets(compiler):
        print(
            f"hvae_kernels: {' '.join(compiler)} is too old for the AVX2 and AVX-512 forms of the CPU kernels, which "
            "GCC 12 and clang 16 compile: they will use SSE2 whatever this machine has",
            file=sys.stderr,
        )
    module = CppExtension(
        "hvae_kernels._C",
        ["csrc/registration.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
        py_limited_api=True,
        extra_compile_args={"cxx": [*FLAGS, f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]},
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


if __name__ == "__main__":  # the tests read FLAGS
    setup(**extension())
