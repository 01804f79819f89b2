"""The patched interpreter that all Triton rows run in computes what Triton's own does, bit for bit."""

import io
import os
import pathlib
import subprocess
import sys

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

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
        # the second time a tape is played, if nothing but numbers differs
        for dtype, seed in ((torch.float32, 0), (torch.float64, 0), (torch.float32, 1)):
            torch.manual_seed(seed)
            spec_inputs = [x.requires_grad_() for x in spec.make(dtype, "cpu", **spec.cases["plain"])]
            outputs = spec.op(*spec_inputs)
            gradients = torch.autograd.grad(outputs, spec_inputs, [x.cos() for x in outputs], allow_unused=True)
            results[name, str(dtype), seed] = [x.detach() for x in (*outputs, *gradients) if x is not None]
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


@triton.jit
def _branches(x, y, n, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    value = tl.load(x + at, mask=inside, other=0.0)
    if tl.sum(value, 0) > 0:  # noqa: SIM108 - a branch
        value = value * 2.0
    else:
        value = value - tl.max(value, 0)
    for _ in range(program % 3):
        tl.store(y + at, value, mask=inside)
        value = value + tl.load(y + at, mask=inside, other=0.0)
    tl.store(y + at, value, mask=inside)


def _expected(x):
    rows = [row * 2 if row.sum() > 0 else row - row.max() for row in x.split(8)]
    return torch.cat([row * 2 ** (program % 3) for program, row in enumerate(rows)])


def test_branches_on_numbers(monkeypatch):
    """A program takes the branches of its own numbers, whichever others took; known ones are played."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    first = signs.repeat_interleave(8) * (1 + torch.arange(72) % 8)

    def check(x):
        y = torch.full_like(x, torch.nan).to(device)
        _branches[(len(x) // 8,)](x.to(device), y, len(x), BLOCK=8)
        assert torch.equal(y.cpu(), _expected(x))

    for x in (first, first[24:48], -first):
        check(x)
    if device == "cpu":
        monkeypatch.setattr("quick_interpreter.Recording", None)
    check(torch.cat([-3 * first[:24], 5 * first[:24]]))


def test_what_a_gpu_would_not_do_is_refused():
    x = torch.zeros(8)
    with pytest.raises(TypeError, match="a GPU rounds to float32"):
        _branches[(1,)](x, x, 8.5, BLOCK=8)
    with pytest.raises(ValueError, match="all but the first axis end at 65535"):
        _branches[(1, 65_536)](x, x, 8, BLOCK=8)
