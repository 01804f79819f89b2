"""Rows of ``results.json`` from the state files of finished jobs; ``report.md`` from both."""

from __future__ import annotations

from typing import Any

from hvae.chairs import data, models, study
from hvae.chairs.study import METHODS, Job, Setting
from hvae.chairs.train import State
from hvae.experiment import Config, table, versions
from hvae.runs import Row

NOTES = f"""\
Chairs of random measures, of boxes: 4 kinds of back, 3 of legs, 3 of arms (one of them on the left alone). Each is
drawn from all azimuths and {len(data.ELEVATIONS)} elevations, in one picture each, with a colour, brightness and zoom
of its own. Of every other chair {data.SHARE_HELD_OUT:.1%} of the azimuths, one beside another, are never seen.

The network is told chair, view (sin and cos of azimuth and elevation) and transformation, and draws colours and a mask
through transposed convolutions. The bound of a picture is `log N(image; mean, {models.SCALE}^2) + log Bernoulli(mask)`
minus the divergence of the chair's z from N(0, I), which all pictures of the chair share; an embedding is a point,
without prior or divergence. Adam from 2e-3 to 0 along half a cosine, batches of {study.BATCH_SIZE}."""

ERRORS = """\
*bound*: a training picture's, on the average over the last epoch's updates, each before its step. *error*: root of the
mean square error of colours between 0 and 1, on white; *overlap*: intersection over union of the masks; both from the
mean of q."""
VIEWS = """\
*off* is the angle to the nearest azimuth at which the chair was seen. *nearest* shows that view in its place; it is
drawn again in the colour, brightness and zoom of the picture that is asked for, which flatters it. *mirrored* may also
take a view from the other side and mirror it, as most chairs are symmetric."""
ARITHMETIC = """\
To the z of each chair with one feature is added the mean z of the chairs that have the other, minus the mean z of the
chairs like itself. The truth is the same chair built with the other feature. *unchanged*: without the addition."""


def row_of(job: Job, state: State, setting: Setting) -> Row:
    """A finished job's row."""
    return {
        **{"method": job.name, "dim": setting.latent, "bound": state.history[-1]["bound"]},
        **state.figures,
        **{"epochs": state.epoch, "seconds": state.seconds},
    }


def tables(config: Config, rows: list[Row]) -> list[str]:
    """The report but for its figures."""
    about = (
        f"Seed {config['seed']}; {config['n_chairs']} chairs from {config['n_azimuths']} azimuths and "
        f"{len(data.ELEVATIONS)} elevations, {config['size']} x {config['size']} pixels; {config['epochs']} epochs, "
        f"z of {config['latent']} dimensions; {versions(config)}."
    )
    parts = ["# Chairs", about, NOTES, "## Pictures", ERRORS, picture_table(rows)]
    parts += ["## Views never seen", VIEWS, view_table(rows)]
    return [*parts, "## Feature arithmetic", ARITHMETIC, arithmetic_table(rows)]


def summary(config: Config, rows: list[Row]) -> tuple[list[str], list[list[Any]]]:
    """Of the table that the command prints."""
    headers, lines = _pictures(rows)
    return [*headers, "seconds"], [[*line, row["seconds"]] for line, row in zip(lines, rows, strict=True)]


def picture_table(rows: list[Row]) -> str:
    """One line a model."""
    headers, lines = _pictures(rows)
    return table([*headers, "epochs"], [[*line, row["epochs"]] for line, row in zip(lines, rows, strict=True)])


def _pictures(rows: list[Row]) -> tuple[list[str], list[list[Any]]]:
    lines = []
    for row in rows:
        unseen = row["views"][0]["model"]
        lines.append([METHODS[row["method"]], row["bound"], row.get("divergence"), *row["seen"], *unseen])
    return ["model", "bound", "KL a chair", "seen: error", "overlap", "never seen: error", "overlap"], lines


def view_table(rows: list[Row]) -> str:
    """One line an angle and model."""
    lines: list[list[Any]] = []
    for row in rows:
        for view in row["views"]:
            off = "all" if view["degrees"] is None else f"{view['degrees']:.4g}°"
            scores = [value for name in ("model", "nearest", "mirrored") for value in view[name]]
            lines.append([METHODS[row["method"]], off, view["pictures"], *scores])
    headers = ["model", "off", "pictures"]
    headers += [f"{name}: {what}" for name in ("model", "nearest", "mirrored") for what in ("error", "overlap")]
    return table(headers, lines)


def arithmetic_table(rows: list[Row]) -> str:
    """One line a feature and model."""
    lines = []
    for row in rows:
        for name, found in row["arithmetic"].items():
            scores = [*found["changed"], *found["unchanged"]]
            lines.append([METHODS[row["method"]], name, found["chairs"], *scores])
    headers = ["model", "feature", "chairs", "error", "overlap", "unchanged: error", "overlap"]
    return table(headers, lines)
