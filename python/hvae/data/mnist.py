"""MNIST as intensities: from the sample in this package, a folder of IDX files, or torchvision; binarised by name.

The sample (licence and credit: ``MNIST.md`` beside it) holds the study's own digits, rounded, and a file of their
labels. ``python -m hvae.data.mnist DIR`` writes both again.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import struct
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvae.runs import StudyError

N_TRAIN, N_VALIDATION = 10_000, 1_000
SIDE, N_PIXELS = 28, 28 * 28
BINARISATIONS = ("round", "static", "dynamic")
SAMPLE = Path(__file__).with_name("mnist_sample.gz")
SAMPLE_SHA256 = "5ef6eefbff4014d4cb9e61f729f077af88917d10a9f823c163d83662dec114fc"
LABELS = Path(__file__).with_name("mnist_labels.gz")
LABELS_SHA256 = "5aeea5250caba94e3e257b0c8ccb4355ff1a6b0adbab4964c7a6efd7502c237a"
UNSIGNED_BYTES = 0x800  # of a magic number, to which the number of dimensions is added


class IdxFile(NamedTuple):
    """A file of images, or of labels, as MNIST's authors published it, unzipped.

    ``shape`` is that of an item.
    """

    name: str
    items: int
    sha256: str
    shape: tuple[int, ...] = (SIDE, SIDE)


TRAIN = IdxFile("train-images-idx3-ubyte", 60_000, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db")
TEST = IdxFile("t10k-images-idx3-ubyte", 10_000, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7")
TRAIN_LABELS = IdxFile(
    "train-labels-idx1-ubyte", 60_000, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5", ()
)
TEST_LABELS = IdxFile(
    "t10k-labels-idx1-ubyte", 10_000, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2", ()
)


class Digits(NamedTuple):
    """Intensities 0 to 255, uint8, ``(N, 784)``: of training digits, and of test digits for validation."""

    train: Tensor
    validation: Tensor


class Labels(NamedTuple):
    """Which digits they are, 0 to 9, uint8, ``(N,)``."""

    train: Tensor
    validation: Tensor


def load(source: str = "sample", n_train: int = N_TRAIN, n_validation: int = N_VALIDATION) -> Digits:
    """The first digits of the training set and of the test set.

    Args:
        source: ``"sample"``, ``"torchvision"`` (downloaded to torch's hub directory), or a folder with the IDX files,
            gzipped or not, which may lie in ``MNIST/raw`` as torchvision leaves them.
        n_train: how many for training.
        n_validation: how many for validation.

    Raises:
        StudyError: there are not so many, or a file is missing or not what MNIST's authors published.
    """
    whole = {"sample": _sample, "torchvision": _torchvision}.get(source, lambda: _folder(Path(source)))()
    for digits, count in zip(whole, (n_train, n_validation), strict=True):
        if count > len(digits):
            raise StudyError(f"{source} has {len(digits)} digits, not {count}: the whole MNIST is --data DIR")
    return Digits(whole.train[:n_train], whole.validation[:n_validation])


def load_labels(source: str = "sample", n_train: int = N_TRAIN, n_validation: int = N_VALIDATION) -> Labels:
    """Of the digits that :func:`load` returns for the same arguments, with the same errors."""
    readers = {
        "sample": _sample_labels,
        "torchvision": _torchvision_labels,
    }
    train, validation = readers.get(source, lambda: _folder_labels(Path(source)))()
    for labels, count in ((train, n_train), (validation, n_validation)):
        if count > len(labels):
            raise StudyError(f"{source} has {len(labels)} labels, not {count}: the whole MNIST is --data DIR")
    return Labels(train[:n_train].to(torch.uint8), validation[:n_validation].to(torch.uint8))


def binarise(intensities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Pixels 0 or 1, uint8: rounded, or, with a generator, drawn with the intensities as probabilities."""
    if generator is None:
        return (intensities >= 128).to(torch.uint8)
    uniform = torch.rand(intensities.shape, generator=generator)
    return (uniform < intensities / 255).to(torch.uint8)


def _sample() -> Digits:
    packed = gzip.decompress(SAMPLE.read_bytes())
    if hashlib.sha256(packed).hexdigest() != SAMPLE_SHA256:
        raise StudyError(f"{SAMPLE} is corrupt: install the package again")
    bits = (_bytes(packed)[:, None] >> torch.arange(7, -1, -1)) & 1
    return Digits(*(bits.to(torch.uint8) * 255).view(-1, N_PIXELS).split([N_TRAIN, N_VALIDATION]))


def _sample_labels() -> Labels:
    packed = gzip.decompress(LABELS.read_bytes())
    if hashlib.sha256(packed).hexdigest() != LABELS_SHA256:
        raise StudyError(f"{LABELS} is corrupt: install the package again")
    return Labels(*_bytes(packed).split([N_TRAIN, N_VALIDATION]))


def pack(digits: Digits) -> bytes:
    """What the sample holds of digits: their rounded pixels, eight to a byte."""
    bits = torch.cat([binarise(part) for part in digits]).view(-1, 8)
    return bytes((bits << torch.arange(7, -1, -1)).sum(-1).tolist())


def _torchvision_parts() -> list[Any]:
    try:
        from torchvision.datasets import MNIST
    except (ImportError, RuntimeError) as error:  # RuntimeError beside a torch that it was not built for
        raise StudyError(f"--data torchvision: torchvision cannot be imported: {error}") from error
    return [MNIST(torch.hub.get_dir(), train=train, download=True) for train in (True, False)]


def _torchvision() -> Digits:
    return Digits(*(part.data.flatten(1) for part in _torchvision_parts()))


def _torchvision_labels() -> Labels:
    return Labels(*(part.targets for part in _torchvision_parts()))


def _folder(folder: Path) -> Digits:
    return Digits(*(read(find(folder, file), file) for file in (TRAIN, TEST)))


def _folder_labels(folder: Path) -> Labels:
    return Labels(*(read(find(folder, file), file).flatten() for file in (TRAIN_LABELS, TEST_LABELS)))


def find(folder: Path, file: IdxFile) -> Path:
    """Where the folder has the file, gzipped or not, under one of the names that it is published under."""
    for name in (file.name, file.name.replace("-idx", ".idx")):
        for place in (folder, folder / "MNIST" / "raw", folder / name):  # one archive holds folders of the files' names
            for path in (place / name, place / f"{name}.gz"):
                if path.is_file():
                    return path
    raise StudyError(f"{folder} has no {file.name}, gzipped or not")


def read(path: Path, file: IdxFile) -> Tensor:
    """The items of an IDX file, flat, ``(N, ...)``; StudyError where it is not the one that was published."""
    kind = "images" if file.shape else "labels"
    header, item, magic = 4 * (2 + len(file.shape)), math.prod(file.shape), UNSIGNED_BYTES + 1 + len(file.shape)
    size = header + file.items * item
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            content = stream.read(size + 1)  # no more of a file that holds something else
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise StudyError(f"{path} is not a whole gzip file: {error}") from error
    if len(content) > size:
        raise StudyError(f"{path} holds more than the {size} bytes of MNIST's {file.name}")
    if len(content) < header:
        raise StudyError(f"{path} has {len(content)} bytes, too few for the header of an IDX file")
    found, *sizes = struct.unpack(f">{header // 4}I", content[:header])
    if found != magic:
        raise StudyError(f"{path} begins with magic number {found:#x}, not {magic:#x}: no IDX file of {kind}")
    if sizes != [file.items, *file.shape] or len(content) != size:
        expected = " x ".join(map(str, [file.items, *file.shape]))
        raise StudyError(
            f"{path} holds {' x '.join(map(str, sizes))} {kind} in {len(content)} bytes, not {expected} and a header"
        )
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise StudyError(f"{path} has another SHA-256 than MNIST's {file.name}: it is damaged or other data")
    return _bytes(content[header:]).view(-1, item)


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


if __name__ == "__main__":
    sample, labels = pack(load(sys.argv[1])), bytes(torch.cat(load_labels(sys.argv[1])).tolist())
    for path, content in ((SAMPLE, sample), (LABELS, labels)):
        path.write_bytes(gzip.compress(content, 9, mtime=0))
        print(path.name, hashlib.sha256(content).hexdigest())
