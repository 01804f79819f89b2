"""Learned latent dependencies: densities beside torch's own, the exact evidence of a small model, a planted graph."""

import math

import pytest
import torch
from hvae.autoencoder import Code
from hvae.densities import normal_log_prob
from hvae.mnist import likelihood
from hvae.structured.figures import draw_graph
from hvae.structured.models import TEMPERATURES, Gates, StructuredModel, fuse
from torch import nn
from torch.distributions import Independent, Normal

from hvae_kernels.functional import iwae_bound

NODES, WIDTH, PIXELS, CONTEXT = 4, 2, 6, 3
EDGES = NODES * (NODES - 1) // 2


def normal(loc, log_scale):
    return Independent(Normal(loc, log_scale.exp()), 1)


def small(iaf_width=0, gates=None, nodes=NODES, width=WIDTH):
    """A model with perceptrons, its gates fixed if they are given, one for each edge."""
    context = CONTEXT if iaf_width else 0
    encoder = nn.Sequential(nn.Linear(PIXELS, 8), nn.Tanh(), nn.Linear(8, 2 * nodes * width + context))
    decoder = nn.Sequential(nn.Linear(nodes * width, 8), nn.Tanh(), nn.Linear(8, PIXELS))
    model = StructuredModel(encoder, decoder, nodes, width, 4, iaf_width, context).double()
    for network in model.top_down:
        nn.init.normal_(network[-1].weight, std=0.05)
    if gates is not None:
        model.gates.fixed_logits.copy_(2 * torch.as_tensor(gates) - 1)
        model.gates.learning = False
    return model


def images(count):
    return torch.randint(0, 2, (count, PIXELS)).double()


def noise(model, *shape):
    return torch.randn(*shape, model.noise_features, dtype=torch.float64)


def nodes_of(x):
    return x.unflatten(-1, (NODES, WIDTH)).unbind(-2)


def test_fused_gaussian_is_the_normalised_product():
    loc, log_scale, other_loc, other_log_scale, x, y = torch.randn(6, 5, 3, dtype=torch.float64)
    fused = fuse(loc, log_scale, other_loc, other_log_scale)
    log_product = [
        normal_log_prob(at, loc, log_scale) + normal_log_prob(at, other_loc, other_log_scale) for at in (x, y)
    ]
    log_fused = [normal_log_prob(at, *fused) for at in (x, y)]
    torch.testing.assert_close(log_fused[0] - log_fused[1], log_product[0] - log_product[1])


@pytest.mark.parametrize("log_scale", [-300.0, 300.0])
def test_a_fused_gaussian_is_the_sharp_one(log_scale):
    sharp, wide = (1.0, min(log_scale, 0.0)), (2.0, max(log_scale, 0.0))
    found = fuse(*(torch.tensor(x, dtype=torch.float64) for x in (*sharp, *wide)))
    torch.testing.assert_close(torch.stack(found), torch.tensor(sharp, dtype=torch.float64))


@pytest.mark.parametrize("gates", [[1, 0, 1, 1, 0, 1], [1] * EDGES])
def test_log_weights_are_the_densities_of_the_samples(gates):
    """By torch.distributions, node by node, from the samples alone."""
    model, x = small(gates=gates), images(3)
    eps, code = noise(model, 2, 3), model.encode(x)
    z, _ = model.sample(eps, code)
    parts, locs, log_scales = nodes_of(z), nodes_of(code.loc), nodes_of(code.log_scale)
    expected = torch.distributions.Bernoulli(logits=model.decoder(z)).log_prob(x).sum(-1)
    matrix = torch.zeros(NODES, NODES).double()
    matrix[tuple(torch.triu_indices(NODES, NODES, 1))] = torch.tensor(gates).double()
    for n in range(NODES):
        prior = torch.zeros(WIDTH).double(), torch.zeros(WIDTH).double()
        loc, scale = locs[n], log_scales[n].exp()
        if n < NODES - 1:
            parents = torch.cat([matrix[n, m] * parts[m] for m in range(n + 1, NODES)], dim=-1)
            prior = model.top_down[n](parents).chunk(2, -1)
            precision = scale**-2 + prior[1].exp() ** -2
            loc = (loc * scale**-2 + prior[0] * prior[1].exp() ** -2) / precision
            scale = precision**-0.5
        expected = expected + normal(*prior).log_prob(parts[n]) - normal(loc, scale.log()).log_prob(parts[n])
    torch.testing.assert_close(model(x, eps), expected)


def test_flows_carry_each_node_and_their_inverse_brings_it_back():
    torch.manual_seed(1)
    model, plain = small(iaf_width=8, gates=[1] * EDGES), small(gates=[1] * EDGES)
    for name in ("encoder", "decoder", "top_down"):
        setattr(plain, name, getattr(model, name))
    x = images(3)
    code, eps = model.encode(x), noise(model, 2, 3)
    z, log_ratio = model.sample(eps, code)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    parts, parents, gates = nodes_of(z), [], model.gates(eps[..., model.latent :])
    for n in reversed(range(NODES)):
        before, log_abs_det = model.flows[n].inverse(parts[n], code.context.expand(2, -1, -1))
        q, prior = (nodes_of(code.loc)[n], nodes_of(code.log_scale)[n]), model.prior(n, parents, gates)
        q = q if prior is None else fuse(*q, *prior)
        log_p = normal_log_prob(parts[n], *(prior or torch.zeros(2, WIDTH, dtype=torch.float64)))
        expected += log_p - normal(*q).log_prob(before) - log_abs_det
        parents.insert(0, parts[n])
    torch.testing.assert_close(log_ratio, expected)


@pytest.mark.parametrize("iaf_width", [0, 8])
def test_closed_gates_make_independent_nodes(iaf_width):
    """The bound is that of a model whose nodes have learned Gaussians for priors, and none knows of another."""
    model, x = small(iaf_width, gates=[0] * EDGES), images(3)
    eps, code = noise(model, 2, 3), model.encode(x)
    log_ratio, parts = 0.0, []
    for n in range(NODES):
        q = nodes_of(code.loc)[n], nodes_of(code.log_scale)[n]
        prior = torch.zeros(2, WIDTH, dtype=torch.float64)
        if n < NODES - 1:
            prior = model.top_down[n](torch.zeros(WIDTH * (NODES - 1 - n), dtype=torch.float64)).chunk(2, -1)
            q = fuse(*q, *(part.expand_as(q[0]) for part in prior))
        z = q[0] + q[1].exp() * nodes_of(eps[..., : model.latent])[n]
        log_ratio = log_ratio - normal(*q).log_prob(z)
        if iaf_width:
            z, log_abs_det = model.flows[n](z, code.context)
            log_ratio = log_ratio + log_abs_det
        log_ratio = log_ratio + normal(*prior).log_prob(z)
        parts.append(z)
    logits = model.decoder(torch.cat(parts, -1))
    torch.testing.assert_close(model(x, eps), model.log_likelihood(logits, x) + log_ratio)


@pytest.mark.parametrize("iaf_width", [0, 8])
@torch.no_grad()
def test_the_bound_is_below_the_evidence_and_importance_sampling_finds_it(iaf_width):
    """Two nodes of one dimension: the evidence is an integral over the plane."""
    torch.manual_seed(0)
    model, x = small(iaf_width, gates=[1], nodes=2, width=1), images(3)
    for stack in model.flows:  # a proposal that stays near the posterior
        for flow in stack.flows:
            torch._foreach_mul_(list(flow.parameters()), 0.1)
            flow.made.layers[-1].bias[1] = 4
    line = torch.linspace(-8, 8, 321, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    log_prior = normal_log_prob(z[:, :1], *model.prior(0, [z[:, 1:]], model.gates(z[:, :1])))
    log_prior = log_prior + normal_log_prob(z[:, 1:], torch.zeros(1), torch.zeros(1))
    log_joint = log_prior[:, None] + torch.stack([model.log_likelihood(model.decoder(z), row) for row in x], 1)
    evidence = log_joint.logsumexp(0) + 2 * math.log(16 / 320)
    weights = model(x, noise(model, 20_000, 3))
    assert (weights.mean(0) - 4 * weights.std(0) / 20_000**0.5 < evidence).all()
    found = likelihood.log_likelihood(model, x, 40_000, lambda number, rows: noise(model, rows, 3), 4_000)
    torch.testing.assert_close(found, evidence, atol=0.03, rtol=0)


@pytest.mark.parametrize("iaf_width", [0, 8])
def test_gradients_with_relaxed_gates(iaf_width):
    """Of all parameters, along a random direction, gates being learned."""
    model, x = small(iaf_width), images(3)
    model.begin_epoch(1)
    eps, parameters = noise(model, 2, 3), list(model.parameters())
    direction = [torch.randn_like(parameter) for parameter in parameters]

    def bound():
        return iwae_bound(model(x, eps)).sum() - model.penalty()

    grads = torch.autograd.grad(bound(), parameters)
    slope = sum((g * d).sum() for g, d in zip(grads, direction, strict=True))
    values, h = [], 1e-7
    for step in (h, -2 * h):
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=step)
            values.append(bound())
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * h), rtol=1e-5, atol=1e-5)


def test_gates_cool_down_and_are_fixed():
    gates = Gates(3).double()
    with torch.no_grad():
        gates.scores.copy_(torch.tensor([0.1, -0.1, 0.02]))
    draws = torch.randn(20_000, 3, dtype=torch.float64)
    spread = []
    for progress, temperature in (
        (0.0, TEMPERATURES[0]),
        (0.5, math.prod(TEMPERATURES) ** 0.5),
        (1.0, TEMPERATURES[1]),
    ):
        gates.cool(progress)
        assert gates.temperature == pytest.approx(temperature)
        drawn = gates(draws)
        values = drawn[(slice(None), *torch.triu_indices(3, 3, 1))]
        assert ((values >= 0) & (values <= 1)).all()
        assert (drawn.tril() == 0).all()
        torch.testing.assert_close((values > 0.5).double().mean(0), gates.logits.sigmoid(), atol=0.02, rtol=0)
        spread.append(values.std())
    assert spread[0] < spread[1] < spread[2]  # nearer to 0 and 1
    hard = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]).double()
    probabilities = gates.graph()[0]
    assert probabilities[0, 1] == torch.sigmoid(gates.logits[0])
    assert torch.equal(gates.eval()(draws[0]), hard)
    gates.train().fix()
    with torch.no_grad():
        gates.scores.neg_()
    gates.fix()
    assert torch.equal(gates(draws[0]), hard)
    assert torch.equal(gates.graph(), torch.stack([probabilities, hard]))


@pytest.mark.parametrize("gate_epochs", [1, 2, 4])
def test_the_last_epoch_of_the_gates_is_the_coolest(gate_epochs):
    model, temperatures = small(), []
    model.gate_epochs = gate_epochs
    for epoch in range(gate_epochs):
        model.begin_epoch(epoch)
        temperatures.append(model.gates.temperature)
        assert model.gates.learning
    model.begin_epoch(gate_epochs)
    assert not model.gates.learning
    assert temperatures[0] == TEMPERATURES[0]
    assert temperatures[-1] == pytest.approx(TEMPERATURES[gate_epochs > 1])


def test_a_model_that_goes_on_keeps_its_gates():
    model = small()
    nn.init.constant_(model.gates.scores, 0.3)
    model.begin_epoch(4)
    nn.init.constant_(model.gates.scores, -0.3)  # as an optimiser's momentum might
    other = small()
    other.load_state_dict(model.state_dict())
    other.begin_epoch(6)
    for it in (model, other):
        assert it.gates.graph()[1].sum() == EDGES
        assert not it.gates.learning
        assert it.penalty() == 0


class Planted(StructuredModel):
    """Three nodes that are seen through a little noise: what is left to learn is their prior."""

    SCALE = 0.1

    def __init__(self):
        super().__init__(nn.Identity(), nn.Identity(), 3, 1, gate_epochs=30)

    def encode(self, x):
        return Code(x, torch.full_like(x, math.log(self.SCALE)), x[:, :0])

    def log_likelihood(self, logits, x):
        return Normal(logits, self.SCALE).log_prob(x).sum(-1)


PLANTED = {"one edge": [(0, 2)], "a chain": [(0, 1), (1, 2)], "none": []}


@pytest.mark.parametrize("edges", PLANTED.values(), ids=PLANTED)
def test_gates_find_a_planted_graph(edges):
    """A node is a curve of its parent and a little noise, or noise alone; useless gates close."""
    torch.manual_seed(0)
    drawn = torch.randn(3, 2048)
    nodes = list(drawn)
    for child, parent in reversed(edges):
        nodes[child] = torch.sin(2 * nodes[parent]) + 0.3 * drawn[child]
    x = torch.stack(nodes, -1) + Planted.SCALE * torch.randn(2048, 3)
    model = Planted()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for epoch in range(30):
        model.begin_epoch(epoch)
        for batch in x[torch.randperm(len(x))].split(128):
            loss = model.penalty() - model(batch, torch.randn(1, len(batch), model.noise_features)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.begin_epoch(30)
    expected = torch.zeros(3, 3)
    for edge in edges:
        expected[edge] = 1
    probabilities, gates = model.graph()
    assert torch.equal(gates, expected), probabilities


@pytest.mark.parametrize("gate", [0, 1])
@torch.no_grad()
def test_samples_of_the_prior_have_its_moments(gate):
    """The third node has the root for its parent: twice its first dimension, and noise; if the gate is open."""
    model = small(gates=[0] * (EDGES - 1) + [gate])
    hidden, _, output = model.top_down[2]
    hidden.weight.zero_(), hidden.bias.zero_(), output.weight.zero_()
    hidden.weight[0, 0], hidden.bias[0] = 1.0, 30.0  # where softplus is the identity
    output.weight[0, 0] = 2.0
    output.bias.copy_(torch.tensor([-60.0, -3.0, math.log(0.1), math.log(2.0)]))
    n = 100_000
    z = model.float().sample_prior(n, torch.Generator().manual_seed(0))
    third, root = z.unflatten(-1, (NODES, WIDTH))[:, 2:].unbind(1)
    rest = third - gate * torch.stack([2 * root[:, 0], torch.zeros(len(z))], -1)
    for x, mean, std in ((root, [0.0, 0.0], [1.0, 1.0]), (rest, [0.0, -3.0], [0.1, 2.0])):
        mean, std = torch.tensor(mean), torch.tensor(std)
        error = 4 * std / math.sqrt(n)  # standard errors
        assert ((x.mean(0) - mean).abs() < error).all()
        assert ((x.std(0) - std).abs() < error / math.sqrt(2)).all()


def test_the_graph_is_drawn(tmp_path):
    draw_graph(tmp_path / "graph.png", Gates(5).graph(), "five nodes")
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")
