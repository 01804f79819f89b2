"""The documentation's sources: their code runs, what is generated fits the code, the checker of the pages is awake."""

import ast
import csv
import re
import runpy
from pathlib import Path

import pytest
import test_contract
import test_examples
from opspecs import OPSPECS

import hvae_kernels as hk

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): blocks
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if (blocks := re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL))
}
CHECK = runpy.run_path(str(ROOT / "docs" / "_hooks" / "check.py"))
MAKE = runpy.run_path(str(ROOT / "docs" / "_hooks" / "notebooks.py"))
NOTEBOOKS = sorted(MAKE["pages"]())


def test_there_are_pages_with_code():
    assert {"README.md", "docs/index.md", "docs/guides/implementations.md", "docs/guides/compile.md"} <= PAGES.keys()


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page, tmp_path, monkeypatch):
    """All blocks of a page in their order, as somebody who pastes them."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for number, block in enumerate(PAGES[page], 1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


def test_conda_recipe_asks_for_what_the_project_asks_for():
    recipe, project = (ROOT / path for path in (".github/conda/recipe.yaml", "pyproject.toml"))
    context = dict(re.findall(r'^  (\w+): "(.+)"$', recipe.read_text(), re.MULTILINE))
    assert context["version"] == hk.__version__
    assert f'requires-python = ">={context["python_min"]}"' in project.read_text()
    assert f'dependencies = ["torch>={context["torch_min"]}"]' in project.read_text()


def test_tutorials_show_examples():
    shown = re.findall(r'--8<-- "([^"]+)"', "".join(p.read_text() for p in (ROOT / "docs" / "tutorials").glob("*.md")))
    assert shown == ["examples/bayesian_regression.py"]
    assert (ROOT / shown[0]).is_file()


def test_notebooks_are_those_of_the_tutorials():
    files = {path.stem for path in (ROOT / "docs" / "notebooks").iterdir()}
    assert files == set(NOTEBOOKS) == {"faster_zuko_flow", "hamiltonian_vae_digits", "sbi_posterior", "vamp_prior"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_what_its_tutorial_and_example_make(name):
    """Written by docs/_hooks/notebooks.py, which has not run since one of them changed if this fails."""
    written, made = MAKE["read"](name), MAKE["composed"](name)
    for cell in [cell for cell in (*written["cells"], *made["cells"]) if cell["cell_type"] == "code"]:
        cell.update(execution_count=None, outputs=[])
    assert written == made


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_has_the_code_of_its_example(name):
    """All of it in its order, but for the docstrings of the file and of ``main``."""
    _, *definitions, main, _ = ast.parse((ROOT / "examples" / f"{name}.py").read_text()).body
    cells = "\n".join(MAKE["source"](cell) for cell in MAKE["code_cells"](MAKE["read"](name)))
    assert list(map(ast.dump, ast.parse(cells).body)) == list(map(ast.dump, [*definitions, *main.body[1:]]))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_has_its_output_and_nothing_of_the_machine(name):
    cells = MAKE["code_cells"](MAKE["read"](name))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {(output["output_type"], output["name"]) for output in outputs} == {("stream", "stdout")}
    printed = "".join(text for output in outputs for text in output["text"])
    assert test_examples.PRINTED[name] in printed
    assert not re.search(r"\r|warning|/(home|root|tmp|usr|work)/|site-packages", printed, re.IGNORECASE)
    assert not any(cell["metadata"] for cell in cells)


def test_site_shows_a_notebook_where_the_tutorial_names_it():
    name = "vamp_prior"
    before, _, after = MAKE["LINK"].split(MAKE["pages"]()[name].read_text())
    shown = MAKE["on_page_markdown"](f"{before}[here](../notebooks/{name}.ipynb){after}")
    assert shown.startswith(before)
    assert shown.endswith(after)
    assert f"](../notebooks/{name}.ipynb){{" in shown
    for cell in MAKE["code_cells"](MAKE["read"](name)):
        for text in (MAKE["source"](cell), *("".join(output["text"]) for output in cell["outputs"])):
            assert f"\n{text.rstrip()}\n```" in shown
    assert MAKE["on_page_markdown"]("See [it](../notebooks/x.ipynb).") == "See [it](../notebooks/x.ipynb)."


def test_text_of_a_notebook_stands_alone():
    page = r"\(a\) [b](c.md) [`d`](e.md#f) [g](https://h)" + "\n\n\\[\ni,\nj\n\\]\n"
    assert MAKE["portable"](page) == "$a$ *b* `d` [g](https://h)\n\n$$\ni,\nj\n$$\n"


def test_the_table_of_the_contract_has_its_rows_and_checks():
    """Written by docs/_hooks/contract.py; which sets a machine has changes numbers of cases alone."""
    with (ROOT / "docs" / "contract.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["op"], row["implementation"]) for row in rows}
    assert found == {(spec.name, implementation) for spec in OPSPECS for implementation in spec.implementations}
    checks = {name.removeprefix("test_") for name in vars(test_contract) if name.startswith("test_")}
    assert {row["check"] for row in rows} == checks
    # of the page of guarantees; read, as its module imports mkdocs
    tree = ast.parse((ROOT / "docs" / "_hooks" / "pages.py").read_text())
    kinds = next(x.value for x in tree.body if isinstance(x, ast.Assign) and x.targets[0].id == "CHECKS")
    assert sorted(check for kind in ast.literal_eval(kinds).values() for check in kind) == sorted(checks)


def test_workflows_call_targets_that_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    called = re.findall(r"run: make ([\w-]+)", "".join(path.read_text() for path in files))
    assert {"lint", "quick", "test", "docs", "wheel"} <= set(called) <= targets


def test_templates_ask_what_runs_where():
    templates = [ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml" for name in ("wrong_number", "slow_case")]
    for path in (*templates, ROOT / ".github" / "pull_request_template.md"):
        assert "python -m hvae_kernels`" in path.read_text()
    assert "python -m hvae_kernels bench OP" in templates[1].read_text()


def test_the_version_that_is_cited_is_this_one():
    assert f"\nversion: {hk.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {hk.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


GOOD = '<h1>a</h1><h2>b</h2><h3>c</h3><h2>d</h2><img alt="e" src="f.png"><a href="https://g">h</a>'


@pytest.mark.parametrize(
    ("html", "fault"),
    [
        ("<p>a</p>", "no heading"),
        ("<h1>a</h1><h3>b</h3>", "heading of level 3 after one of level 1"),
        ("<h2>a</h2>", "heading of level 2 after one of level 0"),
        ("<h1>a</h1><h1>b</h1>", "two headings of level 1"),
        (GOOD.replace('alt="e"', ""), "image f.png has no text"),
        (GOOD.replace('alt="e"', 'alt=" "'), "image f.png has no text"),
        (GOOD + '<script src="https://cdn/x.js"></script>', "<script> loads https://cdn/x.js"),
        (GOOD + '<link rel="stylesheet" href="//fonts/x.css">', "<link> loads //fonts/x.css"),
        (GOOD + '<span class="arithmatex">x</span>', "a formula is not rendered"),
    ],
)
def test_checker_of_pages_sees(html, fault):
    assert CHECK["faults"](html) == [fault]


def test_checker_of_pages_passes_a_good_one():
    assert CHECK["faults"](GOOD + '<link rel="canonical" href="https://here">') == []
