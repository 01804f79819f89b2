"""The testing helpers must be able to fail."""

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


def test_poisoned_memory_shows_and_ends():
    with testing.poisoned_memory():
        assert torch.empty(5).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_saved_bytes_counts_what_is_kept():
    x = torch.randn(8, requires_grad=True)
    assert testing.saved_bytes(lambda: x * x, [x]) == 0
    assert testing.saved_bytes(lambda: x.exp(), [x]) == 32
