"""``hk.accelerate``: the same numbers as the untouched flow, in both directions, with every gradient."""

import copy
import functools
import importlib
import io
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import peers
import pytest
import torch
from peers import FLOWS, Pyro, Zuko
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
)
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode
from zuko import flows as zuko_flows
from zuko.bayesian import BayesianModel

import hvae_kernels as hk
from hvae_kernels import _extension, testing
from hvae_kernels.compat import _network

FEATURES, ROWS = 5, 7
each_flow = pytest.mark.parametrize("name", FLOWS)
#: ``auto`` leaves small calls of the parallel direction to the library, an explicit choice fuses both.
each_choice = pytest.mark.parametrize("choice", ["auto", "cpp"])


@pytest.fixture(autouse=True)
def double_precision():
    """pyro's and normflows' own sequential directions need it as the default; with the settings of zuko."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with peers.settings():
        yield
    torch.set_default_dtype(before)


def make(name, seed=0, spread=0.7):
    """A flow with parameters that matter: libraries start their last layers near zero."""
    torch.manual_seed(seed)
    flow = FLOWS[name].build(FEATURES, FLOWS[name].context)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.normal_(std=spread * max(1, parameter.shape[-1]) ** -0.5)
    return flow


def points(name, dtype=torch.float64, seed=1, rows=ROWS):
    """Features and, where the flow takes one, context."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    c = torch.randn(rows, FLOWS[name].context, generator=generator, dtype=torch.float64).to(dtype)
    return x, c if FLOWS[name].context else None


def fused(flow, layers=None):
    flow, report = hk.accelerate(copy.deepcopy(flow))
    assert layers is None or (len(report.swapped), report.left) == (layers, [])
    return flow


class Passes:
    """Counts calls of the libraries' masked layers."""

    def __enter__(self):
        self.count, self.patches = 0, []
        for kind in peers.MASKED:
            patch = mock.patch.object(kind, "forward", self.counting(kind.forward))
            patch.start()
            self.patches.append(patch)
        return self

    def counting(self, forward):
        def counted(*args):
            self.count += 1
            return forward(*args)

        return counted

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()


# ---- The map ----


@each_flow
@each_choice
def test_log_determinant_is_that_of_the_jacobian(name, choice):
    """Value, sign and direction, by autograd's full Jacobian; and there and back again."""
    library, flow = FLOWS[name].library, fused(make(name), FLOWS[name].layers)
    x, c = points(name)
    with hk.use_impl(choice):
        y, ladj = library.there(flow, x, c)
        back, minus = library.back(flow, y, c)
        torch.testing.assert_close((back, minus), (x, -ladj), rtol=1e-9, atol=1e-9)
        for direction, at, expected in ((library.there, x, ladj), (library.back, y, minus)):
            jacobian = torch.autograd.functional.jacobian(lambda v, f=direction: f(flow, v, c)[0].sum(0), at)
            sign, logarithm = torch.linalg.slogdet(jacobian.transpose(0, 1))
            assert (sign == 1).all()
            torch.testing.assert_close(logarithm, expected, rtol=1e-9, atol=1e-9)


def quantities(library, flow, x, c):
    """Everything that a flow is used for: values both ways, the density, and the gradients of both directions."""
    results = []
    for direction in (library.there, library.back):
        at = x.clone().requires_grad_()
        context = None if c is None else c.clone().requires_grad_()
        y, ladj = direction(flow, at, context)
        parameters = [p for p in flow.parameters() if p.requires_grad]
        leaves = [at, *parameters] if c is None else [at, context, *parameters]
        gradients = torch.autograd.grad((y * y).sum() + (y.sin().sum(-1) * ladj).sum(), leaves, allow_unused=True)
        results += [y, ladj, *(g for g in gradients if g is not None)]
    return [*results, library.log_prob(flow, x, c)]


@each_flow
@each_choice
def test_same_numbers_and_gradients_in_float64(name, choice):
    flow, inputs = make(name), points(name)
    ours = fused(flow)
    expected = quantities(FLOWS[name].library, flow, *inputs)
    with hk.use_impl(choice):
        results = quantities(FLOWS[name].library, ours, *inputs)
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-9)


@each_flow
@each_choice
def test_float32_stays_within_the_error_budget(name, choice):
    """A mild flow and many rows: an ill-conditioned inverse multiplies whatever rounding came first, theirs or ours."""
    plain = make(name, spread=0.25).float()
    ours, exact = fused(plain), copy.deepcopy(plain).double()

    def run(flow, x, c=None):
        torch.set_default_dtype(x.dtype)
        try:
            return quantities(FLOWS[name].library, flow, x, c)
        finally:
            torch.set_default_dtype(torch.float64)

    def op(*inputs):
        with hk.use_impl(choice):
            return run(ours, *inputs)

    def formula(x, *context):
        return run(exact if x.dtype == torch.float64 else plain, x, *context)

    def draw():
        return [x for x in points(name, torch.float32, torch.initial_seed(), rows=256) if x is not None]

    testing.assert_as_exact(op, formula, draw)


@each_flow
def test_samples_follow_the_seed(name):
    flow, (_, c) = make(name), points(name)
    samples = []
    for either in (flow, fused(flow)):
        torch.manual_seed(5)
        samples.append(FLOWS[name].library.sample(either, ROWS, c))
    torch.testing.assert_close(*samples, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, flow in FLOWS.items() if not flow.keeps])
def test_no_pass_through_the_librarys_network(name):
    library, flow, (x, c) = FLOWS[name].library, make(name), points(name)
    counts = []
    for either in (flow, fused(flow)):
        with hk.use_impl("cpp"), Passes() as passes:
            library.there(either, x, c)
            library.back(either, x, c)
            library.sample(either, ROWS, c)
        counts.append(passes.count)
    assert counts[0] >= 2 * FEATURES
    assert counts[1] == 0


# ---- What a module is besides ----


@each_flow
def test_parameters_and_state_dict_are_the_same_objects(name):
    flow = make(name)
    before = {key: (value, value.clone()) for key, value in flow.state_dict(keep_vars=True).items()}
    same, report = hk.accelerate(flow)
    assert same is flow
    assert len(report.swapped) == FLOWS[name].layers
    after = flow.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for key, (value, copied) in before.items():
        assert after[key] is value
        assert torch.equal(value, copied)
    FLOWS[name].library.back(flow, *points(name))
    assert list(flow.state_dict()) == list(before)


@each_flow
def test_training_follows_the_original(name):
    """An optimiser made before the swap, training through the sequential direction."""
    library, flow = FLOWS[name].library, make(name)
    x, c = points(name)
    losses = []
    for either in (flow, copy.deepcopy(flow)):
        optimizer = torch.optim.Adam(either.parameters(), lr=0.01)
        if either is not flow:
            hk.accelerate(either)
        for _ in range(3):
            optimizer.zero_grad()
            z, ladj = library.back(either, x, c)
            loss = (z.square().sum(-1) / 2 - ladj).mean()
            loss.backward()
            optimizer.step()
        losses.append((loss, library.log_prob(either, x, c)))
    torch.testing.assert_close(*losses, rtol=1e-8, atol=1e-8)


@each_flow
def test_copies_and_loaded_states(name):
    """Masks and orders are part of the state: after loading them the degrees are those of the loaded ones."""
    library, flow, (x, c) = FLOWS[name].library, make(name), points(name)
    ours = fused(flow)
    with torch.no_grad():
        library.back(ours, x, c)  # so that it remembers its masks
    file = io.BytesIO()
    pickle.dump(ours, file)
    for either in (copy.deepcopy(ours), pickle.loads(file.getvalue())):
        torch.testing.assert_close(library.back(either, x, c), library.back(flow, x, c), rtol=1e-9, atol=1e-9)
    other = make(name, seed=3)
    for assign in (False, True):
        for target in (ours, flow):
            target.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        # pyro and zuko compute from attributes what is not in the state: loaded flows are compared with loaded flows
        torch.testing.assert_close(library.there(ours, x, c), library.there(flow, x, c), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(library.back(ours, x, c), library.back(flow, x, c), rtol=1e-9, atol=1e-9)
        with hk.use_impl("cpp"), Passes() as passes:
            library.back(ours, x, c)
        assert FLOWS[name].keeps or passes.count == 0


@each_flow
def test_pickles_name_the_librarys_classes(name):
    """They load where this package is not; copies stay swapped."""
    library, flow, (x, c) = FLOWS[name].library, make(name), points(name)
    ours = fused(flow)
    with torch.no_grad():
        library.back(ours, x, c)
    expected = [type(part) for part in flow.modules()]
    for copied in (copy.deepcopy(ours), copy.copy(ours)):
        assert [type(part) for part in copied.modules()] == [type(part) for part in ours.modules()]
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        written = pickle.dumps(ours, protocol)
        assert b"hvae_kernels" not in written
        loaded = pickle.loads(written)
        assert [type(part) for part in loaded.modules()] == expected
    torch.testing.assert_close(library.there(loaded, x, c), library.there(flow, x, c), rtol=0, atol=0)
    torch.testing.assert_close(library.back(loaded, x, c), library.back(flow, x, c), rtol=0, atol=0)
    hk.accelerate(loaded)
    torch.testing.assert_close(library.back(loaded, x, c), library.back(flow, x, c), rtol=1e-9, atol=1e-9)


def test_a_copied_layer_of_its_own_stays_swapped():
    for copier in (copy.copy, copy.deepcopy):
        layer, original = swapped_layer()
        twin, x = copier(layer), torch.randn(ROWS, D)
        with Passes() as passes:
            results = twin.inverse(x)
        assert passes.count == 0
        torch.testing.assert_close(results, original.inverse(x), rtol=1e-9, atol=1e-9)
        shared = {id(parameter) for parameter in layer.parameters()} & {id(p) for p in twin.parameters()}
        assert bool(shared) == (copier is copy.copy)


def test_pickled_distributions_name_the_librarys_classes():
    """Those of zuko hold transforms that a swapped layer made."""
    for name in ("zuko-context", "zuko"):
        flow, (x, c) = make(name), points(name)
        written = pickle.dumps(fused(flow)(c))
        assert b"hvae_kernels" not in written
        torch.testing.assert_close(pickle.loads(written).log_prob(x), flow(c).log_prob(x))
        twin = copy.deepcopy(fused(flow)(None if c is None else c.detach()))
        with Passes() as passes:
            twin.transform.inv(x)
        assert passes.count == 0


@each_flow
def test_restored_flows_are_what_they_were(name):
    library, flow, (x, c) = FLOWS[name].library, make(name), points(name)
    ours = fused(flow)
    tensors = ours.state_dict(keep_vars=True)
    assert hk.restore(ours) is ours
    for part, original in zip(ours.modules(), flow.modules(), strict=True):
        assert type(part) is type(original)
        assert vars(part).keys() == vars(original).keys()
    assert all(value is tensors[key] for key, value in ours.state_dict(keep_vars=True).items())
    for direction in (library.there, library.back):
        torch.testing.assert_close(direction(ours, x, c), direction(flow, x, c), rtol=0, atol=0)
    assert len(hk.accelerate(hk.restore(ours))[1].swapped) == FLOWS[name].layers


@pytest.mark.parametrize("make", [zuko_flows.NICE, zuko_flows.MAF, zuko_flows.NSF])
def test_a_distribution_outlives_restore(make):
    flow, context, x = make(4, 2), torch.randn(2), torch.randn(5, 4)
    expected = flow(context).log_prob(x)
    hk.accelerate(flow)
    made_before = flow(context)
    hk.restore(flow)
    torch.testing.assert_close(made_before.log_prob(x), expected)
    assert made_before.sample((3,)).shape == (3, 4)


def test_only_modules_are_restored():
    linear = nn.Linear(2, 2)
    assert hk.restore(linear) is linear
    with pytest.raises(TypeError, match=r"restore: module must be a torch.nn.Module, or .* got list \[\]"):
        hk.restore([])


@each_flow
def test_a_first_call_in_inference_mode_leaves_it_trainable(name):
    library, flow, (x, c) = FLOWS[name].library, make(name), points(name)
    for first in (library.there, library.back):
        ours = fused(make(name))
        with torch.inference_mode(), hk.use_impl("cpp"):
            first(copy.deepcopy(ours), x, c)
            first(ours, x.clone(), c)
        ours.load_state_dict(flow.state_dict())
        with torch.inference_mode(), hk.use_impl("cpp"):
            first(ours, x.clone(), c)
        with hk.use_impl("cpp"):
            torch.testing.assert_close(quantities(library, ours, x, c), quantities(library, flow, x, c))


@pytest.mark.parametrize("change", ["inference tensor", "data", "in place"])
def test_masks_that_change_are_noticed(change):
    """Inference tensors have no version, and a tensor that is given other data keeps its own."""
    with torch.inference_mode(change == "inference tensor"):
        layer, _ = swapped_layer()
        x, mask = torch.randn(ROWS, D), layer.autoregressive_net.blocks[0].linear_layers[0].mask
        layer.inverse(x)
        if change == "data":
            mask.data = torch.zeros_like(mask)
        else:
            mask.zero_()
        expected = hk.restore(copy.deepcopy(layer)).inverse(x)
        torch.testing.assert_close(layer.inverse(x), expected, rtol=1e-9, atol=1e-9)


def test_degrees_are_not_the_layers_own_tensors():
    """A buffer that the library does not read may change without its masks."""
    layer, original = swapped_layer()
    x = torch.randn(ROWS, D)
    layer.inverse(x)
    layer.autoregressive_net.initial_layer.degrees.fill_(1)
    torch.testing.assert_close(layer.inverse(x), original.inverse(x), rtol=1e-9, atol=1e-9)


# ---- What is left alone ----

D = FEATURES
_graph = torch.eye(4, dtype=torch.bool)
_graph[2, 0] = _graph[3, 1] = True


def _nflows_layer(**options):
    return peers.nflows_transforms.MaskedAffineAutoregressiveTransform(D, 12, **options)


def _edited_mask():
    layer = _nflows_layer()
    layer.autoregressive_net.blocks[0].linear_layers[0].mask[0, -1] = 1.0
    return layer


def _lowered():
    """Masks that fit degrees, but a residual connection that carries what later features know to earlier ones."""
    layer = _nflows_layer(num_blocks=1)
    net = layer.autoregressive_net
    first, second = net.blocks[0].linear_layers
    second.degrees.fill_(1)
    second.mask.copy_(second.degrees[:, None] >= first.degrees)
    net.final_layer.mask.copy_(net.final_layer.degrees[:, None] > second.degrees)
    return layer


def _preprocessed():
    layer = peers.normflows.flows.MaskedAffineAutoregressive(D, 12)
    layer.autoregressive_net = peers.normflows.nets.MADE(D, 12, output_multiplier=2, preprocessing=nn.Tanh())
    return layer


def _hooked():
    layer = _nflows_layer()
    layer.autoregressive_net.initial_layer.register_forward_hook(lambda *_: None)
    return layer


def _instance(layer, **methods):
    """With methods of its own that do what those of its class do."""
    for name, method in methods.items():
        setattr(layer, name, method(layer))
    return layer


def _own_forward():
    layer = _nflows_layer()
    _instance(layer.autoregressive_net.final_layer, forward=lambda last: lambda x: type(last).forward(last, x))
    return layer


def _edited_network():
    layer = _nflows_layer()
    del layer.autoregressive_net.blocks[0].dropout
    return layer


class _Subclass(peers.nflows_transforms.MaskedAffineAutoregressiveTransform):
    def _elementwise_forward(self, inputs, params):
        raise NotImplementedError


class _OtherVersion(peers.nflows_transforms.MaskedAffineAutoregressiveTransform):
    """A layer whose class computes another tail, as another version of the library would."""

    def _elementwise_forward(self, inputs, params):
        outputs, logabsdet = super()._elementwise_forward(inputs, params)
        return 2 * outputs, logabsdet


class _Partial(functools.partial):
    def __call__(self, shift, scale):
        return super().__call__(shift, 2 * scale)


def _maf(**options):
    return peers.MaskedAutoregressiveTransform(4, **options)


LEFT = {
    "zuko coupling": (
        lambda: peers.zuko.flows.coupling.GeneralCouplingTransform(
            D, univariate=peers.zuko.transforms.AdditiveTransform, shapes=[()]
        ),
        "univariate map is AdditiveTransform, not MonotonicAffineTransform, ",
    ),
    "zuko univariate map": (
        lambda: _maf(univariate=peers.zuko.transforms.SignedPowerTransform, shapes=[()]),
        "univariate map is SignedPowerTransform, not MonotonicAffineTransform, MonotonicRQS",
    ),
    "zuko spline's shapes": (
        lambda: _maf(univariate=peers.zuko.transforms.MonotonicRQSTransform, shapes=[(4,), (5,), (3,)]),
        r"splines have parameters of shapes \[\(4,\), \(5,\), \(3,\)\]",
    ),
    "zuko graph": (lambda: _maf(adjacency=_graph), "masks are no staircase"),
    "zuko activation": (lambda: _maf(activation=nn.LeakyReLU), "activation LeakyReLU.* has no kernel"),
    "activation's settings": (lambda: _maf(activation=lambda: nn.ELU(alpha=0.5)), r"activation ELU\(alpha=0.5\)"),
    "activation function": (lambda: _nflows_layer(activation=torch.sin), "activation sin has no kernel"),
    "nflows spline": (
        lambda: peers.nflows_transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(D, 12),
        "splines have the tails None: linear and circular ones have kernels",
    ),
    "nflows quadratic spline": (
        lambda: peers.nflows_transforms.MaskedPiecewiseQuadraticAutoregressiveTransform(D, 12),
        "MaskedPiecewiseQuadraticAutoregressiveTransform is none of MaskedAffineAutoregressiveTransform, ",
    ),
    "subclass": (lambda: _Subclass(D, 12), "_Subclass is a subclass of MaskedAffineAutoregressiveTransform"),
    "batch norm": (lambda: _nflows_layer(use_batch_norm=True), "batch norm inside its network"),
    "batch norm, feed-forward": (
        lambda: _nflows_layer(use_batch_norm=True, use_residual_blocks=False),
        "batch norm inside its network",
    ),
    "dropout": (lambda: _nflows_layer(dropout_probability=0.1), r"dropout \(p = 0.1\) is active in training mode"),
    "edited mask": (_edited_mask, "masks are no staircase"),
    "residual to lower degrees": (_lowered, "a residual connection to units of lower degree"),
    "parametrised layer": (
        lambda: _parametrised(),
        "a ParametrizedMaskedLinear where nflows has a MaskedLinear",
    ),
    "hooks": (_hooked, "hooks inside its network"),
    "forward of an instance": (_own_forward, "a module there has a forward of its own"),
    "map of an instance": (
        lambda: _instance(_nflows_layer(), _elementwise_inverse=lambda layer: layer._elementwise_inverse),
        "it has a _elementwise_inverse of its own, which may do something else",
    ),
    "zuko map of an instance": (lambda: _instance(_maf(), meta=lambda layer: layer.meta), "it has a meta of its own"),
    "pyro map of an instance": (
        lambda: _instance(peers.pyro_transforms.affine_autoregressive(D), _call=lambda layer: layer._call),
        "it has a _call of its own",
    ),
    "half precision": (lambda: _nflows_layer().bfloat16(), "parameters are bfloat16"),
    "meta device": (lambda: _nflows_layer().to("meta"), "parameters are on meta: the kernels run on the CPU"),
    "normflows spline": (
        lambda: peers.NormflowsSpline(D, 12, tails=["circular", None] + ["linear"] * (D - 2)),
        "its features have other tails than linear and circular ones",
    ),
    "preprocessing": (_preprocessed, "input is preprocessed by Tanh"),
    "pyro spline": (
        lambda: peers.pyro_transforms.spline_autoregressive(D),
        "splines are of order 'linear': quadratic ones have kernels",
    ),
    "pyro conditional spline": (
        lambda: peers.pyro_transforms.conditional_spline_autoregressive(D, 2),
        "splines are of order 'linear': quadratic ones have kernels",
    ),
    "pyro spline's parameters": (
        lambda: peers.pyro_transforms.spline_autoregressive(D, count_bins=4, order="quadratic"),
        r"param_dims is \[4, 4, 3, 4\], not \[4, 4, 3\]",
    ),
    "pyro neural": (
        lambda: peers.pyro_transforms.neural_autoregressive(D),
        "NeuralAutoregressive is none of AffineAutoregressive, SplineAutoregressive, ",
    ),
    "pyro network of one's own": (
        lambda: peers.pyro_transforms.AffineAutoregressive(nn.Linear(D, 2 * D)),
        "network is a Linear, not an AutoRegressiveNN",
    ),
    "pyro parameters": (
        lambda: peers.pyro_transforms.AffineAutoregressive(peers.AutoRegressiveNN(D, [12], param_dims=[1, 1, 1])),
        r"param_dims is \[1, 1, 1\]",
    ),
    "pyro clips": (
        lambda: peers.pyro_transforms.affine_autoregressive(D, log_scale_min_clip=3.0),
        "low must be below high",
    ),
    "zuko slope": (
        lambda: _maf(univariate=functools.partial(peers.zuko.transforms.MonotonicAffineTransform, slope=2.0)),
        "slope = 2.0 is not between 0 and 1",
    ),
    "subclass of partial": (
        lambda: _maf(univariate=_Partial(peers.zuko.transforms.MonotonicAffineTransform)),
        "its univariate map is _Partial",
    ),
    "edited network": (lambda: _edited_network(), "not what is known here: AttributeError"),
    "swapped already": (lambda: hk.accelerate(_nflows_layer())[0], "already swapped"),
}


def _parametrised():
    layer = _nflows_layer()
    nn.utils.parametrizations.weight_norm(layer.autoregressive_net.initial_layer)
    return layer


@pytest.mark.parametrize("case", LEFT)
def test_left_alone_by_name_and_reason(case):
    build, reason = LEFT[case]
    module = nn.ModuleDict({"here": build(), "and": nn.Linear(2, 2)})
    kinds = [type(part) for part in module.modules()]
    _, report = hk.accelerate(module)
    assert report.swapped == []
    assert [type(part) for part in module.modules()] == kinds
    ((name, text),) = report.left
    assert name.startswith("here")
    assert re.search(reason, text), text
    assert f"    {name}: {text}" in str(report)


def test_a_layer_proves_itself_first():
    """A version of a library that computes something else is noticed, whatever the parameters are."""
    adapter = importlib.import_module("hvae_kernels.compat.nflows")
    layer = _OtherVersion(D, 12)
    with mock.patch.dict(adapter.FUSED, {_OtherVersion: adapter.FUSED[_OtherVersion.__mro__[1]]}):
        _, report = hk.accelerate(layer)
    assert type(layer) is _OtherVersion
    assert "computes something else" in report.left[0][1]


def test_report_of_a_mixed_module():
    module = nn.ModuleDict({"good": _nflows_layer(), "bad": _nflows_layer(use_batch_norm=True)})
    _, report = hk.accelerate(module)
    assert [name for name, _ in report.swapped] == ["good"]
    assert str(report) == (
        "swapped (1):\n    good: MaskedAffineAutoregressiveTransform, 5 features\n"
        "left alone (1):\n    bad: batch norm inside its network"
    )
    _, report = hk.accelerate(_nflows_layer(context_features=2))
    assert str(report).endswith("(the module itself): MaskedAffineAutoregressiveTransform, 5 features, 2 of context")


@each_flow
def test_it_draws_nothing_and_minds_no_default_device(name):
    flow = make(name)
    state = torch.get_rng_state()
    with torch.device("meta"):
        _, report = hk.accelerate(flow)
    assert (len(report.swapped), report.left) == (FLOWS[name].layers, [])
    assert torch.get_rng_state().equal(state)


def test_only_modules_are_taken():
    with pytest.raises(TypeError, match=r"accelerate: module must be a torch.nn.Module, or .* got list \[\]"):
        hk.accelerate([])


def test_no_library_is_imported_for_a_module_without_it():
    code = """
import sys, torch, hvae_kernels as hk
print(hk.accelerate(torch.nn.Linear(2, 2))[1])
assert not {'zuko', 'nflows', 'normflows', 'pyro', 'sbi'} & set(sys.modules)
import nflows.transforms as t
print(hk.accelerate(t.MaskedAffineAutoregressiveTransform(3, 8))[1])
assert not {'zuko', 'normflows', 'pyro'} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("nothing to swap")
    assert "swapped (1)" in result.stdout


# ---- Calls that the kernels do not serve ----


def swapped_layer(**options):
    layer = _nflows_layer(**options)
    original = copy.deepcopy(layer)
    return hk.accelerate(layer)[0], original


def _load_graph(layer):
    state = layer.state_dict()
    state["autoregressive_net.blocks.0.linear_layers.0.mask"] = torch.ones(12, 12).tril()
    layer.load_state_dict(state)


def _hook(layer):
    layer.autoregressive_net.final_layer.register_forward_pre_hook(lambda *_: None)


UNSERVED = {
    "dropout again": (lambda layer: layer.train(), torch.float64),
    "hooks": (_hook, torch.float64),
    "half precision": (lambda layer: layer.bfloat16(), torch.bfloat16),
    "no staircase any more": (_load_graph, torch.float64),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_unserved_calls_run_the_librarys_code(case):
    change, dtype = UNSERVED[case]
    layer = _nflows_layer(dropout_probability=0.5).eval()
    original = copy.deepcopy(layer)
    hk.accelerate(layer)
    assert type(layer) is not type(original)
    x = torch.randn(ROWS, D).to(dtype)
    results = []
    for either in (original, layer):
        change(either)
        torch.manual_seed(0)
        with Passes() as passes:
            results.append((either(x), either.inverse(x)))
        assert passes.count == 6 * (D + 1)
    torch.testing.assert_close(*results, rtol=0, atol=0)
    layer.eval()
    layer.autoregressive_net.final_layer._forward_pre_hooks.clear()


def test_dropout_layer_is_fused_again_in_evaluation():
    layer = hk.accelerate(_nflows_layer(dropout_probability=0.5).eval())[0]
    x = torch.randn(ROWS, D)
    for mode, count in ((True, 6 * D), (False, 0)):
        with Passes() as passes:
            layer.train(mode).inverse(x)
        assert passes.count == count


#: One of each library, by the classes that can be swapped.
KINDS = ["zuko-context", "nflows-residual", "normflows-residual", "pyro", "pyro-stable", "pyro-context"]
each_kind = pytest.mark.parametrize("name", KINDS)


def linears(flow):
    return [layer for layer in flow.modules() if isinstance(layer, nn.Linear)]


def _set_forward(flow):
    for layer in linears(flow):
        layer.forward = lambda x, layer=layer: 2 * type(layer).forward(layer, x)


def _hook_form(apply, parameter):
    """Weights that a hook computes from what an optimiser changes meanwhile."""

    def change(flow):
        for layer in linears(flow):
            torch.manual_seed(0)
            apply(layer)
            with torch.no_grad():
                getattr(layer, parameter).mul_(1.5)

    return change


def _spectral_norm(layer):
    nn.utils.spectral_norm(layer.train())
    for _ in range(20):  # until its estimate of the norm is one
        layer(torch.zeros(1, layer.in_features))
    layer.eval()


def _parametrise(flow):
    for layer in linears(flow):
        nn.utils.parametrizations.weight_norm(layer)


def _everywhere(register):
    return lambda flow: register(lambda module, *_: 2 * _[-1] if isinstance(module, nn.Linear) else None)


ALTERED = {
    "forward of an instance": _set_forward,
    "weight_norm": _hook_form(nn.utils.weight_norm, "weight_g"),
    "spectral_norm": _hook_form(_spectral_norm, "weight_orig"),
    "prune": _hook_form(lambda layer: prune.random_unstructured(layer, "weight", 0.3), "weight_orig"),
    "parametrization": _parametrise,
    "hook on all modules": _everywhere(register_module_forward_hook),
    "pre-hook on all modules": lambda flow: register_module_forward_pre_hook(
        lambda module, inputs: (2 * inputs[0],) if isinstance(module, nn.Linear) else None
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("name", [*KINDS, "pyro-spline"])  # which no trace takes, not even pyro's own
@pytest.mark.parametrize("case", ALTERED)
def test_a_call_that_is_more_than_its_weights_is_made_in_both_directions(name, case):
    library, flow, (x, c) = FLOWS[name].library, make(name, spread=0.4), points(name)
    ours = fused(flow)
    results = []
    for either in (flow, ours):
        handle = ALTERED[case](either.eval())
        with hk.use_impl("cpp"):
            y, ladj = library.there(either, x, c)
            back, minus = library.back(either, y, c)
        if hasattr(handle, "remove"):
            handle.remove()
        results.append((y, ladj, back, minus))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.testing.assert_close(results[1][2:], (x, -ladj), rtol=1e-6, atol=1e-6)


def test_hooks_on_all_modules_leave_layers_alone_while_they_last():
    layer, _ = swapped_layer()
    x, calls = torch.randn(ROWS, D), []
    with register_module_full_backward_hook(lambda module, *_: calls.append(module)):
        _, report = hk.accelerate(_nflows_layer())
        layer.inverse(x)[0].sum().backward()
    assert report.left[0][1] == "there are hooks on all modules"
    assert layer.autoregressive_net.initial_layer in calls
    with Passes() as passes:
        layer.inverse(x)
    assert passes.count == 0


def test_a_bayesian_flow_samples_its_activations_in_both_directions():
    """zuko sets a forward on every linear layer, and leaves that of the class behind, bound."""
    x, c = points("zuko-context")
    results = []
    for swap in (False, True):
        flow = make("zuko-context", spread=0.4)
        if swap:
            hk.accelerate(flow)
        torch.manual_seed(0)
        bayesian = BayesianModel(flow, init_logvar=-5.0)
        with bayesian.reparameterize(local_trick=True) as sampled, torch.no_grad():
            y = Zuko.there(sampled, x, c)[0]
            results.append((y, Zuko.back(sampled, y, c)[0]))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.testing.assert_close(results[1][1], x, rtol=1e-8, atol=1e-8)
    assert "forward" in vars(linears(flow)[0])
    for either in (flow, copy.deepcopy(flow)):
        with Passes() as passes:
            Zuko.back(either, x, c)
        assert passes.count == 0


def test_modes_that_count_or_fake_operators_see_the_librarys():
    results = []
    for layer in swapped_layer():
        with FlopCounterMode(display=False) as counter:
            layer.inverse(torch.randn(ROWS, D))
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert layer.inverse(torch.randn(ROWS, D))[0].shape == (ROWS, D)
        results.append(counter.get_total_flops())
    assert results[0] == results[1] > 0


class Direction(nn.Module):
    """One direction of a flow as a module."""

    def __init__(self, name, direction, flow):
        super().__init__()
        self.direction, self.flow = getattr(FLOWS[name].library, direction), flow

    def forward(self, x, c=None):
        return self.direction(self.flow, x, c)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("direction", ["there", "back", "log_prob"])
@each_kind
def test_traces_are_of_the_librarys_code(name, direction, grad):
    """Also when the masks' degrees are not yet known; the saved program needs nothing of ours."""
    inputs = tuple(x for x in points(name) if x is not None)
    flow = make(name)
    with torch.set_grad_enabled(grad), hk.use_impl("cpp"):
        expected = Direction(name, direction, flow)(*inputs)
        traced = torch.jit.trace(Direction(name, direction, fused(make(name))), inputs)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    kinds = {node.kind() for node in traced.inlined_graph.nodes()}
    assert not [kind for kind in kinds if "hvae" in kind or "PythonOp" in kind]
    torch.testing.assert_close(torch.jit.load(file)(*inputs), expected)


def test_exported_programs_are_of_the_librarys_code():
    x = points("nflows-residual")[0]
    for direction in ("there", "back"):
        for export in (
            lambda module: torch.export.export(module, (x,), strict=False).graph_module,
            lambda module: make_fx(module)(x),
        ):
            graph = export(Direction("nflows-residual", direction, fused(make("nflows-residual"))))
            assert not [node for node in graph.graph.nodes if "hvae" in str(node.target)]


def test_autocast_and_compile_run_the_librarys_code():
    layer, original = swapped_layer()
    x = torch.randn(ROWS, D).float()
    layer, original = layer.float(), original.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer.inverse(x), original.inverse(x), rtol=0, atol=0)
    compiled = torch.compile(lambda v: layer(v), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), original(x))


def test_functional_transforms_run_the_librarys_code():
    """An ensemble by vmap: even the masks are batched."""
    pairs = [swapped_layer() for _ in range(2)]
    x = torch.randn(ROWS, D)
    state = torch.func.stack_module_state([layer for layer, _ in pairs])
    base = pairs[0][0]

    class Inverse(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = base

        def forward(self, x):
            return self.layer.inverse(x)

    named = [{f"layer.{key}": value for key, value in part.items()} for part in state]
    results = torch.func.vmap(lambda *values: torch.func.functional_call(Inverse(), values, (x,)))(*named)
    expected = [torch.stack(column) for column in zip(*(layer.inverse(x) for _, layer in pairs), strict=True)]
    torch.testing.assert_close(list(results), expected)


def test_a_version_that_is_not_known_is_left_alone():
    layer = _nflows_layer()
    with mock.patch("importlib.import_module", side_effect=ImportError("no MADE")):
        _, report = hk.accelerate(layer)
    assert (report.swapped, report.left) == ([], [("nflows", "this version of it is not known here: no MADE")])


def test_other_device_runs_the_librarys_code():
    """The meta device stands for any without a kernel."""
    layer, _ = swapped_layer()
    layer.to("meta")
    y, ladj = layer.inverse(torch.empty(ROWS, D, device="meta"))
    assert (y.shape, ladj.shape, y.device.type) == ((ROWS, D), (ROWS,), "meta")


def test_errors_are_the_librarys():
    layer, original = swapped_layer(context_features=2)
    plain, plain_original = swapped_layer()
    for ours, theirs, *arguments in (
        (layer, original, torch.randn(ROWS, D + 1)),
        (layer, original, torch.randn(2, ROWS, D)),
        (layer, original, torch.randn(ROWS, D).float()),
        (layer, original, torch.randn(ROWS, D), torch.randn(3, 2)),
        (plain, plain_original, torch.randn(ROWS, D), torch.randn(ROWS, 2)),
    ):
        with pytest.raises(Exception) as expected:  # noqa: PT011 - whatever the library says
            theirs.inverse(*arguments)
        with pytest.raises(expected.type, match=re.escape(str(expected.value))):
            ours.inverse(*arguments)


def test_small_parallel_calls_stay_with_the_library():
    layer, _ = swapped_layer()
    x = torch.randn(ROWS, D)
    net = layer.autoregressive_net
    weights = sum(p.numel() for p in net.parameters() if p.dim() == 2)

    def least(*numbers):
        return mock.patch.dict(_network.LEAST, {_extension.cpu_set(): _network.Least(*numbers)})

    for expected, fewest, work in ((6, weights + 1, 0), (6, weights, ROWS * weights + 1), (0, weights, ROWS * weights)):
        with least(1, fewest, work), Passes() as passes:
            layer(x)
        assert passes.count == expected
    with least(ROWS * weights, weights + 1):
        assert not _network.gains(net, x)
        with torch.no_grad():
            assert _network.gains(net, x)
            assert not _network.gains(net, x[1:])


def test_parallel_calls_of_splines_stay_with_the_library_where_all_is_products():
    layer = fused(make("nflows-spline"))._transform._transforms[0]
    x = torch.randn(ROWS, D)
    weights = sum(p.numel() for p in layer.autoregressive_net.parameters() if p.dim() == 2)
    passes_of_the_library = 4
    for most, expected in ((weights // D, passes_of_the_library), (weights // D + 1, 0)):
        with mock.patch.object(_network, "MOST_WEIGHTS", most), Passes() as passes:
            layer(x)
            with torch.no_grad():
                layer(x)
        assert passes.count == expected


@pytest.fixture
def glasflow(tmp_path, monkeypatch):
    """Its package is made of nflows' files under another name; the scale's function is what it adds."""
    package = tmp_path / "glasflow"
    shutil.copytree(Path(sys.modules["nflows"].__file__).parent, package / "nflows")
    package.joinpath("__init__.py").touch()
    for file in package.rglob("*.py"):
        text = re.sub(r"^(from|import) nflows", r"\1 glasflow.nflows", file.read_text(), flags=re.MULTILINE)
        text = text.replace(
            "scale = F.softplus(unconstrained_scale) + self._epsilon",
            "scale = self.scale_activation(unconstrained_scale)",
        )
        text = text.replace(
            "        self._epsilon = 1e-3\n",
            "        self._epsilon = 1e-3\n        self.scale_activation = lambda x: F.softplus(x) + self._epsilon\n",
        )
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("glasflow.nflows.transforms.autoregressive")
    for name in [name for name in sys.modules if name.startswith("glasflow") or name.endswith("compat.glasflow")]:
        del sys.modules[name]


def test_glasflow_is_nflows_under_another_name(glasflow):
    x, c = points("nflows-residual-context")
    layers = nn.ModuleList(
        [
            glasflow.MaskedAffineAutoregressiveTransform(D, 12, context_features=3),
            glasflow.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                D, 12, context_features=3, num_bins=4, tails="linear", tail_bound=2.0
            ),
        ]
    )
    for layer, ours in zip(layers, fused(layers, layers=2), strict=True):
        for direction in ("forward", "inverse"):
            with hk.use_impl("cpp"), mock.patch.object(glasflow.made_module.MaskedLinear, "forward", None):
                result = getattr(ours, direction)(x, c)
            torch.testing.assert_close(result, getattr(layer, direction)(x, c), rtol=1e-9, atol=1e-9)
    with mock.patch.object(
        glasflow.MaskedAffineAutoregressiveTransform,
        "__init__",
        functools.wraps(glasflow.MaskedAffineAutoregressiveTransform.__init__)(lambda *_: None),
    ):
        fused(layers, layers=2)  # a decorator around __init__ hides none of what is known of it
    layers[0].scale_activation = torch.exp
    _, report = hk.accelerate(layers)
    assert report.left == [("0", "it has a scale_activation of its own")]


# ---- What is particular to a library ----


@pytest.mark.parametrize("inside", [False, True])
def test_a_guide_of_pyro_that_has_no_flow_yet_is_named(inside):
    import pyro
    from pyro.infer.autoguide import AutoIAFNormal

    def model():
        pyro.sample("z", pyro.distributions.Normal(torch.zeros(FEATURES), 1.0).to_event(1))

    guide = AutoIAFNormal(model, hidden_dim=[8], num_transforms=2)
    module, name = (nn.ModuleDict({"guide": guide}), "guide") if inside else (guide, "")
    _, report = hk.accelerate(module)
    why = "AutoIAFNormal makes its flow at its first call: call it once, then accelerate it"
    assert (report.swapped, report.left) == ([], [(name, why)])
    guide()
    _, report = hk.accelerate(module)
    assert (len(report.swapped), report.left) == (2, [])
    assert guide()["z"].shape == (FEATURES,)


@pytest.mark.parametrize(
    ("x_shape", "c_shape"), [((), ()), ((4,), ()), ((4, 3), (3,)), ((4, 2, 3), (2, 1)), ((), (3,)), ((4, 1), (3,))]
)
def test_zuko_broadcasts_features_and_context(x_shape, c_shape):
    flow = make("zuko-context")
    ours = fused(flow)
    x, c = torch.randn(*x_shape, FEATURES), torch.randn(*c_shape, 3)
    transform, original = ours(c).transform, flow(c).transform
    with hk.use_impl("cpp"), Passes() as passes:
        results, inverses = transform.call_and_ladj(x), transform.inv(x)
    assert passes.count == 0
    torch.testing.assert_close((results[0], inverses), (original(x), original.inv(x)), rtol=1e-9, atol=1e-9)
    x = x.expand_as(results[0])  # zuko's own log-determinant does not follow a wider context
    torch.testing.assert_close(results, original.call_and_ladj(x), rtol=1e-9, atol=1e-9)


def test_zuko_takes_no_rows():
    """Where the library's own reshaping fails."""
    ours, x = fused(make("zuko")), torch.randn(2, 0, FEATURES)
    shapes = [tuple(result.shape) for result in Zuko.back(ours, x, None)]
    assert shapes == [(2, 0, FEATURES), (2, 0)]


def test_zuko_sample_and_density_in_one_pass():
    """The generic code finds the log-determinant by another pass; neither is made here."""
    flow = make("zuko")
    ours = fused(flow)
    results = []
    for either in (flow, ours):
        torch.manual_seed(0)
        results.append(either().rsample_and_log_prob((ROWS,)))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    inverse = mock.Mock(side_effect=_network.sequential)
    with mock.patch.object(_network, "sequential", inverse), Passes() as passes:
        ours().rsample_and_log_prob((ROWS,))
    assert (inverse.call_count, passes.count) == (2, 0)


class Calls:
    """Counts the passes through a module."""

    def __init__(self, module):
        self.count = 0
        module.register_forward_hook(self.add)

    def add(self, *_):
        self.count += 1


@pytest.mark.parametrize("name", ["zuko-coupling", "zuko-coupling-spline"])
def test_zuko_coupling_samples_with_density_in_one_pass(name):
    ours = fused(make(name))
    calls = Calls(ours.transform.transforms[0].hyper)
    ours().rsample_and_log_prob((ROWS,))
    assert calls.count == 1


def test_zuko_coupling_runs_the_librarys_code_where_it_is_recorded():
    flow, (x, _) = make("zuko-coupling"), points("zuko-coupling")
    ours = fused(flow)
    picks = {torch.ops.aten.index_select.default, torch.ops.aten.index_copy.default}
    assert not {node.target for node in make_fx(lambda x: ours().log_prob(x))(x).graph.nodes} & picks
    compiled = torch.compile(lambda x: ours().log_prob(x), backend="eager")
    torch.testing.assert_close(compiled(x), flow().log_prob(x), rtol=1e-9, atol=1e-9)


def test_zuko_circular_splines_of_points_outside_are_the_librarys():
    """Its shift takes such a point into the interval, and the log-determinant is that of the point there."""
    for name in ("zuko-coupling-circular", "zuko-circular"):
        flow, y = make(name), 3 * points(name)[0]
        assert (y.abs() > torch.pi).any()
        for direction in (Zuko.there, Zuko.back):
            torch.testing.assert_close(direction(fused(flow), y, None), direction(flow, y, None), rtol=1e-9, atol=1e-9)


def test_zuko_coupling_takes_the_mask_that_it_has():
    flow = make("zuko-coupling")
    ours, (x, _) = fused(flow), points("zuko-coupling", rows=4)
    ours().log_prob(x)
    for either in (flow, ours):
        either.transform.transforms[0].mask.copy_(torch.tensor([1, 1, 0, 0, 1]))
    torch.testing.assert_close(ours().log_prob(x), flow().log_prob(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["zuko-coupling-context", "zuko-coupling-spline-context"])
def test_zuko_coupling_broadcasts_the_context(name):
    flow, (x, c) = make(name), points(name)
    ours = fused(flow)
    torch.testing.assert_close(ours(c[0]).log_prob(x), flow(c[0]).log_prob(x), rtol=1e-9, atol=1e-9)
    x = x.expand(3, -1, -1)
    torch.testing.assert_close(ours(c).log_prob(x), flow(c).log_prob(x), rtol=1e-9, atol=1e-9)
    for either in (flow, ours):  # a coupling layer takes no context with more rows
        with pytest.raises(RuntimeError):
            either(c).log_prob(x[0, 0])


def test_zuko_circular_broadcasts_the_context():
    flow, (x, c) = make("zuko-circular-context"), points("zuko-circular-context")
    ours, transform = fused(flow), lambda either: either(c).transform.transforms[0]
    assert transform(ours)(x[0]).shape == (ROWS, FEATURES)
    torch.testing.assert_close(
        transform(ours).call_and_ladj(x[0]), transform(flow).call_and_ladj(x[0]), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(transform(ours).inv(x[0]), transform(flow).inv(x[0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["pyro", "pyro-stable", "pyro-spline", "pyro-context"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
def test_pyro_takes_any_batch(name, shape):
    flow = make(name)
    ours = fused(flow)
    x = torch.randn(*shape, FEATURES)
    c = torch.randn(*shape[-1:], 3) if FLOWS[name].context else None
    with hk.use_impl("cpp"), Passes() as passes:
        results = Pyro.there(ours, x, c), Pyro.back(ours, x, c)
    assert passes.count == 0
    expected = Pyro.there(flow, x, c), Pyro.back(flow, x, c)
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["pyro-context", "pyro-spline-context"])
def test_pyro_names_what_a_conditional_transform_became(name):
    (step, _), (_, c) = make(name), points(name)
    _, report = hk.accelerate(step.condition(c))
    why = "it is what a conditional transform became given its context: accelerate that transform"
    assert (report.swapped, report.left) == ([], [("", why)])


@pytest.mark.parametrize("name", ["pyro", "pyro-spline"])
def test_pyro_keeps_its_cache(name):
    """What a call found serves the log-determinant of that very pair, in both directions."""
    (layer, _) = fused(make(name))
    y = torch.randn(ROWS, FEATURES)
    served = mock.Mock(side_effect=_network.served)
    with mock.patch.object(_network, "served", served):
        x = layer.inv(y)
        assert layer.inv(y) is x
        assert layer(x) is y
        ladj = layer.log_abs_det_jacobian(x, y)
        assert served.call_count == 1
        again = layer.log_abs_det_jacobian(x.clone(), y)
    torch.testing.assert_close(again, ladj)
    assert ladj.shape == (ROWS,)


def test_pyro_goes_on_with_a_scale_that_underflowed():
    """Where the kernels refuse to divide by zero, the library's own code runs, whatever it makes of it."""
    flow = make("pyro-stable")
    with torch.no_grad():
        for layer in flow:
            layer.arn.layers[-1].bias[FEATURES:] = -1e4
    y = torch.randn(ROWS, FEATURES)
    results = [either[0].inv(y) for either in (flow, fused(flow))]
    torch.testing.assert_close(*results, equal_nan=True)


def test_pyro_needs_no_default_dtype():
    """The library's own inverse fails in float64 unless that is the default."""
    (layer, _) = fused(make("pyro"))
    torch.set_default_dtype(torch.float32)
    x = layer.inv(torch.randn(ROWS, FEATURES, dtype=torch.float64))
    assert x.dtype is torch.float64


def test_second_derivatives_through_the_sequential_direction():
    flow = make("zuko")
    ours = fused(flow)
    y = torch.randn(2, FEATURES)
    hessians = [
        torch.autograd.functional.hessian(lambda v, f=either: f().transform.inv(v).sin().sum(), y)
        for either in (flow, ours)
    ]
    torch.testing.assert_close(*hessians, rtol=1e-9, atol=1e-9)
