"""The testing helpers must be able to fail."""

import itertools
import math

import pytest
import torch

from hvae_kernels import testing


def test_budget_allows_twice_the_plain_error():
    oracle = torch.ones(10, dtype=torch.float64)
    plain = oracle.float() + 1e-4
    testing.assert_within_budget([oracle.float() + 1.9e-4], [plain], [oracle])
    with pytest.raises(AssertionError, match=r"result 0: relative error .* exceeds its budget"):
        testing.assert_within_budget([oracle.float() + 2.2e-4], [plain], [oracle])


def test_budget_refuses_nan_and_wrong_shapes():
    oracle = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="inf"):
        testing.assert_within_budget([torch.full((3,), torch.nan)], [oracle.float()], [oracle])
    with pytest.raises(AssertionError, match="shape"):
        testing.relative_error(torch.ones(2), oracle)


def off(error):
    """A result that is off by ``error``, a number for each draw in turn, or its oracle, in float64."""
    errors = iter(error) if isinstance(error, list) else itertools.repeat(error)
    return lambda x: [x.new_ones(10) if x.dtype == torch.float64 else x.new_full((10,), 1 + next(errors))]


def ones():
    return [torch.ones(1)]


def test_a_lucky_draw_of_the_formula_does_not_condemn():
    testing.assert_as_exact(off(1.5e-4), off([1e-6] + [1e-4] * 50), ones)


def test_what_is_worse_on_most_draws_is_condemned():
    with pytest.raises(AssertionError, match=r"result 0: median relative error of 15 draws 0\.00025 exceeds"):
        testing.assert_as_exact(off(2.5e-4), off(1e-4), ones)


def test_a_failure_on_one_draw_is_condemned():
    with pytest.raises(AssertionError, match=r"result 0: relative error 0\.01 exceeds its budget 0\.0002"):
        testing.assert_as_exact(off([1e-2] + [1e-4] * 50), off(1e-4), ones)
    with pytest.raises(AssertionError, match="relative error inf"):
        testing.assert_as_exact(off([math.nan] + [1e-4] * 50), off(1e-4), ones)


@pytest.mark.parametrize(("ulps", "sound"), [(3, True), (50, False)])
def test_an_ill_conditioned_draw_allows_a_few_units_of_the_inputs(ulps, sound):
    """A difference of close numbers, which the formula happens to take exactly."""
    close, apart = ([torch.tensor([1.0]), torch.tensor([y])] for y in (1 - 2.0**-10, -1000.0))
    draws = itertools.chain([close], itertools.repeat(apart))

    def check():
        off = ulps * torch.finfo(torch.float32).eps
        testing.assert_as_exact(lambda x, y: [x + off - y], lambda x, y: [x - y], lambda: next(draws))

    if sound:
        check()
    else:
        with pytest.raises(AssertionError, match="result 0: relative error"):
            check()


def test_more_draws_are_made_only_where_the_first_exceeds_its_budget():
    made = []

    def make():
        made.append(torch.randn(3))
        return made[-1:]

    testing.assert_as_exact(off(1.5e-4), off(1e-4), make)
    assert len(made) == 1
    following = torch.get_rng_state()
    for _ in range(2):
        testing.assert_as_exact(off(1.5e-4), off([1e-6] + [1e-4] * 50), make)
    assert len(made) == 1 + 2 * (1 + testing.DRAWS)
    assert all(map(torch.equal, made[2 : 2 + testing.DRAWS], made[-testing.DRAWS :]))  # by seeds: the same again
    torch.set_rng_state(following)
    assert torch.equal(torch.randn(3), made[1])
    assert torch.equal(torch.randn(3), made[2 + testing.DRAWS])  # between the two checks the state was put back


def test_poisoned_memory_shows_and_ends():
    with testing.poisoned_memory():
        assert torch.empty(5).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_threads_are_put_back():
    before = torch.get_num_threads()

    def fail():
        with testing.threads(before + 1):
            raise RuntimeError(torch.get_num_threads())

    with pytest.raises(RuntimeError, match=str(before + 1)):
        fail()
    assert torch.get_num_threads() == before


def test_saved_bytes_counts_what_is_kept():
    x = torch.randn(8, requires_grad=True)
    assert testing.saved_bytes(lambda: x * x, [x]) == 0
    assert testing.saved_bytes(lambda: x.exp(), [x]) == 32
