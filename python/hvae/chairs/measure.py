"""The finished model's figures: views it never saw beside the nearest that it saw, chairs with other features."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hvae.chairs import study
from hvae.chairs.data import ELEVATIONS, Gallery, Target, coloured
from hvae.chairs.models import Generator
from hvae.chairs.study import Job
from hvae.chairs.styles import Style
from hvae.densities import standard_normal_divergence

#: What feature arithmetic changes: a field of the style, from one value to another.
FEATURES = {
    "arms on": ("arm_kind", "none", "both"),
    "arms off": ("arm_kind", "both", "none"),
    "four legs to a pedestal": ("leg_kind", "four", "pedestal"),
    "panel to slats": ("back_kind", "panel", "slats"),
}
#: Colour, brightness and zoom of pictures made for figures.
NEUTRAL = torch.tensor([1.0, 0.75, 0.45, 0.9, 1.0])
N_SHOWN, N_STEPS = 6, 7


class Quality(NamedTuple):
    """Of pictures: root of the mean square error of the colours, and mean intersection over union of the masks."""

    error: float
    overlap: float


def quality(drawn: Target, truth: Target) -> Quality:
    """Of what is drawn."""
    error = (drawn.image - truth.image).double().square().mean().sqrt().item()
    ours, other = drawn.mask.bool().flatten(1), truth.mask.bool().flatten(1)
    overlap = (ours & other).sum(1) / (ours | other).sum(1).clamp(min=1)
    return Quality(error, overlap.double().mean().item())


@torch.no_grad()
def drawn(model: Generator, z: Tensor, view: Tensor, transform: Tensor) -> Target:
    """What the network draws, the mask where it is likelier than not."""
    parts = zip(*(given.split(study.BATCH_SIZE) for given in (z, view, transform)), strict=True)
    images, logits = zip(*(model.draw(*part) for part in parts), strict=True)
    return Target(torch.cat(images), (torch.cat(logits) > 0).to(torch.uint8))


def predicted(model: Generator, gallery: Gallery, index: Tensor) -> tuple[Target, Target]:
    """From the means of q, and the truth."""
    chair, view, transform = gallery.condition(index)
    return drawn(model, model.loc.detach()[chair], view, transform), gallery.target(index)


class Nearest(NamedTuple):
    """What was seen nearest to pictures: its azimuth ``(B,)``, whether it is to be mirrored, and how many steps off."""

    azimuth: Tensor
    mirrored: Tensor
    steps: Tensor


def nearest(gallery: Gallery, index: Tensor, mirror: bool) -> Nearest:
    """In training, of the same chair and elevation; with ``mirror`` pictures from the other side count, too."""
    chair, azimuth, _ = index.unbind(-1)
    count = len(gallery.azimuths)
    other = torch.arange(count)
    steps = gallery.steps_between(azimuth.unsqueeze(1), other)
    from_other_side = gallery.steps_between(azimuth.unsqueeze(1), -other)
    both = torch.cat([steps, from_other_side], 1) if mirror else steps
    taken = gallery.unseen[chair].repeat(1, 2 if mirror else 1)
    found = both.masked_fill(taken, count).min(1)
    return Nearest(found.indices % count, found.indices >= count, found.values)


def nearest_pictures(gallery: Gallery, index: Tensor, mirror: bool) -> Target:
    """The nearest pictures in training, drawn again in the colour, brightness and zoom of those that are asked for."""
    found = nearest(gallery, index, mirror)
    transforms = gallery.transforms[index.unbind(-1)]
    shades = []
    for (chair, _, elevation), azimuth, mirrored, transform in zip(
        index.tolist(), found.azimuth.tolist(), found.mirrored.tolist(), transforms, strict=True
    ):
        shade = gallery.draw(gallery.styles[chair], azimuth, elevation, transform[4].item())
        shades.append(shade.flip(-1) if mirrored else shade)
    return coloured(torch.stack(shades), transforms)


def figures(model: Generator, gallery: Gallery) -> dict[str, Any]:
    """Numbers of the finished model."""
    seen, unseen = (gallery.indices(unseen=which) for which in (False, True))
    found: dict[str, Any] = {"seen": list(quality(*predicted(model, gallery, seen)))}
    steps = nearest(gallery, unseen, mirror=False).steps
    views = []
    for distance in [None, *steps.unique().tolist()]:
        index = unseen if distance is None else unseen[steps == distance]
        ours, truth = predicted(model, gallery, index)
        rivals = [quality(nearest_pictures(gallery, index, mirror), truth) for mirror in (False, True)]
        degrees = None if distance is None else 360 * distance / len(gallery.azimuths)
        names = ("model", "nearest", "mirrored")
        values = {name: list(each) for name, each in zip(names, (quality(ours, truth), *rivals), strict=True)}
        views.append({"degrees": degrees, "pictures": len(index), **values})
    found["views"] = views
    arithmetic = {name: changed(model, gallery, *feature) for name, feature in FEATURES.items()}
    found["arithmetic"] = {name: values for name, values in arithmetic.items() if values}
    if model.gaussian:
        loc, log_scale = model.loc.detach(), model.log_scale.detach()
        found["divergence"] = standard_normal_divergence(loc, log_scale).mean().item()
    return found


def direction(model: Generator, gallery: Gallery, name: str, before: str, after: str) -> Tensor | None:
    """From the mean z of chairs with one feature to that of chairs with another; None where there are none."""
    kinds = [getattr(style, name) for style in gallery.styles]
    groups = [[chair for chair, kind in enumerate(kinds) if kind == which] for which in (before, after)]
    if not all(groups):
        return None
    start, end = (model.loc.detach()[group].mean(0) for group in groups)
    return end - start


def changed(model: Generator, gallery: Gallery, name: str, before: str, after: str) -> dict[str, Any] | None:
    """Every chair that has a feature, given another: beside the truth, as is the chair unchanged."""
    step = direction(model, gallery, name, before, after)
    if step is None:
        return None
    styles = {chair: style for chair, style in enumerate(gallery.styles) if getattr(style, name) == before}
    azimuths = range(0, len(gallery.azimuths), max(1, len(gallery.azimuths) // 4))
    index = torch.tensor([(chair, azimuth, 0) for chair in styles for azimuth in azimuths])
    view = gallery.view(index[:, 1], index[:, 2])
    transform = NEUTRAL.expand(len(index), -1)
    truth = _truth(gallery, [_given(styles[chair], name, after) for chair in index[:, 0].tolist()], index)
    z = model.loc.detach()[index[:, 0]]
    moved, unmoved = (quality(drawn(model, each, view, transform), truth) for each in (z + step, z))
    return {"chairs": len(styles), "changed": list(moved), "unchanged": list(unmoved)}


def _given(style: Style, name: str, kind: str) -> Style:
    """The chair with another feature."""
    changes: dict[str, Any] = {name: kind}
    return replace(style, **changes)


def _truth(gallery: Gallery, styles: list[Style], index: Tensor) -> Target:
    """Of any chairs from the views of ``index (B, 3)``."""
    views, zoom = index[:, 1:].tolist(), NEUTRAL[4].item()
    shades = [
        gallery.draw(style, azimuth, elevation, zoom) for style, (azimuth, elevation) in zip(styles, views, strict=True)
    ]
    return coloured(torch.stack(shades), NEUTRAL.expand(len(shades), -1))


def pictures(job: Job, model: Generator, gallery: Gallery) -> dict[str, Tensor]:
    """What the report shows: rows of pictures, ``(rows, columns, S, S, 3)`` uint8."""
    found = {"unseen": _unseen(model, gallery), "interpolation": _interpolation(model, gallery)}
    rows = [_arithmetic(model, gallery, *feature) for feature in FEATURES.values()]
    if any(row is not None for row in rows):
        found["arithmetic"] = torch.stack([row for row in rows if row is not None])
    if model.gaussian:
        z = job.noise((2 * N_STEPS, model.loc.shape[1]), "samples")
        found["samples"] = _neutral(model, gallery, z).unflatten(0, (2, N_STEPS))
    return found


def _unseen(model: Generator, gallery: Gallery) -> Tensor:
    """A column a picture, of as many chairs, the farthest from what was seen: nearest seen, drawn, truth."""
    index = gallery.indices(unseen=True)
    steps = nearest(gallery, index, mirror=False).steps
    chosen = []
    for chair in index[:, 0].unique().tolist()[:N_SHOWN]:
        own = (index[:, 0] == chair).nonzero().squeeze(1)
        chosen.append(own[steps[own].argmax()])
    index = index[torch.stack(chosen)]
    ours, truth = predicted(model, gallery, index)
    return torch.stack([_shown(each) for each in (nearest_pictures(gallery, index, False), ours, truth)])


def _interpolation(model: Generator, gallery: Gallery) -> Tensor:
    """A row a pair of chairs, z on the line between theirs."""
    pairs = [(2 * row, 2 * row + 1) for row in range(min(4, len(gallery.styles) // 2))]
    t = torch.linspace(0, 1, N_STEPS).unsqueeze(1)
    loc = model.loc.detach()
    rows = [_neutral(model, gallery, torch.lerp(loc[one], loc[other], t)) for one, other in pairs]
    return torch.stack(rows)


def _arithmetic(model: Generator, gallery: Gallery, name: str, before: str, after: str) -> Tensor | None:
    """Two chairs, three pictures of each: drawn as it is, drawn with the other feature, truth."""
    step = direction(model, gallery, name, before, after)
    if step is None:
        return None
    chairs = [chair for chair, style in enumerate(gallery.styles) if getattr(style, name) == before]
    shown = []
    for chair in (chairs[0], chairs[-1]):
        z = model.loc.detach()[chair]
        truth = _truth(gallery, [_given(gallery.styles[chair], name, after)], _oblique(gallery, 1))
        shown += [*_neutral(model, gallery, torch.stack([z, z + step])), *_shown(truth)]
    return torch.stack(shown)


def _oblique(gallery: Gallery, count: int) -> Tensor:
    """The view of figures, an eighth of the way around, from above: ``(count, 3)``."""
    return torch.tensor([[0, len(gallery.azimuths) // 8, len(ELEVATIONS) - 1]]).expand(count, -1)


def _neutral(model: Generator, gallery: Gallery, z: Tensor) -> Tensor:
    index = _oblique(gallery, len(z))
    view = gallery.view(index[:, 1], index[:, 2])
    return _shown(drawn(model, z, view, NEUTRAL.expand(len(z), -1)))


def _shown(target: Target) -> Tensor:
    """``(B, S, S, 3)`` uint8."""
    return (target.image * 255).round().to(torch.uint8).movedim(1, -1)
