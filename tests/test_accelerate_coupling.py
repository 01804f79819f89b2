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

import hvae_kernels as hk

F64 = torch.float64


def _mlp(sizes, inputs, outputs):
    return nflows.nn.nets.ResidualNet(inputs, outputs, **sizes)


def nflows_layer(tails="linear", context=None, **options):
    torch.manual_seed(0)
    net = functools.partial(_mlp, {"hidden_features": 16, "num_blocks": 1, "context_features": context})
    layer = nflows.transforms.PiecewiseRationalQuadraticCouplingTransform(
        [1, 0, 1, 1, 0], net, num_bins=6, tails=tails, tail_bound=2.5, **options
    )
    return _spread(layer)


def normflows_layer():
    torch.manual_seed(0)
    return _spread(normflows.flows.CoupledRationalQuadraticSpline(5, 1, 16, num_bins=5, tail_bound=2))


def circular_layer():
    torch.manual_seed(0)
    return _spread(normflows.flows.CircularCoupledRationalQuadraticSpline(4, 1, 16, list(range(4)), num_bins=5))


def _spread(layer):
    """In float64, with parameters that a mistake shows in."""
    layer = layer.to(F64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
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


@pytest.mark.parametrize("make", [nflows_layer, normflows_layer], ids=["nflows", "normflows"])
def test_the_same_numbers(make):
    layer = make()
    fast, report = hk.accelerate(copy.deepcopy(layer))
    assert len(report.swapped) == 1
    assert not report.left
    x = 1.5 * torch.randn(9, 5, dtype=F64)
    torch.testing.assert_close(results(fast, x), results(layer, x), rtol=1e-9, atol=1e-9)
    assert fast.state_dict().keys() == layer.state_dict().keys()


def test_contexts_and_unconditional_splines():
    layer = nflows_layer(context=3, apply_unconditional_transform=True)
    fast, _ = hk.accelerate(copy.deepcopy(layer))
    x, context = torch.randn(9, 5, dtype=F64), torch.randn(9, 3, dtype=F64)
    torch.testing.assert_close(results(fast, x, context), results(layer, x, context), rtol=1e-9, atol=1e-9)


def test_images():
    torch.manual_seed(0)
    net = functools.partial(lambda i, o: nflows.nn.nets.ConvResidualNet(i, o, hidden_channels=8, num_blocks=1))
    layer = _spread(
        nflows.transforms.PiecewiseRationalQuadraticCouplingTransform([1, 0], net, num_bins=4, tails="linear")
    )
    fast, _ = hk.accelerate(copy.deepcopy(layer))
    x = torch.randn(2, 2, 3, 4, dtype=F64)
    torch.testing.assert_close(fast(x), layer(x), rtol=1e-9, atol=1e-9)


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
            lambda: nflows.transforms.AffineCouplingTransform(
                [1, 0], functools.partial(_mlp, {"hidden_features": 4, "num_blocks": 1})
            ),
            "AffineCouplingTransform is none of MaskedAffineAutoregressiveTransform, ",
        ),
        (circular_layer, "its features have tails or bounds of their own"),
    ],
    ids=["no tails", "affine", "circular"],
)
def test_left_alone_by_name_and_reason(make, reason):
    _, report = hk.accelerate(make())
    assert not report.swapped
    ((_, why),) = report.left
    assert reason in why
