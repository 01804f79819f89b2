"""What may import what, and one name for an op wherever it is met."""

import ast
import functools
import graphlib
import importlib
import pathlib
import re
import sys

import mutation_check
import ops
import opspecs
import pytest
import torch

from hvae_kernels import _dispatch, _torch, functional

ROOT = pathlib.Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import benchmarks.ops  # noqa: E402
from benchmarks import registry  # noqa: E402

OPS = ROOT / "hvae_kernels" / "ops"

#: From which kind of module to which others. ``api`` and what it hands calls to are an op's own; other ops meet its
#: package, its reference and what its implementations share.
ALLOWED = {
    "base": {"base"},
    "shared": {"base", "shared", "reference"},
    "reference": {"base", "shared", "reference"},
    "triton": {"base", "shared", "triton", "autograd"},
    "autograd": {"base", "shared", "reference", "autograd", "op"},
    "api": {"base", "shared", "reference", "autograd"},
    "op": {"api", "shared"},
    "functional": {"op"},
    "nn": {"base", "functional", "nn", "op", "shared", "reference"},
    "compat": {"base", "compat", "op", "api"},
    "testing": {"base"},
    "bench": {"base", "functional", "testing"},
    "package": {"base", "functional", "nn", "compat", "package", "bench"},
    "hvae": {"hvae", "package", "functional", "nn", "op"},
}
#: Of an op's modules those that are neither of the four that every op has nor shared by its implementations.
KINDS = {
    "api": "api",
    "reference": "reference",
    "autograd": "autograd",
    "triton": "triton",
    # device functions that know a table of the ops
    "_triton.gates": "triton",
    # parts of one op's way from api to the kernels
    "annealed_leapfrog.trajectory": "autograd",
    "gaussian_leapfrog.dense": "autograd",
    "leapfrog.field": "autograd",
    "leapfrog_update.trajectory": "autograd",
}


def kind_of(module):
    """A key of :data:`ALLOWED`."""
    package, *path = module.split(".")
    if package == "hvae":
        return "hvae"
    if not path or path == ["__main__"]:
        return "package"
    if path[0] == "_triton":
        return KINDS.get(".".join(path), "base")
    if path[0] == "ops":
        return "op" if len(path) < 3 else KINDS.get(".".join(path[1:]), KINDS.get(path[2], "shared"))
    return path[0] if path[0] in ALLOWED else "base"


def files_of_modules():
    """``{module: its file}`` of both packages."""
    files = {}
    for package in (ROOT / "hvae_kernels", ROOT / "python" / "hvae"):
        for path in package.rglob("*.py"):
            parts = path.relative_to(package.parent).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imports(files):
    """``{module: names of the modules that it imports}``, type checkers' imports among them."""
    graph = {}
    for module, path in files.items():
        names = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                inner = (f"{node.module}.{alias.name}" for alias in node.names)
                names |= {name if name in files else node.module for name in inner}
        graph[module] = (names & files.keys()) - {module}
    return graph


FILES = files_of_modules()
GRAPH = imports(FILES)


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_point_one_way(module):
    kind = kind_of(module)
    wrong = {name for name in GRAPH[module] if kind_of(name) not in ALLOWED[kind]}
    if module == "hvae_kernels._dispatch":
        wrong -= {"hvae_kernels"}  # for its version, at a call
    assert not wrong


@pytest.mark.parametrize("module", sorted(name for name in GRAPH if kind_of(name) in ("triton", "api")))
def test_an_op_calls_its_own(module):
    """Of other ops, kernels use device functions of other kernels, and ``api`` nothing."""
    own, kind = ".".join(module.split(".")[:3]), kind_of(module)
    others = [name for name in GRAPH[module] if name.startswith("hvae_kernels.ops") and not name.startswith(own + ".")]
    assert all(
        kind_of(name) in ({"triton", "shared"} if kind == "triton" else {"shared", "autograd"}) for name in others
    )


def test_there_is_no_cycle():
    graph = {module: {name for name in names if name != module.rpartition(".")[0]} for module, names in GRAPH.items()}
    del graph["hvae_kernels._dispatch"]
    list(graphlib.TopologicalSorter(graph).static_order())


# ---- Torch's private parts ----


def private_parts_of_torch(path):
    """The dotted names of what a file uses of torch, or imports from it, that begins with an underscore."""
    tree, names, found = ast.parse(path.read_text(encoding="utf-8")), {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            of_torch = [alias for alias in node.names if alias.name.split(".")[0] == "torch"]
            names |= {alias.asname or "torch": alias.name if alias.asname else "torch" for alias in of_torch}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id in names:
            found.add(".".join((names[node.id], *reversed(parts))))
    return {name for name in found if re.search(r"\._(?!_)", name)}


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_private_parts_of_torch_are_in_one_file(module):
    found = private_parts_of_torch(FILES[module])
    if module == "hvae_kernels._torch":
        shorter = {name.rpartition(".")[0] for name in found}
        assert found - shorter == set(_torch.SEEN)
    else:
        assert found == set()


@pytest.mark.parametrize("symbol", _torch.SEEN)
def test_torch_has_its_private_part(symbol):
    """Red on a torch that has dropped or renamed it."""
    functools.reduce(getattr, symbol.split(".")[1:], torch)


def test_dynamo_knows_its_mark():
    def function():
        pass

    assert vars(_torch.constant_in_graph(function)) == vars(torch._dynamo.assume_constant_result(lambda: None))


# ---- Names ----

FOLDERS = sorted(path.name for path in OPS.iterdir() if (path / "api.py").exists())
#: Functions and files whose folder has another one's name, or that of the family.
FAMILY = {
    "dense_gaussian_leapfrog": "gaussian_leapfrog",
    "constrain_planar": "planar_flow",
    "dreg_surrogate": "iwae",
    "stl_surrogate": "iwae",
    "autoregressive_forward": "autoregressive_network",
    "autoregressive_inverse": "autoregressive_network",
    "autoregressive_spline_inverse": "autoregressive_network",
    "sweep": "autoregressive_network",
}
#: Without kernels of their own.
COMPOSED = {"leapfrog"}
#: Kernels without a row in the benchmarks, and why.
UNTIMED = {
    "autoregressive_forward": "timed in whole flows, benchmarks/autoregressive.py",
    "autoregressive_inverse": "timed in whole flows, benchmarks/autoregressive.py",
    "autoregressive_spline_inverse": "timed in whole flows, benchmarks/accelerate.py",
    "dreg_surrogate": "the kernels of iwae_bound, with another power",
    "gaussian_mixture_responsibilities": "the kernels of gaussian_mixture_log_prob, with another output",
    "stl_surrogate": "the kernels of iwae_bound, with another power",
}


def folder_of(name):
    """The op folder that a function or kernel is in."""
    return FAMILY.get(name) or max((f for f in FOLDERS if name.startswith(f)), key=len, default=None)


@pytest.mark.parametrize("name", sorted({*_dispatch.OPS, *(n for n in functional.__all__ if n[0].islower())}))
def test_functions_and_kernels_are_in_the_folder_of_their_name(name):
    assert folder_of(name) in FOLDERS


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_its_kernels_and_its_tests_have_one_name(folder):
    files = ["README.md", "__init__.py", "api.py", "reference.py"]
    paths = [OPS / folder / file for file in files] + [ROOT / "tests" / f"test_{folder}.py"]
    if folder not in COMPOSED:
        paths += [ROOT / "csrc" / "cpu" / f"{folder}.cpp"]
        if folder not in ("masked_linear",):  # its kernels are those of all products
            paths += [ROOT / "csrc" / "kernels" / f"{folder}.h"]
    assert [str(path) for path in paths if not path.is_file()] == []


def test_every_kernel_file_has_its_folder():
    shared = {"rows", "tile", "common", "elementary", "sets", "weight_grad"}
    for path in (*(ROOT / "csrc").glob("cpu/*"), *(ROOT / "csrc").glob("kernels/*")):
        assert path.stem in shared or folder_of(path.stem) in FOLDERS, path


#: All that is registered; rmsprop_step_, which only the studies import, works in place and has tests of its own.
KERNELS = {op.name for op in _dispatch.OPS.values() if set(op.implementations) - {"reference"}} - {"rmsprop_step_"}


def owner_of(path):
    """The op folder that a file belongs to; None of one that belongs to several ops or to none."""
    top, *inner = path.split("/")
    if top == "csrc":
        return folder_of(pathlib.Path(path).stem)
    return inner[1] if top == "hvae_kernels" and inner[0] == "ops" else None


def test_every_op_folder_has_its_file_of_specs_and_mutations():
    assert list(ops.NAMES) == FOLDERS


def test_every_file_of_benchmarks_has_its_folder():
    assert set(benchmarks.ops.NAMES) <= set(FOLDERS)
    assert set(registry.FIRST) <= set(benchmarks.ops.NAMES)


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_op_has_its_rows_in_the_files_of_its_name(folder):
    own = importlib.import_module(f"ops.{folder}")
    names = [spec.name for spec in own.SPECS]
    if folder in benchmarks.ops.NAMES:
        names += [row.name for row in importlib.import_module(f"benchmarks.ops.{folder}").ROWS]
    assert {folder_of(name) for name in names} <= {folder}
    assert own.MUTATIONS
    assert set(own.MUTATIONS) == {row for row in mutation_check.MUTATIONS if owner_of(row.path) == folder}


def test_every_kernel_has_one_spec_and_one_row_of_benchmarks():
    assert sorted(spec.name for spec in opspecs.OPSPECS) == sorted(KERNELS)
    rows = [row.name for row in registry.ROWS]
    directions = {f"{name}_inverse" for name in rows} & set(rows)
    assert sorted(set(rows) - directions) == sorted(KERNELS - UNTIMED.keys())
    assert len(rows) == len(set(rows))
    assert UNTIMED.keys() <= KERNELS
