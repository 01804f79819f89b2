"""The GPU's one-launch forward direction of small networks: values, masks, its limits, and what it allocates."""

import dataclasses
import os

import pytest
import torch
from networks import network
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hvae_kernels as hk
from hvae_kernels import testing
from hvae_kernels.ops.affine_autoregressive.gates import PARAMETERS
from hvae_kernels.ops.autoregressive_network import ACTIVATIONS, autoregressive_forward, reference
from hvae_kernels.ops.autoregressive_network import autograd as network_autograd
from hvae_kernels.ops.autoregressive_network.network import fits_whole, flattened

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles for the GPU here")
RAW = network_autograd.RAW_FORWARD["triton"]


def raw_arguments(net):
    counts, (program, *rest), tensors = flattened(net)
    remaining = iter(tensors)
    return [*([next(remaining) for _ in range(count)] for count in counts), list(program), *rest]


def fits(net):
    _, _, _, gates, degrees, program, *_ = raw_arguments(net)
    return fits_whole(gates, degrees, program)


def assert_values(x, net, exact=None):
    """The raw kernel at x, which for float64 may differ by another order of summation; else as exact at any x."""
    exact = net if exact is None else exact

    def op(x):
        results = RAW(x, *raw_arguments(net))
        assert all(result.dtype == x.dtype for result in results)
        return results

    def formula(x):
        return reference.autoregressive_forward(x, exact.with_tensors(tuple(t.to(x.dtype) for t in exact.tensors())))

    if x.dtype == torch.float64:
        assert max(map(testing.relative_error, op(x), formula(x))) <= 1e-12
    else:
        testing.assert_as_exact(op, formula, lambda: [torch.randn_like(x)])


@pytest.mark.parametrize("gate", list(PARAMETERS))
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_and_gates(dtype, activation, gate):
    """One of few structures and sizes for each pair, so that all meet."""
    place = list(ACTIVATIONS).index(activation) + list(PARAMETERS).index(gate)
    kind = ("linear", "one_hidden", "two_hidden", "context")[place % 4]
    rows, features, hidden = ((5, 3, 7), (33, 17, 20), (15, 16, 33))[place % 3]
    order = ("natural", "shuffled", "levels")[place % 3]
    net = network(
        kind, features, hidden, rows, activation=activation, gate=gate, order=order, halves=place % 2 == 0, dtype=dtype
    )
    assert_values(torch.randn(rows, features, dtype=dtype), net)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_largest(dtype):
    net = network("two_hidden", 128, 127, 3, dtype=dtype)
    assert fits(net)
    assert_values(torch.randn(3, 128, dtype=dtype), net)


def test_several_tiles_of_either_width():
    from hvae_kernels.ops.autoregressive_network.triton.small import FEWEST_ROWS, MANY_PROGRAMS, launch

    most = MANY_PROGRAMS * FEWEST_ROWS
    assert launch(most).block_rows < launch(most + 1).block_rows
    for rows in (1, FEWEST_ROWS + 1, most + 1):
        x = torch.randn(rows, 2, dtype=torch.float64)
        assert_values(x, network("one_hidden", 2, 3, rows, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["linear", "two_hidden"])
def test_nan_behind_the_mask(kind):
    net = network(kind, 5, 7, 4, dtype=torch.float64, order="shuffled")
    reads = [net.degrees, *(stage.degrees for stage in net.stages)]
    poisoned = tuple(
        dataclasses.replace(
            stage, weight=torch.where(stage.degrees[:, None] >= before, stage.weight, torch.full((), torch.nan))
        )
        for stage, before in zip(net.stages, reads, strict=False)
    )
    assert any(bool(stage.weight.isnan().any()) for stage in poisoned)
    assert_values(torch.randn(4, 5, dtype=torch.float64), dataclasses.replace(net, stages=poisoned), net)


def test_offsets_on_every_stage_without_biases_in_sliced_weights():
    net = network("two_hidden", 3, 5, 4, dtype=torch.float64)
    stages = tuple(
        dataclasses.replace(
            stage,
            weight=torch.randn(stage.weight.shape[0], 9, dtype=torch.float64)[:, 1 : 1 + stage.weight.shape[1]],
            bias=None,
            offset=torch.randn(4, stage.weight.shape[0], dtype=torch.float64),
            activation="tanh",
        )
        for stage in net.stages
    )
    x = torch.randn(3, 4, dtype=torch.float64).mT
    assert_values(x, dataclasses.replace(net, stages=stages))


@pytest.mark.parametrize(("rows", "features", "hidden"), [(0, 3, 4), (3, 0, 4), (3, 2, 0)])
def test_empty(rows, features, hidden):
    net = network("one_hidden", features, hidden, rows, dtype=torch.float64)
    x = torch.randn(rows, features, dtype=torch.float64)
    results = RAW(x, *raw_arguments(net))
    torch.testing.assert_close(results, reference.autoregressive_forward(x, net))


def test_what_fits():
    assert all(fits(network(kind, 3, 4, 2, dtype=torch.float32)) for kind in ("linear", "two_hidden", "context"))
    assert not any(
        fits(network(kind, 3, 4, 2, dtype=torch.float32)) for kind in ("three_hidden", "residual", "skip", "gated")
    )
    assert not fits(network("one_hidden", 129, 4, 2, dtype=torch.float32))
    assert not fits(network("one_hidden", 4, 129, 2, dtype=torch.float32))
    assert fits(network("one_hidden", 128, 128, 2, dtype=torch.float64))


BAD = {
    "a weight": lambda a: a[0].__setitem__(0, a[0][0][:, 1:]),
    "a bias": lambda a: a[1].__setitem__(0, a[1][0][1:].contiguous()),
    "an offset": lambda a: a[2].__setitem__(0, a[2][0][1:].contiguous()),
    "a gate": lambda a: a[3].__setitem__(0, a[2][0]),
    "degrees": lambda a: a[4].__setitem__(0, a[4][0].int()),
    "a source": lambda a: a[5].__setitem__(4 + 4, -1),
    "a skip": lambda a: a[5].__setitem__(4 + 3, 0),
    "a place": lambda a: a[5].__setitem__(0, 1_000),
}


@pytest.mark.parametrize("what", list(BAD))
def test_bad_input(what):
    net = network("context", 3, 3, 4, dtype=torch.float64)
    x, arguments = torch.randn(4, 3, dtype=torch.float64), raw_arguments(net)
    RAW(x, *arguments)
    BAD[what](arguments)
    with pytest.raises(RuntimeError, match="shapes or dtypes do not fit"):
        RAW(x, *arguments)


@pytest.mark.parametrize("kind", ["skip", "gated", "residual", "three_hidden"])
def test_larger_networks_are_refused_and_composed(kind):
    net = network(kind, 3, 4, 4, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="shapes or dtypes do not fit"):
        RAW(x, *raw_arguments(net))
    with hk.use_impl("triton"):
        results = autoregressive_forward(x, net)
    torch.testing.assert_close(results, reference.autoregressive_forward(x, net))


class Calls(TorchDispatchMode):
    """Names of all ops, and shapes of all that they return."""

    def __init__(self):
        super().__init__()
        self.ops, self.shapes = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.ops.append(str(function))
        self.shapes |= {tuple(t.shape) for t in tree_leaves(results) if isinstance(t, torch.Tensor)}
        return results


@pytest.fixture
def launches(monkeypatch):
    """Names of the Triton kernels launched."""
    from triton.runtime.interpreter import InterpretedFunction

    names, getitem = [], InterpretedFunction.__getitem__

    def counted(self, grid):
        names.append(self.fn.__name__)
        return getitem(self, grid)

    monkeypatch.setattr(InterpretedFunction, "__getitem__", counted)
    return names


def test_one_launch_and_nothing_hidden_in_memory(launches):
    net = network("two_hidden", 3, 23, 19, dtype=torch.float64)
    x = torch.randn(19, 3, dtype=torch.float64)
    with hk.use_impl("triton"), Calls() as calls:
        results = autoregressive_forward(x, net)
    assert launches == ["_forward_kernel"]
    assert "hvae_kernels.autoregressive_forward.triton" in calls.ops
    assert not any(19 in shape and max(shape[1:], default=0) > 3 for shape in calls.shapes)
    torch.testing.assert_close(results, reference.autoregressive_forward(x, net))


def test_with_gradients_it_is_composed(launches):
    net = network("one_hidden", 3, 5, 4, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    with hk.use_impl("triton"):
        autoregressive_forward(x, net)
        assert len(launches) > 1
        launches.clear()
        with torch.no_grad():
            autoregressive_forward(x, net)
    assert launches == ["_forward_kernel"]
