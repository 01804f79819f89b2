"""Deep latent Gaussian models: posteriors against Jacobians, formulas and exact evidence, and the command with them."""

import json
import math

import pytest
import torch
from hvae import cli, experiment
from hvae.autoencoder import Code
from hvae.mnist import deep, likelihood, networks, study, train
from hvae.mnist.deep import HviModel, NiceModel, PlanarModel
from hvae.mnist.study import Job, Setting
from seen import check_what_is_seen
from test_mnist_models import LATENT, PIXELS, SCALE, LinearGaussian, expected_bound
from torch import nn
from torch.distributions import Normal

from hvae_kernels import testing
from hvae_kernels.functional import iwae_bound, planar_flow

SETTING = Setting(1, "sample", 64, 32, "round", "maxout", 8, 1, 0, 1)
CARRIED = {"dlgm-planar": (PlanarModel, 3), "dlgm-nice": (NiceModel, 3), "hvi": (HviModel, 2, 2)}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def build(name, loud=True, **options):
    """A model of the study in float64; loud ones are far from their first parameters."""
    (job,) = study.plan([name], options.pop("n_steps", 3), **options)
    model = job.build(SETTING, torch.zeros(0, 784)).double()
    return shaken(model) if loud else model


def shaken(model, scale=0.02):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
        if model.hamiltonian is not None:
            model.hamiltonian.step_size_logit.fill_(-1.5)
    return model


def images(count):
    return torch.randint(0, 2, (count, 784), dtype=torch.uint8)


def noise(model, *shape):
    return torch.randn(*shape, model.noise_features, dtype=torch.float64)


def carried(name, scale=0.03):
    """A linear Gaussian model, with its evidence, and the same with a posterior that is carried on."""
    plain = LinearGaussian(0)
    with torch.no_grad():  # columns at right angles: the posterior is diagonal
        columns, _ = torch.linalg.qr(torch.randn(PIXELS, LATENT, dtype=torch.float64))
        plain.decoder.layers[0].weight.copy_(columns * torch.tensor([0.5, 1.0, 2.0]))
    plain.exact_posterior()
    kind, *options = CARRIED[name]
    known = type("Known", (kind,), {"log_likelihood": LinearGaussian.log_likelihood})
    decoder = networks.Network(networks.Linear(LATENT, PIXELS)).double()
    decoder.load_state_dict(plain.decoder.state_dict())
    model = known(plain.encoder, decoder, LATENT, *options).double()
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if not part.startswith("decoder"):
                parameter += scale * torch.randn_like(parameter)
        if model.hamiltonian is not None:
            model.hamiltonian.step_size_logit.fill_(-1.0)
    return plain, model


def test_a_maxout_unit_is_the_largest_of_four_maps():
    decoder = networks.decoder("maxout", 40).double()
    z = torch.randn(3, 40, dtype=torch.float64)
    first, _, second, _, last = decoder.layers
    hidden = z
    for layer in (first, second):
        rows = [layer.weight[place::400] for place in range(400)]
        assert rows[0].shape[0] == 4
        maps = [hidden @ row.T + layer.bias[place::400] for place, row in enumerate(rows)]
        hidden = torch.stack([each.max(-1).values for each in maps], -1)
    torch.testing.assert_close(decoder(z), hidden @ last.weight.T + last.bias)
    encoder = networks.encoder("maxout", 80)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 785 * 1600 + 401 * 1600 + 401 * 80


def test_a_widened_network_says_what_it_said():
    network, pixels = networks.encoder("maxout", 6), torch.rand(3, 784)
    before, bias = network(pixels), torch.randn(5)
    networks.widen(network, bias)
    after = network(pixels)
    torch.testing.assert_close(after, torch.cat([before, bias.expand(3, -1)], -1))


@pytest.mark.parametrize("name", ["dlgm-planar", "dlgm-nice", "hvi"])
def test_no_layers_and_no_steps_are_the_dlgm_to_the_bit(name):
    plain, model = build("dlgm", loud=False), build(name, loud=False, n_steps=0, flow_layers=0)
    eps, pixels = noise(plain, 2, 4), images(4)
    assert torch.equal(model(pixels, eps), plain(pixels, eps))


@pytest.mark.parametrize("name", ["dlgm-planar", "dlgm-nice", "hvi"])
def test_all_begin_as_the_dlgm(name):
    plain, model = build("dlgm", loud=False), build(name, loud=False, flow_layers=5)
    if name == "hvi":
        nn.init.constant_(model.hamiltonian.step_size_logit, -60)
    eps, pixels = noise(model, 2, 4), images(4)
    expected = plain(pixels, eps[..., :40])
    torch.testing.assert_close(model(pixels, eps), expected)
    assert (shaken(model)(pixels, eps) - expected).abs().min() > 1e-2


def test_the_encoders_outputs_move_planar_layers_by_a_tenth():
    model, pixels = shaken(build("dlgm-planar")), images(2)
    code, eps = model.encode(pixels), noise(model, 1, 2)
    layers = model.first + 0.1 * code.context.view(2, *model.first.shape)
    u, w, b = layers.split([model.latent, model.latent, 1], -1)
    z, log_abs_det = planar_flow(code.loc + code.log_scale.exp() * eps[0], u, w, b.squeeze(-1), constrain=True)
    made = model.transport(pixels, code, eps)
    torch.testing.assert_close(made[0][0], z)
    torch.testing.assert_close(made[2][0], code.log_scale.sum(-1) + log_abs_det)


@pytest.mark.parametrize("name", study.DEEP)
def test_a_bound_does_not_depend_on_the_other_images(name):
    model, pixels = build(name), images(6)
    eps = noise(model, 3, 6)
    torch.testing.assert_close(model(pixels[2:4], eps[:, 2:4]), model(pixels, eps)[:, 2:4])


@pytest.mark.parametrize("name", ["dlgm-planar", "dlgm-nice"])
def test_log_abs_det_is_that_of_autograds_jacobian(name):
    """Of the map from noise to z, with the layers of that image."""
    model, pixels = build(name, flow_layers=4), images(3)
    code, eps = model.encode(pixels), noise(model, 1, 3)
    log_abs_det = model.transport(pixels, code, eps)[2]
    for row in range(3):
        one = Code(*(part[row : row + 1] for part in code[:3]))

        def transport(point, one=one, row=row):
            return model.transport(pixels[row : row + 1], one, point.view(1, 1, -1))[0].flatten()

        jacobian = torch.autograd.functional.jacobian(transport, eps[0, row])
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_abs_det[0, row])
    assert log_abs_det.std() > 1e-2


def test_two_couplings_move_every_dimension():
    model, pixels = build("dlgm-nice", flow_layers=2), images(3)
    code, eps = model.encode(pixels), noise(model, 1, 3)
    moved = model.transport(pixels, code, eps)[0] - (code.loc + code.log_scale.exp() * eps)
    assert (moved.abs() > 1e-6).all()


def test_hamiltonian_inference_by_its_formula():
    _, model = carried("hvi")
    x, eps = torch.randn(4, PIXELS, dtype=torch.float64), noise(model, 1, 4)[0]
    output = model.encoder(x)
    loc, log_scale, context = output[:, :3], output[:, 3:6], output[:, 6:]
    first, *others = eps.split(3, -1)
    z = loc + log_scale.exp() * first
    expected = -Normal(loc, log_scale.exp()).log_prob(z).sum(-1)

    def joint(z):
        prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
        return prior + Normal(model.decoder(z), SCALE).log_prob(x).sum(-1)

    def slope(z):
        return torch.autograd.grad(joint(z).sum(), z)[0]

    for forward, reverse, gamma in zip(model.forward_models, model.reverse_models, others, strict=True):
        loc, log_scale = (0.1 * forward.layers(torch.cat([z, context], -1))).split(3, -1)
        v = loc + log_scale.exp() * gamma
        expected = expected - Normal(loc, log_scale.exp()).log_prob(v).sum(-1)
        for _ in range(2):
            v = v + model.hamiltonian.step_size / 2 * slope(z)
            z = z + model.hamiltonian.step_size * v
            v = v + model.hamiltonian.step_size / 2 * slope(z)
        loc, log_scale = (0.1 * reverse.layers(torch.cat([z, context], -1))).split(3, -1)
        expected = expected + Normal(loc, log_scale.exp()).log_prob(v).sum(-1)
    torch.testing.assert_close(model(x, eps[None])[0], expected + joint(z))


def precision_of(plain):
    """Of the diagonal posterior."""
    return 1 + plain.decoder.layers[0].weight.detach().square().sum(0) / SCALE**2


@torch.no_grad()
def linear_momenta(model):
    """Momentum models whose location is linear in z and the context, and whose scale is fixed: set both to 0 and 1."""
    for momentum in (*model.forward_models, *model.reverse_models):
        momentum.layers = nn.Linear(LATENT + deep.CONTEXT, 2 * LATENT).double()
        momentum.layers.weight.zero_(), momentum.layers.bias.zero_()


@pytest.mark.parametrize("n_steps", [1, 2, 7])
@torch.no_grad()
def test_where_leapfrog_leaves_the_posterior_as_it_is_every_weight_is_the_evidence(n_steps, monkeypatch):
    """Steps keep ``v^2 + P (1 - eps^2 P / 4) y^2``; with momenta of that variance forth and back nothing is lost."""
    monkeypatch.setitem(CARRIED, "hvi", (HviModel, n_steps, 2))
    plain, model = carried("hvi", scale=0.0)
    linear_momenta(model)
    variance = 1 - model.hamiltonian.step_size.square() * precision_of(plain) / 4
    for momentum in (*model.forward_models, *model.reverse_models):
        momentum.layers.bias[LATENT:] = variance.log() / 2 / deep.STEP
    x, eps = torch.randn(5, PIXELS, dtype=torch.float64), noise(model, 50, 5)
    z, *_ = model.transport(x, model.encode(x), eps)
    assert (z - plain.transport(x, plain.encode(x), eps[..., :LATENT])[0]).abs().mean() > 0.1
    torch.testing.assert_close(model(x, eps), plain.evidence(x).expand(50, -1))
    model.reverse_models[0].layers.bias += 1.0
    assert (expected_bound(model, x) < plain.evidence(x) - 1e-3).all()


@torch.no_grad()
def test_with_the_exact_way_back_the_gap_is_the_divergence_of_z(monkeypatch):
    """Any ``q(z_0 | x)``; all is Gaussian in each dimension, and the log weight is quadratic in the noise."""
    monkeypatch.setitem(CARRIED, "hvi", (HviModel, 3, 1))
    plain, model = carried("hvi", scale=0.0)
    linear_momenta(model)
    layer, precision, step = model.encoder.layers[-1], precision_of(plain), model.hamiltonian.step_size
    layer.weight[2 * LATENT : 3 * LATENT] = layer.weight[:LATENT]  # the context: the posterior's mean
    layer.bias[2 * LATENT : 3 * LATENT] = layer.bias[:LATENT]
    offset, scales, momenta = (torch.rand(3, LATENT, dtype=torch.float64) + 0.5).unbind()
    layer.bias[:LATENT] += offset
    layer.bias[LATENT : 2 * LATENT] = scales.log()
    model.forward_models[0].layers.bias[LATENT:] = momenta.log() / deep.STEP
    a, b = 1 - step**2 * precision / 2, step  # one step: (y, v) to (a y + b v, c y + a v)
    c = -precision * step * (1 - step**2 * precision / 4)
    maps = torch.stack([torch.stack([a, b], -1), torch.stack([c, a], -1)], -2).matrix_power(3)
    mean = maps[:, :, 0] * offset[:, None]
    covariance = maps @ torch.diag_embed(torch.stack([scales, momenta], -1).square()) @ maps.mT
    gain = covariance[:, 0, 1] / covariance[:, 0, 0]
    back = model.reverse_models[0].layers
    back.weight[:LATENT, : 2 * LATENT] = torch.cat([gain.diag(), -gain.diag()], -1) / deep.STEP
    back.bias[:LATENT] = (mean[:, 1] - gain * mean[:, 0]) / deep.STEP
    back.bias[LATENT:] = (covariance[:, 1, 1] - gain * covariance[:, 0, 1]).log() / 2 / deep.STEP
    end = Normal(mean[:, 0], covariance[:, 0, 0].sqrt())
    gap = torch.distributions.kl_divergence(end, Normal(torch.zeros_like(precision), precision.rsqrt())).sum()
    x = torch.randn(5, PIXELS, dtype=torch.float64)
    exact = plain.evidence(x) - gap
    torch.testing.assert_close(expected_bound(model, x), exact)
    for parameter in (back.weight, back.bias):
        parameter[:LATENT] += torch.randn_like(parameter[:LATENT])
        assert (expected_bound(model, x) < exact).all(), "no other Gaussian of the way back is better"


@pytest.mark.parametrize("n_steps", [1, 4])
@pytest.mark.parametrize("step_size_logit", [-4.0, -1.0, 0.5])
@torch.no_grad()
def test_the_expected_bound_is_never_above_the_evidence(n_steps, step_size_logit, monkeypatch):
    monkeypatch.setitem(CARRIED, "hvi", (HviModel, n_steps, 2))
    plain, model = carried("hvi")
    linear_momenta(model)
    model.hamiltonian.step_size_logit.fill_(step_size_logit)
    for momentum in (*model.forward_models, *model.reverse_models):
        momentum.layers.weight[:LATENT].normal_(std=2.0), momentum.layers.bias.normal_(std=5.0)
    x = torch.randn(50, PIXELS, dtype=torch.float64)
    assert (expected_bound(model, x) < plain.evidence(x)).all()


@pytest.mark.parametrize("name", CARRIED)
@torch.no_grad()
def test_weights_are_unbiased(name):
    """``exp`` of a log weight is the evidence on average, and importance sampling finds it."""
    plain, model = carried(name, scale=0.01 if name == "hvi" else 0.03)
    x = torch.randn(3, PIXELS, dtype=torch.float64)
    eps = noise(model, 20_000, 3)
    ratios = (model(x, eps) - plain.evidence(x)).exp()
    error = ratios.std(0) / math.sqrt(len(ratios))
    assert ((ratios.mean(0) - 1).abs() < 4 * error).all()
    assert (error < 0.02).all(), "or a wrong weight could not be told"
    assert (ratios.std(0) > 0.05).all(), "or the posterior is not carried anywhere"
    found = likelihood.log_likelihood(model, x, 20_000, lambda number, rows: eps[500 * number :][:rows], 500)
    torch.testing.assert_close(found, plain.evidence(x) + ratios.mean(0).log())


@pytest.mark.parametrize("memory", ["reversible", "store"])
@pytest.mark.parametrize("name", study.DEEP)
def test_gradients_are_those_of_the_annealed_bound(name, memory):
    """Of all parameters, along a random direction, in training."""
    model, pixels = build(name), images(4)
    if model.hamiltonian is not None:
        model.hamiltonian.memory = memory
    model.annealing = 0.3
    eps, parameters = noise(model, 2, 4), list(model.parameters())
    direction = [torch.randn_like(parameter) for parameter in parameters]

    def bound():
        return iwae_bound(model(pixels, eps)).sum()

    grads = torch.autograd.grad(bound(), parameters)
    slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    values, h = [], 1e-8  # seldom across a kink of the maxima
    for step in (h, -2 * h):
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=step)
            values.append(bound())
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * h), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["hvae", "dlgm-planar", "hvi"])
def test_annealing_weighs_the_log_joint_in_training_alone(name):
    model, pixels = build(name), images(3)
    eps = noise(model, 2, 3)
    whole = model(pixels, eps)
    code = model.encode(pixels)
    z, *_, decode = model.transport(pixels, code, eps)
    log_joint = model.log_joint(decode(z.flatten(0, 1)), pixels, z)
    model.annealing = 0.25
    torch.testing.assert_close(model(pixels, eps), whole - 0.75 * log_joint)
    torch.testing.assert_close(model.eval()(pixels, eps), whole)


def test_the_weight_grows_to_one():
    job = Job("dlgm", 0, 1, annealing=10_000)
    assert [job.joint_weight(step) for step in (0, 1_000, 9_900, 20_000)] == pytest.approx([0.01, 0.11, 1.0, 1.0])
    assert Job("dlgm", 0, 1).joint_weight(0) == 1.0


def test_a_trajectory_ends_where_the_flow_does():
    model, pixels = build("hvi", momenta=1), images(2)
    eps = noise(model, 1, 2)
    path = model.trajectory(pixels, eps)
    z, *_ = model.transport(pixels, model.encode(pixels), eps)
    torch.testing.assert_close(path[-1], model.decoder(z[0]))
    assert (path[0] - path[-1]).abs().max() > 1e-4


# ---- The command ----

SMALL = ["--train-size", "40", "--validation-size", "24", "--batch-size", "16", "--epochs", "2", "--network", "mlp"]
COMMAND = ["mnist", *SMALL, "--likelihood-samples", "7", "--threads", "1"]
MODELS = ["--model", *study.DEEP, "--flow-layers", "3", "--momenta", "2", "--annealing", "4"]
KEYS = ["dlgm-K0-S1-A4", "dlgm-planar-K0-S1-L3-A4", "dlgm-nice-K0-S1-L3-A4", "hvi-K2-S1-M2-A4-N100"]


def hvae(out, *more):
    steps = ["--leapfrog-steps", "2"] if {"hvae", "hvi"} & {*more} else []
    return cli.main([*COMMAND, *steps, "--out", str(out), *more])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "deep"
    with testing.threads(1):
        assert hvae(out, *MODELS) == 0
    return out


def results(out):
    return json.loads((out / "results.json").read_text())


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_results_and_report(finished, capsys):
    rows = results(finished)["rows"]
    assert [row["job"] for row in rows] == KEYS
    for row in rows:
        assert -784 < row["elbo"] < row["log_likelihood"] < 0
        assert row["annealing"] == 4
    table = check_what_is_seen(lambda out, *more: hvae(out, *MODELS, *more), finished, capsys)
    assert [line.split(",")[0] for line in table[-4:]] == [key.split("-K")[0] for key in KEYS]
    text = (finished / "report.md").read_text()
    for name in (*(f"samples-{key}" for key in KEYS), "trajectories-hvi-K2-S1-M2-A4-N100"):
        assert f"({name}.png)" in text
    assert "| hvi, K = 2, 2 momenta, annealed for 4 updates " in text
    assert "- A maxout network has 40 latent dimensions" in text


def test_what_is_maximised_while_the_log_joint_is_annealed_is_called_no_bound(finished, tmp_path):
    """Three steps an epoch, of which one of the second and all of the first are annealed."""
    state = train.State.load(finished / "jobs" / f"{KEYS[0]}.pt")
    assert [record["train"] is None for record in state.history] == [True, True]
    assert hvae(tmp_path, "--model", "vae", "--annealing", "3", "--tensorboard") == 0
    state = train.State.load(tmp_path / "jobs" / "vae-K0-S1-A3.pt")
    assert [record["train"] is None for record in state.history] == [True, False]
    assert results(tmp_path)["rows"][0]["train_bound"] == state.history[-1]["train"]


@pytest.mark.parametrize(
    ("key", "printed"),
    [
        ("dlgm-K0-S1", (None, -89.9, None)),
        ("dlgm-planar-K0-S1-L80", (None, -85.1, None)),
        ("dlgm-nice-K0-S1-L20", (None, -87.9, None)),
        ("hvi-K8-S1-M1", (None, None, -85.51)),
        ("hvi-K8-S1-M4", (None, None, None)),
        ("hvi-K2-S1-M1", (None, None, None)),
    ],
)
def test_printed_figures(key, printed):
    assert Job.from_key(key).published("maxout") == printed


def test_a_killed_run_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch):
    epoch = train.Trainer.train_epoch

    def killed(self, pixels):
        if self.state.epoch == 1:
            raise KeyboardInterrupt
        return epoch(self, pixels)

    for model in study.DEEP:
        options = {"dlgm-planar": MODELS[5:7], "dlgm-nice": MODELS[5:7], "hvi": MODELS[7:9]}.get(model, [])
        with monkeypatch.context() as patch:
            patch.setattr(experiment, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
            patch.setattr(train.Trainer, "train_epoch", killed)
            assert hvae(tmp_path, "--model", model, *options, "--annealing", "4", "--resume") == 130
    assert hvae(tmp_path, *MODELS, "--resume") == 0
    assert without_times(results(tmp_path)["rows"]) == without_times(results(finished)["rows"])
    for key in KEYS:
        ours, other = (torch.load(out / "jobs" / f"{key}.pt") for out in (tmp_path, finished))
        assert all(torch.equal(ours["model"][name], value) for name, value in other["model"].items())


def test_deep_models_have_maxout_networks_by_default(tmp_path):
    sizes = ["--train-size", "8", "--validation-size", "4", "--epochs", "1", "--likelihood-images", "0"]
    for name, network, dim in (("dlgm", "maxout", 40), ("vae", "conv", 64)):
        assert cli.main(["mnist", *sizes, "--model", name, "--out", str(tmp_path / name)]) == 0
        found = results(tmp_path / name)
        assert (found["config"]["network"], found["rows"][0]["dim"]) == (network, dim)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--model", "dlgm", "--flow-layers", "3"], "--flow-layers: only --model dlgm-planar dlgm-nice has any"),
        (["--model", "dlgm", "--momenta", "3"], "--momenta: only --model hvi has any"),
        (["--model", "dlgm", "--units", "3"], "--units: only --model helmholtz has any"),
        (["--model", "structured", "--annealing", "3"], "--annealing: structured takes none"),
        (["--model", "hvi", "--prior", "vamp", "--components", "9"], "--prior vamp: hvi takes none"),
    ],
)
def test_what_a_model_does_not_have_is_refused(wrong, said, tmp_path, capsys):
    assert hvae(tmp_path, *wrong) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "key", ["dlgm-K0-S1-L3", "hvi-K2-S1", "vae-K0-S1-M1", "helmholtz-K0-S1", "dlgm-K0-S1-U3", "dlgm-planar-K0-S1-L03"]
)
def test_no_job_has_such_a_name(key):
    with pytest.raises(ValueError, match=r"no job is named|expected"):
        Job.from_key(key)
