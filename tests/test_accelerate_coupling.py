"""``hk.accelerate`` on coupling layers: the same numbers, gradients, copies and pickles, splines in one kernel."""

from __future__ import annotations

import copy
import functools
import pickle

import nflows.nn.nets
import nflows.transforms
import normflows
import pytest
import torch
from normflows.flows.neural_spline.autoregressive import (
    MaskedPiecewiseRationalQuadraticAutoregressive as NormflowsSpline,
)
from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling as NormflowsCoupling
from pyro.distributions import transforms as pyro_transforms
from pyro.nn import AutoRegressiveNN, DenseNN
from torch.fx.experimental.proxy_tensor import make_fx

import hvae_kernels as hk

F64 = torch.float64
AS_FAST = "affine coupling: the library's own code is as fast"


def _mlp(sizes, inputs, outputs):
    return nflows.nn.nets.ResidualNet(inputs, outputs, **sizes)


def nflows_layer(tails="linear", context=None, **options):
    torch.manual_seed(0)
    net = functools.partial(_mlp, {"hidden_features": 16, "num_blocks": 1, "context_features": context})
    layer = nflows.transforms.PiecewiseRationalQuadraticCouplingTransform(
        [1, 0, 1, 1, 0], net, num_bins=6, tails=tails, tail_bound=2.5, **options
    )
    return _spread(layer)


def affine_layer(kind="Affine", context=None, **options):
    torch.manual_seed(0)
    net = functools.partial(_mlp, {"hidden_features": 16, "num_blocks": 1, "context_features": context})
    return _spread(getattr(nflows.transforms, f"{kind}CouplingTransform")([1, 0, 1, 1, 0], net, **options))


def normflows_layer(**options):
    torch.manual_seed(0)
    return _spread(normflows.flows.CoupledRationalQuadraticSpline(5, 1, 16, num_bins=5, tail_bound=2, **options))


def bounds_layer():
    torch.manual_seed(0)
    mask = torch.tensor([1, 0, 1, 1, 0])
    net = functools.partial(_mlp, {"hidden_features": 16, "num_blocks": 1})
    layer = NormflowsCoupling(mask, net, num_bins=5, tails="linear", tail_bound=BOUNDS.clone())
    return _spread(layer)


def circular_layer(circular=range(5), tail_bound=2.0, kind="Coupled"):
    torch.manual_seed(0)
    make = getattr(normflows.flows, f"Circular{kind}RationalQuadraticSpline")
    layer = make(5, 1, 16, list(circular), num_bins=5, tail_bound=tail_bound)
    return _spread(layer)


def autoregressive_layer():
    torch.manual_seed(0)
    layer = NormflowsSpline(5, 16, num_bins=5, tails="linear", tail_bound=BOUNDS.clone())
    return _spread(layer, std=0.3)  # of 0.5, rows have a condition number of 2e8, and no library finds the way back


BOUNDS = torch.tensor([2.0, 1.0, 1.5, 2.5, 3.0], dtype=F64)
CIRCULAR = {
    f"{kind} {name}": functools.partial(circular_layer, circular, bound, kind)
    for kind in ("Coupled", "Autoregressive")
    for name, circular, bound in (
        ("all", range(5), 2.0),
        ("mixed", (0, 3), 2.0),
        ("none", (), 2.0),
        ("bounds", range(5), BOUNDS),
        ("mixed bounds", (1, 2), BOUNDS),
    )
}
#: Of each layer how many swaps it takes.
LAYERS = {
    "nflows": (nflows_layer, 1),
    "nflows affine": (affine_layer, 1),
    "nflows additive": (functools.partial(affine_layer, "Additive"), 1),
    "nflows affine unconditional": (
        functools.partial(
            affine_layer,
            unconditional_transform=lambda features: nflows.transforms.PiecewiseRationalQuadraticCDF(
                [features], num_bins=4, tails="linear", tail_bound=2.0
            ),
        ),
        2,
    ),
    "normflows": (normflows_layer, 2),
    "normflows circular": (functools.partial(normflows_layer, tails="circular"), 2),
    "Coupled linear bounds": (bounds_layer, 1),
    "Autoregressive linear bounds": (autoregressive_layer, 1),
    **{name: (make, 1 if name.startswith("Auto") else 2) for name, make in CIRCULAR.items()},
}
each_layer = pytest.mark.parametrize(("make", "swaps"), LAYERS.values(), ids=LAYERS)


def _spread(layer, std=0.5):
    """In float64, with parameters that a mistake shows in."""
    layer = layer.to(F64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return layer


def results(layer, x, context=None):
    """Both directions, and all gradients."""
    given = () if context is None else (context,)
    found = []
    for direction in (layer.forward, layer.inverse):
        leaf = x.clone().requires_grad_()
        image, log_abs_det = direction(leaf, *given)
        leaves = [leaf, *layer.parameters()]
        found += [image, log_abs_det]
        found += torch.autograd.grad(image.cos().sum() + log_abs_det.sin().sum(), leaves, materialize_grads=True)
    return [value.detach() for value in found]


def accelerated(layer, swaps=1):
    fast, report = hk.accelerate(copy.deepcopy(layer))
    assert (len(report.swapped), report.left) == (swaps, [])
    return fast


def inputs(rows=9):
    """Some outside every interval."""
    return 1.5 * torch.randn(rows, 5, generator=torch.Generator().manual_seed(1), dtype=F64)


@each_layer
def test_the_same_numbers(make, swaps):
    layer = make()
    fast, x = accelerated(layer, swaps), inputs()
    torch.testing.assert_close(results(fast, x), results(layer, x), rtol=1e-9, atol=1e-9)
    assert fast.state_dict().keys() == layer.state_dict().keys()


@each_layer
def test_log_determinants_are_those_of_the_jacobians_and_there_is_a_way_back(make, swaps):
    fast, x = accelerated(make(), swaps), inputs().clamp(-0.99, 0.99)  # inside, where tails of features are maps
    for there, back in ((fast.forward, fast.inverse), (fast.inverse, fast.forward)):
        image, log_abs_det = there(x)
        jacobian = torch.func.vmap(torch.func.jacrev(lambda row, f=there: f(row[None])[0][0]))(x)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_abs_det, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(back(image), (x, -log_abs_det), rtol=1e-9, atol=1e-9)


@each_layer
def test_nan_in_a_row_stays_in_it(make, swaps):
    fast, x = accelerated(make(), swaps), inputs()
    broken = x.clone()
    broken[4, 0] = torch.nan
    rest = torch.arange(len(x)) != 4
    for direction in (fast.forward, fast.inverse):
        for result, expected in zip(direction(broken), direction(x), strict=True):
            torch.testing.assert_close(result[rest], expected[rest], rtol=0, atol=0)


@each_layer
def test_second_derivatives(make, swaps):
    layer = make()
    found = []
    for module in (accelerated(layer, swaps), layer):
        x = inputs(4).requires_grad_()
        image, log_abs_det = module(x)
        loss = image.sin().sum() + log_abs_det.cos().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        leaves = [x, *module.parameters()]
        found.append(torch.autograd.grad(gradient.square().sum(), leaves, materialize_grads=True))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("make", [nflows_layer, affine_layer], ids=["splines", "affine"])
def test_contexts_and_unconditional_splines(make):
    unconditional = {"apply_unconditional_transform": True} if make is nflows_layer else {}
    layer = make(context=3, **unconditional)
    fast = accelerated(layer, 1 + len(unconditional))
    x, context = torch.randn(9, 5, dtype=F64), torch.randn(9, 3, dtype=F64)
    torch.testing.assert_close(results(fast, x, context), results(layer, x, context), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Affine", {}),
        ("Additive", {}),
        ("PiecewiseRationalQuadratic", {"num_bins": 4, "tails": "linear"}),
        (
            "PiecewiseRationalQuadratic",
            {"num_bins": 4, "tails": "linear", "apply_unconditional_transform": True, "img_shape": [3, 4]},
        ),
    ],
    ids=["affine", "additive", "splines", "unconditional"],
)
def test_images(kind, options):
    torch.manual_seed(0)
    net = functools.partial(lambda i, o: nflows.nn.nets.ConvResidualNet(i, o, hidden_channels=8, num_blocks=1))
    layer = _spread(getattr(nflows.transforms, f"{kind}CouplingTransform")([1, 0, 1], net, **options))
    fast = accelerated(layer, 2 if "img_shape" in options else 1)
    x = torch.randn(2, 3, 3, 4, dtype=F64)
    torch.testing.assert_close(fast(x), layer(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fast.inverse(x), layer.inverse(x), rtol=1e-9, atol=1e-9)


def test_inputs_that_the_library_refuses():
    fast = accelerated(affine_layer())
    for x, message in ((torch.randn(5, dtype=F64), "2D or a 4D"), (torch.randn(2, 4, dtype=F64), "features = 5")):
        for direction in (fast.forward, fast.inverse):
            with pytest.raises(ValueError, match=message):
                direction(x)


def test_compiled_exported_and_recorded_programs_are_of_the_librarys_code():
    layer, x = affine_layer(), inputs()
    fast = accelerated(layer)
    ours = {torch.ops.aten.index_select.default, torch.ops.aten.index_copy.default}
    assert not {node.target for node in make_fx(fast)(x).graph.nodes} & ours
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-9, atol=1e-9)
    exported = torch.export.export(fast, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x), rtol=1e-9, atol=1e-9)


def test_autocast_leaves_an_affine_layers_numbers():
    layer = affine_layer().float()
    fast, x = accelerated(layer), torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(x), layer(x), rtol=0, atol=0)
        torch.testing.assert_close(fast.inverse(x), layer.inverse(x), rtol=0, atol=0)
    torch.testing.assert_close(fast.bfloat16()(x.bfloat16()), layer.bfloat16()(x.bfloat16()), rtol=0, atol=0)


def test_what_is_outside_an_interval_stays_as_it_is():
    layer, x = accelerated(bounds_layer()), 10 * inputs()
    moved, bounds = layer.transform_features, layer.tail_bound
    outside = x[:, moved].abs() > bounds
    for direction in (layer.forward, layer.inverse):
        assert torch.equal(direction(x)[0][:, moved][outside], x[:, moved][outside])


def test_what_is_set_on_a_layer_or_its_network_runs():
    layer = affine_layer()
    fast, x = accelerated(layer), inputs()
    fast.transform_net.register_forward_hook(lambda module, given, result: 2 * result)
    layer.transform_net.register_forward_hook(lambda module, given, result: 2 * result)
    torch.testing.assert_close(fast(x), layer(x), rtol=0, atol=0)
    for module in (fast, layer):
        own = module._scale_and_shift
        module._scale_and_shift = lambda raw, own=own: own(0.5 * raw)
    torch.testing.assert_close(fast(x), layer(x), rtol=0, atol=0)
    layer.forward = layer.forward
    _, report = hk.accelerate(layer)
    assert report.left == [("", "it has a forward of its own, which may do something else")]


class _OtherVersion(nflows.transforms.AffineCouplingTransform):
    """A layer whose class puts features elsewhere, as another version of the library would."""

    def forward(self, inputs, context=None):
        outputs, log_abs_det = super().forward(inputs, context)
        return outputs.flip(-1), log_abs_det


def test_a_layer_proves_itself_first(monkeypatch):
    from hvae_kernels.compat import _coupling
    from hvae_kernels.compat import nflows as adapter

    monkeypatch.setitem(adapter.FUSED, _OtherVersion, _coupling.fused(_OtherVersion, _coupling.Fused))
    layer = affine_layer()
    layer.__class__ = _OtherVersion
    _, report = hk.accelerate(layer)
    assert "something else than the version" in report.left[0][1]


def test_the_kernel_runs(monkeypatch):
    calls = []
    from hvae_kernels.compat import _coupling

    op = _coupling.rational_quadratic_spline
    monkeypatch.setattr(_coupling, "rational_quadratic_spline", lambda *a, **o: calls.append(a) or op(*a, **o))
    fast, _ = hk.accelerate(nflows_layer())
    calls.clear()
    fast(torch.randn(3, 5, dtype=F64))
    assert len(calls) == 1


def test_copies_pickles_and_restore():
    layer, _ = hk.accelerate(nflows_layer())
    kind, x = type(layer), torch.randn(4, 5, dtype=F64)
    assert type(copy.deepcopy(layer)) is kind
    layer.transform_net_create_fn = None
    loaded = pickle.loads(pickle.dumps(layer))
    assert type(loaded) is nflows.transforms.PiecewiseRationalQuadraticCouplingTransform
    torch.testing.assert_close(loaded(x), layer(x), rtol=1e-9, atol=1e-9)
    assert type(hk.restore(layer)) is nflows.transforms.PiecewiseRationalQuadraticCouplingTransform


def test_half_precision_and_autocast_run_the_librarys_code():
    layer = nflows_layer().float()
    fast, _ = hk.accelerate(copy.deepcopy(layer))
    x = torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (functools.partial(nflows_layer, tails=None), "its splines have the tails None"),
        (
            lambda: nflows.transforms.PiecewiseLinearCouplingTransform(
                [1, 0], functools.partial(_mlp, {"hidden_features": 4, "num_blocks": 1})
            ),
            "PiecewiseLinearCouplingTransform is none of MaskedAffineAutoregressiveTransform, ",
        ),
        (
            lambda: normflows.flows.AffineCouplingBlock(torch.nn.Linear(2, 4), split_mode="checkerboard"),
            "it splits in another way than by halves of the channels",
        ),
        (lambda: normflows.flows.MaskedAffineFlow(torch.tensor([1.0, 0.0])), AS_FAST),
        (lambda: pyro_transforms.affine_coupling(4), AS_FAST),
        (lambda: pyro_transforms.conditional_affine_coupling(4, 2), AS_FAST),
    ],
    ids=["no tails", "linear", "block", "masked", "pyro", "pyro conditional"],
)
def test_left_alone_by_name_and_reason(make, reason):
    _, report = hk.accelerate(make())
    assert not report.swapped
    ((_, why),) = report.left
    assert reason in why


# ---- normflows: the block of an affine coupling layer ----


def block(mode="channel", outputs=6, **options):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, outputs))
    return normflows.flows.AffineCouplingBlock(net.to(F64), split_mode=mode, **options)


BLOCKS = {
    "exp": block,
    "flipped": functools.partial(block, "channel_inv"),
    "sigmoid": functools.partial(block, scale_map="sigmoid"),
    "inverse sigmoid": functools.partial(block, "channel_inv", scale_map="sigmoid_inv"),
    "additive": functools.partial(block, outputs=3, scale=False),
}


@pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
def test_a_block_has_the_same_bits(make):
    layer, x = make(), torch.randn(4, 6, dtype=F64)
    fast = accelerated(layer)
    torch.testing.assert_close(results(fast, x), results(layer, x), rtol=0, atol=0)
    image, log_abs_det = fast(x)
    torch.testing.assert_close(fast.inverse(image), (x, -log_abs_det), rtol=1e-9, atol=1e-9)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: fast(row[None])[0][0]))(x)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_abs_det, rtol=1e-9, atol=1e-9)
    assert type(pickle.loads(pickle.dumps(fast))) is type(layer)


def test_a_block_of_images_and_under_autocast_has_the_same_bits():
    net = torch.nn.Conv2d(2, 4, 3, padding=1)
    layer, x = normflows.flows.AffineCouplingBlock(net), torch.randn(2, 4, 3, 3)
    fast = accelerated(layer)
    torch.testing.assert_close(fast(x), layer(x), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(x), layer(x), rtol=0, atol=0)
        torch.testing.assert_close(fast.inverse(x), layer.inverse(x), rtol=0, atol=0)


def test_a_blocks_parts_are_called_where_they_do_more(monkeypatch):
    layer = block()
    fast, x, calls = accelerated(layer), torch.randn(4, 6, dtype=F64), []
    handle = fast.flows[0].register_forward_hook(lambda *_: calls.append(0))
    fast(x)
    handle.remove()
    fast(x)
    assert calls == [0]
    fast.flows[2].mode = fast.flows[0].mode = "channel_inv"
    torch.testing.assert_close(fast(x), block("channel_inv")(x), rtol=0, atol=0)
    fast.flows[2].mode = "channel"
    layer.flows[0].mode = "channel_inv"
    torch.testing.assert_close(fast(x), layer(x), rtol=0, atol=0)
    compiled = torch.compile(accelerated(block()), backend="eager")
    torch.testing.assert_close(compiled(x), block()(x), rtol=1e-9, atol=1e-9)


# ---- pyro: splines, alone, conditional and as the parts of a coupling layer ----


def spline_coupling(identity=False, bins=5):
    torch.manual_seed(0)
    net = DenseNN(2, [16], [3 * bins, 3 * bins, 3 * (bins - 1)])
    return _spread(pyro_transforms.SplineCoupling(5, 2, net, bins, 2.0, "quadratic", identity))


def conditional_spline(autoregressive=False, bins=5):
    torch.manual_seed(0)
    if autoregressive:
        net = AutoRegressiveNN(5, [16], [bins, bins, bins - 1])
        return _spread(pyro_transforms.ConditionalSpline(net, 5, bins, 2.0, "quadratic"))
    return _spread(pyro_transforms.conditional_spline(5, 3, [16], bins, 2.0, "quadratic"))


def free_spline():
    torch.manual_seed(0)
    return _spread(pyro_transforms.Spline(5, 4, 2.0, "quadratic"))


#: Of each transform how many swaps it takes, and the width of its context.
PYRO = {
    "coupling": (spline_coupling, 2, 0),
    "coupling identity": (functools.partial(spline_coupling, True), 2, 0),
    "spline": (free_spline, 1, 0),
    "conditional": (conditional_spline, 1, 3),
    "conditional autoregressive": (functools.partial(conditional_spline, True), 1, 5),
}
each_pyro = pytest.mark.parametrize(("make", "swaps", "width"), PYRO.values(), ids=PYRO)


def pyro_direction(layer, context, inverse, x):
    """``(image, log_abs_det)`` of a row."""
    transform = layer if context is None else layer.condition(context)
    transform, x = transform.inv if inverse else transform, x.clone()  # pyro's caches go by identity
    image = transform(x)
    logs = transform.log_abs_det_jacobian(x, image)
    return image, logs.sum(-1) if logs.dim() == x.dim() else logs


def of_width(width):
    return torch.randn(9, width, generator=torch.Generator().manual_seed(2), dtype=F64) if width else None


@each_pyro
def test_pyro_has_the_same_numbers(make, swaps, width):
    layer, context = make(), of_width(width)
    found = []
    for module in (accelerated(layer, swaps), layer):
        for inverse in (False, True):
            x = inputs().requires_grad_()
            image, log_abs_det = pyro_direction(module, context, inverse, x)
            loss, leaves = image.cos().sum() + log_abs_det.sin().sum(), [x, *module.parameters()]
            gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
            found.append([value.detach() for value in (image, log_abs_det, *gradients)])
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-9, atol=1e-9)


@each_pyro
def test_pyro_has_the_same_second_derivatives(make, swaps, width):
    layer, context = make(), of_width(width)
    found = []
    for module in (accelerated(layer, swaps), layer):
        for inverse in (False, True):
            x = inputs().clamp(-1.9, 1.9).requires_grad_()  # outside, those of pyro's inverse are NaN
            image, log_abs_det = pyro_direction(module, context, inverse, x)
            loss, leaves = image.cos().sum() + log_abs_det.sin().sum(), [x, *module.parameters()]
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            found.append(torch.autograd.grad(gradient.square().sum(), leaves, materialize_grads=True))
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-8, atol=1e-8)


@each_pyro
def test_pyro_log_determinants_are_those_of_the_jacobians_and_there_is_a_way_back(make, swaps, width):
    fast, x, context = accelerated(make(), swaps), inputs(), of_width(width)
    for inverse in (False, True):
        image, log_abs_det = pyro_direction(fast, context, inverse, x)
        back, minus = pyro_direction(fast, context, not inverse, image)
        torch.testing.assert_close((back, minus), (x, -log_abs_det), rtol=1e-9, atol=1e-9)
        jacobian = torch.autograd.functional.jacobian(
            lambda x, i=inverse: pyro_direction(fast, context, i, x)[0].sum(0), x
        ).transpose(0, 1)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_abs_det, rtol=1e-9, atol=1e-9)


@each_pyro
def test_pyro_keeps_nan_in_its_row(make, swaps, width):
    fast, x, context = accelerated(make(), swaps), inputs(), of_width(width)
    broken = x.clone()
    broken[4, 0] = torch.nan
    rest = torch.arange(len(x)) != 4
    for inverse in (False, True):
        results = [pyro_direction(fast, context, inverse, given) for given in (broken, x)]
        for result, expected in zip(*results, strict=True):
            torch.testing.assert_close(result[rest], expected[rest], rtol=0, atol=0)


@each_pyro
def test_pyro_copies_pickles_and_restore(make, swaps, width):
    layer, x, context = make(), inputs(), of_width(width)
    fast = accelerated(layer, swaps)
    expected = pyro_direction(layer, context, False, x)
    kinds = [type(part) for part in fast.modules()]
    twin = copy.deepcopy(fast)
    assert [type(part) for part in twin.modules()] == kinds
    loaded = pickle.loads(pickle.dumps(fast))
    plain = [type(part) for part in layer.modules()]
    assert [type(part) for part in loaded.modules()] == plain
    for module in (twin, loaded, hk.restore(fast)):
        torch.testing.assert_close(pyro_direction(module, context, False, x), expected, rtol=1e-9, atol=1e-9)
    assert [type(part) for part in fast.modules()] == plain
    assert fast.state_dict().keys() == layer.state_dict().keys()


@each_pyro
def test_pyro_runs_the_kernel(make, swaps, width, monkeypatch):
    from hvae_kernels.compat import pyro as adapter

    calls, op = [], adapter.rational_quadratic_spline
    monkeypatch.setattr(adapter, "rational_quadratic_spline", lambda *a, **o: calls.append(a) or op(*a, **o))
    fast, context = accelerated(make(), swaps), of_width(width)
    calls.clear()
    pyro_direction(fast, context, False, inputs())
    assert len(calls) == (1 if swaps == 1 or fast.identity else 2)
    with torch.autocast("cpu", torch.bfloat16):
        calls.clear()
        pyro_direction(fast, context, False, inputs())
    assert not calls
    make_fx(lambda x: pyro_direction(fast, context, False, x)[0])(inputs())
    assert not calls


@pytest.mark.parametrize("make", [make for make, *_ in (*LAYERS.values(), *PYRO.values())], ids=[*LAYERS, *PYRO])
def test_it_draws_nothing_and_minds_no_default_device(make):
    layer = make()
    state = torch.get_rng_state()
    with torch.device("meta"):
        _, report = hk.accelerate(layer)
    assert (len(report.swapped) > 0, report.left) == (True, [])
    assert torch.get_rng_state().equal(state)


def test_pyro_takes_any_batch_of_inputs_and_context():
    layer = conditional_spline()
    fast, x, context = accelerated(layer), inputs(6).reshape(2, 3, 5), of_width(3)
    for rows in (context[0], context[:3], context[:6].reshape(2, 3, 3)):
        results = [pyro_direction(module, rows, False, x) for module in (fast, layer)]
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    for module in (fast, layer):
        with pytest.raises(RuntimeError):
            pyro_direction(module, context[:4], False, x)


def test_pyro_splines_with_methods_of_their_own_are_left_alone():
    layer = free_spline()
    layer._params = functools.partial(pyro_transforms.Spline._params, layer)
    other = conditional_spline()
    other.condition = other.condition
    linear = pyro_transforms.spline_coupling(4)
    _, report = hk.accelerate(torch.nn.ModuleList([layer, other, linear]))
    assert not report.swapped
    assert report.left == [
        ("0", "it has a _params of its own, which may do something else"),
        ("1", "it has a condition of its own, which may do something else"),
        ("2.lower_spline", "its splines are of order 'linear': quadratic ones have kernels"),
        ("2.upper_spline", "its splines are of order 'linear': quadratic ones have kernels"),
    ]


def test_pyro_parameters_that_are_set_afterwards_are_used():
    layer, x = free_spline(), inputs()
    fast = accelerated(layer)
    for module in (layer, fast):
        module._params = lambda own=module._params: own()
        module.unnormalized_widths.data.mul_(2)
    torch.testing.assert_close(fast(x), layer(x), rtol=0, atol=0)


def test_pyro_parts_of_an_autoregressive_layer_are_swapped_with_it():
    net = AutoRegressiveNN(4, [12], [5, 5, 4])
    layer = pyro_transforms.SplineAutoregressive(4, net, 5, 2.0, "quadratic")
    _, report = hk.accelerate(layer)
    assert (report.swapped, report.left) == ([("", "SplineAutoregressive, 4 features")], [])
    _, report = hk.accelerate(layer)
    assert report.left == [("", "already swapped")]
