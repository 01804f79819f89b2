"""The Bayesian regression example: its oracle, its estimators, its files."""

import pytest
import torch
from hvae import regression
from seen import check_table


@pytest.fixture
def data(monkeypatch):
    monkeypatch.setattr(regression, "ROWS", 500)
    return regression.make_data()


def expected_bound(layer, data):
    """The bound has a closed form here: the expected squared error is that of the mean plus the variance."""
    mean = data.x @ layer.weight_loc.mT
    variance = data.x.square() @ (2 * layer.weight_log_scale).exp().mT
    error = ((mean - data.y).square() + variance).mean() / (2 * regression.NOISE_SCALE**2)
    return error + layer.kl() / len(data.x)


def test_no_posterior_is_better_than_the_exact_one(data):
    best = regression.exact_layer(data)
    gradients = torch.autograd.grad(expected_bound(best, data), tuple(best.parameters()))
    assert max(g.abs().max() for g in gradients) < 1e-5
    assert regression.distances(data, best) == pytest.approx((0, 0), abs=1e-6)
    with torch.no_grad():
        best.weight_loc[0, 0] += 0.1
    (gradient,) = torch.autograd.grad(expected_bound(best, data), best.weight_loc)
    assert gradient.abs().max() > 1e-2, "a gradient that is always small would tell nothing"


@pytest.mark.parametrize("name", regression.ESTIMATORS)
def test_both_estimates_are_of_the_bound(data, name):
    layer = regression.exact_layer(data)
    with torch.no_grad():
        layer.weight_log_scale += 2
        estimates = torch.stack(
            [regression.negative_bound(layer, regression.ESTIMATORS[name], data) for _ in range(1000)]
        )
        error = estimates.mean() - expected_bound(layer, data)
    assert abs(error) < 4 * estimates.std() / 1000**0.5


def test_report(data, monkeypatch, tmp_path, capsys):
    for name, value in (("BATCH_SIZES", (1, 256)), ("STEPS", 20), ("DRAWS", 100)):
        monkeypatch.setattr(regression, name, value)
    regression.main(["--out", str(tmp_path), "--seed", "1"])
    report = (tmp_path / "report.md").read_text()
    captured = capsys.readouterr()
    assert captured.err == f"hvae.regression: results go to {tmp_path}\n"
    assert captured.out.endswith(f"\nReport: {tmp_path / 'report.md'}; 1 figure lies beside it.\n")
    table = captured.out.split("\nReport: ")[0]
    check_table(table)
    regression.main(["--out", str(tmp_path), "--seed", "1", "--quiet"])
    assert capsys.readouterr() == (table, "")
    assert (tmp_path / "variance.png").stat().st_size > 1000
    rows = [[cell.strip() for cell in line.split("|")] for line in report.splitlines()]
    ratios = {row[1]: float(row[4]) for row in rows if len(row) == 6 and row[1].isdigit()}
    assert 0.5 < ratios["1"] < 2, "one row: both estimators are the same"
    assert ratios["256"] > 5


def test_a_file_in_the_place_of_the_folder_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert regression.main(["--out", str(tmp_path / "file"), "--quiet"]) == 1
    assert capsys.readouterr().err.startswith("hvae.regression: ")
