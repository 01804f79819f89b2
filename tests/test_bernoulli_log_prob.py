"""``bernoulli_log_prob`` beyond the contract: sure and infinite logits, shared values, what it saves, bad input."""

import math

import pytest
import torch

import hvae_kernels as hk
from hvae_kernels import testing
from hvae_kernels.functional import bernoulli_log_prob
from hvae_kernels.ops.bernoulli_log_prob.api import _broadcast_run

IMPLEMENTATIONS = ("cpp", "triton", "reference")
INF = math.inf


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def implementation(request):
    with hk.use_impl(request.param):
        yield request.param


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (torch.tensor([0, 1, 255], dtype=torch.uint8), "255"),
        (torch.tensor([0.0, 1.0, 254.0]), "254.0"),
        (torch.tensor([0.0, -0.5, 1.0]), "-0.5"),
        (torch.tensor([1.0, 0.0, 1.25]).expand(3, 3), "1.25"),
    ],
)
def test_raw_pixels_are_refused(implementation, value, got):
    """Wherever they stand; a GPU would have to wait for its values."""
    logits = torch.zeros(2, 3, 3)
    for place in range(3):
        spoiled = value.roll(place, -1)
        if implementation == "triton":
            assert bernoulli_log_prob(logits, spoiled).isfinite().all()
            continue
        with pytest.raises(ValueError, match=rf"bernoulli_log_prob: value must be in \[0, 1\].* got {got}"):
            bernoulli_log_prob(logits, spoiled)


@pytest.mark.parametrize("at", [0, 5, 700, 1023])
def test_a_pixel_of_a_long_row_is_refused(implementation, at):
    for dtype in (torch.float32, torch.float64, torch.uint8):
        value = torch.zeros(3, 1024, dtype=dtype)
        value[2, at] = 3
        if implementation != "triton":
            with pytest.raises(ValueError, match="must be in"):
                bernoulli_log_prob(torch.zeros(2, 3, 1024, dtype=torch.float64 if dtype.itemsize > 4 else None), value)


def test_rounding_is_no_error():
    value = torch.tensor([1 + 1e-6, -1e-7, 0.5])
    assert bernoulli_log_prob(torch.zeros(3), value).isfinite()


def test_is_a_distribution():
    """The probabilities of all outcomes of five variables add to 1."""
    logits = 3 * torch.randn(5, dtype=torch.float64)
    outcomes = torch.cartesian_prod(*[torch.tensor([False, True])] * 5)
    log_prob = bernoulli_log_prob(logits.expand(32, 5), outcomes)
    torch.testing.assert_close(log_prob.exp().sum(), torch.ones((), dtype=torch.float64))


def test_symmetry():
    """Swapping outcomes and negating logits changes no bit."""
    logits, value = 20 * torch.randn(7, 33), torch.rand(7, 33) < 0.5
    assert torch.equal(bernoulli_log_prob(logits, value), bernoulli_log_prob(-logits, ~value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sure_logits(dtype):
    """Relative to the result where ``value * logits - softplus(logits)`` has nothing left."""
    logits = torch.tensor([[40.0, 60.0, 80.0], [-40.0, -60.0, -80.0]], dtype=dtype, requires_grad=True)
    value = torch.tensor([[True] * 3, [False] * 3])
    log_prob = bernoulli_log_prob(logits, value)
    rest = torch.exp(-logits.detach().abs())
    torch.testing.assert_close(log_prob, -rest.sum(-1), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
    torch.testing.assert_close(gradient, logits.detach().sign() * rest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limits(dtype):
    """Large and infinite logits for and against the value, and NaN."""
    logits = torch.tensor([1e4, 1e4, -1e4, -1e4, INF, INF, -INF, -INF, math.nan], dtype=dtype, requires_grad=True)
    value = torch.tensor([1, 0, 1, 0, 1, 0, 1, 0, 1], dtype=torch.uint8)
    log_prob = bernoulli_log_prob(logits, value, event_ndims=0)
    expected = torch.tensor([0, -1e4, -1e4, 0, 0, -INF, -INF, 0, math.nan], dtype=dtype)
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=0, equal_nan=True)
    (gradient,) = torch.autograd.grad(log_prob.sum(), logits)
    expected = torch.tensor([0, -1, 1, 0, 0, -1, 1, 0, math.nan], dtype=dtype)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)


def test_products_do_not_overflow():
    """The most factors that a logarithm takes, each as large as it gets."""
    logits = torch.zeros(1, 5000)
    log_prob = bernoulli_log_prob(logits, torch.ones(5000, dtype=torch.bool))
    torch.testing.assert_close(log_prob, torch.tensor([-5000 * math.log(2)]))


@pytest.mark.parametrize("value_shape", [(5,), (4, 5), (3, 1, 5), (1, 4, 5), (2, 1, 1, 5), (2, 1, 4, 5), (2, 3, 1, 5)])
def test_values_are_shared(value_shape):
    """As if expanded, and so are gradients and Hessian-vector products."""
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    value = torch.rand(value_shape, dtype=torch.float64, requires_grad=True)

    def derivatives(value):
        log_prob = bernoulli_log_prob(logits, value)
        first = torch.autograd.grad(log_prob.sin().sum(), (logits, leaf), create_graph=True)
        second = torch.autograd.grad(sum(g.cos().sum() for g in first), (logits, leaf))
        return log_prob, *first, *second

    leaf = value
    shared = derivatives(leaf)
    expanded = derivatives(leaf.expand(2, 3, 4, 5).contiguous())
    torch.testing.assert_close(shared, expanded, rtol=1e-12, atol=1e-12)


def test_samples_with_dimensions_of_one_between_share_their_value():
    """They are one run of dimensions: no copy of the value is made for the last of them."""
    assert _broadcast_run((2, 1, 3, 4), (1, 1, 1, 4)) == (0, 3)
    assert _broadcast_run((2, 3, 4), (2, 1, 1)) == (1, 3)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, 1)])
def test_vmap_of_shared_values(in_dims):
    """``vmap`` over logits, value or both, where the value is shared inside the leading dimensions."""
    logits, value = torch.randn(3, 3, 4, 6, 5, dtype=torch.float64), torch.rand(3, 3, 1, 6, 5, dtype=torch.float64)
    stacked = [x if dim is not None else x[0] for x, dim in zip((logits, value), in_dims, strict=True)]
    gradient = torch.func.grad(lambda *x: bernoulli_log_prob(*x).sin().sum())
    for function in (bernoulli_log_prob, gradient):
        slices = [
            [x if dim is None else x.select(dim, i) for x, dim in zip(stacked, in_dims, strict=True)] for i in range(3)
        ]
        expected = torch.stack([function(*s) for s in slices])
        torch.testing.assert_close(torch.func.vmap(function, in_dims)(*stacked), expected)


def test_saves_its_inputs_alone(implementation):
    logits, value = torch.randn(4, 8, 50, requires_grad=True), torch.rand(8, 50)
    saved = testing.saved_bytes(lambda: bernoulli_log_prob(logits, value), (logits, value))
    assert (saved == 0) == (implementation != "reference")


ONE = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((ONE.int(), ONE), TypeError, "logits must be a float32 or float64 tensor"),
        ((ONE, ONE.double()), TypeError, "value must have the dtype of logits"),
        ((ONE, ONE.long()), TypeError, "value must have the dtype of logits"),
        ((ONE, 1.0), TypeError, "value must be a tensor"),
        ((ONE, ONE.bool().to("meta")), ValueError, "value must be on the device of logits"),
        ((ONE, ONE.bool().to_sparse()), TypeError, "value must be a dense tensor"),
        ((ONE, ONE, 1.0), TypeError, "event_ndims must be an integer"),
        ((ONE, ONE, 3), ValueError, "event_ndims must be between 0 and logits' 2 dimensions"),
        ((ONE, ONE, -1), ValueError, "event_ndims must be between 0"),
        ((ONE, ONE[:, :1]), ValueError, r"value must be .* to logits' \(2, 3\) and ends in \(3,\)"),
        ((ONE, ONE[:1], 2), ValueError, r"ends in \(2, 3\)"),
        ((ONE, ONE[0], 2), ValueError, r"ends in \(2, 3\)"),
        ((ONE, torch.ones(5, 2, 3)), ValueError, "value must be of a shape that broadcasts"),
        ((ONE, torch.ones(4, 3)), ValueError, "value must be of a shape that broadcasts"),
    ],
)  # fmt: skip
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        bernoulli_log_prob(*arguments)


@pytest.mark.parametrize("implementation", ["reference", "cpp"])
def test_a_single_pixel_without_dimensions(implementation):
    logit = torch.tensor(0.3, dtype=torch.float64)
    found = bernoulli_log_prob(logit, torch.tensor(True), 0, implementation=implementation)
    torch.testing.assert_close(found, torch.nn.functional.logsigmoid(logit))
