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


def gradients(function, inputs, upstream):
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*leaves), leaves, [g.to(leaves[0].dtype) for g in upstream])


def assert_like_reference(op, reference, inputs):
    """Values and gradients in float32 within the budget of the plain formula's error."""
    exact = [x.double() for x in inputs]
    upstream = [torch.randn_like(y) for y in reference(*inputs)]
    results = (*op(*inputs), *gradients(op, inputs, upstream))
    plain = (*reference(*inputs), *gradients(reference, inputs, upstream))
    oracle = (*reference(*exact), *gradients(reference, exact, upstream))
    testing.assert_within_budget([r.detach() for r in results], [p.detach() for p in plain], [o.detach() for o in oracle])


@each_set
# rows of whole cache lines, of half of one, of no whole vector, and short ones that share a line
@pytest.mark.parametrize("shape", [(2049, 512), (1051, 1000), (1051, 1003), (52_500, 20)])
def test_leapfrog_whose_results_go_past_the_caches(cpu_set, shape):
    spec = SPECS["gaussian_leapfrog"]
    with hk.use_cpu(cpu_set):
        assert_like_reference(spec.op, spec.reference, spec.make(torch.float32, "cpu", shape=shape))


@each_set
@pytest.mark.parametrize("op", ["autoregressive_forward", "autoregressive_inverse"])
@pytest.mark.parametrize("kind", ["two_hidden", "residual", "gated", "skip"])
def test_network_whose_weights_fit_no_cache(cpu_set, op, kind):
    """Gradients of wide networks are sums over all samples at once; of narrow ones, tile by tile."""
    case = {"shape": (150, 13), "kind": kind, "hidden": 270}
    spec = SPECS[op].at(case)
    with hk.use_cpu(cpu_set):
        assert_like_reference(spec.op, spec.reference, spec.make(torch.float32, "cpu", **case))


@each_set
@pytest.mark.parametrize("rows", [20, 65, 1100])
def test_narrow_network_of_many_tiles(cpu_set, rows):
    case = {"shape": (rows, 13), "kind": "two_hidden", "hidden": 70}
    spec = SPECS["autoregressive_forward"].at(case)
    with hk.use_cpu(cpu_set):
        assert_like_reference(spec.op, spec.reference, spec.make(torch.float32, "cpu", **case))
