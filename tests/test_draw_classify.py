"""``hvae draw --task classify``: cluttered digits, the networks, and the command end to end."""

import json

import pytest
import torch
import torch.nn.functional as F
from hvae import cli, experiment, runs
from hvae.data import mnist
from hvae.data.clutter import PIECE, cluttered
from hvae.draw import classify, models
from hvae.draw.classifiers import Convolutional, Reader
from hvae.draw.classify import Job, Setting
from hvae.draw.train import State
from seen import check_what_is_seen
from torch import nn

from hvae_kernels.ops.draw import reference


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_a_cluttered_image_contains_the_whole_digit_and_pieces_alone_beside_it():
    digits = mnist.load(n_train=50).train
    others = torch.full((3, 784), 7, dtype=torch.uint8)
    images, corners = cluttered(digits, others, 100, 8, generator(1))
    assert images.shape == (50, 100, 100)
    for image, (row, column), digit in zip(images, corners.tolist(), digits.view(-1, 28, 28), strict=True):
        found = image[row : row + 28, column : column + 28]
        assert torch.equal(found[digit > 0], digit[digit > 0])
        assert set(image.unique().tolist()) == {0, 7, 255}
        rest = (image == 7).sum().item()
        assert PIECE**2 / 4 < rest <= 8 * PIECE**2
    assert {corners.min().item() < 5, corners.max().item() > 67} == {True}


def test_places_are_seeded_and_every_one_is_met():
    digits = mnist.load(n_train=30).train
    first, again, other = (cluttered(digits, digits, 32, 2, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], other[0])
    _, corners = cluttered(digits[:1].expand(2_000, -1), digits, 32, 0, generator(3))
    assert len(corners.unique(dim=0)) == 25


def test_without_clutter_and_room_the_image_is_the_digit():
    digits = mnist.load(n_train=5).train
    images, corners = cluttered(digits, digits, 28, 0, generator(1))
    assert torch.equal(images.flatten(1), digits)
    assert not corners.any()


def test_a_piece_is_cut_from_a_digit():
    """One piece on a dark digit: a window of 8 x 8 pixels of it is somewhere in the image."""
    other = torch.randint(1, 256, (1, 784), dtype=torch.uint8)
    (image,), _ = cluttered(torch.zeros(1, 784, dtype=torch.uint8), other, 40, 1, generator(1))
    rows, columns = (image > 0).nonzero().aminmax(dim=0)
    piece = image[rows[0] : columns[0] + 1, rows[1] : columns[1] + 1]
    windows = other.view(28, 28).unfold(0, 8, 1).unfold(1, 8, 1).reshape(-1, 8, 8)
    assert piece.shape == (8, 8)
    assert (windows == piece).flatten(1).all(1).sum() == 1


def test_a_reader_by_its_formula():
    model, images = Reader(3, 40, hidden=6).double(), torch.rand(2, 40, 40, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    h, c = (state.expand(2, -1) for state in model.states)
    reads = []
    for _ in range(3):
        reads.append(model.read_at(h))
        patch = reference.draw_read(images[:, None], reads[-1], 12).flatten(1)
        h, c = model.core(patch, (h, c))
    logits, found = model.run(images)
    torch.testing.assert_close(logits, model.classes(h))
    torch.testing.assert_close(found, torch.stack(reads))
    assert torch.equal(model(images), logits)


def test_the_first_glimpse_is_the_whole_image():
    model = Reader(1, 100)
    nn.init.zeros_(model.read_at.weight)
    numbers = model.read_at(model.states[:1])
    numbers = torch.cat([torch.zeros(1, 2), numbers[:, 2:3], torch.zeros(1, 2)], -1)
    torch.testing.assert_close(models.window(numbers[0], 12, 100), torch.tensor([0.0, 0.0, 99.0]))
    torch.testing.assert_close(numbers[0, 2].exp().sqrt(), torch.tensor(99 / 11 / 2))


@pytest.mark.parametrize(("side", "places"), [(100, 19), (60, 11), (28, 4)])
def test_the_baseline_is_rams(side, places):
    model = Convolutional(side)
    assert model(torch.rand(2, side, side)).shape == (2, 10)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == 8 * 101 + (8 * places**2 + 1) * 256 + 257 * 10


def test_measures_are_the_cross_entropy_and_the_wrong_ones():
    logits, labels = torch.randn(7, 10), torch.tensor([0, 1, 2, 3, 4, 5, 6], dtype=torch.uint8)
    logits[:4] = F.one_hot(labels[:4].long(), 10) * 20.0
    logits[4:] = F.one_hot(labels[4:].long() + 1, 10) * 20.0
    loss, wrong = classify.measures(logits, labels)
    torch.testing.assert_close(loss, -(logits.log_softmax(-1)[range(7), labels.long()]).sum())
    assert wrong == 3
    images = torch.arange(0, 70, 10, dtype=torch.uint8)[:, None]  # intensities, of which the model sees [0, 1]
    model = nn.Sequential(nn.Linear(1, 10))
    mean, error = classify.evaluate(model, images.repeat(100, 1), labels.repeat(100))
    loss, wrong = classify.measures(model(images / 255), labels)
    assert mean == pytest.approx(loss.item() / 7, rel=1e-5)
    assert error == pytest.approx(wrong.item() / 7)


@pytest.mark.parametrize("glimpses", [0, 2])
def test_digits_in_place_are_learned(glimpses, tmp_path, monkeypatch):
    """Some dozen long steps, little room and one piece: less than half the error of chance, which is 0.9."""
    monkeypatch.setattr(classify, "LEARNING_RATE", 1e-3)
    setting = Setting(1, "classify", "sample", 1_500, 200, 5, 30, 1)
    with experiment.threads(1):
        state = State()
        classify.train(Job(glimpses), setting, setting.digits(), state, tmp_path / "state.pt", lambda state: None)
    assert [record["epoch"] for record in state.history] == [1, 2, 3, 4, 5]
    assert state.history[-1]["validation"] < 0.45


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(classify, "LEARNING_RATE", 1e30)
    setting = Setting(1, "classify", "sample", 200, 10, 3, 40, 1)
    with pytest.raises(runs.StudyError, match=r"convolutional: the loss of epoch \d is not finite"):
        classify.train(Job(0), setting, setting.digits(), State(), tmp_path / "state.pt", lambda state: None)


SIZES = ("--train-size=120", "--validation-size=30", "--epochs=2", "--side=40", "--pieces=2", "--glimpses", "2", "4")
KEYS = ("convolutional", "reader-T2", "reader-T4")


def hvae(out, *more):
    return cli.main(["draw", "--task", "classify", "--threads", "1", *SIZES, "--out", str(out), *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "classify"
    assert hvae(out) == 0
    return out


def results(out):
    return json.loads((out / "results.json").read_text())


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_results_and_report(finished, capsys):
    rows = results(finished)["rows"]
    assert [(row["method"], row["glimpses"]) for row in rows] == [("convolutional", 0), ("reader", 2), ("reader", 4)]
    for row in rows:
        assert (row["epochs"], row["steps"]) == (2, 4)
        assert 0 < row["validation_error"] <= 1
    assert check_what_is_seen(hvae, finished, capsys)[0].startswith("model ")
    text = (finished / "report.md").read_text()
    for name in ("curves", "glimpses-reader-T2", "glimpses-reader-T4"):
        assert f"({name}.png)" in text
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    lines = {line[0]: dict(zip(table[0], line, strict=True)) for line in table[2:]}
    assert (lines["4 glimpses"]["printed"], lines["4 glimpses"]["printed, RAM"]) == ("4.18", "9.41")
    assert lines["convolutional"]["printed"] == "14.35"
    assert lines["2 glimpses"]["printed"] == "-"


@pytest.mark.parametrize("model", [["--glimpses", "2", "--no-convolutional"], ["--glimpses", "2"]])
def test_a_killed_run_goes_on_to_the_same_bits(model, finished, tmp_path, monkeypatch):
    epoch, calls = classify.train_epoch, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return epoch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        patch.setattr(classify, "train_epoch", killed)
        assert hvae(tmp_path, *model) == 130
    assert hvae(tmp_path, *model, "--resume") == 0
    expected = [row for row in results(finished)["rows"] if row["glimpses"] in ((2,) if len(model) == 3 else (0, 2))]
    assert without_times(results(tmp_path)["rows"]) == without_times(expected)
    ours, other = (torch.load(out / "jobs" / "reader-T2.pt", weights_only=True) for out in (tmp_path, finished))
    assert all(torch.equal(ours["model"][name], other["model"][name]) for name in other["model"])
    assert all(torch.equal(ours["pictures"][name], other["pictures"][name]) for name in other["pictures"])


def test_another_task_or_setting_is_refused_in_the_same_directory(finished, capsys):
    assert hvae(finished) == 1
    assert "--resume" in capsys.readouterr().err
    assert hvae(finished, "--resume", "--pieces", "3") == 1
    assert "was made with pieces 2, not 3" in capsys.readouterr().err
    sizes = ["--train-size", "120", "--validation-size", "30", "--epochs", "2", "--likelihood-images", "0"]
    assert cli.main(["draw", *sizes, "--draw-steps", "2", "--resume", "--out", str(finished)]) == 1
    assert f"{finished} was made with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--draw-steps=3", "--draw-steps is an option of --task generate alone"),
        ("--no-attention", "--attention is an option of --task generate alone"),
        ("--likelihood-images=3", "--likelihood-images is an option of --task generate alone"),
        ("--train-size=20000", "sample has 10000 digits, not 20000"),
    ],
)
def test_mistakes_are_one_sentence(wrong, message, tmp_path, capsys):
    assert hvae(tmp_path, wrong) == 1
    assert message in capsys.readouterr().err


def test_options_of_classification_are_not_those_of_drawing(tmp_path, capsys):
    assert cli.main(["draw", "--glimpses", "4", "--out", str(tmp_path)]) == 1
    assert "--glimpses is an option of --task classify alone" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["--side=27", "--pieces=-1", "--glimpses=0", "--task=x"])
def test_wrong_arguments(wrong, tmp_path):
    with pytest.raises(SystemExit):
        hvae(tmp_path, wrong)


@pytest.mark.parametrize("key", ["reader-T0", "reader-T04", "attention-T3", "reader"])
def test_no_job_has_such_a_name(key):
    with pytest.raises(ValueError, match="no job is named"):
        Job.from_key(key)
