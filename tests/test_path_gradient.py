"""``hk.path_log_prob``: the path gradient by its definition, through every flow, at the cost that is promised."""

from __future__ import annotations

import contextlib
import copy
import functools
from unittest import mock

import peers
import pytest
import torch
from nflows.transforms import CompositeTransform
from peers import FLOWS
from torch import nn
from torch.distributions import AffineTransform, ComposeTransform, Independent, Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import hvae_kernels as hk
from hvae_kernels import testing
from hvae_kernels.compat import _network
from hvae_kernels.functional import Spline
from hvae_kernels.nn import coupling, path
from hvae_kernels.nn.flow import Flow
from hvae_kernels.ops import autoregressive_network

F64, D, ROWS = torch.float64, 4, 6
IAF, MAF = hk.nn.InverseAutoregressiveFlow, hk.nn.MaskedAutoregressiveFlow
NORMAL = Independent(Normal(torch.zeros(D, dtype=F64), 1.0), 1)


class Cubic(Flow):
    """``z + a tanh(z) + b z^3 / 3`` on features mixed by a matrix; nobody knows its inverse."""

    features = D

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.eye(D, dtype=F64) + 0.1 * torch.randn(D, D, dtype=F64))
        self.scale = nn.Parameter(torch.rand(D, dtype=F64))

    def forward(self, z, context=None):
        y = z @ self.mix.mT
        x = y + self.scale * y.tanh() + y**3 / 3
        slope = 1 + self.scale * (1 - y.tanh() ** 2) + y**2
        return x, slope.log().sum(-1) + torch.linalg.slogdet(self.mix)[1]

    def inverse(self, z, context=None):
        raise NotImplementedError


def stack_of_all():
    kinds = [hk.nn.PlanarFlow(D, 2), IAF(D, [9], 2), hk.nn.RadialFlow(D, 2), MAF(D, [9], gate=Spline(4))]
    return hk.nn.FlowStack([*kinds, hk.nn.FlowStack.coupling(2, D, [9], context_features=2), Cubic()])


#: By name, what makes a flow, and whether it takes a context.
OURS = {
    "iaf": (lambda: IAF(D, [9, 7]), 0),
    "iaf-context": (lambda: IAF(D, [9], 2, "sigmoid", [2, 0, 3, 1]), 2),
    "iaf-spline": (lambda: IAF(D, [9], gate=Spline(4)), 0),
    "maf": (lambda: MAF(D, [9, 7], activation="tanh"), 0),
    "maf-context": (lambda: MAF(D, [9], 2), 2),
    "maf-spline-context": (lambda: MAF(D, [9], 2, Spline(4, bound=2.0, style="zuko")), 2),
    "coupling": (lambda: hk.nn.CouplingFlow(D, [9]), 0),
    "coupling-spline-context": (lambda: hk.nn.CouplingFlow(D, [9], 2, Spline(4)), 2),
    "planar": (lambda: hk.nn.PlanarFlow(D, 3), 0),
    "planar-shared": (lambda: hk.nn.PlanarFlow(D, 3, shared=True), 0),
    "radial": (lambda: hk.nn.RadialFlow(D, 3), 0),
    "cubic": (Cubic, 0),
    "stack-iaf": (lambda: hk.nn.FlowStack.autoregressive(IAF, 3, D, [9]), 0),
    "stack-maf-context": (lambda: hk.nn.FlowStack.autoregressive(MAF, 3, D, [9], context_features=2), 2),
    "stack-coupling": (lambda: hk.nn.FlowStack.coupling(4, D, [9], gate=Spline(4)), 0),
    "stack-of-all": (stack_of_all, 2),
}
INVERTIBLE = [name for name in OURS if not any(word in name for word in ("planar", "radial", "cubic", "all"))]
each = pytest.mark.parametrize("name", OURS)


def case(name, rows=ROWS, spread=0.5):
    """A flow with parameters that matter, points and context that need gradients."""
    torch.manual_seed(len(name))
    make, context_features = OURS[name]
    flow = make().double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=spread * max(1, parameter.shape[-1]) ** -0.5)
    z = torch.randn(rows, D, dtype=F64, requires_grad=True)
    context = torch.randn(rows, context_features, dtype=F64, requires_grad=True) if context_features else None
    return flow, z, context


def by_definition(forward, z, log_prob=NORMAL.log_prob):
    """x, log q(x) and its gradient by x with all else held, from autograd's full Jacobian of the map alone."""
    with torch.enable_grad():
        x = forward(z)[0]
        jacobian = torch.autograd.functional.jacobian(lambda z: forward(z)[0].sum(0), z.detach()).transpose(0, 1)
        start = z.detach().requires_grad_()
        log_q = log_prob(start) - forward(start)[1]
        (total,) = torch.autograd.grad(log_q.sum(), start)
    return x, log_q.detach(), torch.linalg.solve(jacobian.mT, total.unsqueeze(-1)).squeeze(-1)


def gradients(output, sources):
    found = torch.autograd.grad(output, sources, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(source) if grad is None else grad for source, grad in zip(sources, found, strict=True)]


def require_definition(flow, z, context, forward, log_prob=NORMAL.log_prob, also=(), **options):
    """Values, gradients of log q and of x, for a sum that weighs every row and feature on its own."""
    sources = [x for x in (z, context) if x is not None] + list(also)
    sources += flow.parameters() if isinstance(flow, nn.Module) else []
    x, log_q = hk.path_log_prob(flow, z, context, **options)
    expected_x, expected_log_q, score = by_definition(forward, z, log_prob)
    exact = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close((x, log_q), (expected_x, expected_log_q), **exact)
    rows, weights = torch.randn(len(z), dtype=F64), torch.randn(len(z), D, dtype=F64)
    expected = gradients((rows.unsqueeze(-1) * score * expected_x).sum(), sources)
    torch.testing.assert_close(gradients((rows * log_q).sum(), sources), expected, **exact)
    assert any(grad.abs().max() > 1e-3 for grad in expected)
    together = gradients((rows * log_q).sum() + (weights * x).sum(), sources)
    apart = gradients((weights * expected_x).sum(), sources)
    torch.testing.assert_close(together, [a + b for a, b in zip(expected, apart, strict=True)], **exact)


@each
def test_is_the_definition(name):
    flow, z, context = case(name)
    require_definition(flow, z, context, lambda z: flow(z, context))


@each
def test_value_is_that_of_the_forward_pass(name):
    flow, z, context = case(name)
    x, log_q = hk.path_log_prob(flow, z, context)
    image, log_abs_det = flow(z, context)
    assert torch.equal(x, image)
    torch.testing.assert_close(log_q, NORMAL.log_prob(z) - log_abs_det, rtol=0, atol=1e-13)
    with torch.no_grad():
        bare, value = hk.path_log_prob(flow, z, context)
    assert torch.equal(bare, x)
    assert torch.equal(value, log_q)
    assert not value.requires_grad


def density(flow, x, context):
    z, log_abs_det = flow.inverse(x, context)
    return NORMAL.log_prob(z) + log_abs_det


@pytest.mark.parametrize("name", INVERTIBLE)
def test_nothing_varies_where_q_is_p(name):
    """Zero for every point, to rounding, where the plain estimator's gradient is not."""
    flow, z, context = case(name)
    target, held = copy.deepcopy(flow).requires_grad_(False), None if context is None else context.detach()
    parameters = list(flow.parameters())
    x, log_q = hk.path_log_prob(flow, z.detach(), held)
    path_gradient = gradients((log_q - density(target, x, held)).sum(), parameters)
    image, log_abs_det = flow(z.detach(), held)
    plain = gradients((NORMAL.log_prob(z.detach()) - log_abs_det - density(target, image, held)).sum(), parameters)
    largest = max(grad.abs().max().item() for grad in plain)
    assert largest > 0.1
    assert max(grad.abs().max().item() for grad in path_gradient) < 1e-10 * largest


@pytest.mark.parametrize("name", ["iaf", "maf-spline-context", "stack-coupling", "planar", "radial"])
def test_expected_gradient_is_that_of_the_plain_estimator(name):
    """Their difference, the score, vanishes on the average: within 4.5 standard errors, and is not zero."""
    flow, _, _ = case(name)
    blocks, rows = 64, 512
    target = Independent(Normal(torch.linspace(-1, 1, D, dtype=F64), 0.7), 1)
    context = torch.ones(rows, 2, dtype=F64) if "context" in name else None
    parameters, differences = list(flow.parameters()), []
    for _ in range(blocks):
        z = torch.randn(rows, D, dtype=F64)
        x, log_q = hk.path_log_prob(flow, z, context)
        image, log_abs_det = flow(z, context)
        by_path = gradients((log_q - target.log_prob(x)).mean(), parameters)
        plain = gradients((NORMAL.log_prob(z) - log_abs_det - target.log_prob(image)).mean(), parameters)
        differences.append(torch.cat([(a - b).flatten() for a, b in zip(by_path, plain, strict=True)]))
    differences = torch.stack(differences)
    errors = differences.std(0) / blocks**0.5
    moved = errors > 1e-12
    assert moved.sum() > len(errors) // 5  # the others are weights that a mask hides, or whose unit never fires
    assert (differences.mean(0).abs() <= 4.5 * errors + 1e-12).all()


def test_other_bases_and_leading_dimensions():
    """A base that learns gets its gradients through z alone."""
    flow, _, _ = case("stack-of-all")
    loc = torch.randn(D, dtype=F64, requires_grad=True)
    base = Independent(Normal(loc, 0.8), 1)
    torch.manual_seed(0)
    z, context = base.rsample((2, ROWS)), torch.randn(2, ROWS, 2, dtype=F64)
    x, log_q = hk.path_log_prob(flow, z, context, base)
    flat = context.flatten(0, 1)
    expected_x, value, score = by_definition(lambda z: flow(z, flat), z.flatten(0, 1), base.log_prob)
    torch.testing.assert_close((x, log_q), (expected_x.unflatten(0, (2, -1)), value.unflatten(0, (2, -1))))
    assert log_q.shape == (2, ROWS)
    torch.testing.assert_close(gradients(log_q.sum(), [loc]), gradients((score * expected_x).sum(), [loc]))
    uniform = Independent(torch.distributions.Uniform(torch.full((D,), -9.0, dtype=F64), 9.0), 1)
    affine, z, _ = case("iaf")
    require_definition(
        affine, z, None, affine, lambda z: z.sum(-1) * 0 - D * torch.tensor(18.0, dtype=F64).log(), base=uniform
    )


def test_one_point_alone_and_float32():
    flow, z, _ = case("stack-maf-context")
    context = torch.randn(2, dtype=F64)
    x, log_q = hk.path_log_prob(flow, z[0], context)
    assert (x.shape, log_q.shape) == ((D,), ())
    all_log_q = hk.path_log_prob(flow, z[:1], context[None])[1]
    torch.testing.assert_close(gradients(log_q, list(flow.parameters())), gradients(all_log_q, list(flow.parameters())))
    single = flow.float()
    x, log_q = hk.path_log_prob(single, z.float(), torch.randn(ROWS, 2))
    assert x.dtype == log_q.dtype == torch.float32
    log_q.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in single.parameters())


@pytest.mark.parametrize("layers", [0, 1])
def test_the_centre_of_a_radial_flow(layers):
    flow = hk.nn.RadialFlow(D, layers, dtype=F64)
    z = torch.cat((flow.center.detach(), torch.randn(1, D, dtype=F64))).requires_grad_()
    x, log_q = hk.path_log_prob(flow, z)
    (found,) = torch.autograd.grad(log_q.sum(), z)
    assert found.isfinite().all()
    assert (x.shape, log_q.shape) == (z.shape, z.shape[:1])


# ---- What it costs ----


@contextlib.contextmanager
def counted(owner, name):
    """Calls of a function, each as whether something that it was given as parameters needs gradients."""
    calls, function = [], getattr(owner, name)

    def counting(*arguments):
        parameters = arguments[0].parameters() if isinstance(arguments[0], nn.Module) else arguments[1].stages
        calls.append(any(getattr(one, "weight", one).requires_grad for one in parameters))
        return function(*arguments)

    with mock.patch.object(owner, name, counting):
        yield calls


@pytest.mark.parametrize(
    ("name", "there", "back"), [("stack-iaf", "forward", "inverse"), ("maf", "inverse", "forward")]
)
def test_an_autoregressive_flow_is_passed_once_each_way(name, there, back):
    """And the second time without gradients of weights; without gradients at all the first pass is the only one."""
    flow, z, context = case(name)
    n = len(getattr(flow, "flows", [flow]))
    owner = autoregressive_network
    with counted(owner, f"autoregressive_{there}") as first, counted(owner, f"autoregressive_{back}") as second:
        _, log_q = hk.path_log_prob(flow, z, context)
        assert (first, second) == ([True] * n, [False] * n)
        log_q.sum().backward()
        with torch.no_grad():
            hk.path_log_prob(flow, z, context)
        assert (len(first), len(second)) == (2 * n, n)
        held = flow.requires_grad_(False)
        assert not hk.path_log_prob(held, z.detach(), context)[1].requires_grad
        assert (len(first), len(second)) == (3 * n, n)


def test_a_coupling_flows_network_is_called_twice():
    flow, z, _ = case("stack-coupling")
    with counted(coupling.Conditioner, "forward") as calls:
        hk.path_log_prob(flow, z)[1].sum().backward()
    assert calls == [True] * 4 + [False] * 4


@pytest.mark.parametrize("name", ["planar", "radial"])
def test_layers_in_closed_form_solve_nothing(name):
    flow, z, _ = case(name)
    with mock.patch.object(path, "_solved", None):
        hk.path_log_prob(flow, z)[1].sum().backward()


def test_any_other_map_takes_d_backward_passes():
    flow, z, _ = case("cubic")
    with mock.patch.object(path, "_gradient", wraps=path._gradient) as passes:
        hk.path_log_prob(flow, z)
    assert passes.call_count == D + 1


def test_a_flow_that_is_more_than_its_class_is_called():
    """By hooks the closed form is out, and a stack with one is one map."""
    flow, z, _ = case("planar")
    flow.register_forward_hook(lambda module, inputs, result: (2 * result[0], result[1] + D * torch.tensor(2.0).log()))
    require_definition(flow, z, None, flow)
    stack, z, context = case("stack-maf-context")
    stack.register_forward_hook(lambda module, inputs, result: result)
    require_definition(stack, z, context, lambda z: stack(z, context))


def test_parameters_are_left_as_they_were():
    flow, z, context = case("stack-of-all")
    before = {name: (id(value), value._version) for name, value in flow.named_parameters()}
    hk.path_log_prob(flow, z, context)
    assert {name: (id(value), value._version) for name, value in flow.named_parameters()} == before
    assert all(parameter.requires_grad for parameter in flow.parameters())


# ---- Autocast ----


@pytest.mark.parametrize("name", ["planar", "planar-shared", "radial"])
def test_closed_forms_leave_autocast_out(name):
    """In float32 as the flows themselves, and just so of bfloat16 points."""
    flow, z, _ = case(name)
    flow, results = flow.float(), []
    for autocast, dtype in ((False, torch.float32), (True, torch.float32), (True, torch.bfloat16)):
        points = z.detach().bfloat16().to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            x, log_q = hk.path_log_prob(flow, points)
        results.append((x, log_q, *gradients(log_q.sum(), list(flow.parameters()))))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-6, atol=1e-6)


def test_a_jacobian_in_half_precision_is_solved_for():
    flow, z, _ = case("cubic")
    flow, points = flow.float(), z.detach().bfloat16()
    expected = gradients(hk.path_log_prob(flow, points.float())[1].sum(), list(flow.parameters()))
    solve = mock.patch.object(torch.linalg, "solve", wraps=torch.linalg.solve)
    with torch.autocast("cpu", torch.bfloat16), solve as solved:  # which GPUs have not in bfloat16
        found = gradients(hk.path_log_prob(flow, points)[1].sum(), list(flow.parameters()))
    assert solved.call_args.args[0].dtype == torch.float32
    assert max(testing.relative_error(a, b.double()) for a, b in zip(found, expected, strict=True)) < 0.05


# ---- Twice ----


@pytest.mark.parametrize("name", ["iaf", "planar"])
def test_second_derivatives_are_refused(name):
    flow, z, _ = case(name)
    x, log_q = hk.path_log_prob(flow, z)
    once = torch.autograd.grad(log_q.sum() + x.square().sum(), z, create_graph=True)[0]
    torch.testing.assert_close(once, torch.autograd.grad(log_q.sum() + x.square().sum(), z, retain_graph=True)[0])
    with pytest.raises(RuntimeError, match="path_log_prob: log_q is differentiable once"):
        torch.autograd.grad(once.sum(), z)
    (of_x,) = torch.autograd.grad(x.square().sum(), z, create_graph=True)
    assert torch.autograd.grad(of_x.sum(), z)[0].abs().max() > 0


def test_functional_transforms_are_refused():
    flow, z, _ = case("iaf")
    with pytest.raises(RuntimeError, match=r"path_log_prob: transforms of torch\.func"):
        torch.func.grad(lambda z: hk.path_log_prob(flow, z)[1].sum())(z.detach())


# ---- torch.distributions ----


def test_transforms():
    """A context that a transform holds gets its gradient; ours, torch's, and both together, there and back."""
    flow, z, context = case("maf-context")
    planar = case("planar")[0]
    loc, scale = torch.randn(D, dtype=F64, requires_grad=True), torch.rand(D, dtype=F64) + 0.5
    ours, affine = flow.as_transform(context, cache_size=1), AffineTransform(loc, scale)
    learned = [context, loc, *flow.parameters(), *planar.parameters()]
    require = functools.partial(require_definition, z=z, context=None, also=learned)

    def through(z):
        x, total = flow(z, context)
        image, log_abs_det = planar(x * scale + loc)
        return image, total + scale.log().sum() + log_abs_det

    def back(z):
        x, log_abs_det = flow.inverse((z - loc) / scale, context)
        return x, log_abs_det - scale.log().sum()

    def squashed(z):
        x, total = flow(z, context)
        return x.tanh(), total + TanhTransform().log_abs_det_jacobian(x, x.tanh()).sum(-1)

    require(ours, forward=lambda z: flow(z, context))
    require(ours.inv, forward=lambda z: flow.inverse(z, context))
    parts = [ours, affine, planar.as_transform()]
    for composed in (parts, ComposeTransform(parts), TransformedDistribution(NORMAL, parts)):
        require(composed, forward=through)
    require(ComposeTransform([ours, affine]).inv, forward=back)
    require(ComposeTransform([ours.inv, affine.inv]), forward=lambda z: _shifted(flow.inverse(z, context), loc, scale))
    stack, _, held = case("stack-maf-context")
    require(stack.as_transform(held).inv, forward=lambda z: stack.inverse(z, held), also=[held, *stack.parameters()])
    with pytest.raises(NotImplementedError, match="PlanarFlow: the inverse has no closed form"):
        hk.path_log_prob(planar.as_transform().inv, z)
    require([ours, TanhTransform()], forward=squashed)


def _shifted(pair, loc, scale):
    return (pair[0] - loc) / scale, pair[1] - scale.log().sum()


def test_a_transforms_cache_is_not_asked():
    """It holds points of other parameters, and such without gradients."""
    loc, z = torch.zeros(D, dtype=F64, requires_grad=True), torch.randn(2, D, dtype=F64)
    shift = AffineTransform(loc, 2.0, cache_size=1)
    with torch.no_grad():
        hk.path_log_prob(shift, z)
        loc += 1
    x, log_q = hk.path_log_prob(shift, z)
    torch.testing.assert_close(x, 2 * z + 1)
    (found,) = torch.autograd.grad(log_q.sum(), loc)
    torch.testing.assert_close(found, -(z / 2).sum(0))


# ---- Other libraries ----

#: Without a context where the library's objects take one as a transform does.
PEERS = [name for name in FLOWS if FLOWS[name].library is not peers.Pyro]


@pytest.fixture
def zuko_settings():
    """And the default dtype that pyro's own sequential directions need."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    with peers.settings():
        yield
    torch.set_default_dtype(before)


def peer(name, accelerated):
    torch.manual_seed(3)
    flow = FLOWS[name].build(D, FLOWS[name].context).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.normal_(std=0.5 * max(1, parameter.shape[-1]) ** -0.5)
    if accelerated:
        flow, report = hk.accelerate(flow)
        assert report.swapped
    z = torch.randn(ROWS, D, dtype=F64, requires_grad=True)
    c = FLOWS[name].context
    return flow, z, torch.randn(ROWS, c, dtype=F64, requires_grad=True) if c else None


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", PEERS)
def test_flows_of_other_libraries(name, accelerated, zuko_settings):
    flow, z, context = peer(name, accelerated)
    library = FLOWS[name].library
    forwards = library.there if library is peers.Normflows else library.back
    require_definition(flow, z, context, lambda z: forwards(flow, z, context), base_of(flow, context))


def base_of(flow, context):
    """The log-density of noise as the library has it."""
    if hasattr(flow, "q0"):
        return (lambda z: flow.q0.log_prob(z)) if context is None else (lambda z: flow.q0.log_prob(z, context=context))
    return flow._distribution.log_prob if hasattr(flow, "_distribution") else flow(context).base.log_prob


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", [name for name in FLOWS if FLOWS[name].library is peers.Pyro])
def test_transforms_of_pyro(name, accelerated, zuko_settings):
    flow, z, context = peer(name, accelerated)
    if flow.inverted and context is None:
        distribution = peers.Pyro.distribution(flow, z, context)
        require_definition(distribution, z, None, lambda z: peers.Pyro.there(flow, z, context))
        return
    flow.inverted = False
    require_definition(flow, z, context, lambda z: peers.Pyro.there(flow, z, context))
    if context is not None:
        whole = peers.dist.ConditionalTransformedDistribution(
            peers.dist.Normal(z.new_zeros(D), 1.0).to_event(1), list(flow)
        )
        x, log_q = hk.path_log_prob(whole, z, context)
        torch.testing.assert_close((x, log_q), hk.path_log_prob(flow, z, context))


def test_pyros_layers_without_inverse(zuko_settings):
    layer = peers.pyro_transforms.Planar(D).double()
    z = torch.randn(ROWS, D, dtype=F64, requires_grad=True)

    def forward(z):
        x = layer(z)
        return x, layer.log_abs_det_jacobian(z, x)

    require_definition(layer, z, None, forward)


def test_parts_of_other_libraries(zuko_settings):
    """Distributions that a lazy flow has returned, and layers as maps from noise to points."""
    flow, z, context = peer("zuko-context", True)
    built = flow(context)
    x, log_q = hk.path_log_prob(built, z)
    again, also = hk.path_log_prob(flow, z, context)
    torch.testing.assert_close((x, log_q), (again, also))
    sources = [z, context, *flow.parameters()]
    torch.testing.assert_close(gradients(log_q.sum(), sources), gradients(also.sum(), sources))
    flow, z, context = peer("nflows-residual-context", True)
    assert isinstance(flow._transform, CompositeTransform)
    require_definition(flow._transform, z, context, lambda z: flow._transform(z, context))
    flow, z, _ = peer("normflows-residual", True)
    require_definition(flow.flows, z, None, lambda z: peers.Normflows.there(flow, z, None))


@pytest.mark.parametrize("name", FLOWS)
def test_every_place_of_a_parameter_is_as_it_was(name, zuko_settings):
    """Also of modules that stand in two places, as a spline's network in pyro."""
    flow, z, context = peer(name, True)
    flow.inverted = False
    places = [(key, id(value)) for key, value in flow.named_parameters(remove_duplicate=False)]
    hk.path_log_prob(flow, z, context)
    assert [(key, id(value)) for key, value in flow.named_parameters(remove_duplicate=False)] == places


def test_a_network_before_nflows_and_a_base_with_context(zuko_settings):
    flow, z, context = peer("nflows-residual-context", True)
    embedding = nn.Linear(2, 3, dtype=F64)
    base = peers.nflows_distributions.ConditionalDiagonalNormal([D], nn.Linear(3, 2 * D, dtype=F64))
    whole = peers.nflows_flows.Flow(flow._transform, base, embedding)
    context = torch.randn(ROWS, 2, dtype=F64, requires_grad=True)
    require_definition(
        whole,
        z,
        context,
        lambda z: flow._transform.inverse(z, embedding(context)),
        lambda z: base.log_prob(z, embedding(context).detach()),
    )


class Glasflow(nn.Module):
    """As glasflow has it: from points to noise, and no network for the context."""

    def __init__(self, transform, distribution):
        super().__init__()
        self._transform, self._distribution = transform, distribution

    def forward(self, x, conditional=None):
        return self._transform.forward(x, context=conditional)

    def inverse(self, z, conditional=None):
        return self._transform.inverse(z, context=conditional)


Glasflow.__module__, Glasflow.__name__ = "glasflow.flows.base", "Flow"


def test_flows_of_glasflow(zuko_settings):
    inner, z, context = peer("nflows-residual-context", True)
    flow = Glasflow(inner._transform, inner._distribution)
    require_definition(flow, z, context, lambda z: flow.inverse(z, context), flow._distribution.log_prob)


@pytest.mark.parametrize("name", ["zuko", "zuko-inverted-context", "nflows-spline", "normflows-spline-context", "pyro"])
def test_an_accelerated_layer_is_passed_once_each_way(name, zuko_settings):
    """No layer of the library's is called, and without gradients there is one pass alone."""
    flow, z, context = peer(name, True)
    flow.inverted, calls = False, []
    with hk.use_impl("cpp"), contextlib.ExitStack() as patches:
        for kind in peers.MASKED:
            patches.enter_context(mock.patch.object(kind, "forward", None))
        for direction in ("sequential", "parallel"):
            counting = mock.Mock(
                wraps=getattr(_network, direction), side_effect=functools.partial(_note, calls, direction)
            )
            patches.enter_context(mock.patch.object(_network, direction, counting))
        with torch.no_grad():
            hk.path_log_prob(flow, z, context)
        (first,) = set(calls)
        assert calls == [first] * 2
        calls.clear()
        hk.path_log_prob(flow, z, context)[1].sum().backward()
    (second,) = {"sequential", "parallel"} - {first}
    assert calls == [first] * 2 + [second] * 2


def _note(calls, direction, *_):
    calls.append(direction)
    return mock.DEFAULT


# ---- Errors ----


class Named(nn.Module):
    features = D


@pytest.mark.parametrize(
    ("flow", "given"),
    [
        (None, "NoneType None"),
        (nn.Linear(D, D), "Linear"),
        (Named(), "Named"),
        ([IAF(D, [4]), 3.0], r"float 3\.0"),
        (lambda z: z, "function"),
        (NORMAL, "Independent"),
    ],
)
def test_what_is_no_flow(flow, given):
    with pytest.raises(TypeError, match=rf"path_log_prob: flow must be a flow of hvae_kernels\.nn, .*, got {given}"):
        hk.path_log_prob(flow, torch.zeros(2, D))


def test_a_hamiltonian_flow_has_no_density_of_positions():
    flow = hk.nn.HamiltonianFlow(D, 2)
    for given in (flow, [flow]):
        with pytest.raises(TypeError, match=r"flow must be a flow of positions alone.*HamiltonianFlow"):
            hk.path_log_prob(given, torch.zeros(2, D))


def test_bad_arguments(zuko_settings):
    flow, z, context = case("iaf-context")
    with pytest.raises(TypeError, match="path_log_prob: z must be a dense floating-point tensor"):
        hk.path_log_prob(flow, [1.0])
    with pytest.raises(ValueError, match=r"z must be a tensor of shape \(\.\.\., 4\)"):
        hk.path_log_prob(flow, z[:, :3], context)
    with pytest.raises(TypeError, match="path_log_prob: context must be a tensor, got list"):
        hk.path_log_prob(flow, z, [1.0])
    with pytest.raises(ValueError, match=r"context must be a tensor of shape \(\.\.\., 2\)"):
        hk.path_log_prob(flow, z)
    for other in (case("stack-iaf")[0], case("planar")[0], flow.as_transform(context), [case("radial")[0]]):
        with pytest.raises(ValueError, match="context must be None, as"):
            hk.path_log_prob(other, z, context)
    with pytest.raises(TypeError, match="base must be None or a distribution, with a log_prob, got float"):
        hk.path_log_prob(flow, z, context, 1.0)
    with pytest.raises(ValueError, match=r"base must be over vectors, with log_prob of shape \(6,\)"):
        hk.path_log_prob(flow, z, context, Normal(torch.zeros(D, dtype=F64), 1.0))
    for name in ("zuko", "nflows-linear", "normflows-residual"):
        with pytest.raises(ValueError, match="base must be None, as the flow has its own"):
            hk.path_log_prob(peer(name, False)[0], z, None, NORMAL)
    for name in ("normflows-residual",):
        with pytest.raises(ValueError, match="context must be None, as NormalizingFlow takes none"):
            hk.path_log_prob(peer(name, False)[0], z, context)
    with pytest.raises(TypeError, match="flow must be"):
        hk.path_log_prob(peers.zuko.mixtures.GMM(D, 0, 3), z)


class Pairless(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.forward = lambda z: result(z)

    def inverse(self, x):
        return x, x.sum(-1)


def test_bad_results():
    z = torch.zeros(2, D)
    with pytest.raises(TypeError, match=r"path_log_prob: flow must be .*, got a torch\.float32 tensor"):
        hk.path_log_prob(Pairless(lambda z: z), z)
    with pytest.raises(ValueError, match=r"flow must be one with log_abs_det of shape \(2,\)"):
        hk.path_log_prob(Pairless(lambda z: (z, z)), z)
