"""Import, installation and dispatch: what a stranger meets first."""

import ast
import doctest
import importlib
import importlib.resources
import inspect
import itertools
import os
import pathlib
import pkgutil
import platform
import re
import subprocess
import sys
import typing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import hvae_kernels as hk
from hvae_kernels import _dispatch, _extension, testing

ONE = torch.ones(2)
ARGUMENTS = (ONE, ONE, ONE, ONE, ONE, ONE)


def python(code, **environment):
    ours = ("TRITON_INTERPRET", "HVAE_KERNELS_IMPL", "HVAE_KERNELS_CPU")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**inherited, **environment}, capture_output=True, text=True, timeout=120)


def test_doctests():
    """Every public docstring's "Equivalent to:" runs."""
    attempted = 0
    adapters = tuple(f".compat.{peer}" for peer in hk.compat.PEERS)  # these import their libraries
    for module in pkgutil.walk_packages(hk.__path__, "hvae_kernels."):
        if module.name.endswith(("_C", "__main__", *adapters)) or "triton" in module.name:
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


def test_types_of_the_public_api_are_complete():
    """What ``make lint`` asks mypy, where that is not installed."""
    assert importlib.resources.files(hk).joinpath("py.typed").is_file()
    functions = {name: getattr(hk.functional, name) for name in hk.functional.__all__}
    for name in hk.nn.__all__:
        kind = getattr(hk.nn, name)
        methods = {method: getattr(kind, method, None) for method in ("__init__", "forward", "inverse")}
        functions |= {f"{name}.{method}": function for method, function in methods.items() if function is not None}
    assert {"leapfrog", "RadialFlow.__init__", "MADE.forward", "FlowStack.inverse"} <= functions.keys()
    for name, function in functions.items():
        wanted = {*inspect.signature(function).parameters, *(() if isinstance(function, type) else ("return",))}
        # of a class its constructor's: Python 3.10 takes no class whose dataclass has a KW_ONLY
        hints = typing.get_type_hints(function.__init__ if isinstance(function, type) else function)
        assert wanted - {"self"} <= hints.keys(), name


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


def test_config_and_show_config_name_every_implementation(capsys):
    found = hk.config()
    assert found["versions"]["torch"] == torch.__version__
    assert found["extension"] is None
    assert found["implementation"] == "auto"
    for devices in found["ops"].values():
        assert list(devices) == ["cpu"] + ["cuda"] * torch.cuda.is_available()
        for choice in devices.values():
            assert {choice["chosen"], *choice["others"]} == set(_dispatch.IMPLEMENTATIONS)
    here = found["ops"]["gaussian_leapfrog"]["cpu"]
    assert here["chosen"] == "cpp"
    assert here["others"]["reference"] == "available: `with use_impl('reference'):` selects it"
    hk.show_config()
    text = capsys.readouterr().out
    assert set(_dispatch.OPS) <= set(re.findall(r"\w+", text))
    same = [name for name, devices in found["ops"].items() if devices["cpu"] == here]
    listed = text.split("\ncpp on cpu:\n")[1].split("\n    not ")[0]
    assert re.findall(r"\w+", listed) == same
    assert f"CPU kernels: {found['cpu']['chosen']}" in text
    with hk.use_impl("cuda"):
        refused = hk.config()
    assert refused["implementation"] == "cuda"
    assert refused["ops"]["gaussian_leapfrog"]["cpu"]["chosen"] is None
    result = python("import runpy; runpy.run_module('hvae_kernels', run_name='__main__')")
    assert "TRITON_INTERPRET=1 was not set" in result.stdout
    assert result.returncode == 0, result.stderr


# ---- Instruction sets ----

SETS = _extension.cpu_sets()
HERE = [name for name, reason in SETS.items() if reason is None]
AWAY = [name for name, reason in SETS.items() if reason is not None]


def test_names_of_sets_are_those_of_the_extension():
    assert ("auto", *SETS) == _extension.CHOICES
    assert "baseline" in HERE


@pytest.mark.parametrize("name", HERE)
def test_a_set_is_used_and_put_back(name):
    before = _extension.cpu_set()
    with hk.use_cpu(name):
        found = hk.config()["cpu"]
        assert found["chosen"] == _extension.cpu_set() == name
        assert set(found["others"]) == set(SETS) - {name}
        for other in set(HERE) - {name}:
            assert found["others"][other] == f"available: `with use_cpu({other!r}):` selects it"
        with hk.use_cpu("auto"):
            assert _extension.cpu_set() == HERE[-1]
        assert _extension.cpu_set() == name
    with pytest.raises(KeyError), hk.use_cpu(name):
        raise KeyError
    assert _extension.cpu_set() == before


@pytest.mark.parametrize("name", HERE[1:])
def test_the_set_reaches_the_kernels(name):
    """The baseline has no fused multiply-add: of many products and sums some are rounded otherwise."""
    inputs = torch.randn(3, 64, 97).unbind()
    with hk.use_cpu("baseline"):
        baseline, _ = hk.functional.affine_autoregressive(*inputs)
    with hk.use_cpu(name):
        result, _ = hk.functional.affine_autoregressive(*inputs)
    assert not torch.equal(result, baseline)
    torch.testing.assert_close(result, baseline)


#: A context of the whole process, two values to choose, and how to read the one in force.
BLOCKS = {
    "use_impl": (hk.use_impl, ("reference", "cpp"), _dispatch.requested),
    "use_cpu": (hk.use_cpu, (HERE[0], HERE[-1]), _extension.cpu_set),
    "threads": (testing.threads, (1, 2), torch.get_num_threads),
}


@pytest.mark.parametrize("leaving", [*itertools.permutations(range(3))])
@pytest.mark.parametrize("name", BLOCKS)
def test_overlapping_blocks_end_at_the_initial_choice(name, leaving):
    """Blocks of three threads that end in any order: the last one of those still open decides."""
    block, (first, second), read = BLOCKS[name]
    before, chosen = read(), [second, first, second]
    blocks = [block(choice) for choice in chosen]
    for choice, context in zip(chosen, blocks, strict=True):
        context.__enter__()
        assert read() == choice
    still = [0, 1, 2]
    for place in leaving:
        blocks[place].__exit__(None, None, None)
        still.remove(place)
        assert read() == (chosen[still[-1]] if still else before)


def test_overlapping_blocks_of_poisoned_memory():
    first, second = testing.poisoned_memory(), testing.poisoned_memory()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.empty(5).isnan().all()
    second.__exit__(None, None, None)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_refused_block_leaves_others_alone():
    before = _extension.cpu_set()
    with hk.use_cpu(HERE[0]):
        for block in (hk.use_cpu, hk.use_impl):
            with pytest.raises(ValueError, match="got 'sse'"):
                block("sse").__enter__()
        with pytest.raises(RuntimeError), testing.threads(0):
            pass
        assert _extension.cpu_set() == HERE[0]
    assert (_extension.cpu_set(), _dispatch.requested()) == (before, "auto")


def test_many_threads_enter_and_leave_blocks():
    """Whatever order they happen upon, each ends its own block; the backward pass sees the choice from its threads."""

    def work(seed):
        for _ in range(200):
            with hk.use_impl(("reference", "cpp")[seed % 2]), hk.use_cpu(HERE[seed % len(HERE)]):
                z = torch.randn(2, 3, requires_grad=True)
                hk.functional.radial_flow(z, z[:1], z[0, :1].exp(), z[0, :1].exp())[0].sum().backward()

    before = _dispatch.requested(), _extension.cpu_set()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert (_dispatch.requested(), _extension.cpu_set()) == before


def test_use_impl_inside_a_compiled_function():
    def function(x):
        with hk.use_impl("reference"):
            inside = _dispatch.requested()
        return x + (inside == "reference") + 2 * (_dispatch.requested() == "reference")

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    for _ in range(2):
        assert compiled(torch.zeros(())) == 1
        with hk.use_impl("reference"):
            assert compiled(torch.zeros(())) == 3


def test_unknown_sets_are_refused():
    with pytest.raises(ValueError, match=r"use_cpu: .* must be one of auto, baseline, avx2, avx512, got 'sse'"):
        hk.use_cpu("sse")  # a statement that forgets its `with` is told of a typo, too
    for name in ("sse", "auto", 2):  # "auto" is Python's word
        with pytest.raises(ValueError, match=rf"must be one of baseline, avx2, avx512, got {name!r}"):
            importlib.import_module("hvae_kernels._C").use_cpu_set(name)


def test_sets_that_the_machine_lacks_are_refused(monkeypatch):
    before = _extension.cpu_set()
    for name in AWAY:
        with pytest.raises(ValueError, match=f"'{name}' cannot be used: {SETS[name]}"):
            importlib.import_module("hvae_kernels._C").use_cpu_set(name)
    monkeypatch.setattr(_extension, "cpu_sets", lambda: {"baseline": None, "avx2": "not on this CPU"})
    with pytest.raises(RuntimeError, match=r"use_cpu: .* 'avx2' .* cannot be used: not on this CPU; .* here: baseline"):
        hk.use_cpu("avx2").__enter__()
    assert _extension.cpu_set() == before


RUN = """
import torch, hvae_kernels as hk
one = torch.ones(2)
with hk.use_impl("reference"):
    hk.functional.gaussian_leapfrog(one, one, one, one, one, one)
"""


@pytest.mark.parametrize("name", ["auto", *HERE])
def test_environment_variable_sets_the_instruction_set(name):
    code = RUN + "hk.functional.gaussian_leapfrog(one, one, one, one, one, one); print(hk.config()['cpu'])"
    result = python(code, HVAE_KERNELS_CPU=name)
    assert result.returncode == 0, result.stderr
    found = ast.literal_eval(result.stdout)
    assert (found["requested"], found["chosen"]) == (name, HERE[-1] if name == "auto" else name)


def test_wrong_instruction_set_is_refused_at_import():
    result = python("import hvae_kernels", HVAE_KERNELS_CPU="AVX2")
    assert result.returncode != 0
    assert result.stderr.endswith(
        "ValueError: HVAE_KERNELS_CPU: instruction set must be one of auto, baseline, avx2, avx512, got 'AVX2'\n"
    )


#: Stands in for a machine without AVX-512, whatever machine this is.
LACKING = """
from hvae_kernels import _extension
_extension.cpu_sets = lambda: {"baseline": None, "avx2": None, "avx512": "not on this CPU"}
"""


def test_instruction_set_that_the_machine_lacks_is_refused_at_the_call():
    """Never replaced by another or by the reference; what needs no C++ kernel still runs, ``show_config`` says why."""
    code = f"""
{LACKING}{RUN}
def refused(implementation):
    try:
        with hk.use_impl(implementation):
            hk.functional.gaussian_leapfrog(one, one, one, one, one, one)
    except RuntimeError as error:
        return str(error)
try:
    hk.use_cpu("baseline").__enter__()
except RuntimeError as error:
    refusal = str(error)
assert refused("auto") == refused("cpp") == refused("auto") == refusal
hk.show_config()
print(refusal)
print(hk.config()["cpu"])
"""
    result = python(code, HVAE_KERNELS_CPU="avx512")
    assert result.returncode == 0, result.stderr
    *shown, refusal, found = result.stdout.splitlines()
    assert refusal == (
        "HVAE_KERNELS_CPU: instruction set 'avx512' was asked for but cannot be used: not on this CPU; "
        "usable here: baseline, avx2"
    )
    assert shown[1] == f"CPU kernels: none ({refusal})"
    assert "none on cpu:" in shown
    assert ast.literal_eval(found)["chosen"] is None
    assert ast.literal_eval(found)["others"]["avx512"] == "not on this CPU"


def test_show_config_says_why_not_a_better_set(monkeypatch, capsys):
    def first_lines(machine, **others):
        found = {"requested": "auto", "chosen": "baseline", "others": others}
        monkeypatch.setattr(_dispatch, "_cpu", lambda: found)
        monkeypatch.setattr("platform.machine", lambda: machine)
        hk.show_config()
        return capsys.readouterr().out.splitlines()[1]

    absent = {"avx2": "not on this CPU", "avx512": "not on this CPU"}
    printed = first_lines("x86_64", **absent)
    assert printed == "CPU kernels: baseline (avx2: not on this CPU; avx512: not on this CPU)"
    assert first_lines("aarch64", **absent) == "CPU kernels: baseline (NEON)"


# ---- Installation and choices ----


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
assert hk.config()['cpu'] == {'requested': 'baseline', 'chosen': None, 'others': {}}
try:
    with hk.use_impl('cpp'):
        hk.functional.gaussian_leapfrog(one, one, one, one, one, one)
except RuntimeError as error:
    print(error)
try:
    hk.use_cpu('baseline').__enter__()
except RuntimeError as error:
    print(error)
"""
    result = python(code, HVAE_KERNELS_CPU="baseline")
    assert result.returncode == 0, result.stderr
    assert "CPU kernels: none (the extension was not built" in result.stdout
    assert "use_cpu: instruction set 'baseline' was asked for, but the extension was not built" in result.stdout
    assert "reference on cpu:" in result.stdout
    assert (
        "gaussian_leapfrog: implementation 'cpp' was asked for but cannot be used: the extension was not"
        in result.stdout
    )


def test_explicit_choice_never_falls_back():
    for name in _dispatch.RESERVED:  # names without an implementation, on whatever device
        with (
            hk.use_impl(name),
            pytest.raises(RuntimeError, match=f"{name!r} was asked for but cannot be used: no op has"),
        ):
            hk.functional.gaussian_leapfrog(*ARGUMENTS)
    half = [x.bfloat16() for x in ARGUMENTS]
    with hk.use_impl("cpp"), pytest.raises(RuntimeError, match="no bfloat16 kernel"):
        hk.functional.gaussian_leapfrog(*half)
    results = hk.functional.gaussian_leapfrog(*half)  # auto falls back to the reference
    assert all(result.dtype is torch.bfloat16 for result in results)


def test_threads_choose_for_their_own_calls():
    """Each of several at once, while blocks of others come and go."""
    inputs = torch.randn(3, 64, 33).unbind()

    def calls(implementation):
        with hk.use_impl("reference" if implementation == "cpp" else "cpp"):
            return [hk.functional.affine_autoregressive(*inputs, implementation=implementation) for _ in range(50)]

    expected = {name: calls(name)[0] for name in ("cpp", "reference")}
    assert not torch.equal(expected["cpp"][0], expected["reference"][0])
    names = ["cpp", "reference"] * 4
    with ThreadPoolExecutor(4) as pool:
        for name, results in zip(names, pool.map(calls, names), strict=True):
            assert all(all(map(torch.equal, result, expected[name])) for result in results)


def test_choices_nest_and_are_checked():
    with hk.use_impl("reference"):
        with hk.use_impl("cpp"):
            assert _dispatch.resolve("gaussian_leapfrog", ONE) == "cpp"
        assert _dispatch.resolve("gaussian_leapfrog", ONE) == "reference"
    assert _dispatch.resolve("gaussian_leapfrog", ONE) == "cpp"
    with pytest.raises(ValueError, match=r"must be one of auto, triton, cpp, reference, got 'fast'"):
        hk.use_impl("fast")


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


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86 has several instruction sets")
def test_setup_tells_what_an_old_compiler_leaves_out():
    root = os.path.dirname(os.path.dirname(os.path.abspath(hk.__file__)))
    compiler = os.environ.get("CXX", "c++")
    for old, told in (("-U__GNUC__ -D__GNUC__=11 -U__clang_major__ -D__clang_major__=15", True), ("", False)):
        command, environment = [sys.executable, "setup.py", "--name"], {**os.environ, "CXX": f"{compiler} {old}"}
        result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert ("is too old for the AVX2 and AVX-512 forms of the CPU kernels" in result.stderr) is told


def test_readmes_links_lead_somewhere():
    root = pathlib.Path(__file__).parents[1]
    links = re.findall(r"\]\(([\w./-]+)\)", (root / "README.md").read_text())
    assert links
    assert [link for link in links if not (root / link).exists()] == []


def test_documents_name_every_public_function_and_its_maths():
    root = pathlib.Path(__file__).parents[1]
    text = (root / "docs" / "ops.md").read_text()
    functions = {name: getattr(hk.functional, name) for name in hk.functional.__all__}
    functions = {name: function for name, function in functions.items() if inspect.isfunction(function)}
    assert [name for name in functions if not re.search(rf"^\| .*`{name}\(.*\|", text, re.MULTILINE)] == []
    folders = {function.__module__.split(".")[2] for function in functions.values()}
    text = (root / "README.md").read_text()
    assert [folder for folder in sorted(folders) if f"](hvae_kernels/ops/{folder}/README.md)" not in text] == []
    assert text.count("\n") <= 130


class Weighted(torch.autograd.Function):
    """``x iwae_bound(log_weights)``, somebody's, whose backward pass calls the op with what it saved."""

    @staticmethod
    def forward(x, log_weights):
        return x * hk.functional.iwae_bound(log_weights)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        return grad * hk.functional.iwae_bound(ctx.saved_tensors[1]), None


def test_pull_back_of_a_foreign_function():
    x, log_weights = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(3,), (4, 3)])
    _, pull_back = torch.func.vjp(lambda x: Weighted.apply(x, log_weights), x)
    (gradient,) = pull_back(torch.ones(3, dtype=torch.float64))
    (result,) = torch.autograd.grad(gradient.sum(), log_weights)
    torch.testing.assert_close(result, log_weights.softmax(0))
