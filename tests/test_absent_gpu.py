"""Every Triton kernel compiles for a Hopper GPU, which the interpreter cannot show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from opspecs import OPSPECS

pytest.importorskip("triton")
TOOL = Path(__file__).with_name("absent_gpu.py")


def run(cache, *command):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, cwd=TOOL.parent)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


WRITTEN = sorted({spec.name for spec in OPSPECS if "triton" in spec.implementations})
#: By backward passes that record nothing.
SOLVED = {"autoregressive_inverse", "autoregressive_spline_inverse"}


@pytest.mark.parametrize("part", range(4))
def test_every_kernel_compiles(part, tmp_path):
    """Forward, backward and second order, in all dtypes; what float32 kernels cannot keep in registers is little."""
    ops = WRITTEN[part::4]
    lines = run(tmp_path, TOOL, "--cases", "plain", "--spilled", "32", "--ops", *ops).splitlines()
    assert {line.split()[0] for line in lines} == set(ops)
    assert all(line.split()[4].isdigit() for line in lines)
    assert {line.split()[0] for line in lines if "_solve_kernel" in line} >= SOLVED.intersection(ops)


@pytest.mark.parametrize("part", range(2))
def test_kernels_compile_for_sizes_of_one(part, tmp_path):
    """Triton makes Python's numbers of arguments that are 1, which have none of a tensor's methods."""
    ops = WRITTEN[part::2]
    lines = run(tmp_path, TOOL, "--cases", "one_element", "--dtypes", "float32", "--ops", *ops).splitlines()
    assert {line.split()[0] for line in lines} == set(ops)


def test_large_masked_products_use_tensor_cores_asynchronously(tmp_path):
    """In bfloat16; copies run ahead of the products, and nothing is spilled."""
    code = """
import torch, absent_gpu, hvae_kernels as hk
kernels = absent_gpu.install(90)
x = torch.zeros(2048, 1024, dtype=torch.bfloat16, requires_grad=True)
with hk.use_impl("triton"):
    y = hk.functional.masked_linear(x, x[:1024].detach(), None, torch.arange(1024), torch.arange(1024))
    torch.autograd.grad(y, x, torch.zeros_like(y))
assert len(kernels) == 2
for kernel in kernels:
    found = kernel.instructions()
    assert kernel.name == "_product_kernel" and not kernel.spilled, kernel
    assert found["HGMMA"] and found["LDGSTS"] and not found["HMMA"], found
"""
    run(tmp_path, "-c", code)
