"""Builds the one extension: CPU kernels through torch's ABI-stable API, so one binary serves many torch and Pythons.

``HVAE_KERNELS_SKIP_BUILD=1`` installs without a compiler: the reference and the Triton kernels remain.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

MINIMUM_TORCH = "2.10"
TARGET_VERSION = "0x020a000000000000"  # torch 2.10 in the form of TORCH_TARGET_VERSION


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
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(
            f"hvae_kernels: no C++ compiler ({compiler!r} not found): install g++ or set CXX, or set "
            "HVAE_KERNELS_SKIP_BUILD=1 to install without the C++ kernels"
        )
    # No -march=native and no -ffast-math: the kernels choose their instruction set at run time and respect NaN.
    flags = ["-O3", "-std=c++20", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
    module = CppExtension(
        "hvae_kernels._C",
        ["csrc/registration.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
        py_limited_api=True,
        extra_compile_args={"cxx": [*flags, f"-DTORCH_TARGET_VERSION={TARGET_VERSION}"]},
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**extension())
