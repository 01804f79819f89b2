"""Deferred initialisation: built on the meta device, given memory by ``to_empty``, and then reset."""

from __future__ import annotations

import contextlib
import copy
import functools

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
    "coupling": lambda: hk.nn.CouplingFlow(5, [16], mask=[True, False, False, True, True]),
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
    "annealed": lambda: hk.nn.AnnealedHamiltonianFlow(5, 3, score_features=4, bridge_step_sizes=True),
    "annealed_importance": lambda: hk.nn.AnnealedImportanceSampling(5, 3),
    "annealed_given": lambda: hk.nn.AnnealedHamiltonianFlow(
        5, 3, refreshment=0, betas=torch.tensor([0.1, 0.4, 1.0], device="cpu"), memory="store"
    ),
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


BUILDERS = {
    "MaskedLinear": functools.partial(hk.nn.MaskedLinear, [0, 1, 2], (2, 1)),
    "MADE": functools.partial(hk.nn.MADE, 5, [9, 9], 3, 2),
    "InverseAutoregressiveFlow": functools.partial(hk.nn.InverseAutoregressiveFlow, 5, [16], 2),
    "CouplingFlow": functools.partial(hk.nn.CouplingFlow, 5, [16], 2),
    "FlowStack": stack,
    "PlanarFlow": functools.partial(hk.nn.PlanarFlow, 5, 3),
    "RadialFlow": functools.partial(hk.nn.RadialFlow, 5, 3),
    "LocalReparamLinear": functools.partial(hk.nn.LocalReparamLinear, 5, 3),
    "HamiltonianFlow": functools.partial(hk.nn.HamiltonianFlow, 5, 3),
    "AnnealedHamiltonianFlow": functools.partial(hk.nn.AnnealedHamiltonianFlow, 5, 3),
    "AnnealedHamiltonianFlow, given": functools.partial(
        hk.nn.AnnealedHamiltonianFlow, 5, 3, betas=torch.ones(3), learn_refreshment=False, score_features=4
    ),
    "HamiltonianFlow, free": functools.partial(hk.nn.HamiltonianFlow, 5, 3, "free", replicas=2),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_modules_are_made_where_and_as_they_are_asked_for(name):
    build = BUILDERS[name]
    deferred = build(device="meta", dtype=torch.float64)
    assert all(x.is_meta for x in tensors(deferred).values())
    module = build(device=torch.device("cpu"), dtype=torch.float64)
    floating = [x for x in tensors(module).values() if x.is_floating_point()]
    assert {x.dtype for x in floating} == {torch.float64}
    assert {x.dtype for x in build().parameters()} == {torch.float32}
    named = {"FlowStack": "MADE", "InverseAutoregressiveFlow": "MADE"}.get(name, name.partition(",")[0])
    with pytest.raises(TypeError, match=f"{named}: dtype must be a torch.dtype, got str"):
        build(dtype="float64")
    with pytest.raises(ValueError, match=f"{named}: dtype must be a floating-point one, got torch.int64"):
        build(dtype=torch.int64)
    with pytest.raises(TypeError, match=f"{named}: device must be a torch.device or its name, got float"):
        build(device=1.5)
