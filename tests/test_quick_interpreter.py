"""The patched interpreter that all Triton rows run in computes what Triton's own does, bit for bit."""

import io
import os
import pathlib
import subprocess
import sys

import torch

SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "patched":
    import quick_interpreter
    quick_interpreter.install()
import hvae_kernels as hk
from opspecs import OPSPECS

results = {}
with hk.use_impl("triton"):
    for name in ("gaussian_leapfrog", "masked_linear", "radial_flow", "gaussian_mixture_log_prob", "iwae_bound"):
        spec = next(spec for spec in OPSPECS if spec.name == name)
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(0)
            spec_inputs = [x.requires_grad_() for x in spec.make(dtype, "cpu", **spec.cases["plain"])]
            outputs = spec.op(*spec_inputs)
            gradients = torch.autograd.grad(outputs, spec_inputs, [x.cos() for x in outputs], allow_unused=True)
            results[name, str(dtype)] = [x.detach() for x in (*outputs, *gradients) if x is not None]
torch.save(results, sys.stdout.buffer)
"""


def results_of(kind):
    command = [sys.executable, "-c", SCRIPT, str(pathlib.Path(__file__).parent), kind]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=300)
    return torch.load(io.BytesIO(done.stdout))


def test_it_has_the_bits_of_the_stock_one():
    patched, stock = results_of("patched"), results_of("stock")
    assert patched.keys() == stock.keys()
    for name, values in patched.items():
        assert len(values) == len(stock[name]) > 1
        assert all(map(torch.equal, values, stock[name])), name
