"""Coupling flows: exact both ways, against autograd's full Jacobian, with every tail."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import hvae_kernels as hk
from hvae_kernels.functional import Gate, Spline

F64 = torch.float64
TAILS = {
    "affine": "affine",
    "softplus": Gate.softplus(),
    "sigmoid": Gate.sigmoid(),
    "spline": Spline(8),
    "circular": Spline(5, tails="circular"),
    "zuko": Spline(4, bound=5.0, style="zuko"),
}


def flow_of(gate, features=5, **options):
    torch.manual_seed(0)
    return hk.nn.CouplingFlow(features, [16], gate=gate, dtype=F64, **options)


@pytest.mark.parametrize("gate", TAILS.values(), ids=TAILS)
def test_both_directions_and_the_full_jacobian(gate):
    flow, z = flow_of(gate, context_features=2, activation="tanh"), torch.randn(7, 5, dtype=F64)
    context = torch.randn(7, 2, dtype=F64)
    image, log_abs_det = flow(z, context)
    assert torch.equal(image[:, [1, 3]], z[:, [1, 3]])
    assert not torch.isclose(image[:, [0, 2, 4]], z[:, [0, 2, 4]]).all()
    torch.testing.assert_close(flow.inverse(image, context), (z, -log_abs_det))
    one = torch.func.vmap(torch.func.jacrev(lambda z, c: flow(z[None], c[None])[0][0]))(z, context)
    torch.testing.assert_close(torch.linalg.slogdet(one)[1], log_abs_det)


@pytest.mark.parametrize("gate", TAILS.values(), ids=TAILS)
def test_gradients(gate):
    flow, z = flow_of(gate, activation="tanh"), torch.randn(3, 5, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, *_: flow(z), (z, *flow.parameters()))
    assert torch.autograd.gradcheck(lambda z, *_: flow.inverse(z), (z, *flow.parameters()))
    assert torch.autograd.gradgradcheck(lambda z, *_: flow(z), (z, *flow.parameters()), fast_mode=True)


def test_the_reference_agrees():
    flow, z = flow_of(Spline(8)), torch.randn(2, 3, 5, dtype=F64)
    with hk.use_impl("reference"):
        expected = flow(z)
    torch.testing.assert_close(flow(z), expected)
    assert expected[1].shape == (2, 3)


def test_masks():
    z = torch.randn(4, 5, dtype=F64)
    flow = flow_of("affine", mask=torch.tensor([False, False, True, True, False]))
    assert torch.equal((flow(z)[0] != z).any(0), flow.mask)
    everything = flow_of("affine", mask=[True] * 5)
    assert (everything(z)[0] != z).all()
    torch.testing.assert_close(everything.inverse(everything(z)[0])[0], z)


def test_a_conditioner_of_ones_own():
    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Linear(2, 3, dtype=F64)

        def forward(self, z):
            shift = self.shift(z)
            return torch.stack((shift, torch.zeros_like(shift)), -2)

    flow, z = flow_of("affine", conditioner=Mine()), torch.randn(4, 5, dtype=F64)
    image, log_abs_det = flow(z)
    torch.testing.assert_close(image[:, ::2], z[:, ::2] + flow.conditioner.shift(z[:, 1::2]))
    assert torch.equal(log_abs_det, torch.zeros(4, dtype=F64))
    wrong = flow_of("affine", conditioner=torch.nn.Linear(2, 3, dtype=F64))
    with pytest.raises(ValueError, match=r"conditioner must be to return|conditioner must"):
        wrong(z)


def test_stacks_alternate():
    stack = hk.nn.FlowStack.coupling(3, 5, [8], gate=Spline(4), dtype=F64)
    masks = [flow.mask.tolist() for flow in stack.flows]
    assert masks[0] == masks[2] == [not one for one in masks[1]] == [True, False, True, False, True]
    z = torch.randn(6, 5, dtype=F64)
    image, log_abs_det = stack(z)
    assert (image != z).all()
    torch.testing.assert_close(stack.inverse(image), (z, -log_abs_det))
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(5, dtype=F64), 1.0), 1)
    model = torch.distributions.TransformedDistribution(base, [stack.as_transform()])
    torch.testing.assert_close(model.log_prob(image), base.log_prob(z) - log_abs_det)


def test_copies_pickles_and_state_dicts():
    flow, z = flow_of(Spline(4), mask=[True, True, False, False, True]), torch.randn(3, 5, dtype=F64)
    expected = flow(z)[0]
    for other in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(other(z)[0], expected)
    other = flow_of(Spline(4))
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other(z)[0], expected)
    assert torch.equal(other.mask, flow.mask)
    with pytest.raises(RuntimeError, match="size mismatch for transformed"):
        flow_of(Spline(4), mask=[True, True, False, False, False]).load_state_dict(flow.state_dict())


def test_materialises_from_the_meta_device():
    flow = hk.nn.CouplingFlow(5, [8], mask=[True, False, False, False, True], device="meta").to_empty(device="cpu")
    for module in flow.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert flow.mask.tolist() == [True, False, False, False, True]
    assert flow.transformed.tolist() == [0, 4]
    assert flow.passing.tolist() == [1, 2, 3]
    assert flow(torch.randn(2, 5))[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"features": 0}, ValueError, "features must be an integer of at least 1"),
        ({"mask": [False] * 5}, ValueError, "mask must be of 5 booleans, not all of them False"),
        ({"mask": [True] * 4}, ValueError, "mask must be of 5 booleans"),
        ({"mask": [1, 0, 1, 0, 1]}, TypeError, "mask must be None, or booleans"),
        ({"gate": 3}, TypeError, "gate must be a name, a Gate or a Spline"),
        ({"gate": "cubic"}, ValueError, "gate must be a Gate or one of"),
        ({"activation": "sine"}, ValueError, "activation must be one of"),
        ({"hidden_features": "16"}, TypeError, "hidden_features must be"),
        ({"conditioner": len}, TypeError, r"conditioner must be None or a torch\.nn\.Module"),
    ],
)
def test_bad_arguments(options, error, message):
    given = {"features": 5, "hidden_features": [8]} | options
    with pytest.raises(error, match=message):
        hk.nn.CouplingFlow(**given)


class Pair(torch.nn.Module):
    """No conditioner."""

    def forward(self, z):
        return z, z


def test_bad_calls():
    flow, z = flow_of("affine"), torch.randn(3, 5, dtype=F64)
    with pytest.raises(ValueError, match="context must be None"):
        flow(z, torch.randn(3, 2, dtype=F64))
    with pytest.raises(ValueError, match=r"context must be a tensor of shape \(\.\.\., 2\)"):
        flow_of("affine", context_features=2)(z)
    with pytest.raises(ValueError, match=r"z must be a tensor of shape \(\.\.\., 5\)"):
        flow(z[:, :4])
    with pytest.raises(ValueError, match=r"CouplingFlow: context must be of a batch shape that broadcasts to \(3,\)"):
        flow_of("affine", context_features=2)(z, torch.randn(4, 2, dtype=F64))
    with pytest.raises(
        ValueError, match=r"CouplingFlow: conditioner must be a network that returns a tensor of shape \(3, 2, 3\)"
    ):
        hk.nn.CouplingFlow(5, [], conditioner=Pair())(z)
    with pytest.raises(ValueError, match="order must be absent, as orders says it"):
        hk.nn.FlowStack.autoregressive(hk.nn.MaskedAutoregressiveFlow, 2, 5, [8], order=[0, 1, 2, 3, 4])
    with pytest.raises(TypeError, match="flows must be a sequence of flows, got HamiltonianFlow"):
        hk.nn.FlowStack([hk.nn.HamiltonianFlow(5, 2)])
    with pytest.raises(ValueError, match="conditioner must be absent"):
        hk.nn.FlowStack.coupling(2, 5, [8], conditioner=torch.nn.Identity())
    underflows = flow_of("affine")
    torch.nn.init.constant_(underflows.conditioner.layers[-1].bias, -2000.0)
    with pytest.raises(RuntimeError, match="a scale is below the least normal number"):
        underflows.inverse(z)


def test_the_inverse_is_of_float32_under_autocast():
    flow = hk.nn.CouplingFlow(64, [8])
    x = torch.randn(16, 64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        z, log_abs_det = flow.float().inverse(x)
        _, forward = flow(z)
    assert (z.dtype, log_abs_det.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(log_abs_det, -forward, rtol=0, atol=0.05)
