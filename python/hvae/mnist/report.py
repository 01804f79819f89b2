"""Rows of ``results.json`` from the state files of finished jobs; ``report.md`` and the figures from both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hvae import runs
from hvae.experiment import Config, table, versions
from hvae.mnist import figures
from hvae.mnist.state import State
from hvae.mnist.study import BRIDGED, DEEP, KEYS, LAST_EPOCHS, Job, Setting
from hvae.runs import Row

NOTES = f"""Figures are means over images, in nats an image, with every constant.

- *train*: the training bound, averaged over the last epoch's steps, with each batch's own batch-norm statistics; none
  where the log joint was annealed in it, as what was maximised then is no bound.
- *validation*: the same bound of the validation images after the last epoch, with running statistics.
- *validation, last {LAST_EPOCHS}*: its mean over the last {LAST_EPOCHS} epochs.
- *one sample*: the validation bound of one sample, by which all models compare like for like.
- *log-likelihood*: of the first validation images, by importance sampling.
- *printed*: what the documents print. The printed figure of hvae is no bound: the momentum was overwritten by zeros.
  Those of structured, structured-iaf and vae-iaf come from another setting: 200 epochs in which gates were learned and
  600 with the gates fixed, and log-likelihoods from 100 samples.
- The *train* bound of a structured model is that of relaxed gates as long as they are learned; otherwise a gate is open
  or closed.
- *decoder passes*: in an update, an image, with a gradient each: importance samples, leapfrog steps or bridges and the
  last value. Not among them are one at z_0 for batch norms, and what is computed again to save memory.
- *seconds an epoch*: wall time, validation included, beside whatever else the machine did.
- Structured models have five nodes of 16 dimensions, the others 64 dimensions; 40 with a maxout network.
"""
#: Of models, what is to be said of them where there are any.
MORE_NOTES = {
    DEEP: """\
- A maxout network has 40 latent dimensions, and two hidden layers of 400 units, each the largest of 4 linear maps, in
  the encoder and in the decoder. dlgm has a diagonal Gaussian posterior, which planar layers carry on whose parameters
  are the encoder's for each image (dlgm-planar), additive couplings of alternating halves (dlgm-nice), or leapfrog
  steps with a learned model of the momentum's way back (hvi). Layers begin as the identity, momenta as N(0, I),
  leapfrog steps short; a tenth of networks' outputs moves planar layers and momenta.
- Printed figures are of other settings, and stand beside runs of any network. Those of dlgm, dlgm-planar and dlgm-nice,
  from memory: 500,000 updates of RMSprop at 1e-5 with 100 images each, the log joint annealed in the first 10,000.
  Those of hvi are another paper's, of another network: log-likelihoods by importance sampling, no bounds.
""",
    BRIDGED: """\
- uha carries a sample of the encoder's Gaussian along K bridges to the model's posterior, one leapfrog step each, with
  learned temperatures, step sizes and refreshment of the momentum; ldvi has a network in the momentum's way back, too.
  The printed bounds of uha are of stochastically binarised digits, perceptrons of 450 units, and many more updates.
""",
    ("helmholtz",): """\
- A Helmholtz machine has layers of bits instead of latent dimensions, from below, and learns by wake-sleep, not by a
  gradient of the bound. No figure is printed.
""",
}


def row_of(job: Job, state: State, setting: Setting) -> Row:
    """A finished job's row."""
    last = state.history[-1]
    recent = [record["validation"] for record in state.history[-LAST_EPOCHS:]]
    bounds = {
        "train_bound": last["train"],
        "validation_bound": last["validation"],
        "validation_bound_last_epochs": sum(recent) / len(recent),
        "elbo": last["elbo"],
        "log_likelihood": state.log_likelihoods.mean().item(),
    }
    sides = {}
    if state.sandwich.shape[1]:
        lower, upper = state.sandwich.mean(1).tolist()
        sides = {"sandwich_lower": lower, "sandwich_upper": upper, "sandwich_images": state.sandwich.shape[1]}
    return {
        **{"method": job.model, "dim": job.latent(setting), "leapfrog_steps": job.n_steps},
        **{"importance_samples": job.samples, **{name: getattr(job, name) for name in KEYS.values()}},
        "units": list(job.units),
        **{"setting": setting.binarisation, "network": setting.network},
        **{name: runs.finite(value) for name, value in bounds.items()},
        **{"likelihood_images": len(state.log_likelihoods), "likelihood_samples": setting.likelihood_samples},
        **{"epochs": state.epoch, "steps": state.epoch * setting.steps_per_epoch, "seconds": state.seconds},
        **sides,
    }


def tables(config: Config, rows: list[Row]) -> list[str]:
    """The report but for its figures."""
    about = (
        f"Seed {config['seed']}; data {config['data']}: {config['n_train']:,} digits for training, "
        f"{config['n_validation']:,} for validation, binarisation {config['binarisation']!r}; network "
        f"{config['network']!r}, batches of {config['batch_size']}; {versions(config)}."
    )
    if decoder := config.get("decoder"):
        about += f" All models have the decoder of {decoder['job']} after {decoder['epochs']} epochs of training"
        about += ", and leave it as it is: they differ in the posterior alone."
    methods = {row["method"] for row in rows}
    more = [note for models, note in MORE_NOTES.items() if methods.intersection(models)]
    return ["# MNIST", about, "".join([NOTES, *more]), bound_table(config, rows), *sandwich_table(config, rows)]


def summary(config: Config, rows: list[Row]) -> tuple[list[str], list[list[Any]]]:
    """Of the table that the command prints."""
    names = ["train_bound", "validation_bound", "elbo", "log_likelihood", "seconds"]
    lines = [[Job.from_key(row["job"]).label, *(row[name] for name in names)] for row in rows]
    return ["model", "train", "validation", "one sample", "log-likelihood", "seconds"], lines


def drawn(directory: Path, jobs: list[tuple[Job, State]]) -> list[str]:
    """The report's figures."""
    parts = []
    for title, paths in figures.draw(directory, jobs).items():
        parts += [f"## {title}", *(f"![{path.stem}]({path.name})" for path in paths)]
    return parts


def bound_table(config: Config, rows: list[Row]) -> str:
    """Ours beside the printed figures, of which none is of another model's decoder; one line a model."""
    lines = []
    for row in rows:
        job = Job.from_key(row["job"])
        ours = [row[name] for name in ("train_bound", "validation_bound", "validation_bound_last_epochs", "elbo")]
        likelihood = [row["log_likelihood"], row["likelihood_images"], row["likelihood_samples"]]
        cost = [row["epochs"], row["seconds"] / row["epochs"]]
        printed = (None,) * 3 if config.get("decoder") else job.published(row["network"])
        lines.append([job.label, *ours, *printed, *likelihood, job.decoder_passes, *cost])
    headers = [
        *("model", "train", "validation", f"validation, last {LAST_EPOCHS}", "one sample"),
        *("printed, train", "printed, validation", "printed, log-likelihood"),
        *("log-likelihood", "images", "samples", "decoder passes", "epochs", "seconds an epoch"),
    ]
    return table(headers, lines)


def sandwich_table(config: Config, rows: list[Row]) -> list[str]:
    """Bounds of the likelihood of images that each model draws; nothing where there are none."""
    lines = []
    for row in rows:
        if "sandwich_lower" in row:
            lower, upper = row["sandwich_lower"], row["sandwich_upper"]
            lines.append([Job.from_key(row["job"]).label, lower, upper, upper - lower, row["sandwich_images"]])
    if not lines:
        return []
    about = f"""\
## The likelihood between two bounds

Of images drawn from each model itself, for which the latents are exact samples of the posterior: annealed importance
sampling along {config["sandwich_bridges"]} bridges from the encoder's Gaussian bounds `log p(x)` from below, its
reverse from above; means over images, which differ from model to model."""
    return [about, table(["model", "lower", "upper", "gap", "images"], lines)]
