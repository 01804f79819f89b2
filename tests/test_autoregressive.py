"""Properties of masked networks and autoregressive flows that no implementation can fake, and errors for bad input."""

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import KINDS, network
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune

import hvae_kernels as hk
from hvae_kernels import testing
from hvae_kernels.functional import Gate
from hvae_kernels.nn import made
from hvae_kernels.ops import autoregressive_network
from hvae_kernels.ops.affine_autoregressive.gates import PARAMETERS
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
@pytest.mark.parametrize("gate", list(PARAMETERS))
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
    assert "gate=Gate.affine()" in repr(model)
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


def test_stack_hands_its_context_to_the_flows_that_take_one():
    maf, planar = hk.nn.MaskedAutoregressiveFlow, hk.nn.PlanarFlow(4, 2)
    conditional, plain, inner = maf(4, [8], context_features=3), maf(4, [8]), hk.nn.FlowStack([maf(4, [8])])
    z, context = torch.randn(5, 4), torch.randn(5, 3)
    stack = hk.nn.FlowStack([plain, conditional, inner])
    image = inner(conditional(plain(z)[0], context)[0])[0]
    torch.testing.assert_close(stack(z, context)[0], image)
    torch.testing.assert_close(stack.inverse(image, context)[0], z)
    mixed = hk.nn.FlowStack([conditional, planar])
    torch.testing.assert_close(mixed(z, context)[0], planar(conditional(z, context)[0])[0])
    with pytest.raises(ValueError, match="FlowStack: context must be None, as no flow takes one"):
        hk.nn.FlowStack([plain, planar, inner])(z, context)
    with pytest.raises(ValueError, match="MADE: context must be a tensor of shape"):
        stack(z)


def test_stack_hands_its_context_to_code_of_subclasses():
    class Shifted(hk.nn.MaskedAutoregressiveFlow):
        def forward(self, z, context=None):
            return super().forward(z + context)

    class ShiftedStack(hk.nn.FlowStack):
        def forward(self, z, context=None):
            return super().forward(z + context)

    z, context = torch.randn(5, 4), torch.randn(5, 4)
    plain, patched = hk.nn.MaskedAutoregressiveFlow(4, [8]), hk.nn.PlanarFlow(4, 2)
    patched.forward = lambda z, context=None: (z + context, z.new_zeros(5))
    for flow in (Shifted(4, [8]), ShiftedStack([plain]), patched):
        torch.testing.assert_close(hk.nn.FlowStack([plain, flow])(z, context)[0], flow(plain(z)[0], context)[0])


@each_flow
@pytest.mark.parametrize("cache_size", [0, 1])
def test_transform_obeys_torch_distributions(flow, cache_size):
    model = flow(4, [8], context_features=2, activation="tanh")
    context = torch.randn(2)
    transform = model.as_transform(context, cache_size=cache_size)
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


# ---- A cache is no older than what it was computed from ----


def _score(transform, y):
    """What ``TransformedDistribution.log_prob`` computes; the target of every check below is the same without cache."""
    x = transform.inv(y)
    return -x.square().sum(-1) / 2 - transform.log_abs_det_jacobian(x, y)


def _step(model, context, y):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)


def _set_data(model, context, y):
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.1


def _replace(model, context, y):
    model.made.layers[0].weight = torch.nn.Parameter(model.made.layers[0].weight.detach() + 0.1)


def _load(model, context, y):
    model.load_state_dict(type(model)(4, [8], context_features=2, order=[3, 1, 0, 2]).state_dict())


CHANGES = {
    "optimiser": _step,
    "data": _set_data,
    "another parameter": _replace,
    "loaded": _load,
    "context": lambda model, context, y: context.mul_(2),
    "the point": lambda model, context, y: y.mul_(2),
}


@each_flow
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES)
def test_a_cached_pair_is_forgotten_when_anything_changes(flow, mode, change):
    model, context, y = flow(4, [8], context_features=2), torch.randn(2), torch.randn(3, 4)
    cached, plain = model.as_transform(context, cache_size=1), model.as_transform(context)
    with mode():
        if mode is torch.inference_mode:  # whose tensors have no version
            cached.context = plain.context = context = context.clone()
            y = y.clone()
        before = _score(cached, y)
        CHANGES[change](model, context, y)
        after = _score(cached, y)
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, _score(plain, y))


@pytest.mark.parametrize("returned", ["x", "log-determinant"])
def test_results_that_are_changed_in_place_leave_the_cache(returned):
    transform, y = hk.nn.MaskedAutoregressiveFlow(4, [8]).as_transform(cache_size=1), torch.randn(3, 4)
    with torch.no_grad():
        expected = _score(transform, y)
        x = transform.inv(y)
        (x if returned == "x" else transform.log_abs_det_jacobian(x, y)).add_(1)
        torch.testing.assert_close(_score(transform, y), expected)


def _thaw(model, transform, y):
    _score(transform, y)
    model.requires_grad_()


def _in_mode(mode):
    def first(model, transform, y):
        model.requires_grad_()
        with mode():
            _score(transform, y)

    return first


def _backward(model, transform, y):
    model.requires_grad_()
    _score(transform, y).sum().backward()
    model.zero_grad()


FIRST = {
    "no_grad": _in_mode(torch.no_grad),
    "inference_mode": _in_mode(torch.inference_mode),
    "frozen parameters": _thaw,
    "a backward pass": _backward,
}


@each_flow
@pytest.mark.parametrize("first", FIRST)
def test_a_cached_pair_has_the_gradients_that_are_wanted(flow, first):
    model, y = flow(4, [8]).requires_grad_(False), torch.randn(3, 4)
    transform = model.as_transform(cache_size=1)
    FIRST[first](model, transform, y)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(_score(transform, y).sum(), parameters)
    expected = torch.autograd.grad(_score(model.as_transform(), y).sum(), parameters)
    torch.testing.assert_close(gradients, expected)


def test_a_point_that_begins_to_want_gradients_gets_them():
    transform, y = hk.nn.MaskedAutoregressiveFlow(4, [8]).as_transform(cache_size=1), torch.randn(3, 4)
    _score(transform, y)
    (gradient,) = torch.autograd.grad(_score(transform, y.requires_grad_()).sum(), y)
    assert gradient.abs().max() > 0


def test_what_holds_stays_cached_and_is_cleared_by_hand():
    model, y = hk.nn.MaskedAutoregressiveFlow(4, [8]), torch.randn(3, 4)
    transform = model.as_transform(cache_size=1)
    x = transform.inv(y)
    with torch.no_grad():  # what was recorded serves where nothing is
        assert transform.inv(y) is x
    for parameter in model.parameters():
        parameter.data.add_(0.1)  # which torch does not count
    assert transform.inv(y) is x
    transform.clear_cache()
    torch.testing.assert_close(transform.inv(y), model.inverse(y)[0])
    assert transform.inv(y) is not x
    copy.deepcopy(transform)  # without what was recorded, which cannot be copied
    assert pickle.loads(pickle.dumps(transform))._cached_x_y == (None, None)


def test_a_recorded_pair_is_let_go():
    """The node that tells of a backward pass holds neither the points nor the transform."""
    transform = hk.nn.MaskedAutoregressiveFlow(4, [8]).as_transform(cache_size=1)
    gc.disable()
    try:
        y = transform(torch.randn(3, 4))
        kept = weakref.ref(y), weakref.ref(transform)
        transform.clear_cache()
        del y, transform
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()


# ---- Networks that are more than their weights are called ----


def _hook_form(apply, parameter):
    """A weight that a pre-hook computes, from what an optimiser changes after the first call."""

    def change(flow):
        for layer in flow.made.layers:
            apply(layer)
            for _ in range(20):  # spectral_norm estimates in training
                layer(torch.zeros(1, layer.weight.shape[1]))
        with torch.no_grad():
            for layer in flow.made.layers:
                getattr(layer, parameter).mul_(1.5)

    return change


def _set_forward(flow):
    layer = flow.made.layers[0]
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)


class _Doubled(hk.nn.MADE):
    def forward(self, x, context=None):
        return 2 * super().forward(x, context)


class _Wrapped(torch.nn.Module):
    """As an adapter of low rank wraps a layer; a diagonal keeps the order."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.scale = layer, torch.nn.Parameter(torch.rand(len(layer.out_degrees)))

    def forward(self, x):
        return self.layer(x) * self.scale


def _wrap(flow):
    flow.made.layers[1] = _Wrapped(flow.made.layers[1])


def _call_class(flow):
    class Called(hk.nn.MaskedLinear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    flow.made.layers[1].__class__ = Called


MORE = {
    "weight_norm": _hook_form(torch.nn.utils.weight_norm, "weight_g"),
    "spectral_norm": _hook_form(torch.nn.utils.spectral_norm, "weight_orig"),
    "prune": _hook_form(lambda layer: prune.random_unstructured(layer, "weight", 0.3), "weight_orig"),
    "hook": lambda flow: flow.made.layers[1].register_forward_hook(lambda layer, inputs, output: 2 * output),
    "pre-hook": lambda flow: flow.made.register_forward_pre_hook(lambda made, inputs: (inputs[0].sin(), *inputs[1:])),
    "forward of an instance": _set_forward,
    "subclass": lambda flow: setattr(flow.made, "__class__", _Doubled),
    "wrapped layer": _wrap,
    "class that is called otherwise": _call_class,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@each_flow
@pytest.mark.parametrize("gate", ["affine", "sigmoid"])
@pytest.mark.parametrize("case", MORE)
def test_a_network_that_is_more_than_its_weights_is_called_in_both_directions(flow, gate, case):
    model = flow(4, [8], order=[2, 0, 3, 1], gate=gate)
    MORE[case](model)
    model.eval()
    z = torch.randn(2, 3, 4)
    parallel, sequential = (
        (model.forward, model.inverse) if model.forward_is_parallel else (model.inverse, model.forward)
    )
    image, log_abs_det = parallel(z)
    shift, raw = model.made(z).unbind(-2)
    expected = hk.functional.affine_autoregressive(z, shift, raw, gate=gate)
    torch.testing.assert_close((image, log_abs_det), expected, rtol=0, atol=0)
    torch.testing.assert_close(sequential(image), (z, -log_abs_det))
    leaf = image.detach().requires_grad_()
    square = jacobian(lambda y: sequential(y)[0], leaf[0, 0])
    torch.testing.assert_close(square, torch.linalg.inv(jacobian(lambda z: parallel(z)[0], z[0, 0])))


def test_called_networks_give_the_parameters_their_gradients():
    model, y = hk.nn.MaskedAutoregressiveFlow(4, [8], gate="softplus", activation="tanh"), torch.randn(3, 4)
    gradients = []
    for hooked in (False, True):
        handle = model.made.register_forward_hook(lambda *_: None) if hooked else None
        z, log_abs_det = model(y)
        loss = z.square().sum() + log_abs_det.sin().sum()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    handle.remove()
    torch.testing.assert_close(*gradients)


@each_flow
def test_a_hook_on_all_modules_is_seen_in_both_directions(flow):
    model, z = flow(4, [8]), torch.randn(3, 4)
    before = model(z)[0]
    with register_module_forward_hook(
        lambda module, inputs, output: 2 * output if isinstance(module, hk.nn.MaskedLinear) else None
    ):
        image, log_abs_det = model(z)
        torch.testing.assert_close(model.inverse(image), (z, -log_abs_det))
    assert not torch.allclose(image, before)
    torch.testing.assert_close(model(z)[0], before, rtol=0, atol=0)


def test_hooks_are_called_at_every_level_of_a_stack():
    stack, calls = hk.nn.FlowStack.autoregressive(hk.nn.InverseAutoregressiveFlow, 2, 4, [8]), []
    for name, module in stack.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    stack(torch.randn(3, 4))
    assert set(calls) == {n for n, m in stack.named_modules() if not isinstance(m, torch.nn.ModuleList)}


@pytest.mark.parametrize("case", ["later features", "another result every time"])
def test_a_network_without_an_inverse_is_refused(case):
    model = hk.nn.InverseAutoregressiveFlow(4, [8])
    change = (lambda output: output.flip(-1)) if case == "later features" else torch.nn.functional.dropout
    model.made.register_forward_hook(lambda made, inputs, output: change(output))
    image, _ = model(torch.randn(3, 4))
    message = "InverseAutoregressiveFlow: hooks or code of its own make made differ from call to call, or see later .*"
    with pytest.raises(RuntimeError, match=message + r"call eval\(\) .* remove them, or use the other direction alone"):
        model.inverse(image)


def test_a_scale_that_underflows_is_refused_by_calls_too():
    model = hk.nn.InverseAutoregressiveFlow(4, [8])
    model.made.register_forward_hook(lambda made, inputs, output: output - 1e4)
    with pytest.raises(RuntimeError, match="a scale is below the least normal number"):
        model.inverse(torch.randn(3, 4))


def test_a_forward_that_was_put_back_is_read_again():
    """Bound to its module it is that of its class."""
    model = hk.nn.InverseAutoregressiveFlow(4, [8])
    for module in (model.made, *model.made.layers):
        module.forward = module.forward
    assert made.is_read(model.made)
    assert made.is_read(copy.deepcopy(model).made)


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
@pytest.mark.parametrize("gate", list(PARAMETERS))
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
