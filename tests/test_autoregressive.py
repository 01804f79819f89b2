"""Properties of masked networks and autoregressive flows that no implementation can fake, and errors for bad input."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import KINDS, network

import hvae_kernels as hk
from hvae_kernels import testing
from hvae_kernels.functional import Gate
from hvae_kernels.ops import autoregressive_network
from hvae_kernels.ops.autoregressive.gates import NUMBERS
from hvae_kernels.ops.autoregressive_network import ACTIVATIONS, reference
from hvae_kernels.ops.autoregressive_network import autograd as network_autograd

FLOWS = (hk.nn.InverseAutoregressiveFlow, hk.nn.MaskedAutoregressiveFlow)
each_flow = pytest.mark.parametrize("flow", FLOWS)
each_implementation = pytest.mark.parametrize("implementation", ["cpp", "reference"])


@pytest.fixture(autouse=True)
def double_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def jacobian(function, z):
    return torch.autograd.functional.jacobian(function, z)


# ---- Who sees whom ----


@given(
    features=st.integers(1, 7),
    hidden=st.lists(st.integers(1, 9), min_size=0, max_size=3),
    context=st.booleans(),
    seed=st.integers(0, 99),
)
def test_outputs_see_earlier_features_only(features, hidden, context, seed):
    torch.manual_seed(seed)
    order = torch.randperm(features)
    made = hk.nn.MADE(features, hidden, 3, 2 * context, order, "tanh")
    given_context = (torch.randn(2),) if context else ()
    seen = jacobian(lambda x: made(x, *given_context), torch.randn(features)).ne(0)
    place = order.argsort()
    allowed = place[:, None] > place
    assert not (seen & ~allowed).any()


def test_wide_networks_use_every_connection():
    """Not only nothing forbidden: each output depends on all features before it, and on the context."""
    made = hk.nn.MADE(6, [40, 40], 2, 3, activation="tanh")
    x, context = torch.randn(6), torch.randn(3)
    assert jacobian(lambda x: made(x, context), x).ne(0).equal(torch.ones(2, 6, 6).tril(-1).bool())
    assert jacobian(lambda c: made(x, c), context).ne(0).all()


# ---- Flows ----


@each_flow
@pytest.mark.parametrize("gate", list(NUMBERS))
def test_log_determinant_and_round_trip(flow, gate):
    model = flow(5, [20, 20], context_features=2, gate=gate, order=[3, 1, 0, 2, 4], activation="tanh")
    z, context = torch.randn(4, 5), torch.randn(4, 2)
    image, log_abs_det = model(z, context)
    for row in range(4):
        square = jacobian(lambda z, row=row: model(z, context[row])[0], z[row])
        torch.testing.assert_close(torch.linalg.slogdet(square)[1], log_abs_det[row])
        place = torch.tensor([3, 1, 0, 2, 4]).argsort()
        assert not square[place[:, None] < place].any()
    torch.testing.assert_close(model.inverse(image, context), (z, -log_abs_det))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("kind", KINDS)
def test_implicit_derivative_is_the_derivative_through_the_steps(kind, activation):
    inputs = network(kind, 5, 8, 4, activation=activation, gate="softplus", order="shuffled", dtype=torch.float64)
    y = torch.randn(4, 5)
    cotangents = torch.randn(4, 5), torch.randn(4)
    results = []
    for inverse in (autoregressive_network.autoregressive_inverse, reference.autoregressive_inverse):
        leaves = [x.clone().requires_grad_() for x in (y, *inputs.tensors())]
        outputs = inverse(leaves[0], inputs.with_tensors(tuple(leaves[1:])))
        results.append((*outputs, *torch.autograd.grad(outputs, leaves, cotangents)))
    torch.testing.assert_close(*results)


@given(
    rows=st.integers(0, 70),
    features=st.integers(1, 40),
    hidden=st.integers(1, 90),
    kind=st.sampled_from(KINDS),
    order=st.sampled_from(["natural", "shuffled", "levels"]),
    halves=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_network_matches_the_reference(rows, features, hidden, kind, order, halves, seed):
    torch.manual_seed(seed)
    net = network(kind, features, hidden, rows, order=order, halves=halves, gate="soft-clipped", dtype=torch.float64)
    x = torch.randn(rows, features)
    y, log_abs_det = autoregressive_network.autoregressive_forward(x, net)
    torch.testing.assert_close((y, log_abs_det), reference.autoregressive_forward(x, net))
    torch.testing.assert_close(autoregressive_network.autoregressive_inverse(y, net), (x, -log_abs_det))


def test_float32_round_trip_of_a_large_flow():
    """To 1e-5 at d = 784: torch's initial weights make a well-conditioned net."""
    flow = hk.nn.InverseAutoregressiveFlow(784, [1024, 1024]).float()
    z = torch.randn(64, 784, dtype=torch.float32)
    with torch.no_grad():
        image, log_abs_det = flow(z)
        back, minus = flow.inverse(image)
    assert testing.relative_error(back, z.double()) < 1e-5
    assert testing.relative_error(minus, -log_abs_det.double()) < 1e-5


def test_hidden_activations_cost_the_inverse_no_memory():
    """What backward keeps of a trained inverse is its solution, not the steps that led to it."""
    flow, y = hk.nn.InverseAutoregressiveFlow(30, [200, 200]), torch.randn(16, 30)
    flow.requires_grad_()
    kept = testing.saved_bytes(lambda: flow.inverse(y), [y, *flow.parameters(), *flow.buffers()])
    assert kept == y.numel() * y.element_size()


def test_network_passes_do_not_grow_with_features(monkeypatch):
    """The inverse is one call of one kernel, whatever d is."""
    calls = []
    kernel = network_autograd.RAW_INVERSE["cpp"]
    monkeypatch.setitem(network_autograd.RAW_INVERSE, "cpp", lambda *args: (calls.append(1), kernel(*args))[1])
    for features in (2, 50):
        hk.nn.InverseAutoregressiveFlow(features, [60]).inverse(torch.randn(3, features))
    assert len(calls) == 2


@each_flow
@each_implementation
def test_second_derivatives_of_both_directions(flow, implementation):
    model = flow(3, [6], gate="softplus", activation="tanh")
    with hk.use_impl(implementation):
        for direction in (model.forward, model.inverse):
            z = torch.randn(2, 3, requires_grad=True)
            assert torch.autograd.gradgradcheck(lambda z, direction=direction: direction(z), z)


@pytest.mark.parametrize("case", ["the same flow twice", "tied layers", "there and back"])
def test_shared_parameters_with_create_graph(case):
    """A path through an earlier use of a parameter is not counted twice."""
    flow, z = hk.nn.InverseAutoregressiveFlow(4, [6, 6], activation="tanh"), torch.randn(5, 4)
    if case == "tied layers":
        flow.made.layers[1].bias = flow.made.layers[0].bias
    second = flow.inverse if case == "there and back" else flow
    results = []
    for implementation in ("cpp", "reference"):
        with hk.use_impl(implementation):
            image, a = flow(z)
            image, b = second(2 * image)
            loss = image.square().sum() - (a + b).sin().sum()
            gradients = torch.autograd.grad(loss, list(flow.parameters()), create_graph=True)
            penalty = sum(g.square().sum() for g in gradients)
            results.append((*gradients, *torch.autograd.grad(penalty, list(flow.parameters()))))
    torch.testing.assert_close(*results)


@each_flow
def test_dual_numbers(flow):
    model, z, tangent = flow(4, [8], activation="tanh"), torch.randn(3, 4), torch.randn(3, 4)
    for direction in (model.forward, model.inverse):
        expected = torch.func.jvp(direction, (z,), (tangent,))[1]
        with torch.autograd.forward_ad.dual_level():
            results = direction(torch.autograd.forward_ad.make_dual(z, tangent))
            tangents = tuple(torch.autograd.forward_ad.unpack_dual(r).tangent for r in results)
        torch.testing.assert_close(tangents, expected)


@each_flow
def test_compiles_as_one_graph(flow):
    model = flow(4, [8], context_features=2)
    z, context = torch.randn(5, 4, requires_grad=True), torch.randn(5, 2)

    def loss(direction):
        image, log_abs_det = direction(z, context)
        return image.square().sum() - log_abs_det.sum()

    for direction in (model.forward, model.inverse):
        expected = torch.autograd.grad(loss(direction), z)
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(torch.autograd.grad(compiled(direction), z), expected)


@each_flow
def test_leading_dimensions_and_shared_context(flow):
    model = flow(3, [8], context_features=2)
    z, context = torch.randn(2, 4, 3), torch.randn(4, 2)
    image, log_abs_det = model(z, context)
    assert image.shape == z.shape
    assert log_abs_det.shape == (2, 4)
    for row in range(2):
        torch.testing.assert_close(model(z[row], context), (image[row], log_abs_det[row]))
    torch.testing.assert_close(model(z[0, 0], context[0])[0], image[0, 0])


# ---- Modules ----


def test_state_dict_copies_and_repr():
    model = hk.nn.FlowStack.autoregressive(hk.nn.InverseAutoregressiveFlow, 3, 4, [8], orders="permuted")
    z = torch.randn(2, 4)
    other = hk.nn.FlowStack.autoregressive(hk.nn.InverseAutoregressiveFlow, 3, 4, [8])
    other.load_state_dict(model.state_dict())
    for same in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(same(z), model(z))
    assert "gate=Gate(name='affine'" in repr(model)
    assert "in_features=4, out_features=8" in repr(model)


@pytest.mark.parametrize("orders", ["reversed", "permuted", "same"])
def test_stack_is_the_composition(orders):
    generator = torch.Generator().manual_seed(1)
    model = hk.nn.FlowStack.autoregressive(
        hk.nn.MaskedAutoregressiveFlow, 3, 4, [8], orders=orders, generator=generator
    )
    z = torch.randn(5, 4)
    image, total = z, 0
    for flow in model.flows:
        image, log_abs_det = flow(image)
        total = total + log_abs_det
    torch.testing.assert_close(model(z), (image, total))
    torch.testing.assert_close(model.inverse(image), (z, -total))
    assert {"reversed": 2, "permuted": 3, "same": 1}[orders] == len(
        {tuple(flow.made.layers[0].in_degrees.tolist()) for flow in model.flows}
    )


@each_flow
@pytest.mark.parametrize("cache_size", [0, 1])
def test_transform_obeys_torch_distributions(flow, cache_size):
    model = flow(4, [8], context_features=2, activation="tanh")
    context = torch.randn(2)
    transform = model.as_transform(context, cache_size)
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(4), torch.ones(4)), 1)
    distribution = torch.distributions.TransformedDistribution(base, [transform])
    assert distribution.event_shape == (4,)
    assert distribution.batch_shape == ()
    sample = distribution.rsample((3,))
    z = transform.inv(sample)
    image, log_abs_det = model(z, context)
    torch.testing.assert_close(image, sample)
    torch.testing.assert_close(distribution.log_prob(sample), base.log_prob(z) - log_abs_det)
    gradients = torch.autograd.grad(distribution.log_prob(sample).sum(), list(model.parameters()), allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in gradients)
    assert transform.with_cache(1)._cache_size == 1
    assert transform.with_cache(cache_size) is transform
    assert transform == model.as_transform(context)
    assert transform != flow(4, [8]).as_transform()


def test_transform_keeps_the_pair_and_its_determinant(monkeypatch):
    model = hk.nn.InverseAutoregressiveFlow(4, [8])
    transform, z = model.as_transform(cache_size=1), torch.randn(3, 4)
    image = transform(z)
    monkeypatch.setattr(model, "forward", None)
    assert transform(z) is image
    assert transform.inv(image) is z
    assert transform.log_abs_det_jacobian(z, image).shape == (3,)


def test_a_transform_without_cache_keeps_nothing():
    transform = hk.nn.FlowStack([hk.nn.MaskedAutoregressiveFlow(4, [8])]).as_transform()
    transform(torch.randn(3, 4, requires_grad=True))
    copy.deepcopy(transform)
    assert transform._cached_log_abs_det is None


def test_the_determinant_comes_from_the_parallel_direction(monkeypatch):
    stack = hk.nn.FlowStack.autoregressive(hk.nn.MaskedAutoregressiveFlow, 2, 4, [8])
    transform, z = stack.as_transform(), torch.randn(3, 4)
    image = transform(z)
    monkeypatch.setitem(network_autograd.RAW_INVERSE, "cpp", None)
    torch.testing.assert_close(transform.log_abs_det_jacobian(z, image), -stack.inverse(image)[1])


def test_no_unit_of_a_default_network_is_without_a_reader():
    for widths in ([8, 2], [3], [20, 4, 9], [1, 1]):
        layers = hk.nn.MADE(10, widths).layers
        for layer, after in itertools.pairwise(layers):
            assert layer.out_degrees.max() <= after.out_degrees.max()


def test_expected_bound_is_below_the_evidence():
    """E log p(x, z) - log q(z) over a flow's samples stays below the exact evidence of a Gaussian model."""
    model = hk.nn.InverseAutoregressiveFlow(2, [16], gate="softplus")
    x, noise = torch.tensor([0.3, -1.0]), torch.randn(20_000, 2)
    normal = torch.distributions.Normal(torch.zeros(2), 1.0)
    with torch.no_grad():
        z, log_abs_det = model(noise)
        log_joint = normal.log_prob(z).sum(-1) + torch.distributions.Normal(z, 1.0).log_prob(x).sum(-1)
        bound = (log_joint - normal.log_prob(noise).sum(-1) + log_abs_det).mean()
    evidence = torch.distributions.Normal(torch.zeros(2), 2**0.5).log_prob(x).sum()
    assert bound < evidence


# ---- Bad input ----


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"features": 0}, ValueError, "MADE: features must be an integer of at least 1, got int 0"),
        ({"hidden_features": [8, 0]}, ValueError, "hidden_features must be an integer of at least 1"),
        ({"context_features": -1}, ValueError, "context_features must be an integer of at least 0"),
        ({"order": [0, 1, 1]}, ValueError, r"order must be a permutation of range\(3\), got \[0, 1, 1\]"),
        ({"order": [0, 1]}, ValueError, r"order must be a permutation of range\(3\)"),
        ({"order": [0.0, 1.0, 2.0]}, TypeError, "order must be integers"),
        ({"activation": "relu6"}, ValueError, "activation must be one of elu, gelu"),
        ({"hidden_degrees": [[0, 2]], "hidden_features": 2}, ValueError, "so that some output can use them, got 2"),
        ({"hidden_degrees": [[1, 0], [0, 0]], "hidden_features": [2, 2]}, ValueError, "between -1 and 0, .* got 1"),
        ({"hidden_degrees": [[0]], "hidden_features": 2}, ValueError, r"hidden_degrees must be of lengths \[2\]"),
    ],
)
def test_bad_made(arguments, error, message):
    with pytest.raises(error, match=message):
        hk.nn.MADE(**{"features": 3, "hidden_features": 8} | arguments)


def test_bad_flow_input():
    flow = hk.nn.InverseAutoregressiveFlow(3, [8], context_features=2)
    with pytest.raises(ValueError, match=r"z must be a tensor of shape \(..., 3\)"):
        flow(torch.randn(4, 2), torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"context must be a tensor of shape \(..., 2\), got a .*\(4, 3\)"):
        flow(torch.randn(4, 3), torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"context must be a tensor of shape \(..., 2\), got NoneType"):
        flow.inverse(torch.randn(4, 3))
    with pytest.raises(ValueError, match="context must be None, as context_features is 0"):
        hk.nn.InverseAutoregressiveFlow(3, [8])(torch.randn(4, 3), torch.randn(4, 2))
    with pytest.raises(TypeError, match=r"weight must have the dtype of x, torch\.float32"):
        flow(torch.randn(4, 3, dtype=torch.float32), torch.randn(4, 2))
    with pytest.raises(ValueError, match="gate must be a Gate or one of affine"):
        hk.nn.InverseAutoregressiveFlow(3, [8], gate="linear")
    with pytest.raises(ValueError, match="context must be of a batch shape that broadcasts to"):
        flow(torch.randn(4, 3), torch.randn(5, 2))
    with pytest.raises(TypeError, match="context must have the dtype of weight"):
        flow(torch.randn(4, 3), torch.randn(4, 2).float())
    for flows in ([], [torch.nn.ReLU()]):
        with pytest.raises(ValueError, match="flows must be at least one flow, all of the same features"):
            hk.nn.FlowStack(flows)
    with pytest.raises(ValueError, match="n_layers must be an integer of at least 1"):
        hk.nn.FlowStack.autoregressive(hk.nn.InverseAutoregressiveFlow, 0, 3, [8])
    with pytest.raises(ValueError, match="epsilon must be positive, and a normal float32 number"):
        Gate.softplus(1e-60)


@each_implementation
@pytest.mark.parametrize("gate", list(NUMBERS))
def test_a_scale_that_underflows_is_no_silent_nan(gate, implementation):
    flow = hk.nn.InverseAutoregressiveFlow(3, [8], gate=Gate(gate)).float()
    with torch.no_grad(), hk.use_impl(implementation):
        flow.made.layers[-1].bias[3:] = -1e4
        image, log_abs_det = flow(torch.randn(5, 3, dtype=torch.float32))
        if gate in ("affine", "sigmoid"):
            with pytest.raises(RuntimeError, match="a scale is below the least normal number, so the map has no"):
                flow.inverse(image)
            return
        back, minus = flow.inverse(image)
    assert all(torch.isfinite(x).all() for x in (image, log_abs_det, back, minus))
