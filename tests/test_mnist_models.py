"""The MNIST study's networks and bounds: the tables' parameters, and what would have caught the source's errors."""

import itertools
import math

import pytest
import torch
from hvae.autoencoder import Code
from hvae.densities import standard_normal_log_prob
from hvae.mnist import likelihood, networks, study
from hvae.mnist.models import Model
from hvae.mnist.networks import Network
from hvae.mnist.study import Setting
from torch import nn
from torch.distributions import MultivariateNormal

from hvae_kernels.functional import dreg_surrogate, iwae_bound, stl_surrogate

SETTING = Setting(1, "sample", 64, 32, "round", "conv", 8, 1, 0, 1)
STEPS = 3


def build(name, network="conv", n_steps=STEPS, components=0):
    """A model in float64, its leapfrog steps long enough to matter."""
    (job,) = study.plan([name], n_steps, 5, components)
    model = job.build(Setting(**{**vars(SETTING), "network": network}), images(8) * 255).double()
    if getattr(model, "hamiltonian", None) is not None:
        nn.init.constant_(model.hamiltonian.step_size_logit, -1.5)
    return model


def images(count):
    return torch.randint(0, 2, (count, 784), dtype=torch.uint8)


def noise(model, *shape):
    return torch.randn(*shape, model.noise_features, dtype=torch.float64)


def n_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameter_counts_of_the_tables():
    assert n_parameters(networks.encoder("conv", 128)) == 328_520
    assert n_parameters(networks.decoder("conv", 64)) == 306_615


def table_5():
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        *(nn.BatchNorm2d(1), nn.Conv2d(1, 16, 5, 2, 2), nn.Softplus()),
        *(nn.BatchNorm2d(16), nn.Conv2d(16, 32, 5, 2, 2), nn.Softplus()),
        *(nn.BatchNorm2d(32), nn.Conv2d(32, 32, 5, 2, 2), nn.BatchNorm2d(32), nn.Flatten()),
        *(nn.Linear(512, 450), nn.Softplus(), nn.BatchNorm1d(450), nn.Linear(450, 128)),
    )


def table_6():
    return nn.Sequential(
        *(nn.BatchNorm1d(64), nn.Linear(64, 450), nn.Softplus()),
        *(nn.BatchNorm1d(450), nn.Linear(450, 512), nn.Softplus(), nn.Unflatten(1, (32, 4, 4))),
        *(nn.BatchNorm2d(32), nn.Conv2d(32, 32, 5, padding=2), nn.Upsample(7), nn.Softplus()),
        *(nn.BatchNorm2d(32), nn.Conv2d(32, 16, 5, padding=2), nn.Upsample(14), nn.Softplus()),
        *(nn.BatchNorm2d(16), nn.Conv2d(16, 16, 5, padding=2), nn.Upsample(28), nn.Softplus()),
        *(nn.Conv2d(16, 1, 5, padding=2), nn.Flatten()),
    )


@pytest.mark.parametrize(
    ("make", "table", "width"),
    [(lambda kind, latent: networks.encoder(kind, 2 * latent), table_5, 784), (networks.decoder, table_6, 64)],
)
def test_the_networks_are_the_tables(make, table, width):
    """Values, gradients and running statistics, in training and then in evaluation."""
    ours, theirs = make("conv", 64).double(), table().double()
    with torch.no_grad():
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.copy_(mine.add_(0.1 * torch.randn_like(mine)))
    x = torch.randn(6, width, dtype=torch.float64)
    (grads, other_grads) = (
        torch.autograd.grad(y.square().sum(), module.parameters())
        for y, module in ((ours(x), ours), (theirs(x), theirs))
    )
    for mine, other in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(mine, other)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kind", networks.NETWORKS)
def test_shapes_and_batch_norms_of_every_kind(kind):
    encoder, decoder = networks.encoder(kind, 14), networks.decoder(kind, 7)
    assert encoder(torch.randn(2, 784)).shape == (2, 14)
    assert decoder(torch.randn(2, 7)).shape == (2, 784)
    assert sum(isinstance(layer, networks.BatchNorm) for layer in decoder.layers) == (5 if kind == "conv" else 0)


def test_held_batch_norms_make_rows_independent_in_training():
    decoder = networks.decoder("conv", 64).double()
    z = torch.randn(6, 64, dtype=torch.float64)
    logits, (decode, _) = decoder(z), decoder.hold(z)
    torch.testing.assert_close(decode(z), logits)
    torch.testing.assert_close(decode(z[:1]), logits[:1])


def test_a_training_step_takes_the_statistics_once_at_z_0():
    model, pixels = build("hvae"), images(8)
    eps = noise(model, 1, 8)
    running = model.decoder.layers[0].running_mean
    model(pixels, eps)
    model.eval()
    first, *_ = model.decoder.layers
    model.train()
    before = running.clone()
    encoded = [layer.running_mean.clone() for layer in model.encoder.layers if hasattr(layer, "running_mean")]
    loc, log_scale, *_ = model.encode(pixels)
    z = loc + log_scale.exp() * eps[0, :, :64]
    assert encoded
    model(pixels, eps)
    torch.testing.assert_close(first.running_mean, 0.9 * before + 0.1 * z.mean(0))


@pytest.mark.parametrize("components", [0, 7])
@pytest.mark.parametrize("name", [*study.MODELS, *study.STRUCTURED])
def test_a_bound_does_not_depend_on_the_other_images(name, components):
    if components and name in study.STRUCTURED:
        with pytest.raises(ValueError, match="--prior vamp: structured"):
            build(name, components=components)
        return
    model, pixels = build(name, components=components), images(6)
    eps = noise(model, 3, 6)
    model(pixels, eps)  # running statistics that are not trivial
    model.eval()
    torch.testing.assert_close(model(pixels[2:4], eps[:, 2:4]), model(pixels, eps)[:, 2:4])


def test_no_leapfrog_steps_is_the_vae():
    vae, hvae = build("vae").eval(), build("hvae", n_steps=0).eval()
    eps, pixels = noise(vae, 2, 4), images(4)
    assert torch.equal(hvae(pixels, eps), vae(pixels, eps))


def test_no_tempering_and_short_steps_are_the_vae():
    vae, hvae = build("vae").eval(), build("hvae").eval()
    eps, pixels = noise(hvae, 2, 4), images(4)
    expected = vae(pixels, eps[..., :64])
    assert (hvae(pixels, eps) - expected).abs().min() > 1e-4
    with torch.no_grad():
        hvae.hamiltonian.tempering_logit.fill_(60)
        hvae.hamiltonian.step_size_logit.fill_(-60)
    torch.testing.assert_close(hvae(pixels, eps), expected)


def test_momentum_is_driven_uphill_of_the_log_joint():
    """The sign of grad U, by finite differences."""
    model, pixels = build("hvae", n_steps=1).eval(), images(1)
    with torch.no_grad():
        model.hamiltonian.tempering_logit.fill_(60)
        model.hamiltonian.step_size_logit.fill_(-18)
    start = torch.randn(64, dtype=torch.float64)
    code = Code(start[None], torch.zeros(1, 64, dtype=torch.float64), start[None, :0])
    _, rho, *_ = model.transport(pixels, code, torch.zeros(1, 1, 128, dtype=torch.float64))

    def log_joint(z):
        return model.log_joint(model.decoder(z), pixels, z)

    h = 1e-5
    shifts = h * torch.eye(64, dtype=torch.float64)
    slope = torch.cat([log_joint(start + shift[None]) - log_joint(start - shift[None]) for shift in shifts]) / (2 * h)
    torch.testing.assert_close(rho.flatten() / model.hamiltonian.step_size, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("components", [0, 7])
@pytest.mark.parametrize("memory", ["reversible", "store"])
@pytest.mark.parametrize("name", study.MODELS)
def test_gradients_are_those_of_the_bound(name, memory, components):
    """Of all parameters, along a random direction, in training: through potentials, batch norms, flows and priors."""
    torch.manual_seed(1)  # seed 0 puts a kink of the ReLUs in the way
    model, pixels = build(name, components=components), images(4)
    if model.hamiltonian is not None:
        model.hamiltonian.memory = memory
    eps, parameters = noise(model, 2, 4), list(model.parameters())
    direction = [torch.randn_like(parameter) for parameter in parameters]

    def bound():
        return iwae_bound(model(pixels, eps)).sum()

    grads = torch.autograd.grad(bound(), parameters)
    slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    values, h = [], 1e-8  # seldom across a kink of the ReLUs
    for step in (h, -2 * h):
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=step)
            values.append(bound())
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * h), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["stl", "dreg"])
@pytest.mark.parametrize("network", networks.NETWORKS)
def test_surrogates_take_over_the_encoder_alone(kind, network):
    """Two objectives in one backward pass; numbers and the decoder's gradient stay the bound's."""
    plain, model, pixels = build("iwae", network), build(f"iwae-{kind}", network), images(3)
    eps = noise(model, 5, 3)
    log_weights, expected = model(pixels, eps), plain(pixels, eps)
    torch.testing.assert_close(log_weights, expected)
    iwae_bound(log_weights).sum().backward()
    iwae_bound(expected).sum().backward()
    for ours, theirs in zip(model.decoder.parameters(), plain.decoder.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    loc, log_scale = plain.encoder(pixels.double()).chunk(2, -1)
    z = loc + log_scale.exp() * eps
    log_q = torch.distributions.Normal(loc.detach(), log_scale.detach().exp()).log_prob(z).sum(-1)
    surrogate = {"stl": stl_surrogate, "dreg": dreg_surrogate}[kind]
    decode, _ = plain.decoder.hold(z.detach().flatten(0, 1))  # a sample must not move the others' batch norms
    objective = surrogate(plain.log_joint(decode(z.flatten(0, 1)), pixels, z) - log_q).sum()
    grads = torch.autograd.grad(objective, list(plain.encoder.parameters()))
    for ours, theirs in zip(model.encoder.parameters(), grads, strict=True):
        torch.testing.assert_close(ours.grad, theirs)
        assert theirs.abs().max() > 0
    plain.load_state_dict(model.state_dict())
    model.eval(), plain.eval()
    torch.testing.assert_close(model(pixels, eps), plain(pixels, eps))


def test_surrogates_are_for_models_without_flows():
    for options in ({"n_steps": 2}, {"iaf_width": 8}):
        with pytest.raises(ValueError, match="estimator: expected 'plain' where flows"):
            Model(networks.encoder("mlp", 8), networks.decoder("mlp", 4), 4, **options, estimator="stl")
    with pytest.raises(ValueError, match="estimator: expected one of plain, stl, dreg, got 'vimco'"):
        Model(networks.encoder("mlp", 8), networks.decoder("mlp", 4), 4, estimator="vimco")


def test_a_vamp_prior_is_the_mean_posterior_of_its_pseudo_inputs():
    """With the batch norms of the images, which alone update the running statistics."""
    model, plain, pixels = build("vae", components=7), build("vae"), images(6)
    eps = noise(model, 2, 6)
    found, expected = model(pixels, eps), plain(pixels, eps)
    for ours, theirs in zip(model.encoder.buffers(), plain.encoder.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    code = model.encode(pixels)
    z = code.loc + code.log_scale.exp() * eps
    of_pseudo_inputs = model.encoder(model.prior.pseudo_inputs(), model.encoder.run(pixels.double())[1]).chunk(2, -1)
    components = torch.distributions.Normal(of_pseudo_inputs[0], of_pseudo_inputs[1].exp())
    log_prior = components.log_prob(z[..., None, :]).sum(-1).logsumexp(-1) - math.log(7)
    torch.testing.assert_close(found - expected, log_prior - standard_normal_log_prob(z))


def test_pseudo_inputs_start_from_training_digits():
    digits = torch.randint(0, 256, (9, 784), dtype=torch.uint8)
    (job,) = study.plan(["vae"], components=7)
    model = job.build(SETTING, digits)
    assert torch.equal(model.prior.pseudo_inputs() > 0.5, digits[:7] >= 128)


def test_iwae_of_one_sample_is_the_elbo():
    model, pixels = build("iwae").eval(), images(3)
    log_weights = model(pixels, noise(model, 1, 3))
    torch.testing.assert_close(iwae_bound(log_weights), log_weights[0])


def test_iwae_is_monotone_in_the_number_of_samples():
    """Averaged over all subsets of the samples it is so without chance."""
    model, pixels = build("iwae").eval(), images(2)
    log_weights = model(pixels, noise(model, 5, 2)).detach()
    means = []
    for size in range(1, 6):
        subsets = [log_weights[list(rows)] for rows in itertools.combinations(range(5), size)]
        means.append(torch.stack([iwae_bound(rows) for rows in subsets]).mean(0))
    assert (torch.stack(means).diff(dim=0) > 0).all()


LATENT, PIXELS, SCALE = 3, 5, 0.7


class LinearGaussian(Model):
    """Known evidence: ``x = W z + b + SCALE * noise``; the encoder's output is a constant."""

    def __init__(self, n_steps, iaf_width=0):
        encoder, decoder = nn.Linear(PIXELS, 2 * LATENT), nn.Linear(LATENT, PIXELS)
        super().__init__(Network(encoder), Network(decoder), LATENT, n_steps, iaf_width)
        self.double()

    def log_likelihood(self, logits, pixels):
        return torch.distributions.Normal(logits, SCALE).log_prob(pixels).sum(-1)

    @property
    def joint(self):
        weight = self.decoder.layers[0].weight.detach()
        return weight, SCALE**2 * torch.eye(PIXELS, dtype=torch.float64)

    def evidence(self, x):
        weight, covariance = self.joint
        return MultivariateNormal(self.decoder.layers[0].bias.detach(), weight @ weight.T + covariance).log_prob(x)

    def exact_posterior(self):
        """Make the encoder's mean the posterior's, and its scales as good as a diagonal can be."""
        weight, _ = self.joint
        precision = torch.eye(LATENT, dtype=torch.float64) + weight.T @ weight / SCALE**2
        gain = torch.linalg.solve(precision, weight.T / SCALE**2)
        layer, bias = self.encoder.layers[0], self.decoder.layers[0].bias
        with torch.no_grad():
            layer.weight.copy_(torch.cat([gain, torch.zeros_like(gain)]))
            layer.bias.copy_(torch.cat([-gain @ bias, -precision.diagonal().log() / 2]))


@torch.no_grad()
def expected_bound(model, x):
    """Exact: every map is affine, so a log weight is quadratic in the noise and these points average it."""
    n = model.noise_features
    points = math.sqrt(n) * torch.cat([torch.eye(n), -torch.eye(n)]).double()
    return model(x, points[:, None].expand(-1, len(x), -1)).mean(0)


@pytest.mark.parametrize("n_steps", [0, 1, 2, 7])
@pytest.mark.parametrize("step_size_logit", [-6.0, -1.0, 1.0])
@pytest.mark.parametrize("tempering_logit", [-1.0, 1.0, 60.0])
def test_the_expected_bound_is_never_above_the_evidence(n_steps, step_size_logit, tempering_logit):
    model, x = LinearGaussian(n_steps), torch.randn(50, PIXELS, dtype=torch.float64)
    if n_steps:
        nn.init.constant_(model.hamiltonian.step_size_logit, step_size_logit)
        nn.init.constant_(model.hamiltonian.tempering_logit, tempering_logit)
    assert (expected_bound(model, x) < model.evidence(x)).all()
    model.exact_posterior()
    assert (expected_bound(model, x) < model.evidence(x)).all()


def test_the_bound_of_the_exact_posterior_is_the_evidence():
    model, x = LinearGaussian(0), torch.randn(4, PIXELS, dtype=torch.float64)
    with torch.no_grad():  # columns at right angles: the posterior's covariance is diagonal
        model.decoder.layers[0].weight.copy_(torch.linalg.qr(torch.randn(PIXELS, LATENT))[0])
    model.exact_posterior()
    torch.testing.assert_close(expected_bound(model, x), model.evidence(x))


@pytest.mark.parametrize(("n_steps", "iaf_width"), [(0, 0), (2, 0), (0, 8), (2, 8)])
@torch.no_grad()
def test_importance_sampling_finds_the_evidence(n_steps, iaf_width):
    model, x = LinearGaussian(n_steps, iaf_width), torch.randn(3, PIXELS, dtype=torch.float64)
    model.exact_posterior()
    if iaf_width:
        torch._foreach_mul_(list(model.iaf.parameters()), 0.1)  # a proposal that stays near the posterior
    found = likelihood.log_likelihood(model, x, 20_001, lambda number, rows: noise(model, rows, 3), 500)
    torch.testing.assert_close(found, model.evidence(x), atol=0.03, rtol=0)


def test_the_stream_is_logsumexp():
    rows = torch.randn(100, 4, dtype=torch.float64) * torch.tensor([1.0, 10.0, 1e3, 1e-3]) - torch.tensor(1e4)
    stream = likelihood.LogMeanExp(4)
    for part in rows.split([1, 60, 39]):
        stream.add(part)
    torch.testing.assert_close(stream.value(), rows.logsumexp(0) - math.log(100))


def test_batches_of_samples_make_no_difference_but_the_encoder_runs_once(monkeypatch):
    model, pixels = build("vae", "mlp").eval(), images(3)
    drawn = noise(model, 10, 3)
    calls, asked, encode = [], [], model.encode
    monkeypatch.setattr(model, "encode", lambda x: calls.append(None) or encode(x))

    def some(number, rows):
        asked.append(rows)
        return drawn[4 * number : 4 * number + rows]

    found = likelihood.log_likelihood(model, pixels, 10, some, 4)
    assert len(calls) == 1
    assert asked == [4, 4, 2]
    torch.testing.assert_close(found, model(pixels, drawn).logsumexp(0) - math.log(10))


def test_a_trajectory_ends_where_the_flow_does():
    model, pixels = build("hvae").eval(), images(2)
    eps = noise(model, 1, 2)
    path = model.trajectory(pixels, eps)
    assert path.shape == (STEPS + 1, 2, 784)
    z, *_ = model.transport(pixels, model.encode(pixels), eps)
    torch.testing.assert_close(path[-1], model.decoder(z[0]))
    assert (path[0] - path[-1]).abs().max() > 1e-4
