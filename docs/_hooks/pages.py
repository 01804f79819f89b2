"""Pages that stand elsewhere or follow from the code: the ops' maths, the API's names, the contract, CONTRIBUTING."""

from __future__ import annotations

import ast
import csv
import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
OPS = ROOT / "hvae_kernels" / "ops"
CONTRACT = ROOT / "docs" / "contract.csv"
MEASURED = ROOT / "docs" / "measured.md"
RESULTS = re.compile(r"(?<=\]\()\.\./(benchmarks/results/[^)]+)")

#: The checks of tests/test_contract.py by what they are about; all of them, or the build fails.
CHECKS = {
    "error budgets": ("forward_budget", "backward_budget", "double_backward_budget"),
    "extremes": ("extremes", "infinite_arguments"),
    "finite differences": ("gradcheck", "gradgradcheck", "third_order"),
    "forward mode": (
        "forward_mode",
        "forward_mode_of_second_derivatives",
        "forward_mode_of_forward_mode",
        "forward_mode_of_forward_mode_of_what_was_pulled_back",
    ),
    "arguments and memory": ("partial_gradients", "same_tensor_twice", "rows_are_apart", "no_gradients_recorded"),
    "repeats": ("bitwise_repeat",),
    "torch.func": ("vmap", "per_sample_second_order", "functional_gradients", "pull_back_after_its_transform"),
    "compilers": ("opcheck", "compile", "compile_by_inductor", "compile_dynamic_shapes", "checkpoint_and_make_fx"),
    "precision": ("half_precision", "autocast", "backward_inside_autocast"),
    "choice": ("implementation_of_a_call", "implementation_of_a_call_never_falls_back"),
}
API = {
    "hvae_kernels": "The package's own functions: what runs where, and other libraries' flows made faster.",
    "functional": "Every op, flat. All are differentiable, draw no random numbers and return new tensors.",
    "nn": "Drop-in modules on the ops.",
    "testing": "Error budgets and poisoned memory: what the tests hold the ops to, for your own kernels.",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {
        "contributing.md": _linked(ROOT / "CONTRIBUTING.md", {}),
        "changelog.md": _linked(ROOT / "CHANGELOG.md", {}),
        "maths/index.md": maths_index(),
        "guarantees.md": (ROOT / "docs" / "_hooks" / "guarantees.md").read_text().replace("CONTRACT", contract()),
        **{f"api/{name}.md": api(name, text) for name, text in API.items()},
        **{f"maths/{name}.md": op_page(name) for name in op_names()},
    }
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    for path in RESULTS.findall(MEASURED.read_text()):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """The charts and CSV files of the page of all figures stand in the site as in the repository."""
    return RESULTS.sub(r"\1", markdown) if page.file.src_uri == MEASURED.name else markdown


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the ops' pages below "The maths", in the order of their names."""
    for entry in config.nav:
        if "The maths" in entry:
            entry["The maths"] = ["maths/index.md", *(f"maths/{name}.md" for name in op_names())]
    return config


def op_names() -> list[str]:
    """The folders of ops."""
    return sorted(path.parent.name for path in OPS.glob("*/README.md"))


def op_page(name: str) -> str:
    """An op's README as it stands; links into the code lead to the file's name alone."""
    return _linked(OPS / name / "README.md", {other: f"{other}.md" for other in op_names()})


def maths_index() -> str:
    """A page of one line an op: the first sentence of its README."""
    lines = []
    for name in op_names():
        body = (OPS / name / "README.md").read_text().split("\n", 1)[1].strip()
        first = re.split(r"(?<=[.:])\s", body, maxsplit=1)[0].rstrip(":").replace("\n", " ")
        lines.append(f"- [{name}]({name}.md): {_without_links(first)}")
    return (
        "# The maths\n\nForward, backward, double backward, bytes and operations of every op: the README of its folder "
        "as it stands.\n\n" + "\n".join(lines) + "\n"
    )


def api(name: str, text: str) -> str:
    """Every public name of a module, in its own order; modules of a package have pages of their own."""
    module = "hvae_kernels" if name == "hvae_kernels" else f"hvae_kernels.{name}"
    entries = [f"::: {module}.{public}" for public in public_names(module)]
    return f"# {name}\n\n`{module}`. {text}\n\n" + "\n\n".join(entries) + "\n"


def public_names(module: str) -> list[str]:
    """Of ``__all__``, or of a module without one its functions; read, not imported."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = ast.literal_eval(node.value)
            return [name for name in names if name not in (*API, "__version__")]
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


def contract() -> str:
    """The contract as a table: a row an op and implementation, a column a kind of check, the number of its cases."""
    with CONTRACT.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kind_of = {check: kind for kind, checks in CHECKS.items() for check in checks}
    cases: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        cases[row["op"], row["implementation"], kind_of[row["check"]]] += int(row["cases"])
    lines = ["| op | implementation | " + " | ".join(CHECKS) + " |", "|---|---|" + "---:|" * len(CHECKS)]
    for op, implementation in dict.fromkeys((row["op"], row["implementation"]) for row in rows):
        counts = " | ".join(str(cases[op, implementation, kind] or "") for kind in CHECKS)
        lines.append(f"| `{op}` | {implementation} | {counts} |")
    kinds = (f"- *{kind}*: {', '.join(f'`{check}`' for check in checks)}" for kind, checks in CHECKS.items())
    return "\n".join([*lines, "", *kinds])


def _linked(path: Path, pages: dict[str, str]) -> str:
    """A Markdown file's text whose links lead to pages of the site, or, where there is none, are the file's name."""

    def replace(match: re.Match[str]) -> str:
        text, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        parts = PurePosixPath(target).parts
        page = next((pages[part] for part in reversed(parts) if part in pages), None)
        return f"[{text}]({page})" if page and parts[-1] in ("README.md", *pages) else f"`{text.strip('`')}`"

    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", replace, path.read_text())


def _without_links(text: str) -> str:
    return re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)
