"""Compiles the Triton kernels for a GPU that need not be there: ``python tests/absent_gpu.py [--ops ...] ...``.

The interpreter proves what kernels compute; it does not prove that they compile. This does, with Triton's own compiler
and assembler, for every kernel that an op launches in its cases of the contract, forward, backward and second order,
and reads from the binaries what they take: registers, bytes that did not fit into them, shared memory. With
``--instructions`` it counts machine instructions that say how fast a kernel can be. Kernels are compiled, not run: the
results of the ops are whatever was in memory.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # before Triton is imported
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402 - needs the environment as it is now, and the path
from opspecs import OPSPECS, OpSpec  # noqa: E402
from test_contract import first_order, leaves, random_like, second_order  # noqa: E402
from triton.backends import nvidia  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.driver import DriverBase  # noqa: E402
from triton.runtime import driver  # noqa: E402

import hvae_kernels as hk  # noqa: E402
from hvae_kernels import _dispatch  # noqa: E402

BIN = Path(nvidia.__file__).parent / "bin"
#: Bytes of shared memory that a program may have, by architecture.
SHARED = {80: 166_912, 90: 232_448}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
#: Tensor cores asynchronously and not, float32 and float64 arithmetic, wide loads, copies past the registers, spills.
INSTRUCTIONS = ("HGMMA", "HMMA", "DMMA", "FFMA", "DFMA", "LDG.E.128", "LDGSTS", "STG.E.128", "LDL", "STL")


@dataclass(frozen=True)
class Kernel:
    """One binary."""

    name: str
    registers: int
    spilled: int
    shared: int
    code: bytes

    def instructions(self) -> Counter[str]:
        """How many of each of ``INSTRUCTIONS`` the binary holds."""
        text = _tool("nvdisasm", self.code)
        return Counter({x: len(re.findall(rf"\b{re.escape(x)}\b", text)) for x in INSTRUCTIONS})


class AbsentGPU(DriverBase):
    """Takes kernels for a GPU and does not launch them."""

    def __init__(self, architecture: int):
        self.architecture, self.utils, self.kernels = architecture, self, []

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Callable:
        raise NotImplementedError

    def launcher_cls(self, source, metadata) -> Callable[..., None]:
        return lambda *_: None

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED[self.architecture]}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", _tool("cuobjdump", binary, "--dump-resource-usage")))
        spilled = int(used["STACK"]) + int(used["LOCAL"])
        self.kernels.append(Kernel(name, int(used["REG"]), spilled, shared, binary))
        return None, None, int(used["REG"]), spilled, 1024


def _tool(name: str, binary: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([BIN / name, *options, file.name], check=True, capture_output=True, text=True).stdout


def install(architecture: int) -> list[Kernel]:
    """From now on ``triton`` serves tensors on the CPU; the list takes the kernels that it compiles."""
    gpu = AbsentGPU(architecture)
    driver.set_active(gpu)
    _dispatch._why_no_triton = lambda device_type: None
    return gpu.kernels


def launch(spec: OpSpec, case: str, dtype: torch.dtype) -> None:
    """Everything that the op launches in this case; a backward pass that records is not that of one that does not."""
    spec = spec.at(spec.cases[case])
    inputs = leaves(spec.make(torch.float32, "cpu", **spec.cases[case]), dtype)
    upstream = random_like(spec.op(*inputs))
    first_order(spec.op, inputs, upstream)
    second_order(spec.op, inputs, upstream, random_like(inputs))


def compile_all(
    ops: list[str], cases: list[str], dtypes: list[str], architecture: int
) -> Iterator[tuple[str, str, torch.dtype, Kernel]]:
    """``(op, case, dtype, kernel)`` of all that these cases compile and no earlier one did."""
    kernels = install(architecture)
    for spec, dtype in itertools.product(OPSPECS, map(DTYPES.__getitem__, dtypes)):
        half = dtype is torch.bfloat16
        written = _dispatch.OPS[spec.name].half_precision if half else spec.implementations
        if spec.name not in ops or "triton" not in written or "triton" not in spec.implementations:
            continue
        for case in [case for case in spec.cases if not cases or case in cases]:
            with hk.use_impl("triton"):
                launch(spec, case, dtype)
            yield from ((spec.name, case, dtype, kernel) for kernel in kernels)
            kernels.clear()


def main(arguments: list[str] | None = None) -> int:
    """Compile and print; the exit status is 1 if a kernel keeps more outside its registers than is allowed."""
    names = [spec.name for spec in OPSPECS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", choices=names, default=names)
    parser.add_argument("--cases", nargs="+", default=[], help="of the contract (by default all)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--architecture", type=int, choices=SHARED, default=90)
    parser.add_argument("--instructions", action="store_true", help="count them, too")
    parser.add_argument("--spilled", type=int, metavar="BYTES", help="red if a float32 kernel spills more")
    options = parser.parse_args(arguments)
    red = False
    for op, case, dtype, kernel in compile_all(options.ops, options.cases, options.dtypes, options.architecture):
        used = f"{kernel.registers:4} registers, {kernel.spilled:4} B spilled, {kernel.shared:6} B shared"
        line = f"{op:34} {case:16} {str(dtype)[6:]:8} {kernel.name:32} {used}"
        if options.instructions:
            line += "  " + ", ".join(f"{name} {n}" for name, n in kernel.instructions().items() if n)
        print(line, flush=True)
        if options.spilled is not None and dtype is torch.float32 and kernel.spilled > options.spilled:
            red = True
            print(f"spills: {line}", file=sys.stderr)
    return int(red)


if __name__ == "__main__":
    sys.exit(main())
