"""MNIST from the package's sample, from IDX files and from torchvision; what is wrong with a file is named."""

import gzip
import hashlib
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hvae.data import mnist
from hvae.runs import StudyError

ROOT = Path(__file__).parent.parent


def idx(images, magic=0x803, sizes=None):
    return struct.pack(">4I", magic, *(sizes or (len(images), 28, 28))) + bytes(images.flatten().tolist())


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A folder of two small IDX files, one of them gzipped, that stand for MNIST's."""
    digits = mnist.Digits(*(torch.randint(0, 256, (n, 784), dtype=torch.uint8) for n in (7, 5)))
    for name, images in zip(("TRAIN", "TEST"), digits, strict=True):
        content, file = idx(images), getattr(mnist, name)
        changed = mnist.IdxFile(file.name, len(images), hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(mnist, name, changed)
        zipped = name == "TEST"
        path = tmp_path / (file.name + ".gz" * zipped)
        path.write_bytes(gzip.compress(content) if zipped else content)
    return tmp_path, digits


def test_the_sample_is_the_studys_digits():
    digits = mnist.load()
    assert [len(part) for part in digits] == [10_000, 1_000]
    assert {value for part in digits for value in part.unique().tolist()} == {0, 255}
    # counted once, by other code, from the original files
    assert int((digits.train > 0).sum()) == 1_039_729
    assert int((digits.validation > 0).sum()) == 97_145
    assert hashlib.sha256(mnist.pack(digits)).hexdigest() == mnist.SAMPLE_SHA256


def test_fewer_digits_are_the_first_and_more_are_refused():
    assert torch.equal(mnist.load(n_train=3).train, mnist.load().train[:3])
    with pytest.raises(StudyError, match="sample has 1000 digits, not 1001"):
        mnist.load(n_validation=1001)


def test_a_folder_of_idx_files_gzipped_or_not(small):
    folder, expected = small
    assert all(torch.equal(*pair) for pair in zip(mnist.load(str(folder), 7, 5), expected, strict=True))
    (folder / "MNIST" / "raw").mkdir(parents=True)
    for path in [path for path in folder.iterdir() if path.is_file()]:
        path.rename(folder / "MNIST" / "raw" / path.name)
    assert torch.equal(mnist.load(str(folder), 7, 5).train, expected.train)


def test_labels_of_the_sample():
    """Counted once, by other code, from the original files."""
    train, validation = mnist.load_labels()
    assert train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert train.bincount().tolist() == [1001, 1127, 991, 1032, 980, 863, 1014, 1070, 944, 978]
    assert validation[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert validation.bincount().tolist() == [85, 126, 116, 107, 110, 87, 87, 99, 89, 94]
    assert torch.equal(mnist.load_labels(n_train=3).train, train[:3])
    with pytest.raises(StudyError, match="sample has 10000 labels, not 10001"):
        mnist.load_labels(n_train=10_001)


def test_labels_of_a_folder(tmp_path, monkeypatch):
    labels = mnist.Labels(*(torch.randint(0, 10, (n,), dtype=torch.uint8) for n in (7, 5)))
    for name, given in zip(("TRAIN_LABELS", "TEST_LABELS"), labels, strict=True):
        file = getattr(mnist, name)
        content = struct.pack(">2I", 0x801, len(given)) + bytes(given.tolist())
        changed = mnist.IdxFile(file.name, len(given), hashlib.sha256(content).hexdigest(), ())
        monkeypatch.setattr(mnist, name, changed)
        (tmp_path / f"{file.name}.gz").write_bytes(gzip.compress(content))
    found = mnist.load_labels(str(tmp_path), 7, 4)
    assert torch.equal(found.train, labels.train)
    assert torch.equal(found.validation, labels.validation[:4])
    path = tmp_path / f"{mnist.TEST_LABELS.name}.gz"
    for content, said in (
        (struct.pack(">2I", 0x803, 5) + bytes(5), "magic number 0x803, not 0x801: no IDX file of labels"),
        (struct.pack(">2I", 0x801, 5) + bytes(4), "5 labels in 12 bytes, not 5 and a header"),
        (struct.pack(">2I", 0x801, 5) + bytes(5), "another SHA-256"),
    ):
        path.write_bytes(gzip.compress(content))
        with pytest.raises(StudyError, match=said):
            mnist.load_labels(str(tmp_path), 7, 4)


DAMAGES = [
    (lambda images: idx(images)[:10], "too few for the header"),
    (lambda images: idx(images, magic=0x801), "magic number 0x801, not 0x803"),
    (lambda images: idx(images)[:-1], "7 x 28 x 28 images in 5503 bytes"),
    (lambda images: idx(images, sizes=(7, 28, 27)), "7 x 28 x 27"),
    (lambda images: idx(images ^ 1), "another SHA-256"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_a_wrong_file_is_named(damage, said, small):
    folder, digits = small
    path = folder / mnist.TRAIN.name
    path.write_bytes(damage(digits.train))
    with pytest.raises(StudyError, match=said) as caught:
        mnist.load(str(folder), 7, 5)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: b"no gzip", lambda content: b""])
def test_a_damaged_gzip_file_is_named(damage, small):
    folder, _ = small
    path = folder / f"{mnist.TEST.name}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StudyError, match=path.name):
        mnist.load(str(folder), 7, 5)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StudyError, match="has no train-images-idx3-ubyte"):
        mnist.load(str(tmp_path))


def test_torchvision(monkeypatch):
    images = torch.randint(0, 256, (2, 6, 28, 28), dtype=torch.uint8)
    datasets = ModuleType("torchvision.datasets")
    targets = torch.arange(6)
    datasets.MNIST = lambda root, train, download: SimpleNamespace(data=images[0 if train else 1], targets=targets)
    monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    digits = mnist.load("torchvision", 6, 4)
    assert torch.equal(digits.train, images[0].view(6, 784))
    assert torch.equal(digits.validation, images[1].view(6, 784)[:4])
    assert mnist.load_labels("torchvision", 6, 4).validation.tolist() == [0, 1, 2, 3]
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(StudyError, match="torchvision cannot be imported"):
        mnist.load("torchvision")


def test_binarisation():
    intensities = torch.tensor([0, 127, 128, 255], dtype=torch.uint8)
    assert mnist.binarise(intensities).tolist() == [0, 0, 1, 1]
    drawn = mnist.binarise(intensities.expand(20_000, 4), torch.Generator().manual_seed(0)).double().mean(0)
    torch.testing.assert_close(drawn, intensities.double() / 255, atol=0.02, rtol=0)
    assert drawn[0] == 0
    assert drawn[3] == 1


def test_the_sample_and_its_licence_are_installed(tmp_path):
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    environment = {**os.environ, "HVAE_KERNELS_SKIP_BUILD": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    installed = tmp_path / "hvae" / "data"
    assert (installed / "mnist_sample.gz").read_bytes() == mnist.SAMPLE.read_bytes()
    assert (installed / "mnist_labels.gz").read_bytes() == mnist.LABELS.read_bytes()
    assert "Share Alike 3.0" in (installed / "MNIST.md").read_text()
