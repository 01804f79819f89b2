"""Sentences as numbers: of the grammar, or of a text with one sentence a line."""

from __future__ import annotations

import array
import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hvae.runs import StudyError
from hvae.sentences import grammar

PADDING, UNKNOWN, BEGIN, END = range(4)
SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
#: Every tenth sentence of a text is held out.
HELD_OUT = 10
#: Bytes of a line of which no more is read.
LONGEST_LINE = 1 << 16
#: Punctuation, by range; all else but blanks makes words, whatever the script: ``\w`` has no combining vowels.
MARKS = r"!-/:-@\[-^`{-~\u00a1\u00a7\u00ab\u00b6\u00b7\u00bb\u00bf\u0964\u0965"
MARKS += r"\u2010-\u2027\u2030-\u205e\u3001-\u3003\u3008-\u3011\uff01-\uff0f\uff1a-\uff20"
#: Of a text: ``<unk>`` and its like, words with what is within them, and runs of marks.
WORD = re.compile(rf"<\w+>|['\u2019]?[^\s{MARKS}]+(?:['\u2019-][^\s{MARKS}]+)*|(?:(?!<\w+>)[{MARKS}])+")


class Batch(NamedTuple):
    """Sentences ``words (B, T)`` int64, each followed by padding, and their lengths ``(B,)``."""

    words: Tensor
    lengths: Tensor


class Sentences:
    """Any number of sentences as one array of words.

    Args:
        words: of all sentences, one after another, int32.
        starts: where each begins, and the end of the last, int64.
    """

    def __init__(self, words: Tensor, starts: Tensor):
        self.words, self.starts = words, starts

    @classmethod
    def of(cls, sentences: Iterable[Iterable[int]]) -> Sentences:
        """From one after another, four bytes a word."""
        words, starts = array.array("i"), array.array("q", [0])
        for sentence in sentences:
            words.extend(sentence)
            starts.append(len(words))
        return cls(_tensor(words, torch.int32), _tensor(starts, torch.int64))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def batch(self, chosen: Tensor) -> Batch:
        """Those of the indices ``(B,)``."""
        starts = self.starts[chosen]
        lengths = self.starts[chosen + 1] - starts
        place = torch.arange(int(lengths.max()))
        inside = place < lengths.unsqueeze(1)
        words = self.words[(starts.unsqueeze(1) + place).clamp(max=len(self.words) - 1)].long()
        return Batch(words.masked_fill(~inside, PADDING), lengths)


def _goes_on(word: int) -> bool:
    return word not in (END, PADDING)


def _tensor(numbers: array.array, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(numbers, dtype=dtype) if numbers else torch.zeros(0, dtype=dtype)


@dataclass(frozen=True)
class Corpus:
    """Sentences for training and held out, and what is known of them.

    Attributes:
        vocabulary: words by their numbers.
        longest: words of the longest sentence.
        checksum: of the text, or the name of the grammar.
        left_out: how many sentences were too long.
        unknown: the share of the held-out words that are not in the vocabulary.
        truth: the grammar, where they are of it.
    """

    vocabulary: list[str]
    train: Sentences
    held_out: Sentences
    longest: int
    checksum: str
    left_out: int = 0
    unknown: float = 0.0
    truth: grammar.Grammar | None = None

    def texts(self, sentences: Tensor) -> list[list[str]]:
        """The words of each row of numbers, up to the end or padding."""
        lines = sentences.tolist()
        return [[self.vocabulary[word] for word in itertools.takewhile(_goes_on, line)] for line in lines]


def of_grammar(seed: int, n_train: int, n_held_out: int) -> Corpus:
    """Sentences drawn from the grammar, those held out by the same means."""
    truth = grammar.english()
    vocabulary = [*SPECIAL, *truth.words()]
    numbers = {word: number for number, word in enumerate(vocabulary)}
    generator = random.Random(seed)
    train, held_out = (
        Sentences.of([numbers[word] for word in truth.sample(generator)] for _ in range(count))
        for count in (n_train, n_held_out)
    )
    longest = max(int(part.starts.diff().max()) for part in (train, held_out))
    return Corpus(vocabulary, train, held_out, longest, checksum="grammar", truth=truth)


def of_file(path: Path, min_count: int, max_words: int) -> Corpus:
    """A text in UTF-8, a sentence a line; every tenth sentence is held out.

    Marks count as words of their own, apostrophes and hyphens within a word are part of it.

    It is read three times, to count words and to number those of each part, so that no more is in memory than four
    bytes a word. Longer sentences are left out. Words that are rarer in training are unknown, as is ``<unk>`` itself.

    Raises:
        StudyError: there is no such file, it is no UTF-8, or has too few sentences.
    """
    counts: Counter[str] = Counter()
    digest = hashlib.sha256()
    left_out = kept = longest = 0
    for words in _lines(path, digest):
        if not words:
            continue
        if len(words) > max_words:
            left_out += 1
            continue
        kept += 1
        longest = max(longest, len(words))
        if kept % HELD_OUT:
            counts.update(words)
    if kept < 2 * HELD_OUT:
        raise StudyError(f"{path} has {kept} sentences of 1 to {max_words} words: at least {2 * HELD_OUT} are needed")
    known = sorted(word for word, count in counts.items() if count >= min_count and word not in SPECIAL)
    vocabulary = [*SPECIAL, *known]
    numbers = {word: number for number, word in enumerate(known, len(SPECIAL))}

    def numbered(held_out: bool) -> Iterator[list[int]]:
        sentences = (words for words in _lines(path) if 0 < len(words) <= max_words)
        for index, words in enumerate(sentences, 1):
            if (index % HELD_OUT == 0) is held_out:
                yield [numbers.get(word, UNKNOWN) for word in words]

    train, held_out = (Sentences.of(numbered(held_out)) for held_out in (False, True))
    unknown = (held_out.words == UNKNOWN).double().mean().item()
    return Corpus(vocabulary, train, held_out, longest, digest.hexdigest(), left_out, unknown)


def _lines(path: Path, digest=None) -> Iterator[list[str]]:
    """The words of each line; of a line longer than ``LONGEST_LINE`` bytes as many as show that it is too long."""
    if path.is_fifo() or path.is_char_device():
        raise StudyError(f"--data {path}: not a file, and it is read three times")
    try:
        with path.open("rb") as stream:
            number = 0
            while line := stream.readline(LONGEST_LINE):
                number += 1
                whole = line
                while len(whole) == LONGEST_LINE and not whole.endswith(b"\n"):
                    if digest:
                        digest.update(whole)
                    whole = stream.readline(LONGEST_LINE)
                if digest:
                    digest.update(whole)
                if whole is line:
                    yield WORD.findall(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                else:
                    yield [SPECIAL[UNKNOWN]] * LONGEST_LINE
    except UnicodeDecodeError as error:
        raise StudyError(f"{path} is not UTF-8: line {number} has the byte {error.object[error.start]:#04x}") from error
    except OSError as error:
        raise StudyError(f"--data {path}: {error.strerror}") from error
