"""What is run: a setting, which all models of a run share, and jobs, one model each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hvae import experiment
from hvae.sentences import data
from hvae.sentences.data import Batch, Corpus
from hvae.sentences.models import SentenceModel

N_TRAIN, N_HELD_OUT = 30_000, 2_000
#: Of a text: rarer words are unknown, longer sentences are left out.
MIN_COUNT, MAX_WORDS = 3, 40
EPOCHS = 10
ANNEALING_EPOCHS = 5
BATCH_SIZE = 128
LEARNING_RATE = 2e-3
#: Of the gradient's norm.
LARGEST_GRADIENT = 5.0
EMBEDDING, HIDDEN, LATENT = 64, 128, 16
WORD_DROPOUT = 0.5
ANNEALINGS = ("linear", "logistic")


@dataclass(frozen=True)
class Method:
    """A model's kind: with z or without; the KL weight annealed; words dropped, all of them by an inputless decoder."""

    label: str
    latent: bool
    annealed: bool = False
    dropout: bool = False
    inputless: bool = False


METHODS = {
    "rnn": Method("RNN", latent=False),
    "vae-plain": Method("VAE, neither", latent=True),
    "vae-annealed": Method("VAE, annealing", latent=True, annealed=True),
    "vae-dropout": Method("VAE, word dropout", latent=True, dropout=True),
    "vae": Method("VAE, annealing and word dropout", latent=True, annealed=True, dropout=True),
    "inputless-rnn": Method("RNN, inputless", latent=False, inputless=True),
    "inputless": Method("VAE, annealing, inputless", latent=True, annealed=True, inputless=True),
}


@dataclass(frozen=True)
class Setting(experiment.Setting):
    """What all models of a run share; the order of data, too."""

    seed: int
    data: str
    checksum: str
    n_train: int
    n_held_out: int
    epochs: int
    hidden: int
    latent: int
    word_dropout: float
    annealing: str
    annealing_epochs: int
    likelihood_sentences: int
    likelihood_samples: int

    @property
    def steps_per_epoch(self) -> int:
        """The last step may have fewer sentences."""
        return -(-self.n_train // BATCH_SIZE)

    def weight(self, method: Method, step: int) -> float:
        """Of the divergence in a step of training."""
        return kl_weight(step, self.annealing_epochs * self.steps_per_epoch, self.annealing) if method.annealed else 1.0


def kl_weight(step: int, steps: int, annealing: str) -> float:
    """From 0 to 1 in so many steps: linear, or logistic from 0.0025 to 0.9975 and on."""
    if annealing == "linear":
        return min(1.0, step / steps)
    return 1 / (1 + math.exp(6 - 12 * step / steps))


def corpus(source: str, seed: int, n_train: int, n_held_out: int, min_count: int, max_words: int) -> Corpus:
    """The sentences of ``--data``."""
    if source == "grammar":
        return data.of_grammar(experiment.generator(seed, "grammar").initial_seed(), n_train, n_held_out)
    return data.of_file(Path(source), min_count, max_words)


@dataclass(frozen=True)
class Job(experiment.NamedJob):
    """A model of one kind."""

    methods = METHODS

    @property
    def method(self) -> Method:
        """Its kind."""
        return METHODS[self.name]

    def dropped(self, batch: Batch, setting: Setting, *purpose: object) -> Tensor | None:
        """The words that the decoder is not to see in a step of training."""
        if not self.method.dropout:
            return None
        return torch.rand(batch.words.shape, generator=self.generator(self.key, *purpose)) < setting.word_dropout

    def model(self, corpus: Corpus, setting: Setting) -> SentenceModel:
        """At its first parameters."""
        latent = setting.latent if self.method.latent else 0
        with experiment.drawing_from(self.generator("parameters")):
            return SentenceModel(len(corpus.vocabulary), latent, EMBEDDING, setting.hidden, self.method.inputless)
