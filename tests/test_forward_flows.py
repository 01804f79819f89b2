"""Planar and radial flows as modules: flows without an inverse."""

import pytest
import torch

import hvae_kernels as hk


def test_shared_planar_is_the_layer_repeated():
    flow, z = hk.nn.PlanarFlow(5, 4, shared=True).double(), torch.randn(6, 5, dtype=torch.float64)
    repeated = [x.detach().repeat_interleave(4, 0) for x in (flow.u, flow.w, flow.b)]
    torch.testing.assert_close(flow(z), hk.functional.planar_flow(z, *repeated, constrain=True))
    assert [tuple(p.shape) for p in flow.parameters()] == [(1, 5), (1, 5), (1,)]


@pytest.mark.parametrize("flow", [hk.nn.PlanarFlow(5, 3), hk.nn.PlanarFlow(5, 3, shared=True), hk.nn.RadialFlow(5, 3)])
def test_modules_are_trainable_transforms(flow):
    with torch.no_grad():  # a radial flow begins as the identity, where a centre makes no difference
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    z = torch.randn(7, 5)
    image, log_abs_det = flow(z)
    gradients = torch.autograd.grad(image.square().sum() + log_abs_det.sum(), tuple(flow.parameters()))
    assert all(torch.isfinite(g).all() and g.any() for g in gradients)
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(5), 1.0), 1)
    transform = flow.as_transform(cache_size=1)
    model = torch.distributions.TransformedDistribution(base, [transform])
    sample = model.rsample((7,))
    start = transform.inv(sample)
    torch.testing.assert_close(model.log_prob(sample), base.log_prob(start) - flow(start)[1])
    with pytest.raises(NotImplementedError, match="the inverse has no closed form"):
        model.log_prob(torch.randn(7, 5))


@pytest.mark.parametrize("flow", [hk.nn.PlanarFlow(5, 3), hk.nn.RadialFlow(5, 3)])
def test_samples_without_gradients_are_scored_without_them(flow):
    """There is no inverse to find the gradient by, so that asking for it is an error, not a zero."""
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(5), 1.0), 1)
    model = torch.distributions.TransformedDistribution(base, [flow.as_transform(cache_size=1)])
    sample = model.sample((7,))
    with torch.no_grad():
        assert model.log_prob(sample).shape == (7,)
    with pytest.raises(
        NotImplementedError, match=r"rsample where gradients are wanted, or log_prob under torch.no_grad"
    ):
        model.log_prob(sample)
    sample = model.rsample((7,))
    with torch.no_grad():
        flow.state_dict()[next(iter(flow.state_dict()))].add_(0.1)
    with pytest.raises(NotImplementedError, match="before anything changes"), torch.no_grad():
        model.log_prob(sample)
    flow.requires_grad_(False)
    assert model.log_prob(model.sample((7,))).shape == (7,)


def test_radial_module_begins_as_the_identity():
    flow, z = hk.nn.RadialFlow(5, 3), torch.randn(7, 5)
    torch.testing.assert_close(flow(z), (z, torch.zeros(7)))


def test_modules_bad_input():
    with pytest.raises(ValueError, match="PlanarFlow: features must be an integer of at least 1, got int 0"):
        hk.nn.PlanarFlow(0, 1)
    with pytest.raises(ValueError, match="RadialFlow: n_layers must be an integer of at least 0, got int -1"):
        hk.nn.RadialFlow(2, -1)
    with pytest.raises(ValueError, match=r"PlanarFlow: z must be a tensor of shape \(\.\.\., 2\)"):
        hk.nn.PlanarFlow(2, 1)(torch.ones(4, 3))
    with pytest.raises(ValueError, match="RadialFlow: context must be None"):
        hk.nn.RadialFlow(2, 1)(torch.ones(4, 2), torch.ones(4, 2))
