"""Properties of the kernels that walk through whole networks: any degrees, units that nobody uses, bad input."""

import dataclasses
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import network

import hvae_kernels as hk
from hvae_kernels import testing
from hvae_kernels.functional import Spline
from hvae_kernels.ops.autoregressive_network import Network, autoregressive_inverse, reference
from hvae_kernels.ops.autoregressive_network import autograd as network_autograd
from hvae_kernels.ops.autoregressive_network.network import flattened

#: Where there is a GPU, Triton compiles for it and has no business with these CPU tensors.
INTERPRETED = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ()
each_kernel = pytest.mark.parametrize("implementation", ["cpp", *INTERPRETED])
each_tail = pytest.mark.parametrize("tail", [None, Spline(3)], ids=["affine", "spline"])
needs_triton = pytest.mark.skipif(not INTERPRETED, reason="Triton compiles for the GPU here")
LOWEST, HIGHEST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max


def with_degrees(net: Network, *degrees) -> Network:
    """The network with other degrees: of the features, then of each stage."""
    features, *rest = (torch.tensor(layer) for layer in degrees)
    stages = (dataclasses.replace(stage, degrees=own) for stage, own in zip(net.stages, rest, strict=True))
    return dataclasses.replace(net, degrees=features, stages=tuple(stages))


def derivatives(inverse, y, net):
    """Values, and gradients for y and every tensor of the network."""
    leaves = [x.detach().requires_grad_() for x in (y, *net.tensors())]
    results = inverse(leaves[0], net.with_tensors(tuple(leaves[1:])))
    seeds = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x) for x in results]
    return *results, *torch.autograd.grad(results, leaves, seeds, materialize_grads=True)


def assert_inverse(implementation, y, net):
    """In fresh memory that is NaN."""
    with hk.use_impl(implementation), testing.poisoned_memory():
        results = derivatives(autoregressive_inverse, y, net)
    for result, exact in zip(results, derivatives(reference.autoregressive_inverse, y, net), strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-11, atol=1e-11)


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


@each_kernel
def test_degrees_at_the_ends_of_int64(implementation):
    """No difference of two of them, nor the opposite of one, is a 64-bit integer."""
    features = [0, HIGHEST, LOWEST + 1, LOWEST + 1]
    hidden = [LOWEST, -5, HIGHEST, LOWEST + 1, HIGHEST - 1, 0]
    net = with_degrees(
        network("one_hidden", 4, 6, 3, dtype=torch.float64), features, hidden, [m - 1 for m in features for _ in "ab"]
    )
    assert_inverse(implementation, double(3, 4), net)


@each_kernel
@each_tail
@pytest.mark.parametrize("kind", ["residual", "gated"])
def test_units_that_no_output_uses(kind, implementation, tail):
    """Units that see every feature, some of them at the end of a connection that adds a raw value."""
    net = network(kind, 3, 6, 4, dtype=torch.float64, activation="sigmoid", tail=tail)
    last = net.stages[-1].degrees.tolist()
    net = with_degrees(net, [0, 1, 2], [-1, 0, 1, 2, 7, 1], [2, 2, 1, 0, 9, -1], [0, 0, 1, 5, 7, 2], last)
    assert_inverse(implementation, double(4, 3), net)


@each_kernel
@each_tail
def test_one_step_with_several_groups_of_units(implementation, tail):
    net = network("two_hidden", 2, 37, 5, dtype=torch.float64, tail=tail)
    assert_inverse(implementation, double(5, 2), net)


@needs_triton
@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(-3, 3), max_size=6), min_size=2, max_size=4))
def test_plan_counts_who_sees_whom(layers):
    from hvae_kernels.ops.autoregressive_network.triton.network import plan

    made = plan([torch.tensor(layer, dtype=torch.int64) for layer in layers])
    ascending = [sorted(range(len(layer)), key=layer.__getitem__) for layer in layers]
    every = [layer[i] for layer, order in zip(layers, ascending, strict=True) for i in order]
    assert made.order.tolist() == [i for order in ascending for i in order]
    assert made.entries == len(every)
    assert made.upto.tolist() == [[sum(m <= degree for m in layer) for degree in every] for layer in layers]
    assert made.below.tolist() == [[sum(m < degree for m in layer) for degree in every] for layer in layers]


@needs_triton
def test_launch_keeps_to_its_limits():
    from hvae_kernels.ops.autoregressive_network.triton.sweep import MANY_PROGRAMS, launch

    for rows, features, widest in ((1, 1, 2), (16, 5, 0), (8192, 784, 4096), (8193, 3, 512), (10**6, 64, 512)):
        made = launch(rows, features, widest)
        assert made.block_rows in (16, 32, 64)
        assert made.programs * made.block_rows >= rows
        assert made.programs <= MANY_PROGRAMS or made.block_rows == 64
        assert made.steps >= 4


BAD = {
    "a weight": lambda a: a[0].__setitem__(0, a[0][0][:, 1:]),
    "a bias": lambda a: a[1].__setitem__(0, a[1][0][1:].contiguous()),
    "an offset": lambda a: a[2].__setitem__(0, a[2][0][1:].contiguous()),
    "a gate": lambda a: a[3].__setitem__(2, a[3][2].float()),
    "degrees": lambda a: a[4].__setitem__(0, a[4][0].int()),
    "a source": lambda a: a[5].__setitem__(4, 0),
    "a residual": lambda a: a[5].__setitem__(4 + 4 * 3 + 1, 0),
    "a skip": lambda a: a[5].__setitem__(4 + 3, 99),
    "a place": lambda a: a[5].__setitem__(0, 1_000),
    "a stride": lambda a: a[5].__setitem__(2, a[5][2] + 1),
}


@each_kernel
@each_tail
@pytest.mark.parametrize("what", list(BAD))
def test_bad_input(what, implementation, tail):
    """The kernels refuse what does not fit: nothing before them looks at a network."""
    net = network("gated", 3, 7, 4, dtype=torch.float64, tail=tail)
    counts, (program, *rest), tensors = flattened(net)
    remaining = iter(tensors)
    arguments = [*([next(remaining) for _ in range(count)] for count in counts), list(program)]
    y = double(4, 3)
    with hk.use_impl(implementation):
        autoregressive_inverse(y, net)  # loads the extension
    raw = network_autograd.RAW_INVERSE[implementation]
    raw(y, *arguments, *rest)
    BAD[what](arguments)
    with pytest.raises(RuntimeError, match="shapes or dtypes do not fit"):
        raw(y, *arguments, *rest)
    call = (y[:, :1], None, y)
    if implementation == "cpp":
        raw, call = network_autograd.RAW_BACKWARD["cpp"], (*call, y.new_empty(0), True, True, True)
    else:
        raw = network_autograd.RAW_SOLVE[implementation]
    with pytest.raises(RuntimeError, match="do not fit"):
        raw(*call, *arguments, *rest)


@each_kernel
def test_without_a_cotangent_an_overflowing_scale_is_not_met(implementation):
    flow = hk.nn.InverseAutoregressiveFlow(2, [4], gate="affine", dtype=torch.float32)
    bias = flow.made.layers[-1].bias
    with torch.no_grad():
        bias[2:] = 100
    with hk.use_impl(implementation):
        _, log_abs_det = flow(torch.randn(3, 2, dtype=torch.float32))
    assert torch.autograd.grad(log_abs_det.sum(), bias)[0].tolist() == [0.0, 0.0, 3.0, 3.0]
