"""Properties of a masked linear layer that no implementation can fake, and the errors for bad input."""

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.masked_linear import degrees, masked_inputs
from torch.profiler import ProfilerActivity, profile

import hvae_kernels as hk
from hvae_kernels import testing
from hvae_kernels.ops.masked_linear import reference

F = hk.functional
#: Where there is a GPU, Triton compiles for it and has no business with these CPU tensors.
INTERPRETED = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ()
KERNELS = ("cpp", *INTERPRETED)
IMPLEMENTATIONS = ("reference", *KERNELS)
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
each_kernel = pytest.mark.parametrize("implementation", KERNELS)
each_strictness = pytest.mark.parametrize("strict", [False, True])


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


def layer(rows=6, n_in=37, n_out=35, pattern="shuffled", dtype=torch.float64):
    """Inputs that need gradients, and degrees."""
    tensors = masked_inputs(dtype, "cpu", shape=(rows, n_in), out=n_out)
    return [x.requires_grad_() for x in tensors], degrees(pattern, n_in, n_out, "cpu")


def connections(in_degrees, out_degrees, strict):
    """The mask, entry by entry in plain Python."""
    ins, outs = in_degrees.tolist(), out_degrees.tolist()
    return torch.tensor([[o > i if strict else o >= i for i in ins] for o in outs]).view(len(outs), len(ins))


def derivatives(function, tensors, seed):
    """Value, gradients, and the gradients of a function of the gradients."""
    y = function(*tensors)
    first = torch.autograd.grad(y, tensors, seed, create_graph=True)
    second = torch.autograd.grad(sum(g.sin().sum() for g in first), tensors, materialize_grads=True)
    return y, *first, *second


# ---- Properties ----


@each_implementation
@given(
    rows=st.integers(0, 5),
    lead=st.sampled_from([(), (2,)]),
    in_degrees=st.lists(st.integers(-3, 3), max_size=40),
    out_degrees=st.lists(st.integers(-3, 3), max_size=40),
    strict=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_and_degrees(implementation, rows, lead, in_degrees, out_degrees, strict, bias, seed):
    """Against a product with a mask that is made entry by entry."""
    torch.manual_seed(seed)
    x, weight, *rest = masked_inputs(
        torch.float64, "cpu", shape=(*lead, rows, len(in_degrees)), out=len(out_degrees), bias=bias
    )
    bias = rest[0] if rest else None
    mask = connections(torch.tensor(in_degrees), torch.tensor(out_degrees), strict)
    with hk.use_impl(implementation):
        y = F.masked_linear(x, weight, bias, in_degrees, out_degrees, strict=strict)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight * mask, bias))


@each_implementation
def test_all_connected_is_a_linear_layer(implementation):
    tensors, _ = layer()
    seed = double(6, 35)
    everything = [7] * 37, [7] * 35
    with hk.use_impl(implementation):
        results = derivatives(lambda *t: F.masked_linear(*t, *everything), tensors, seed)
    torch.testing.assert_close(results, derivatives(torch.nn.functional.linear, tensors, seed))


@each_implementation
def test_nothing_connected_leaves_the_bias(implementation):
    tensors, _ = layer()
    everything = [7] * 37, [7] * 35
    with hk.use_impl(implementation):
        y = F.masked_linear(*tensors, *everything, strict=True)
        gradients = torch.autograd.grad(y.sum(), tensors)
    torch.testing.assert_close(y, tensors[2].expand(6, -1), rtol=0, atol=0)
    for gradient, exact in zip(gradients, (0.0, 0.0, 6.0), strict=True):
        assert bool((gradient == exact).all())


@each_implementation
@each_strictness
@pytest.mark.parametrize("pattern", ["cyclic", "sorted", "shuffled", "dead_rows", "limits"])
def test_jacobian_has_the_zeros_of_the_mask(implementation, strict, pattern):
    (x, weight, bias), ins_outs = layer(rows=1, pattern=pattern)
    mask = connections(*ins_outs, strict)
    with hk.use_impl(implementation):
        jacobian = torch.func.jacrev(lambda row: F.masked_linear(row, weight, bias, *ins_outs, strict=strict))(x[0])
    torch.testing.assert_close(jacobian, torch.where(mask, weight, 0.0), rtol=0, atol=0)


@each_implementation
@each_strictness
def test_weight_gradient_is_exactly_zero_where_masked(implementation, strict):
    tensors, ins_outs = layer()
    mask = connections(*ins_outs, strict)
    with hk.use_impl(implementation):
        y = F.masked_linear(*tensors, *ins_outs, strict=strict)
        (gradient,) = torch.autograd.grad(y.square().sum(), tensors[1])
    assert torch.equal(gradient != 0, mask)


@each_implementation
@each_strictness
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_masked_weights_do_not_matter(implementation, strict, garbage):
    """Bitwise: values, gradients, second derivatives, forward mode."""
    tensors, ins_outs = layer()
    x, weight, bias = tensors
    mask = connections(*ins_outs, strict)
    spoiled = torch.where(mask, weight, garbage).detach().requires_grad_()
    seed, direction = double(6, 35), double(6, 37)

    def function(*tensors):
        return F.masked_linear(*tensors, *ins_outs, strict=strict)

    def run(*tensors):
        tangent = torch.func.jvp(lambda x: function(x, *tensors[1:]), (tensors[0],), (direction,))
        return *derivatives(function, tensors, seed), *tangent

    with hk.use_impl(implementation):
        expected, results = run(x, weight, bias), run(x, spoiled, bias)
    for result, exact in zip(results, expected, strict=True):
        assert torch.equal(result, exact)


@each_implementation
def test_stacked_layers_are_autoregressive(implementation):
    """A MADE of sorted and of cyclic hidden degrees: output d depends on inputs before d alone, and on all of these."""
    features, hidden = 6, 40
    order = torch.arange(1, features + 1)
    for inner in (torch.arange(hidden) * (features - 1) // hidden + 1, torch.arange(hidden) % (features - 1) + 1):
        first, second = double(hidden, features), double(features, hidden)

        def network(x, first=first, second=second, inner=inner):
            activations = F.masked_linear(x, first, None, order, inner)
            return F.masked_linear(activations, second, None, inner, order, strict=True)

        with hk.use_impl(implementation):
            jacobian = torch.func.jacrev(network)(double(features))
        assert torch.equal(jacobian != 0, torch.ones(features, features).tril(-1).bool())


@each_implementation
def test_derivatives_of_every_argument(implementation):
    """The Hessian of a function of the weight, and per-sample gradients, against plain PyTorch."""
    (x, weight, bias), ins_outs = layer(rows=3, n_in=4, n_out=3)
    mask = connections(*ins_outs, False)

    def plain(x, weight, bias):
        return torch.nn.functional.linear(x, weight * mask, bias)

    def fused(x, weight, bias):
        return F.masked_linear(x, weight, bias, *ins_outs)

    def results(function):
        def energy(weight, x=x, bias=bias):
            return function(x, weight, bias).sin().sum()

        hessian, reverse = torch.func.hessian(energy)(weight), torch.func.jacrev(torch.func.jacrev(energy))(weight)
        per_sample = torch.func.vmap(torch.func.grad(energy, argnums=(0, 1, 2)), (None, 0, None))(weight, x, bias)
        ensemble = torch.func.vmap(function, (None, 0, 0))(x, torch.stack([weight, -weight]), torch.stack([bias, bias]))
        biases = torch.func.vmap(function, (None, None, 0))(x, weight, torch.stack([bias, -bias]))
        both = torch.func.vmap(function, (0, None, 0))(x, weight, torch.stack([bias, -bias, 2 * bias]))
        return hessian, reverse, *per_sample, ensemble, biases, both

    with hk.use_impl(implementation):
        ours = results(fused)
    torch.testing.assert_close(ours, results(plain))


@each_implementation
def test_degrees_of_any_kind(implementation):
    """Lists, tuples, every integer type, strided tensors, and a batch of degrees under ``vmap``."""
    (x, weight, bias), (ins, outs) = layer(n_in=5, n_out=4, pattern="cyclic")
    expected = reference.masked_linear(x, weight, bias, ins, outs)
    with hk.use_impl(implementation):
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
            torch.testing.assert_close(F.masked_linear(x, weight, bias, ins.to(dtype), outs.to(dtype)), expected)
        torch.testing.assert_close(F.masked_linear(x, weight, bias, ins.tolist(), tuple(outs.tolist())), expected)
        strided = torch.stack([ins, -ins], -1)[:, 0]
        torch.testing.assert_close(F.masked_linear(x, weight, bias, strided, outs), expected)
        function = torch.func.vmap(lambda outs: F.masked_linear(x, weight, bias, ins, outs))
        pair = function(torch.stack([outs, outs - 9]))
    torch.testing.assert_close(pair, torch.stack([expected, bias.expand_as(expected)]))


# ---- Memory ----


def test_nothing_saved_beyond_inputs():
    tensors, ins_outs = layer(rows=64, dtype=torch.float32)
    assert testing.saved_bytes(lambda: F.masked_linear(*tensors, *ins_outs), (*tensors, *ins_outs)) == 0
    assert testing.saved_bytes(lambda: reference.masked_linear(*tensors, *ins_outs), (*tensors, *ins_outs)) >= 37 * 35


@each_kernel
@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_only_what_the_backward_pass_needs_is_saved(implementation, wanted):
    """The weight for the input's gradient, the input for the weight's, neither for the bias's."""
    tensors, ins_outs = layer(rows=64)
    tensors = dict(zip(("x", "weight", "bias"), (x.detach() for x in tensors), strict=True))
    tensors[wanted].requires_grad_()
    needed = {"x": "weight", "weight": "x"}.get(wanted)
    with hk.use_impl(implementation):
        saved = testing.saved_bytes(lambda: F.masked_linear(*tensors.values(), *ins_outs), ins_outs)
    assert saved == (tensors[needed].nbytes if needed else 0)


def allocated(function):
    """Bytes of each allocation that torch makes while ``function`` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    del result
    events = recorded.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


@each_implementation
def test_the_mask_is_never_materialised(implementation):
    """Forward and backward allocate their results and nothing of the weight's size, as the plain formula does."""
    (x, weight, bias), ins_outs = layer(rows=2, n_in=128, n_out=128, pattern="sorted", dtype=torch.float32)
    seed = torch.ones(2, 128)
    entries = weight.numel()  # a mask of bytes
    with hk.use_impl(implementation):
        F.masked_linear(x, weight, bias, *ins_outs)  # whatever happens once
        forward = allocated(lambda: F.masked_linear(x, weight, bias, *ins_outs))
        y = F.masked_linear(x, weight, bias, *ins_outs)
        backward = allocated(lambda: torch.autograd.grad(y, (x, weight, bias), seed))
    large = [size for size in forward if size >= entries], [size for size in backward if size >= entries]
    if implementation == "reference":
        assert large[0], "this test sees no allocations"
    else:
        assert large == ([], [4 * entries]), "the weight's gradient alone has its size"


# ---- Tiles ----


@each_kernel
def test_blocks_without_connections_are_not_computed(implementation):
    """Shown by the NaN that arithmetic would have carried over from inputs and cotangents without a connection."""
    degree = torch.arange(256) // 128
    x, grad, weight = double(3, 256), double(3, 256), double(256, 256)
    x[:, 128:], grad[:, :128] = math.nan, math.nan
    with hk.use_impl(implementation):
        y, pullback = torch.func.vjp(lambda x: F.masked_linear(x, weight, None, degree, degree), x)
        (grad_x,) = pullback(grad)
    torch.testing.assert_close(y[:, :128], x[:, :128] @ weight[:128, :128].T)
    torch.testing.assert_close(grad_x[:, 128:], grad[:, 128:] @ weight[128:, 128:])


@each_kernel
def test_blocks_without_connections_between_others_are_not_computed(implementation):
    """As in the last layer of a network with two parameters a feature, whose degrees rise twice."""
    ins, outs = torch.arange(256) // 128, torch.arange(512) // 128 % 2
    grad, weight = double(3, 512), double(512, 256)
    grad[:, :128], grad[:, 256:384] = math.nan, math.nan
    with hk.use_impl(implementation):
        _, pullback = torch.func.vjp(lambda x: F.masked_linear(x, weight, None, ins, outs), double(3, 256))
        (grad_x,) = pullback(grad)
    late = outs == 1
    torch.testing.assert_close(grad_x[:, 128:], grad[:, late] @ weight[late, 128:])


@each_strictness
@pytest.mark.parametrize("side", [16, 32, 64, 128])
def test_every_tile_size(monkeypatch, side, strict):
    """Large tiles take many programs to be chosen: here they are forced."""
    from hvae_kernels.ops.masked_linear import triton

    device = "cpu" if INTERPRETED else "cuda"

    def launch(rows, columns, half):
        return triton.Launch(side, side, 16, (-(-rows // side), -(-columns // side)))

    monkeypatch.setattr(triton, "launch", launch)
    tensors = [x.requires_grad_() for x in masked_inputs(torch.float64, device, shape=(67, 65), out=129)]
    ins_outs, seed = degrees("sorted", 65, 129, device), double(67, 129).to(device)
    with hk.use_impl("triton"):
        results = derivatives(lambda *t: F.masked_linear(*t, *ins_outs, strict=strict), tensors, seed)
    expected = derivatives(lambda *t: reference.masked_linear(*t, *ins_outs, strict=strict), tensors, seed)
    torch.testing.assert_close(results, expected)


@given(rows=st.integers(1, 10**6), columns=st.integers(1, 10**5), half=st.booleans())
def test_tiles_cover_the_result(rows, columns, half):
    from hvae_kernels.ops.masked_linear import triton

    plan = triton.launch(rows, columns, half)
    for size, block, programs in zip((rows, columns), (plan.block_rows, plan.block_columns), plan.grid, strict=True):
        assert block in ((16, 32, 64, 128) if half else (16, 32, 64))
        assert (programs - 1) * block < size <= programs * block


# ---- Bad input ----


def good():
    (x, weight, bias), (in_degrees, out_degrees) = layer(4, 3, 5, "cyclic", torch.float32)
    return {"x": x, "weight": weight, "bias": bias, "in_degrees": in_degrees, "out_degrees": out_degrees}


@each_implementation
@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("x", torch.tensor(1.0), ValueError, r"x must be of shape \(\.\.\., in\), got a torch.float32 tensor of shape"),
        ("x", torch.ones(4, 3, dtype=torch.int64), TypeError, "x must be a float32 or float64 tensor"),
        ("x", [1.0], TypeError, "x must be a tensor, got list"),
        ("x", torch.ones(4, 2), ValueError, r"weight must be of shape \(out, in\) with in = 2, got"),
        ("weight", torch.ones(5, 4), ValueError, r"weight must be of shape \(out, in\) with in = 3, got"),
        ("weight", torch.ones(3), ValueError, r"weight must be of shape \(out, in\)"),
        ("weight", torch.ones(5, 3, dtype=torch.float64), TypeError, "weight must have the dtype of x, torch.float32"),
        ("weight", torch.ones(5, 3, device="meta"), ValueError, "weight must be on the device of x, cpu"),
        ("weight", None, TypeError, "weight must be a tensor, got NoneType"),
        ("bias", torch.ones(3), ValueError, r"bias must be of shape \(5,\) or None"),
        ("bias", torch.ones(1, 5), ValueError, r"bias must be of shape \(5,\) or None"),
        ("bias", 0.0, TypeError, "bias must be a tensor, got float 0.0"),
        ("bias", torch.ones(5, dtype=torch.float16), TypeError, "bias must have the dtype of x"),
        ("in_degrees", torch.arange(5), ValueError, r"in_degrees must be of shape \(3,\)"),
        ("in_degrees", torch.arange(3)[None], ValueError, r"in_degrees must be of shape \(3,\)"),
        ("in_degrees", torch.ones(3), TypeError, "in_degrees must be an integer tensor, got a torch.float32 tensor"),
        (
            "in_degrees",
            torch.ones(3).bool(),
            TypeError,
            "in_degrees must be an integer tensor, got a torch.bool tensor",
        ),
        ("in_degrees", [1, 2, 2**70], ValueError, r"in_degrees must be of integers below 2\^63"),
        ("in_degrees", [1, 2], ValueError, r"in_degrees must be of shape \(3,\)"),
        ("in_degrees", [1, 2, 3.0], TypeError, "in_degrees must be an integer tensor or a list or tuple of integers"),
        (
            "in_degrees",
            None,
            TypeError,
            "in_degrees must be an integer tensor or a list or tuple of integers, got None",
        ),
        ("out_degrees", torch.arange(3), ValueError, r"out_degrees must be of shape \(5,\)"),
        ("out_degrees", torch.ones(5, dtype=torch.float64), TypeError, "out_degrees must be an integer tensor"),
        ("out_degrees", torch.arange(5, device="meta"), ValueError, "out_degrees must be on the device of x, cpu"),
        ("out_degrees", "12345", TypeError, "out_degrees must be an integer tensor or a list"),
    ],
)
def test_bad_input(implementation, argument, value, error, message):
    with hk.use_impl(implementation), pytest.raises(error, match=message) as caught:
        F.masked_linear(**{**good(), argument: value})
    assert str(caught.value).startswith("masked_linear: ")
