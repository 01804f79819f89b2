"""Rows of ``results.json`` from the state files of finished jobs; ``report.md`` from both."""

from __future__ import annotations

from typing import Any

from hvae import runs
from hvae.experiment import Config, table, versions
from hvae.runs import Row
from hvae.sentences import grammar, measure, study
from hvae.sentences.study import METHODS, Job, Setting
from hvae.sentences.train import State

GRAMMAR = f"""\
The sentences come from a probabilistic grammar: some millions, of 6 to 15 words, each of one of
{len(grammar.TOPICS)} topics, {len(grammar.TENSES)} tenses, {len(grammar.NUMBERS)} numbers and {len(grammar.TONES)}
tones, which tie its words together. No sentence can be made in two ways, so its probability and the entropy of all are
exact: no model can do better than *truth*, the grammar's own log-probability of the same held-out sentences."""

NOTES = f"""\
Figures are means over held-out sentences, in nats a sentence, its end among what is predicted. The weight of the
divergence is annealed from 0 to 1 where the name says so; word dropout hides words from the decoder in training, never
from what it has to predict; an inputless decoder sees none, in evaluation neither.

- *bound*: the negative bound, all held-out sentences, one sample each; for a network without z the likelihood itself.
- *KL*: the divergence of q(z | x) from the prior in it.
- *NLL*: minus log p(x) by importance sampling from q, of the first held-out sentences, as many as *sentences* says;
  *perplexity*: its exponential a word, the end being a word.
- *above the truth*: NLL minus that of the truth on the same sentences, with two paired standard errors.
- *active*: dimensions of z with `Var_x(E_q[z]) > {measure.ACTIVE}` (Burda et al., section 5.2).
- Adam at 2e-3, batches of {study.BATCH_SIZE}, gradients clipped to a norm of 5; words of {study.EMBEDDING} dimensions,
  one LSTM layer on both sides. z gives the decoder's first state and stands beside each word. All jobs take the same
  batches."""

WORTH = f"""\
*samples*: {measure.N_GENERATED} sentences of the model, z from the prior and each word by its probability; *rebuilt*:
{measure.N_REBUILT} held-out sentences, encoded and decoded to the likeliest words, from the mean of q or from a sample;
*same words*: the share of their words that came back in their places; *steps*: of {measure.N_LINES} lines
`(1 - t) z1 + t z2` between two of them, {measure.N_POINTS} steps each, decoded to the likeliest words; *distinct*: how
many different sentences a line has."""
LANGUAGE = "*In the language* are sentences that the grammar can make, every word of them."
KEPT = """\
In what share of the sentences rebuilt from the mean of q a property is that of the original. Where q is the prior, z
knows nothing, and a share is that of the one sentence that the decoder then always says. A sentence that the grammar
cannot make counts as keeping nothing: where few rebuilt ones are in the language, these shares say little of z."""


def row_of(job: Job, state: State, setting: Setting) -> Row:
    """A finished job's row."""
    figures = {name: runs.finite(value) if isinstance(value, float) else value for name, value in state.figures.items()}
    return {
        **{"method": job.name, "dim": setting.latent if job.method.latent else 0},
        **figures,
        **{"likelihood_samples": setting.likelihood_samples if job.method.latent else 1},
        **{"epochs": state.epoch, "steps_taken": state.epoch * setting.steps_per_epoch, "seconds": state.seconds},
    }


def tables(config: Config, rows: list[Row]) -> list[str]:
    """The report but for its figures."""
    parts = ["# Sentences", _about(config)]
    exact = config["data"] == "grammar"
    if exact:
        parts.append(GRAMMAR)
    parts += [NOTES, "## Likelihood", likelihood_table(rows)]
    parts += ["## What the sentences are worth", WORTH + (f" {LANGUAGE}" if exact else ""), worth_table(rows)]
    if exact:
        parts += ["## What z holds", KEPT, kept_table(rows)]
    return parts


def _about(config: Config) -> str:
    said = config["corpus"]
    about = (
        f"Seed {config['seed']}; data {config['data']}: {config['n_train']:,} sentences for training, "
        f"{config['n_held_out']:,} held out, {said['vocabulary']:,} words"
    )
    if config["data"] == "grammar":
        about += f"; entropy {grammar.english().entropy():.4f} nats a sentence"
    else:
        about += (
            f" that come {said['min_count']} times or more in training; {100 * said['unknown']:.2f} % of the held-out "
            f"words are unknown, and count as `<unk>`; {said['left_out']:,} sentences of more than {said['max_words']} "
            "words left out"
        )
    annealing = f"{config['annealing']} annealing in {config['annealing_epochs']} of {config['epochs']} epochs"
    return f"{about}; {annealing}, word dropout {config['word_dropout']}; {versions(config)}."


def summary(config: Config, rows: list[Row]) -> tuple[list[str], list[list[Any]]]:
    """Of the table that the command prints."""
    lines = []
    for row in rows:
        divergence, active = (row["divergence"], row["active_units"]) if row["dim"] else (None, None)
        scores = [-row["bound"], divergence, -row["log_likelihood"], row["perplexity"], _above(row)]
        lines.append([METHODS[row["method"]].label, *scores, active, row["seconds"]])
    return ["model", "bound", "KL", "NLL", "perplexity", "above the truth", "active", "seconds"], lines


def _above(row: Row) -> str | None:
    if row.get("gap") is None:
        return None
    return f"{row['gap']:.3f}" + (f" ± {2 * row['gap_error']:.3f}" if row["gap_error"] is not None else "")


def likelihood_table(rows: list[Row]) -> str:
    """One line a model, the truth first."""
    headers = ["model", "bound", "KL", "NLL", "perplexity", "above the truth", "active", "of"]
    headers += ["sentences", "samples"]
    lines = []
    for row in rows:
        divergence = row["divergence"] if row["dim"] else None
        scores = [-row["bound"], divergence, -row["log_likelihood"], row["perplexity"], _above(row)]
        cost = [row["active_units"], row["dim"] or None, row["likelihood_sentences"], row["likelihood_samples"]]
        lines.append([METHODS[row["method"]].label, *scores, *cost])
    if rows and rows[0].get("true_log_likelihood") is not None:
        lines.insert(0, ["truth", None, None, -rows[0]["true_log_likelihood"], *[None] * 6])
    return table(headers, lines)


def worth_table(rows: list[Row]) -> str:
    """One line a model."""
    headers = ["model", "samples in the language", "rebuilt, mean: in the language", "same words"]
    headers += ["rebuilt, sample: in the language", "same words", "steps", "in the language", "distinct"]
    lines = []
    for row in rows:
        names = ["samples_in_language", "mean_in_language", "mean_same_words", "sample_in_language"]
        names += ["sample_same_words", "steps", "steps_in_language", "distinct_on_a_line"]
        lines.append([METHODS[row["method"]].label, *(row.get(name) for name in names)])
    return table(headers, lines)


def kept_table(rows: list[Row]) -> str:
    """One line a model with z."""
    lines = [[METHODS[row["method"]].label, *row["kept"]] for row in rows if row["dim"]]
    return table(["model", *grammar.PROPERTIES], lines)
