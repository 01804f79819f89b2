"""Deferred initialisation: built on the meta device, given memory by ``to_empty``, and then reset."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

import hvae_kernels as hk
from hvae_kernels import testing


def stack(**options):
    return hk.nn.FlowStack.autoregressive(hk.nn.MaskedAutoregressiveFlow, 3, 5, [7, 7], **options)


MODULES = {
    "masked_linear": lambda: hk.nn.MaskedLinear([0, 1, 2], (2, 1)),
    "made": lambda: hk.nn.MADE(5, [9, 9], 3),
    "made_narrow": lambda: hk.nn.MADE(9, [3, 4], 2, 2),
    "iaf": lambda: hk.nn.InverseAutoregressiveFlow(5, [16]),
    "iaf_context": lambda: hk.nn.InverseAutoregressiveFlow(5, [16], context_features=2),
    "maf_order": lambda: hk.nn.MaskedAutoregressiveFlow(4, [8], order=[3, 1, 0, 2]),
    "hidden_degrees": lambda: hk.nn.MaskedAutoregressiveFlow(4, [4], hidden_degrees=[[0, 1, 2, 2]]),
    "reversed": stack,
    "permuted": lambda: stack(orders="permuted", generator=torch.Generator().manual_seed(3)),
    "planar": lambda: hk.nn.PlanarFlow(5, 3),
    "planar_shared": lambda: hk.nn.PlanarFlow(5, 3, shared=True),
    "radial": lambda: hk.nn.RadialFlow(5, 3),
    "local_reparam": lambda: hk.nn.LocalReparamLinear(5, 3),
    **{
        f"hamiltonian_{tempering}": lambda tempering=tempering: hk.nn.HamiltonianFlow(5, 3, tempering)
        for tempering in ("none", "quadratic", "quadratic-beta", "free")
    },
    "hamiltonian_replicas": lambda: hk.nn.HamiltonianFlow(5, 3, replicas=2),
}
each_module = pytest.mark.parametrize("name", MODULES)


def materialised(module):
    """Given memory, poisoned, and reset as loaders do: wherever there is a ``reset_parameters``."""
    with testing.poisoned_memory():
        module = module.to_empty(device="cpu")
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return module


def tensors(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@each_module
def test_a_deferred_module_is_an_ordinary_one(name):
    torch.manual_seed(5)
    with torch.device("meta"):
        deferred = MODULES[name]()
    assert all(x.is_meta for x in tensors(deferred).values())
    deferred = materialised(deferred)
    ordinary = MODULES[name]()
    torch.manual_seed(5)
    for part in ordinary.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    torch.manual_seed(5)
    for part in deferred.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    found, expected = tensors(deferred), tensors(ordinary)
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["iaf", "maf_order", "reversed", "permuted", "hidden_degrees"])
def test_the_log_abs_det_of_a_deferred_flow_is_the_jacobians(name):
    with torch.device("meta"):
        flow = MODULES[name]()
    flow = materialised(flow).double()
    z = torch.randn(flow.features, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda z: flow.inverse(z)[0])(z)
    torch.testing.assert_close(flow.inverse(z)[1], torch.linalg.slogdet(jacobian).logabsdet)


@each_module
@pytest.mark.parametrize("assign", [False, True])
def test_a_deferred_module_loads_a_state_dict(name, assign):
    ordinary = MODULES[name]()
    with torch.device("meta"):
        deferred = MODULES[name]()
    deferred = deferred if assign else materialised(deferred)
    ordinary = ordinary.double() if assign else ordinary
    deferred.load_state_dict(copy.deepcopy(ordinary.state_dict()), assign=assign)
    found, expected = tensors(deferred), tensors(ordinary)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_reset_keeps_the_degrees_that_were_loaded(device):
    """A permuted stack's orders come with its state dict: reset, it is the flow that was loaded."""
    saved = stack(orders="permuted", generator=torch.Generator().manual_seed(3))
    with torch.device(device) if device == "meta" else contextlib.nullcontext():
        other = stack(orders="permuted", generator=torch.Generator().manual_seed(4))
    other.load_state_dict(copy.deepcopy(saved.state_dict()), assign=True)
    for part in other.modules():
        if isinstance(part, hk.nn.MaskedLinear):
            part.reset_parameters()
    degrees = {key: x for key, x in saved.named_buffers() if "degrees" in key}
    assert degrees
    assert all(torch.equal(dict(other.named_buffers())[key], x) for key, x in degrees.items())


def test_degrees_without_values_are_refused():
    with torch.device("meta"):
        degrees = torch.arange(3)
        with pytest.raises(
            ValueError, match="MaskedLinear: in_degrees must be integers whose values can be read, got a"
        ):
            hk.nn.MaskedLinear(degrees, [0, 1])
        with pytest.raises(ValueError, match="MADE: order must be integers whose values can be read"):
            hk.nn.MADE(3, [4], order=degrees)
