"""Import, installation and dispatch: what a stranger meets first."""

import doctest
import importlib
import os
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest
import torch

import hvae_kernels as hk
from hvae_kernels import _dispatch, _extension

ONE = torch.ones(2)
ARGUMENTS = (ONE, ONE, ONE, ONE, ONE, ONE)


def python(code, **environment):
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "HVAE_KERNELS_IMPL")
    }
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, timeout=120)


def test_doctests():
    """Every public docstring's "Equivalent to:" runs."""
    attempted = 0
    adapters = tuple(f".compat.{peer}" for peer in hk.compat.PEERS)  # these import their libraries
    for module in pkgutil.walk_packages(hk.__path__, "hvae_kernels."):
        if module.name.endswith(("triton", "_C", "__main__", *adapters)) or "._triton" in module.name:
            continue
        result = doctest.testmod(importlib.import_module(module.name))
        assert result.failed == 0, module.name
        attempted += result.attempted
    assert attempted > 10


def test_public_names():
    assert set(hk.__all__) <= set(dir(hk))
    assert all(callable(getattr(hk.functional, name)) for name in hk.functional.__all__)
    for name in hk.functional.__all__:
        assert "Equivalent to:" in getattr(hk.functional, name).__doc__


def test_import_touches_no_driver_and_no_triton():
    code = """
import sys, torch
before = set(sys.modules)
import hvae_kernels
assert not torch.cuda.is_initialized()
new = {name.split('.')[0] for name in set(sys.modules) - before}
assert new == {'hvae_kernels'}, new
assert 'hvae_kernels._C' not in sys.modules
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_show_config_names_every_implementation():
    text = _dispatch.config()
    for op in _dispatch.OPS:
        assert f"{op} on cpu: " in text
    n_devices = 1 + torch.cuda.is_available()
    assert text.count("not cuda: not written for this op") == len(_dispatch.OPS) * n_devices
    result = python("import runpy; runpy.run_module('hvae_kernels', run_name='__main__')")
    assert "TRITON_INTERPRET=1 was not set" in result.stdout
    assert result.returncode == 0, result.stderr


def test_extension_is_loaded_here():
    """The suite proves the C++ kernels: without them it would pass on nothing."""
    assert _extension.why_absent() is None


def test_works_without_the_extension():
    code = """
import sys
sys.modules['hvae_kernels._C'] = None  # what an install with HVAE_KERNELS_SKIP_BUILD=1 looks like to import
import torch, hvae_kernels as hk
one = torch.ones(2, requires_grad=True)
hk.functional.gaussian_leapfrog(one, one, one, one, one, one)[0].sum().backward()
hk.show_config()
try:
    with hk.use_impl('cpp'):
        hk.functional.gaussian_leapfrog(one, one, one, one, one, one)
except RuntimeError as error:
    print(error)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "compiled extension: the extension was not built" in result.stdout
    assert "gaussian_leapfrog on cpu: reference" in result.stdout
    assert (
        "gaussian_leapfrog: implementation 'cpp' was asked for but cannot be used: the extension was not"
        in result.stdout
    )


def test_explicit_choice_never_falls_back():
    with hk.use_impl("cuda"), pytest.raises(RuntimeError, match="'cuda' was asked for but cannot be used: not written"):
        hk.functional.gaussian_leapfrog(*ARGUMENTS)
    half = [x.bfloat16() for x in ARGUMENTS]
    with hk.use_impl("cpp"), pytest.raises(RuntimeError, match="no bfloat16 kernel"):
        hk.functional.gaussian_leapfrog(*half)
    results = hk.functional.gaussian_leapfrog(*half)  # auto falls back to the reference
    assert all(result.dtype is torch.bfloat16 for result in results)


def test_choices_nest_and_are_checked():
    with hk.use_impl("reference"):
        with hk.use_impl("cpp"):
            assert _dispatch.resolve("gaussian_leapfrog", ONE) == "cpp"
        assert _dispatch.resolve("gaussian_leapfrog", ONE) == "reference"
    assert _dispatch.resolve("gaussian_leapfrog", ONE) == "cpp"
    with (
        pytest.raises(ValueError, match=r"must be one of auto, cuda, triton, cpp, reference, got 'fast'"),
        hk.use_impl("fast"),
    ):
        pass


def test_environment_variable():
    code = """
import torch, hvae_kernels
print(hvae_kernels._dispatch.resolve('gaussian_leapfrog', torch.ones(1)))
"""
    assert python(code, HVAE_KERNELS_IMPL="reference").stdout.strip() == "reference"
    result = python(code, HVAE_KERNELS_IMPL="fast")
    assert "HVAE_KERNELS_IMPL: implementation must be one of" in result.stderr


def test_choice_reaches_compiled_functions():
    """A function compiled under one choice is compiled again under another."""
    torch._dynamo.reset()
    seen = []

    def backend(graph, _):
        seen.append(any("call" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(lambda *x: hk.functional.gaussian_leapfrog(*x), backend=backend, fullgraph=True)
    for implementation in ("cpp", "reference", "cpp"):
        with hk.use_impl(implementation):
            compiled(*ARGUMENTS)
    assert seen == [True, False]


def test_setup_explains_a_missing_torch_and_compiler(tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.abspath(hk.__file__)))
    block = tmp_path / "torch.py"
    block.write_text("raise ImportError('no torch')")
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(tmp_path / "out"),
        "--build-temp",
        str(tmp_path),
    ]
    run = lambda **env: subprocess.run(  # noqa: E731
        command, cwd=root, env={**os.environ, **env}, capture_output=True, text=True, timeout=120
    )
    missing = run(PYTHONPATH=str(tmp_path))
    assert missing.returncode != 0
    assert "building needs torch >= 2.10 in this environment" in missing.stderr
    missing = run(CXX="no-such-compiler")
    assert missing.returncode != 0
    assert "no C++ compiler ('no-such-compiler' not found)" in missing.stderr
    skipped = run(HVAE_KERNELS_SKIP_BUILD="1")
    assert skipped.returncode == 0, skipped.stderr


def test_readmes_links_lead_somewhere():
    root = pathlib.Path(__file__).parents[1]
    links = re.findall(r"\]\(([\w./-]+)\)", (root / "README.md").read_text())
    assert links
    assert [link for link in links if not (root / link).exists()] == []
