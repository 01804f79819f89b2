"""``hvae chairs``: boxes by geometry, views that are never seen, the network by its formulas, and the command."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hvae import cli, experiment, runs
from hvae.chairs import data, measure, models, render, study, styles, train
from hvae.chairs.data import Gallery, Target
from hvae.chairs.models import Generator
from hvae.chairs.render import AMBIENT, LIGHT, REACH, Boxes, View
from hvae.chairs.study import Job, Setting
from seen import check_what_is_seen
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

SIZE = 48


def boxes(*each):
    """From ``(centre, sides)`` or ``(centre, sides, albedo)``, upright."""
    centre, sides, albedo = zip(*((*box, 1.0)[:3] for box in each), strict=True)
    return Boxes(np.array(centre), np.array(sides) / 2, np.zeros(len(each)), np.array(albedo))


def centres(size=SIZE, zoom=1.0):
    """Where the pixels are in the picture's plane: to the right, and up."""
    along = (np.arange(size) + 0.5 - size / 2) * 2 * REACH / (size * zoom)
    return along, -along


# ---- The renderer ----


@pytest.mark.parametrize("zoom", [1.0, 0.7])
def test_a_box_from_the_front_is_a_rectangle(zoom):
    box = boxes(((0.11, 0.3, -0.14), (0.5, 0.2, 0.31)))
    right, up = centres(zoom=zoom)
    expected = (abs(up + 0.14) < 0.155)[:, None] & (abs(right - 0.11) < 0.25)
    brightness = render.draw(box, View(0, 0, zoom), SIZE)
    assert ((brightness > 0) == expected).all()
    assert expected.any()
    np.testing.assert_allclose(brightness[expected], AMBIENT + (1 - AMBIENT) * LIGHT[2])


@pytest.mark.parametrize(
    ("azimuth", "width", "offset"), [(0, 0.5, 0.1), (90, 0.2, 0.3), (180, 0.5, -0.1), (270, 0.2, -0.3)]
)
def test_the_sides_of_a_box(azimuth, width, offset):
    """From the right what is behind is on the right hand."""
    box = boxes(((0.1, 0.3, 0.0), (0.5, 0.2, 0.3)))
    right, up = centres()
    expected = (abs(up) < 0.15)[:, None] & (abs(right - offset) < width / 2)
    assert ((render.draw(box, View(azimuth, 0), SIZE) > 0) == expected).all()


def test_from_above_the_depth_is_seen_and_the_top_is_another_face():
    box = boxes(((0.0, 0.0, 0.0), (0.5, 0.4, 0.3)))
    right, up = centres()
    elevation = math.radians(30)
    half = 0.15 * math.cos(elevation) + 0.2 * math.sin(elevation)
    brightness = render.draw(box, View(0, 30), SIZE)
    assert ((brightness > 0) == ((abs(up) < half)[:, None] & (abs(right) < 0.25))).all()
    edge = 0.15 * math.cos(elevation) - 0.2 * math.sin(elevation)  # of the top, in front
    top = (up > edge)[:, None] & (brightness > 0)
    above, ahead = (
        np.array(LIGHT) @ axis
        for axis in ((0, math.cos(elevation), math.sin(elevation)), (0, -0.5, math.cos(elevation)))
    )
    expected = np.where(top, AMBIENT + (1 - AMBIENT) * above, AMBIENT + (1 - AMBIENT) * ahead) * (brightness > 0)
    np.testing.assert_allclose(brightness, expected)


def test_a_leaning_box_is_a_leaning_rectangle_from_the_side():
    tilt = 0.4
    box = boxes(((0.0, 0.1, 0.05), (0.3, 0.1, 0.6)))._replace(tilt=np.array([tilt]))
    right, up = centres()
    y, z = right[None, :] - 0.1, up[:, None] - 0.05
    along = z * math.cos(tilt) + y * math.sin(tilt)  # the top is farther from the front, on the right hand
    across = y * math.cos(tilt) - z * math.sin(tilt)
    assert ((render.draw(box, View(90, 0), SIZE) > 0) == ((abs(along) < 0.3) & (abs(across) < 0.05))).all()


@pytest.mark.parametrize("azimuth", [0, 360 / 16, 77])
def test_a_whole_turn_changes_nothing(azimuth):
    chair = styles.boxes(styles.random_style(np.random.default_rng(3)))
    once, again = (render.draw(chair, View(azimuth + turn, 20), SIZE, styles.MIDDLE) for turn in (0, 360))
    assert (once == again).all()
    other = render.draw(chair, View(azimuth + 30, 20), SIZE, styles.MIDDLE)
    assert (once != other).any()


@pytest.mark.parametrize("swap", [False, True])
def test_nearer_hides_farther(swap):
    near, far = ((0.1, -0.3, 0.0), (0.3, 0.1, 0.3), 0.5), ((0.0, 0.2, 0.0), (0.8, 0.1, 0.8), 1.0)
    both = boxes(*((far, near) if swap else (near, far)))
    own = [render.draw(boxes(each), View(0, 0), SIZE) for each in (near, far)]
    front = render.draw(both, View(0, 0), SIZE)
    assert (front == np.where(own[0] > 0, *own)).all()
    assert (own[0] > 0).any()
    behind = render.draw(both, View(180, 0), SIZE)
    assert (behind == render.draw(boxes(far), View(180, 0), SIZE)).all()


def test_of_boxes_that_cross_each_hides_the_other_where_it_is_nearer():
    long, wide = ((0.0, 0.0, 0.0), (0.2, 0.9, 0.4), 1.0), ((0.0, 0.0, 0.0), (0.9, 0.2, 0.4), 0.5)
    together, first, second = (render.draw(boxes(*each), View(45, 0), 96) for each in ((long, wide), (long,), (wide,)))
    right, _ = centres(96)
    # from between front and right the long one's front end is on the left hand, the wide one's right end on the right
    for side, alone in ((right < -0.15, first), (right > 0.15, second)):
        assert (together[:, side] == alone[:, side]).all()
        assert (alone[:, side] > 0).any()


def test_no_ray_is_lost_at_the_edge_of_the_picture():
    wide = boxes(((0.0, 0.0, 0.0), (9.0, 9.0, 9.0)))
    assert (render.draw(wide, View(33, 12), 16) > 0).all()
    aside = boxes(((5.0, 0.0, 0.0), (1.0, 1.0, 1.0)), ((0.0, 0.0, -5.0), (1.0, 1.0, 1.0)))
    assert (render.draw(aside, View(0, 0), 16) == 0).all()


@pytest.mark.parametrize("seed", range(12))
def test_chairs_stand_in_the_picture_from_the_ground_up(seed):
    style = styles.random_style(np.random.default_rng(seed))
    parts = styles.boxes(style)
    assert (parts.centre - parts.half)[:, 2].min() == pytest.approx(0, abs=1e-9)
    for azimuth in (0, 60, 200):
        seen = render.draw(parts, View(azimuth, 35, 1.05), SIZE, styles.MIDDLE) > 0
        assert not any(edge.any() for edge in (seen[0], seen[-1], seen[:, 0], seen[:, -1]))
        assert 0.02 < seen.mean() < 0.6


def test_every_choice_of_a_style_shows():
    style = styles.random_style(np.random.default_rng(0))
    for name, kinds in (("back_kind", styles.BACKS), ("leg_kind", styles.LEGS), ("arm_kind", styles.ARMS)):
        shown = {styles.picture(replace(style, **{name: kind}), View(30, 20), SIZE).tobytes() for kind in kinds}
        assert len(shown) == len(kinds)
    left = styles.picture(replace(style, arm_kind="left"), View(0, 0), SIZE)
    both = styles.picture(replace(style, arm_kind="both"), View(0, 0), SIZE)
    added = left != both
    assert added[:, SIZE // 2 :].any()
    assert not added[:, : SIZE // 2].any()


# ---- The pictures ----


@pytest.fixture(scope="module")
def gallery():
    return Gallery(1, 6, 8, 32)


def test_the_mask_is_where_something_is_drawn(gallery):
    index = torch.cartesian_prod(torch.arange(6), torch.arange(8), torch.arange(2))
    target = gallery.target(index)
    assert len(index) == 6 * 8 * 2
    drawn = (target.image != 1).any(1, keepdim=True)
    assert torch.equal(target.mask.bool(), drawn)
    for row in (0, 37, 95):
        chair, azimuth, elevation = index[row].tolist()
        *colour, brightness, zoom = gallery.transforms[chair, azimuth, elevation].tolist()
        view = View(45.0 * azimuth, data.ELEVATIONS[elevation], zoom)
        shade = styles.picture(gallery.styles[chair], view, 32)
        assert torch.equal(gallery.shades[chair, azimuth, elevation], torch.from_numpy(shade))
        expected = np.where(shade > 0, np.array(colour)[:, None, None] * brightness * shade / 255, 1.0)
        np.testing.assert_allclose(target.image[row], expected, atol=1e-6)


def test_conditions_are_sines_and_cosines(gallery):
    condition = gallery.condition(torch.tensor([[2, 3, 1]]))
    azimuth, elevation = math.radians(135), math.radians(35)
    expected = [math.sin(azimuth), math.sin(elevation), math.cos(azimuth), math.cos(elevation)]
    torch.testing.assert_close(condition.view, torch.tensor([expected]))
    assert condition.chair.tolist() == [2]
    assert torch.equal(condition.transform[0], gallery.transforms[2, 3, 1])


def test_seeds_make_the_pictures(gallery):
    again, other = (Gallery(seed, 6, 8, 32) for seed in (1, 2))
    assert torch.equal(again.shades, gallery.shades)
    assert torch.equal(again.transforms, gallery.transforms)
    assert again.styles == gallery.styles
    assert not torch.equal(other.shades, gallery.shades)


def test_some_azimuths_of_every_other_chair_are_held_out(gallery):
    assert gallery.unseen.sum(1).tolist() == [0, 3] * 3
    for row in gallery.unseen[1::2]:
        assert any(row.roll(-turn)[:3].all() for turn in range(8)), "one beside another"
    seen, unseen = ({tuple(index) for index in gallery.indices(which).tolist()} for which in (False, True))
    assert len(unseen) == 3 * 3 * 2
    assert not seen & unseen
    assert len(seen | unseen) == 96


def test_the_nearest_view_is_the_nearest_that_was_seen(gallery):
    index = gallery.indices(unseen=True)
    for mirror in (False, True):
        found = measure.nearest(gallery, index, mirror)
        for (chair, azimuth, _), chosen, mirrored, steps in zip(
            index.tolist(), *(f.tolist() for f in found), strict=True
        ):
            seen = [other for other in range(8) if not gallery.unseen[chair, other]]
            places = [(other, False) for other in seen] + [(other, True) for other in seen if mirror]

            def off(place, azimuth=azimuth):
                distance = ((-place[0] if place[1] else place[0]) - azimuth) % 8
                return min(distance, 8 - distance)

            assert (chosen, mirrored) in places
            assert off((chosen, mirrored)) == steps == min(map(off, places))


def test_a_symmetric_chair_mirrored_is_itself_from_the_other_side():
    style = replace(styles.random_style(np.random.default_rng(1)), arm_kind="both")
    one, other = (styles.picture(style, View(azimuth, 20), SIZE) > 0 for azimuth in (45, -45))
    assert (one[:, ::-1] == other).mean() > 0.999
    assert (one != other).any()


def test_nearest_pictures_have_the_colour_and_zoom_that_are_asked_for(gallery):
    index = gallery.indices(unseen=True)[5:6]
    chair, _, elevation = index[0].tolist()
    found = measure.nearest(gallery, index, mirror=False)
    transform = gallery.transforms[index.unbind(-1)]
    view = View(gallery.azimuths[found.azimuth.item()], data.ELEVATIONS[elevation], transform[0, 4].item())
    shade = torch.from_numpy(styles.picture(gallery.styles[chair], view, 32)).unsqueeze(0)
    expected = data.coloured(shade, transform)
    pictures = measure.nearest_pictures(gallery, index, mirror=False)
    assert torch.equal(pictures.image, expected.image)
    assert torch.equal(pictures.mask, expected.mask)


def test_quality():
    truth = Target(torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    truth.mask[:, :, :2] = 1
    drawn = Target(torch.zeros(2, 3, 4, 4), truth.mask.clone())
    drawn.image[0] = 0.5
    drawn.mask[1, :, 1] = 0
    assert measure.quality(drawn, truth) == (pytest.approx(math.sqrt(0.125)), pytest.approx(0.75))
    assert measure.quality(truth, truth) == (0, 1)


# ---- The network ----


@pytest.mark.parametrize("gaussian", [True, False])
def test_the_bound_by_its_formula(gallery, gaussian):
    model = Generator(6, 32, 5, gaussian)
    index = gallery.indices(unseen=False)[[0, 9, 40]]
    condition, target = gallery.condition(index), gallery.target(index)
    noise = torch.randn(3, 5)
    scored = model(condition, target, noise)
    z, divergence = model.loc[index[:, 0]], torch.zeros(3)
    if gaussian:
        with torch.no_grad():
            model.log_scale.normal_()
        scored = model(condition, target, noise)
        q = Normal(z, model.log_scale[index[:, 0]].exp())
        z, divergence = q.loc + q.scale * noise, kl_divergence(q, Normal(0.0, 1.0)).sum(-1)
    image, logits = model.draw(z, condition.view, condition.transform)
    torch.testing.assert_close(scored.divergence, divergence)
    torch.testing.assert_close(scored.image, Independent(Normal(image, models.SCALE), 3).log_prob(target.image))
    torch.testing.assert_close(scored.mask, Independent(Bernoulli(logits=logits), 3).log_prob(target.mask.float()))


def test_up_convolution_is_zeros_between_the_pixels_and_filters():
    up = models._up(2, 3).double()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    wide = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    wide[:, :, ::2, ::2] = x
    flipped = up.weight.transpose(0, 1).flip(2, 3)
    torch.testing.assert_close(up(x), torch.nn.functional.conv2d(wide, flipped, up.bias, padding=2))


def test_pictures_of_another_size_are_refused(gallery):
    index = gallery.indices(unseen=False)[:2]
    with pytest.raises(ValueError, match="target: expected pictures of 64 x 64, got 32 x 32"):
        Generator(6, 64, 5, True)(gallery.condition(index), gallery.target(index), torch.zeros(2, 5))


def test_feature_arithmetic_moves_by_the_difference_of_means(gallery):
    model = Generator(6, 32, 5, True)
    kinds = [style.leg_kind for style in gallery.styles]
    before, after = kinds[0], next(kind for kind in kinds if kind != kinds[0])
    means = [
        model.loc[[chair for chair, kind in enumerate(kinds) if kind == which]].mean(0) for which in (before, after)
    ]
    torch.testing.assert_close(measure.direction(model, gallery, "leg_kind", before, after), means[1] - means[0])
    assert measure.direction(model, gallery, "leg_kind", before, "wheels") is None
    assert measure.changed(model, gallery, "leg_kind", "wheels", before) is None


def test_training_never_meets_what_is_held_out(gallery, monkeypatch):
    setting = Setting(1, 6, 8, 32, 1, 5)
    met = []
    whole = Gallery.target
    monkeypatch.setattr(Gallery, "target", lambda self, index: met.append(index) or whole(self, index))
    job = Job("embedding", 1)
    model = job.model(setting)
    before = gallery.shades.clone()
    train.train_epoch(job, setting, gallery, model, torch.optim.Adam(model.parameters()), 0)
    met = {tuple(index) for index in torch.cat(met).tolist()}
    assert met == {tuple(index) for index in gallery.indices(unseen=False).tolist()}
    assert torch.equal(gallery.shades, before)


def test_chairs_are_learned(gallery, tmp_path, monkeypatch):
    """Better than the picture and the mask that are best if they are the same for all."""
    monkeypatch.setattr(study, "BATCH_SIZE", 8)
    setting = Setting(1, 6, 8, 32, 35, 5)
    state = train.State()
    with experiment.threads(1):
        train.train(Job("gaussian", 1), setting, gallery, state, tmp_path / "state.pt", lambda state: None)
    seen = gallery.target(gallery.indices(unseen=False))
    mask = (seen.mask.float().mean(0, keepdim=True) > 0.5).to(torch.uint8)
    constant = Target(seen.image.mean(0, keepdim=True), mask.expand_as(seen.mask))
    error, overlap = measure.quality(constant, seen)
    assert state.figures["seen"][0] < 0.95 * error
    assert state.figures["seen"][1] > overlap
    assert state.history[-1]["bound"] > state.history[0]["bound"]


def test_a_bound_that_is_not_finite_stops_the_run(gallery, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "LEARNING_RATE", 1e30)
    with pytest.raises(runs.StudyError, match=r"gaussian: the bound of epoch \d is not finite"):
        train.train(
            Job("gaussian", 1),
            Setting(1, 6, 8, 32, 3, 5),
            gallery,
            train.State(),
            tmp_path / "s.pt",
            lambda state: None,
        )


# ---- The command ----


def hvae(out, *more):
    sizes = ("--chairs=12", "--azimuths=8", "--size=16", "--epochs=2", "--latent=3")
    return cli.main(["chairs", *sizes, "--out", str(out), *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "chairs"
    assert hvae(out) == 0
    return out


def results(out):
    return json.loads((out / "results.json").read_text())


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_results_and_report(finished, capsys):
    rows = results(finished)["rows"]
    assert [row["method"] for row in rows] == ["gaussian", "embedding"]
    assert ["divergence" in row for row in rows] == [True, False]
    for row in rows:
        assert row["epochs"] == 2
        assert [view["degrees"] for view in row["views"]] == [None, 45, 90]
        assert [view["pictures"] for view in row["views"]] == [36, 24, 12]
        for view in row["views"]:
            assert view["mirrored"][0] <= view["nearest"][0] + 0.05
    assert [view["nearest"] for view in rows[0]["views"]] == [view["nearest"] for view in rows[1]["views"]]
    text = (finished / "report.md").read_text()
    assert check_what_is_seen(hvae, finished, capsys)[0].startswith("model ")
    for name in ("unseen", "interpolation", "arithmetic"):
        for key in ("gaussian", "embedding"):
            assert f"({name}-{key}.png)" in text
            assert (finished / f"{name}-{key}.png").read_bytes().startswith(b"\x89PNG")
    assert "(samples-gaussian.png)" in text
    assert "samples-embedding" not in text
    assert "| a Gaussian a chair " in text


@pytest.mark.parametrize("call", [2, 4])
def test_a_killed_run_goes_on_to_the_same_bits(call, finished, tmp_path, monkeypatch, capsys):
    whole, calls = train.train_epoch, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        patch.setattr(train, "train_epoch", killed)
        assert hvae(tmp_path) == 130
    assert "--resume" in capsys.readouterr().err
    assert hvae(tmp_path, "--resume") == 0
    assert without_times(results(tmp_path)["rows"]) == without_times(results(finished)["rows"])
    for key in ("gaussian", "embedding"):
        ours, other = (torch.load(out / "jobs" / f"{key}.pt", weights_only=True) for out in (tmp_path, finished))
        assert all(torch.equal(ours["model"][name], other["model"][name]) for name in other["model"])
        assert all(torch.equal(ours["pictures"][name], other["pictures"][name]) for name in other["pictures"])


def test_resume_adds_to_a_finished_run_of_the_same_kind(finished, capsys, monkeypatch):
    before = results(finished)["rows"]
    assert hvae(finished) == 1
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(
        Setting, "gallery", lambda self, watch: pytest.fail("drawn")
    )  # nothing is drawn where nothing is to be trained
    assert hvae(finished, "--resume") == 0
    assert results(finished)["rows"] == before
    assert hvae(finished, "--resume", "--size=24") == 1
    assert "was made with size 16, not 24" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", ["--epochs=0", "--size=60", "--size=8", "--azimuths=4", "--chairs=1", "--models=sofa", "--seed=-1"]
)
def test_wrong_arguments(wrong, tmp_path):
    with pytest.raises(SystemExit):
        hvae(tmp_path, wrong)


@pytest.mark.parametrize("change", [lambda row: row.pop("seen"), lambda row: row.update(method="sofa")])
def test_rows_of_another_form_are_one_sentence(change, finished, tmp_path, capsys):
    content = results(finished)
    change(content["rows"][0])
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert cli.main(["report", str(tmp_path)]) == 1
    assert f"{tmp_path / 'results.json'} is corrupt or not a file of this run" in capsys.readouterr().err
