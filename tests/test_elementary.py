"""The polynomials of ``csrc/kernels/elementary.h`` against float64 over their whole range, in each instruction set."""

import ctypes
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch

from hvae_kernels import _extension

FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
F = torch.nn.functional


#: In the order of ``SetId`` of ``csrc/kernels/sets.h``, as far as this machine has them.
SETS = [name for name, reason in _extension.cpu_sets().items() if reason is None]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    source = Path(__file__).with_name("elementary.cpp")
    target = tmp_path_factory.mktemp("elementary") / "elementary.so"
    compiler = os.environ.get("CXX", "c++").split()
    subprocess.run([*compiler, *FLAGS, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture(params=SETS)
def library(request, compiled):
    compiled.use_cpu_set(SETS.index(request.param))
    return compiled


def call(library, name, x):
    result = torch.empty_like(x)
    function = getattr(library, f"{name}_{str(x.dtype)[6:].replace('32', '').replace('float64', 'double')}")
    function(ctypes.c_int64(x.numel()), ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(result.data_ptr()))
    return result


def ulp(result, exact):
    """The error in units of the last place of ``exact`` rounded to float32; denormals have the least one's unit."""
    exponent = torch.frexp(exact)[1].clamp(min=-125)
    unit = torch.ldexp(torch.ones_like(exact), exponent - 24)
    return ((result.double() - exact).abs() / unit).max().item()


def between(low, high, n=400_001):
    """Evenly and, in magnitude, logarithmically spaced."""
    even = torch.linspace(low, high, n, dtype=torch.float64)
    small = torch.logspace(-37, math.log10(max(abs(low), abs(high))), n, dtype=torch.float64)
    both = torch.cat([even, small, -small])
    return both[(both >= low) & (both <= high)].float()


#: name: float64 formula, range, ulp
RELATIVE = {
    "exponential": (torch.exp, (-103.9, 88.7), 1.0),
    "exp_nonpositive": (torch.exp, (-103.9, 0.0), 1.0),
    "exp_normal": (torch.exp, (-87.3, 88.3), 1.0),
    "expm1_nonpositive": (torch.expm1, (-40.0, 0.0), 1.0),
    "log1p_unit": (torch.log1p, (0.0, 1.0), 2.0),
    "log1p_nonnegative": (torch.log1p, (0.0, 3e38), 2.0),
    "logarithm": (torch.log, (1e-44, 3e38), 1.0),
    "relu": (torch.relu, (-100.0, 100.0), 0.0),
    "elu": (F.elu, (-100.0, 100.0), 1.0),
    "elu_derivative": (lambda x: torch.where(x > 0, 1.0, x.exp()), (-100.0, 100.0), 1.0),
    "tanh": (torch.tanh, (-40.0, 40.0), 2.5),
    "tanh_derivative": (lambda x: 4 * torch.sigmoid(2 * x) * torch.sigmoid(-2 * x), (-40.0, 40.0), 5.0),
    "softplus": (lambda x: F.softplus(x, threshold=40), (-87.0, 100.0), 3.0),
    "softplus_derivative": (torch.sigmoid, (-87.0, 40.0), 2.5),
    "sigmoid": (torch.sigmoid, (-87.0, 40.0), 2.5),
    "sigmoid_derivative": (lambda x: torch.sigmoid(x) * torch.sigmoid(-x), (-87.0, 87.0), 5.0),
    "silu": (F.silu, (-80.0, 80.0), 3.5),
}
#: name: float64 formula, range, absolute error in units of max(1, |x|)
ABSOLUTE = {
    "error_function": (torch.erf, (-10.0, 10.0), 2e-7),
    "gelu": (F.gelu, (-10.0, 10.0), 2.5e-7),
    "gelu_derivative": (
        lambda x: torch.special.ndtr(x) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi),
        (-10.0, 10.0),
        2.5e-7,
    ),
    "silu_derivative": (
        lambda x: torch.sigmoid(x) * (1 + x * torch.sigmoid(-x)),
        (-80.0, 80.0),
        2.5e-7,
    ),
    "relu_derivative": (lambda x: (x > 0).double(), (-10.0, 10.0), 0.0),
}

#: name: values at minus and plus infinity, None where the function is not defined there
LIMITS = {
    "exponential": (0.0, math.inf),
    "exp_nonpositive": (0.0, None),
    "expm1_nonpositive": (-1.0, None),
    "log1p_nonnegative": (None, math.inf),
    "logarithm": (math.nan, math.inf),
    "elu": (-1.0, math.inf),
    "tanh": (-1.0, 1.0),
    "tanh_derivative": (0.0, 0.0),
    "softplus": (0.0, math.inf),
    "sigmoid": (0.0, 1.0),
    "error_function": (-1.0, 1.0),
}


@pytest.mark.parametrize("name", RELATIVE)
def test_relative_error(library, name):
    formula, (low, high), budget = RELATIVE[name]
    x = between(low, high)
    result = call(library, name, x)
    assert ulp(result, formula(x.double())) <= budget


@pytest.mark.parametrize("name", ABSOLUTE)
def test_absolute_error(library, name):
    formula, (low, high), budget = ABSOLUTE[name]
    x = between(low, high)
    error = (call(library, name, x).double() - formula(x.double())).abs() / x.abs().clamp(min=1).double()
    assert error.max().item() <= budget


@pytest.mark.parametrize("name", [*RELATIVE, *ABSOLUTE])
def test_double(library, name):
    formula, (low, high), _ = {**RELATIVE, **ABSOLUTE}[name]
    x = torch.linspace(max(low, -700.0), min(high, 700.0), 10_001, dtype=torch.float64)
    torch.testing.assert_close(call(library, name, x), formula(x), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(("name", "low", "high"), [(name, *limits) for name, limits in LIMITS.items()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limits(library, name, low, high, dtype):
    """At minus and plus infinity, at NaN, and at zero with its sign where the function is odd."""
    x = torch.tensor([-math.inf, math.inf, math.nan], dtype=dtype)
    result = call(library, name, x)
    assert math.isnan(result[2])
    for got, limit in zip(result, (low, high), strict=False):
        assert limit is None or torch.isclose(got, torch.tensor(limit, dtype=dtype), rtol=2e-7, atol=0, equal_nan=True)
