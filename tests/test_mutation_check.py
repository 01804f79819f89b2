"""The rows of the mutation check follow the kernels; that they are red takes an hour or two, and is its own command."""

import subprocess
import sys
from collections import defaultdict

import pytest
from _pytest.mark.expression import Expression
from mutation_check import MUTATIONS, ROOT, environment


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_changes_one_place_and_names_tests(mutation):
    assert mutation.stands() == 1
    assert mutation.after != mutation.before
    assert mutation.files
    assert all((ROOT / file).is_file() for file in mutation.files)
    assert all((ROOT / "csrc" / "cpu" / f"{source}.cpp").is_file() for source in mutation.sources or ())


def test_every_selector_collects_tests():
    files = sorted({file for mutation in MUTATIONS for file in mutation.files})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    result = subprocess.run(command, cwd=ROOT, env=environment(ROOT), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
    names = defaultdict(list)
    for line in result.stdout.splitlines():
        file, _, test = line.partition("::")
        if test:
            names[file].append(line.lower())
    tests = {tuple(mutation.arguments): mutation for mutation in MUTATIONS}.values()
    empty = []
    for mutation in tests:
        selector = Expression.compile(mutation.tests.partition(" -k ")[2] or "test")
        among = [name for file in mutation.files for name in names[file]]
        if not any(selector.evaluate(lambda word, *, name=name: word.lower() in name) for name in among):
            empty.append(mutation.tests)
    assert not empty
