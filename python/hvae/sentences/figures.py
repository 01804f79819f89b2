"""The study's pictures, curves and latent spaces, and its sentences: samples, reconstructions, lines between two."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hvae.runs import writing
from hvae.sentences.study import Job
from hvae.sentences.train import State

Jobs = Sequence[tuple[Job, State]]


def draw(directory: Path, jobs: Jobs) -> list[str]:
    """Draw the figures in ``directory``; returns the report's part of each, and the sentences."""
    if not jobs:
        return []
    path = directory / "curves.png"
    with writing(path) as partial:
        _curves(jobs).savefig(partial, dpi=80)
    return [f"## Training\n\n![Negative bound and divergence against epochs]({path.name})", *texts(jobs)]


def _curves(jobs: Jobs):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    truth = {state.figures["true_log_likelihood"] for _, state in jobs if "true_log_likelihood" in state.figures}
    for job, state in jobs:
        epochs = [record["epoch"] for record in state.history]
        left.plot(epochs, [-record["held_out"] for record in state.history], label=job.method.label)
        if job.method.latent:
            divergences = [record["held_out_divergence"] for record in state.history]
            right.plot(epochs, divergences, label=job.method.label, color=left.lines[-1].get_color())
    for value in truth:
        left.axhline(-value, color="black", linestyle=":", label="truth")
    left.set(xlabel="epochs", ylabel="negative bound, nats a sentence", title="Held-out sentences", yscale="log")
    right.set(xlabel="epochs", ylabel="KL(q(z | x) | p(z)), nats", yscale="symlog", ylim=(0, None))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    return figure


def texts(jobs: Jobs) -> list[str]:
    """The report's parts of sentences."""
    parts = ["## Sentences\n\nWhere the truth is known, a star marks what the grammar never says."]
    for job, state in jobs:
        parts.append(f"### {job.method.label}: samples\n\n{_list(state.texts['samples'])}")
        if not job.method.latent:
            continue
        parts.append(f"The likeliest words for the same z of the prior:\n\n{_list(state.texts['greedy'])}")
        parts.append(f"### {job.method.label}: held-out sentences rebuilt\n\n{_rebuilt(state.texts['rebuilt'])}")
        parts.append(f"### {job.method.label}: from one held-out sentence to another")
        parts += [_list(line, ordered=True) for line in state.texts["lines"]]
    return parts


def _rebuilt(lines: list[list[str]]) -> str:
    """A table of sentences, their ``|`` escaped."""
    rows = [("sentence", "by the mean of q", "by a sample of q"), ("---",) * 3, *lines]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in row)} |" for row in rows)


def _list(sentences: list[str], ordered: bool = False) -> str:
    return "\n".join(f"{f'{number}.' if ordered else '-'} {_plain(text)}" for number, text in enumerate(sentences, 1))


def _plain(text: str) -> str:
    """Without what Markdown would take for its own."""
    return "".join(f"\\{letter}" if letter in "\\`*_<>|#[]" else letter for letter in text)
