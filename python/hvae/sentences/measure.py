"""The finished model's figures: likelihoods beside the truth, active units, and what its sentences are worth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvae import importance
from hvae.sentences import grammar, study
from hvae.sentences.data import Batch, Corpus, Sentences
from hvae.sentences.models import SentenceModel
from hvae.sentences.study import Job

SAMPLES_AT_A_TIME = 50
#: An active unit's mean varies by more over the sentences: its variance over x of ``E_q[z]``.
ACTIVE = 0.01
N_GENERATED, N_REBUILT = 500, 500
N_LINES, N_POINTS = 50, 7
N_SHOWN, N_LINES_SHOWN = 8, 3


@torch.no_grad()
def log_likelihood(model: SentenceModel, batch: Batch, n_samples: int, noise: Callable[[int, tuple], Tensor]) -> Tensor:
    """``log 1/S sum_s p(x, z_s) / q(z_s | x)`` of B sentences, ``(B,)`` in float64; a few samples at a time."""
    size = len(batch.words)

    def log_weights(number: int, samples: int) -> Tensor:
        repeated = Batch(batch.words.repeat(samples, 1), batch.lengths.repeat(samples))
        return model(repeated, noise(number, (samples * size, model.latent))).log_weight.view(samples, size)

    return importance.log_mean_weight(log_weights, n_samples, SAMPLES_AT_A_TIME)


@torch.no_grad()
def figures(model: SentenceModel, corpus: Corpus, log_likelihoods: Tensor) -> dict[str, Any]:
    """Numbers of the held-out sentences, most of them of the first, whose log-likelihoods ``(N,)`` are known."""
    count = len(log_likelihoods)
    batch = corpus.held_out.batch(torch.arange(count))
    words = int(batch.lengths.sum()) + count
    found = {
        "log_likelihood": log_likelihoods.mean().item(),
        "perplexity": math.exp(min(-log_likelihoods.sum().item() / words, 700.0)),
        "likelihood_sentences": count,
        "active_units": active_units(model, corpus.held_out) if model.latent else None,
    }
    if corpus.truth:
        exact = torch.tensor(list(map(corpus.truth.log_prob, corpus.texts(batch.words))), dtype=torch.float64)
        gap = exact - log_likelihoods
        found["true_log_likelihood"] = exact.mean().item()
        found["entropy"] = corpus.truth.entropy()
        found["gap"] = gap.mean().item()
        found["gap_error"] = gap.std().item() / math.sqrt(count) if count > 1 else None
    return found


@torch.no_grad()
def active_units(model: SentenceModel, sentences: Sentences) -> int:
    """How many dimensions of z have ``Var_x(E_q(z | x)[z]) > ACTIVE``.

    Source: Burda et al., Importance weighted autoencoders, arXiv 1509.00519, section 5.2.
    """
    return int((posterior_means(model, sentences).var(0) > ACTIVE).sum())


@torch.no_grad()
def posterior_means(model: SentenceModel, sentences: Sentences) -> Tensor:
    """``E_q(z | x)[z]`` of all sentences, ``(N, latent)``."""
    parts = torch.arange(len(sentences)).split(study.BATCH_SIZE)
    return torch.cat([model.encode(sentences.batch(chosen))[0] for chosen in parts])


@torch.no_grad()
def texts(job: Job, model: SentenceModel, corpus: Corpus) -> tuple[dict[str, Any], dict[str, Any]]:
    """Samples of the model; with z, held-out sentences rebuilt and lines between them; and figures of them all."""
    longest, written = corpus.longest + 5, corpus.texts
    uniform = torch.rand(longest, N_GENERATED, generator=job.generator(job.key, "words"))
    prior = job.noise((N_GENERATED, model.latent), "samples")
    samples = written(model.generate(prior, longest, uniform))
    shown: dict[str, Any] = {"samples": _shown(samples[:N_SHOWN], corpus)}
    found: dict[str, Any] = {"samples_in_language": _share_in_language(samples, corpus)}
    if not model.latent:
        return shown, found
    shown["greedy"] = _shown(written(model.generate(prior[:N_SHOWN], longest)), corpus)
    count = min(N_REBUILT, len(corpus.held_out))
    batch = corpus.held_out.batch(torch.arange(count))
    originals = corpus.texts(batch.words)
    loc, log_scale = model.encode(batch)
    by_sample = loc + log_scale.exp() * job.noise((count, model.latent), "rebuilt")
    rebuilt = {name: written(model.generate(z, longest)) for name, z in (("mean", loc), ("sample", by_sample))}
    for name, sentences in rebuilt.items():
        found[f"{name}_in_language"] = _share_in_language(sentences, corpus)
        found[f"{name}_same_words"] = _same_words(originals, sentences)
    found["kept"] = _kept(originals, rebuilt["mean"], corpus)
    both = (_shown(part[:N_SHOWN], corpus) for part in (originals, rebuilt["mean"], rebuilt["sample"]))
    shown["rebuilt"] = [list(line) for line in zip(*both, strict=True)]
    lines = interpolations(model, loc[: 2 * min(N_LINES, count // 2)], longest)
    along = [written(line) for line in lines]
    flat = [sentence for line in along for sentence in line]
    found["steps"] = len(flat)
    if corpus.truth:
        found["steps_in_language"] = sum(corpus.truth.log_prob(sentence) > -math.inf for sentence in flat)
    distinct = [len({" ".join(sentence) for sentence in line}) for line in along]
    found["distinct_on_a_line"] = sum(distinct) / len(distinct)
    shown["lines"] = [_shown(line, corpus) for line in along[:N_LINES_SHOWN]]
    return shown, found


def interpolations(model: SentenceModel, ends: Tensor, longest: int) -> list[Tensor]:
    """Likeliest sentences along ``(1 - t) z_1 + t z_2`` from each first ``z`` of a pair ``ends (2 N, latent)``."""
    first, second = ends[::2], ends[1::2]
    t = torch.linspace(0, 1, N_POINTS, dtype=ends.dtype).view(-1, 1, 1)
    points = torch.lerp(first, second, t).transpose(0, 1)  # (N, N_POINTS, latent)
    found = model.generate(points.flatten(0, 1), longest)
    return list(found.unflatten(0, (-1, N_POINTS)))


def _share_in_language(sentences: list[list[str]], corpus: Corpus) -> float | None:
    if corpus.truth is None:
        return None
    return sum(corpus.truth.log_prob(sentence) > -math.inf for sentence in sentences) / len(sentences)


def _same_words(originals: list[list[str]], rebuilt: list[list[str]]) -> float:
    """The share of words of the originals that are in their places."""
    pairs = [(a, b) for one, other in zip(originals, rebuilt, strict=True) for a, b in zip(one, other, strict=False)]
    return sum(a == b for a, b in pairs) / sum(map(len, originals))


def _kept(originals: list[list[str]], rebuilt: list[list[str]], corpus: Corpus) -> list[float] | None:
    """In what share topic, tense, number and tone are those of the original; a sentence of no kind kept none."""
    if corpus.truth is None:
        return None
    kinds = [[grammar.properties(corpus.truth, s) for s in sentences] for sentences in (originals, rebuilt)]
    nothing = (None,) * len(grammar.PROPERTIES)
    same = [[a == b for a, b in zip(one, other or nothing, strict=True)] for one, other in zip(*kinds, strict=True)]
    return [sum(column) / len(same) for column in zip(*same, strict=True)]


def _shown(sentences: list[list[str]], corpus: Corpus) -> list[str]:
    """As text; where the truth is known a star marks what it never says."""
    marks = ["" if corpus.truth is None or corpus.truth.log_prob(s) > -math.inf else " *" for s in sentences]
    return [" ".join(sentence) + mark for sentence, mark in zip(sentences, marks, strict=True)]
