"""The study's data: reproducible, and their statistics are those of the raw points."""

import pytest
import torch
from hvae.gaussian import data

SEED = 12345


def test_truth():
    loc, scale = data.truth(25)
    torch.testing.assert_close(loc[[0, 12, 24]], torch.tensor([-2.4, 0, 2.4], dtype=torch.float64))
    torch.testing.assert_close(scale[[0, 12, 24]], torch.tensor([1.0, 0.1, 1.0], dtype=torch.float64))


def test_statistics_are_those_of_the_points():
    sets = data.data_sets(25, 2, SEED)
    for r, x in enumerate(data.sample_points(25, 2, SEED)):
        x = x.double()
        torch.testing.assert_close(sets.full.mean[r, 0], x.sum(0) / 10_000)
        torch.testing.assert_close(sets.full.variance[r, 0], ((x - x.mean(0)) ** 2).sum(0) / 10_000)
        for batch, points in zip(sets.batches, x.split(256), strict=True):
            assert batch.count == len(points)
            torch.testing.assert_close(batch.mean[r, 0], points.mean(0))
            torch.testing.assert_close(batch.variance[r, 0], ((points - points.mean(0)) ** 2).mean(0))
    assert [batch.count for batch in sets.batches] == [256] * 39 + [16]
    assert (sets.full.count, sets.full.mean.dtype, sets.full.mean.shape) == (10_000, torch.float64, (2, 1, 25))


def test_first_data_sets_do_not_depend_on_how_many_follow_or_on_the_state_of_the_generator():
    one = data.sample_points(25, 1, SEED)[0]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(data.sample_points(25, 2, SEED)[0], one)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(data.sample_points(25, 1, SEED + 1)[0], one)


@pytest.mark.parametrize(("dim", "delta_error"), [(25, 22.24), (50, 51.12), (100, 101.25)])
def test_they_are_the_published_data_sets(dim, delta_error):
    """Every converged Delta error of the documents is ``|mean - Delta|^2`` of these three data sets."""
    sets = data.data_sets(dim, 3, SEED)
    measured = ((sets.full.mean[:, 0] - sets.truth.loc) ** 2).sum(-1).mean().item()
    assert measured == pytest.approx(delta_error, abs=0.01)
