"""What only large calls reach, in every instruction set that the machine has."""

from __future__ import annotations

import pytest
import torch
from opspecs import OPSPECS

import hvae_kernels as hk
from hvae_kernels import _extension, testing

SPECS = {spec.name: spec for spec in OPSPECS}
SETS = [name for name, reason in _extension.cpu_sets().items() if reason is None]
each_set = pytest.mark.parametrize("cpu_set", SETS)


def assert_like_reference(spec, case):
    """Values and gradients in float32 are as exact as the plain formula's."""

    def make():
        inputs = spec.make(torch.float32, "cpu", **case)
        return *inputs, *(torch.randn_like(y) for y in spec.reference(*inputs))

    n_inputs = len(spec.make(torch.float32, "cpu", **case))

    def run(function, tensors):
        inputs = [x.detach().requires_grad_() for x in tensors[:n_inputs]]
        results = function(*inputs)
        gradients = torch.autograd.grad(results, inputs, tensors[n_inputs:], materialize_grads=True)
        return [*(y.detach() for y in results), *gradients]

    testing.assert_as_exact(lambda *x: run(spec.op, x), lambda *x: run(spec.reference, x), make)


@each_set
# rows of whole cache lines, of half of one, of no whole vector, and short ones that share a line
@pytest.mark.parametrize("shape", [(3601, 512), (1851, 1000), (1851, 1003), (92_500, 20)])
@pytest.mark.parametrize("op", ["gaussian_leapfrog", "leapfrog_update", "annealed_leapfrog_update"])
def test_steps_whose_results_go_past_the_caches(cpu_set, op, shape):
    with hk.use_cpu(cpu_set):
        assert_like_reference(SPECS[op], {"shape": shape})


@each_set
# blocks of 64 rows, and of 16 where rows are long
@pytest.mark.parametrize("shape", [(3701, 1001), (75, 50_003)])
def test_planar_layers_whose_results_go_past_the_caches(cpu_set, shape):
    case = {"shape": shape, "constrain": True}
    with hk.use_cpu(cpu_set):
        assert_like_reference(SPECS["planar_flow"].at(case), case)


@each_set
# eight rows at a time, and one
@pytest.mark.parametrize(("shape", "n_layers"), [((1011, 23), 80), ((150, 1_009), 13)])
def test_amortised_layers_whose_gradients_go_past_the_caches(cpu_set, shape, n_layers):
    case = {"shape": shape, "n_layers": n_layers, "constrain": True}
    with hk.use_cpu(cpu_set):
        assert_like_reference(SPECS["planar_flow_amortised"].at(case), case)


@each_set
@pytest.mark.parametrize("op", ["autoregressive_forward", "autoregressive_inverse"])
@pytest.mark.parametrize("kind", ["two_hidden", "residual", "gated", "skip"])
def test_network_whose_weights_fit_no_cache(cpu_set, op, kind):
    """Gradients of wide networks are sums over all samples at once; of narrow ones, tile by tile."""
    case = {"shape": (150, 13), "kind": kind, "hidden": 270}
    with hk.use_cpu(cpu_set):
        assert_like_reference(SPECS[op].at(case), case)


@each_set
@pytest.mark.parametrize("rows", [20, 65, 1100])
def test_narrow_network_of_many_tiles(cpu_set, rows):
    case = {"shape": (rows, 13), "kind": "two_hidden", "hidden": 70}
    with hk.use_cpu(cpu_set):
        assert_like_reference(SPECS["autoregressive_forward"].at(case), case)
