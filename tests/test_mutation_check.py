"""The rows of the mutation check follow the kernels; that they are red takes hours, and is its own command."""

import pytest
from mutation_check import MUTATIONS, ROOT


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mutation_changes_one_place_and_names_tests(mutation):
    assert mutation.stands() == 1
    assert mutation.after != mutation.before
    files = mutation.tests.partition(" -k ")[0].split()
    assert files
    assert all((ROOT / file).is_file() for file in files)
