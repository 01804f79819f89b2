"""``--cpu baseline|avx2|avx512``: one instruction set for our kernels and for what rivals are made of.

A ratio taken below the machine's best set is fair only where rivals are held to that set too: torch's own kernels, the
matrix products of MKL and oneDNN, and the code that Inductor generates. All of them read variables of the environment,
some while torch is imported; so a script calls :func:`hold` before it imports torch, and processes that it starts
inherit the choice. Without ``--cpu`` everything uses what it finds on the machine.

MKL takes the advice on Intel's processors alone.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence

#: By set what torch, MKL, oneDNN and the compiler of Inductor's code are told. Inductor takes its vectors from torch's
#: variable, but what it then leaves scalar its default ``-march=native`` would vectorise after all.
_VALUES = {
    "baseline": ("default", "SSE4_2", "SSE41", "x86-64"),
    "avx2": ("avx2", "AVX2", "AVX2", "x86-64-v3"),
    "avx512": ("avx512", "AVX512", "AVX512_CORE", "x86-64-v4"),
}


def variables(name: str) -> dict[str, str]:
    """The environment that holds everything to the set ``name``."""
    aten, mkl, onednn, march = _VALUES[name]
    held = {"HVAE_KERNELS_CPU": name, "ATEN_CPU_CAPABILITY": aten}
    if platform.machine().lower() in ("x86_64", "amd64"):
        held |= {"MKL_ENABLE_INSTRUCTIONS": mkl, "ONEDNN_MAX_CPU_ISA": onednn, "TORCHINDUCTOR_CPP_MARCH": march}
    return held


def _is_held(name: str) -> bool:
    return all(os.environ.get(key) == value for key, value in variables(name).items())


def _add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cpu", choices=_VALUES, help="hold ours and rivals to this instruction set")


def hold(arguments: Sequence[str] | None = None) -> None:
    """Set the environment as ``--cpu`` of the command line says; to be called before torch is imported.

    Raises:
        RuntimeError: torch is imported already.
        SystemExit: ``HVAE_KERNELS_CPU`` holds our kernels alone.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    _add_option(parser)
    name = parser.parse_known_args(arguments)[0].cpu
    if name is not None:
        if "torch" in sys.modules:
            raise RuntimeError("--cpu: torch is imported already and has read its environment")
        os.environ.update(variables(name))
    alone = os.environ.get("HVAE_KERNELS_CPU")
    if alone in _VALUES and not _is_held(alone):
        parser.error(f"HVAE_KERNELS_CPU={alone} holds our kernels alone: --cpu {alone} holds rivals too")


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse with ``--cpu`` among the options; exits, saying why, where that cannot be kept."""
    _add_option(parser)
    options = parser.parse_args(arguments)
    if options.cpu is not None:
        import hvae_kernels as hk

        if not _is_held(options.cpu):
            parser.error(f"--cpu {options.cpu} works on the command line alone: it acts before torch is imported")
        if (why := hk.config()["extension"]) is not None:
            parser.error(f"--cpu {options.cpu}: {why}")
    return options
