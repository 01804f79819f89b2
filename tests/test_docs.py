"""The documentation's sources: their code runs, what is generated fits the code, the checker of the pages is awake."""

import csv
import re
import runpy
from pathlib import Path

import pytest
import test_contract
from opspecs import OPSPECS

import hvae_kernels as hk

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): blocks
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if (blocks := re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL))
}
CHECK = runpy.run_path(str(ROOT / "docs" / "_hooks" / "check.py"))


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
    assert len(shown) == 4
    assert [path for path in shown if not (ROOT / path).is_file()] == []


def test_the_table_of_the_contract_has_its_rows_and_checks():
    """Written by docs/_hooks/contract.py; which sets a machine has changes numbers of cases alone."""
    with (ROOT / "docs" / "contract.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["op"], row["implementation"]) for row in rows}
    assert found == {(spec.name, implementation) for spec in OPSPECS for implementation in spec.implementations}
    checks = {name.removeprefix("test_") for name in vars(test_contract) if name.startswith("test_")}
    assert {row["check"] for row in rows} == checks


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
