"""The examples as notebooks, in docs/notebooks: ``make notebooks``, or ``python docs/_hooks/notebooks.py [--all]``.

A tutorial with a link to a notebook on a line of its own gives the notebook its text, the example of that name its
code. On the site the line becomes the notebook's cells and outputs. A notebook is run where its code has changed, with
``--all`` always: in the environment of the tests, with nbclient and ipykernel.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "notebooks"
LINK = re.compile(r"^\[[^\]]+\]\(\.\./notebooks/(\w+)\.ipynb\)$", re.MULTILINE)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called for each page: cells in the place of the link."""
    return LINK.sub(lambda match: shown(match[1], read(match[1])), markdown)


def pages() -> dict[str, Path]:
    """The tutorial of each notebook."""
    tutorials = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
    return {match[1]: path for path in tutorials if (match := LINK.search(path.read_text()))}


def read(name: str) -> dict[str, Any]:
    """A notebook that is there."""
    return json.loads((FOLDER / f"{name}.ipynb").read_text())


def source(cell: dict[str, Any]) -> str:
    """A cell's text."""
    return "".join(cell["source"])


def composed(name: str) -> dict[str, Any]:
    """A notebook that was not run: the tutorial around the example."""
    before, _, after = LINK.split(pages()[name].read_text())
    example = split((ROOT / "examples" / f"{name}.py").read_text())
    cells = [("markdown", portable(before)), *example, ("markdown", portable(after))]
    return {
        "cells": [_cell(f"cell-{number}", kind, text.strip()) for number, (kind, text) in enumerate(cells)],
        "metadata": METADATA,
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def split(example: str) -> list[tuple[str, str]]:
    """Kind and text of each cell: what two blank lines part, then the body of ``main`` at its own blank lines."""
    docstring = ast.get_source_segment(example, ast.parse(example).body[0])
    *definitions, main, _ = re.split(r"\n{3,}", example.removeprefix(docstring or "").strip())
    match = re.fullmatch(r'def main\(\) -> None:\n    """(.+?)"""\n(.+)', main, re.DOTALL)
    if not match:
        raise ValueError(f"no main with a docstring: {main}")
    steps = re.split(r"\n\n(?=\S)", textwrap.dedent(match[2]))
    return [*(("code", text) for text in definitions), ("markdown", match[1]), *(("code", text) for text in steps)]


def portable(text: str) -> str:
    """A page's Markdown as notebooks write it: dollars around formulas, and for links to other pages their titles."""
    text = re.sub(r"\\\[\s*(.*?)\s*\\\]", r"$$\n\1\n$$", text, flags=re.DOTALL)
    text = re.sub(r"\\\((.*?)\\\)", r"$\1$", text, flags=re.DOTALL)
    text = re.sub(r"\[(`[^\]]+`)\]\((?!https?:)[^)]+\)", r"\1", text)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"*\1*", text)


def shown(name: str, notebook: dict[str, Any]) -> str:
    """The Markdown of everything between the tutorial's own text."""
    file = f"{name}.ipynb"
    parts = [f'[Download this page as a notebook](../notebooks/{file}){{ .md-button download="{file}" }}']
    for cell in notebook["cells"][1:-1]:
        if cell["cell_type"] == "markdown":
            parts.append(source(cell))
            continue
        parts.append(_fenced(".python", source(cell)))
        parts += [_fenced(".text .no-copy .output", "".join(output["text"])) for output in cell["outputs"]]
    return "\n\n".join(parts)


def run(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with what it prints; what it says on the standard error goes to ours."""
    import nbformat
    from nbclient import NotebookClient

    with tempfile.TemporaryDirectory() as folder:
        live = nbformat.reads(json.dumps(notebook), as_version=4)
        where = {"metadata": {"path": folder}}
        client = NotebookClient(live, kernel_name="python3", timeout=600, record_timing=False, resources=where)
        client.execute()
    nbformat.validate(live)
    for cell, ran in zip(notebook["cells"], live["cells"], strict=True):
        if cell["cell_type"] == "code":
            cell.update(execution_count=ran["execution_count"], outputs=_tidy(ran["outputs"]))
    return notebook


def main() -> None:
    """Write every notebook that is not as its tutorial and its example are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="run those whose code is the same, too")
    everything = parser.parse_args().all
    FOLDER.mkdir(exist_ok=True)
    for name in pages():
        notebook, path = composed(name), FOLDER / f"{name}.ipynb"
        old = code_cells(read(name)) if path.exists() else []
        new = code_cells(notebook)
        same = [source(cell) for cell in old] == [source(cell) for cell in new]
        if same and not everything:
            for cell, ran in zip(new, old, strict=True):
                cell.update(execution_count=ran["execution_count"], outputs=ran["outputs"])
        else:
            run(notebook)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
        print(f"{path.relative_to(ROOT)}: {'text' if same and not everything else 'run'}")


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """All but the text."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def _cell(name: str, kind: str, text: str) -> dict[str, Any]:
    cell = {"cell_type": kind, "id": name, "metadata": {}, "source": text.splitlines(keepends=True)}
    return {**cell, "execution_count": None, "outputs": []} if kind == "code" else cell


def _fenced(classes: str, text: str) -> str:
    return f"``` {{ {classes} }}\n{text.rstrip()}\n```"


def _tidy(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was printed, in one piece; an example gives nothing else."""
    said = ""
    for output in outputs:
        if output["output_type"] != "stream":
            raise ValueError(f"neither printed nor a warning: {output}")
        if output["name"] == "stderr":
            sys.stderr.write(output["text"])
        else:
            said += output["text"]
    return [{"name": "stdout", "output_type": "stream", "text": said.splitlines(keepends=True)}] if said else []


if __name__ == "__main__":
    main()
