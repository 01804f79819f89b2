"""Properties of Gaussian mixtures that no implementation can fake, hard cases, and errors for bad input."""

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.gaussian_mixture import mixture_inputs
from torch.distributions import Independent, Normal

import hvae_kernels as hk
from hvae_kernels import testing
from hvae_kernels.ops.gaussian_mixture import reference

F = hk.functional
#: Where there is a GPU, Triton compiles for it and has no business with these CPU tensors.
INTERPRETED = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ()
each_implementation = pytest.mark.parametrize("implementation", ["reference", "cpp", *INTERPRETED])
each_kernel = pytest.mark.parametrize("implementation", ["cpp", *INTERPRETED])


def mixture(*shape, dtype=torch.float64, **options):
    return mixture_inputs(dtype, "cpu", shape=shape, **options)


def close(results, expected):
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-9)


def derivatives(function, inputs):
    """The value, first and second derivatives, all results and gradients weighed differently."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = function(*inputs)
    gradients = torch.autograd.grad(output, inputs, _different(output), create_graph=True)
    pairing = sum((g * _different(g)).sum() for g in gradients)
    second = torch.autograd.grad(pairing, inputs, materialize_grads=True)
    return [x.detach() for x in (output, *gradients, *second)]


def _different(like):
    return torch.arange(1, 1 + like.numel(), dtype=like.dtype).reshape(like.shape).cos()


@each_implementation
def test_one_component_is_the_normal_density(implementation):
    value, logits, loc, log_scale = mixture(9, 5, components=1)
    with hk.use_impl(implementation):
        result = derivatives(F.gaussian_mixture_log_prob, (value, logits, loc, log_scale))
        assert torch.equal(
            F.gaussian_mixture_responsibilities(value, logits, loc, log_scale), torch.ones(9, 1).double()
        )
    normal = lambda x, a, m, s: Independent(Normal(m[0], s[0].exp()), 1).log_prob(x) + 0 * a  # noqa: E731
    close(result, derivatives(normal, (value, logits, loc, log_scale)))


@each_implementation
def test_equal_components_are_one(implementation):
    value, logits, loc, log_scale = mixture(9, 5, components=1)
    many = torch.randn(7).double(), loc.expand(7, 5), log_scale.expand(7, 5)
    with hk.use_impl(implementation):
        close(F.gaussian_mixture_log_prob(value, *many), F.gaussian_mixture_log_prob(value, logits, loc, log_scale))
        close(F.gaussian_mixture_responsibilities(value, *many), many[0].softmax(0).expand(9, 7))


@each_implementation
def test_it_is_a_density(implementation):
    """It integrates to 1 on a grid that holds all its mass."""
    _, *parameters = mixture(1, 2, components=5)
    line = torch.linspace(-12, 12, 400, dtype=torch.float64)
    with hk.use_impl(implementation):
        log_prob = F.gaussian_mixture_log_prob(torch.cartesian_prod(line, line), *parameters)
    close(log_prob.exp().sum() * (line[1] - line[0]) ** 2, torch.tensor(1.0, dtype=torch.float64))


@each_implementation
def test_responsibilities_are_the_gradient_of_log_prob_in_the_logits(implementation):
    """``d log p / d a = r - softmax(a)``."""
    value, logits, loc, log_scale = mixture(1, 5, components=37)
    logits.requires_grad_()
    with hk.use_impl(implementation):
        (gradient,) = torch.autograd.grad(F.gaussian_mixture_log_prob(value, logits, loc, log_scale).sum(), logits)
        responsibilities = F.gaussian_mixture_responsibilities(value, logits, loc, log_scale)
    close(gradient, (responsibilities[0] - logits.softmax(0)).detach())
    close(responsibilities.sum(-1), torch.ones(1, dtype=torch.float64))


@each_implementation
@pytest.mark.parametrize("density", ["gaussian_mixture_log_prob", "gaussian_mixture_responsibilities"])
def test_logits_of_minus_infinity_remove_components(implementation, density):
    value, logits, loc, log_scale = mixture(9, 5, components=20)
    logits[3:] = -math.inf
    function = getattr(F, density)
    with hk.use_impl(implementation):
        result = derivatives(function, (value, logits, loc, log_scale))
        few = function(value, logits[:3], loc[:3], log_scale[:3])
        output = function(value, logits, loc, log_scale)
    close(output if output.dim() == 1 else output[:, :3], few)
    assert all(torch.isfinite(x).all() for x in result)


HARD = {
    "narrow": {"scale": 1e-3},
    "far": {"spread": 1e3},
    "narrow_and_far": {"scale": 1e-3, "spread": 1e3},
    "one": {"components": 1},
    "many": {"components": 133},
    "very_narrow": {"scale": 1e-18, "spread": 1e-18},
}


@each_kernel
@pytest.mark.parametrize("case", HARD)
def test_hard_cases(implementation, case):
    """float32 values, first and second derivatives against float64, no worse than twice the formula's error."""

    def op(*inputs):
        with hk.use_impl(implementation):
            return derivatives(F.gaussian_mixture_log_prob, inputs)

    def formula(*inputs):
        return derivatives(reference.gaussian_mixture_log_prob, inputs)

    testing.assert_as_exact(op, formula, lambda: mixture(13, 7, dtype=torch.float32, **HARD[case]))


@each_kernel
def test_a_component_that_is_nearly_alone_keeps_its_small_gradient(implementation):
    """Responsibilities of ``1 - 4e-9``: cotangents less their mean, a difference of float32 numbers, have no digits."""
    inputs = [x.float() for x in mixture(3, 5, components=3)]
    inputs[2:] = (torch.zeros(3, 5) for _ in range(2))
    inputs[1] = torch.tensor([20.0, 0.0, 0.5])
    gradients = []
    for dtype, chosen in ((torch.float32, implementation), (torch.float64, "reference")):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        with hk.use_impl(chosen):
            output = F.gaussian_mixture_responsibilities(*leaves)
            gradients.append(torch.autograd.grad(output, leaves[2], _different(output))[0])
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-4, atol=0)


@each_kernel
def test_rows_that_fill_a_tile_count_for_nothing(implementation):
    """Infinitely far from all components, a row of zeros would have NaN for its gradient."""
    value = torch.full((3, 2), 1e25, requires_grad=True)
    loc = torch.full((2, 2), 1e25, requires_grad=True)
    with hk.use_impl(implementation):
        log_prob = F.gaussian_mixture_log_prob(value, torch.zeros(2), loc, torch.zeros(2, 2))
        gradients = torch.autograd.grad(log_prob.sum(), (value, loc))
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@pytest.mark.parametrize("implementation", INTERPRETED)
def test_blocks_of_rows_add_up(implementation, monkeypatch):
    from hvae_kernels.ops.gaussian_mixture import triton

    monkeypatch.setattr(triton, "_WEIGHTS", 1)
    inputs = mixture(2 * triton._ROWS + 5, 3, components=3)
    expected = derivatives(reference.gaussian_mixture_log_prob, inputs)
    with hk.use_impl(implementation):
        close(derivatives(F.gaussian_mixture_log_prob, inputs), expected)


@pytest.mark.parametrize("implementation", INTERPRETED)
def test_programs_share_the_rows_of_few_parameters(implementation, monkeypatch):
    """With several runs of tiles each."""
    from hvae_kernels.ops.gaussian_mixture import triton

    monkeypatch.setattr(triton, "_ROWS", 2)
    monkeypatch.setattr(triton, "_PROGRAMS", 4)
    inputs = mixture(150, 3, components=2)
    assert triton._parts(2, 3, 150) == 2
    expected = derivatives(reference.gaussian_mixture_log_prob, inputs)
    with hk.use_impl(implementation):
        close(derivatives(F.gaussian_mixture_log_prob, inputs), expected)


@each_kernel
def test_a_distant_origin_costs_nothing(implementation):
    """Distances are differences: what all values and locations share is gone before anything is squared."""
    value, logits, loc, log_scale = (x.float() for x in mixture(33, 8, components=20))
    value, loc = (x * 2**10 for x in (value, loc))
    value, loc = value.round() / 2**10, loc.round() / 2**10  # so that the shift is exact
    with hk.use_impl(implementation):
        near = F.gaussian_mixture_log_prob(value, logits, loc, log_scale)
        assert torch.equal(F.gaussian_mixture_log_prob(value + 4096, logits, loc + 4096, log_scale), near)


@each_kernel
def test_a_common_scale_costs_nothing(implementation):
    """The normaliser that all components share would take digits from densities, and so from responsibilities."""
    errors = []
    for scale in (1.0, 2.0**-40):
        torch.manual_seed(0)
        inputs = mixture(33, 257, dtype=torch.float32, scale=scale, spread=scale)
        with hk.use_impl(implementation):
            result = F.gaussian_mixture_responsibilities(*inputs)
        oracle = reference.gaussian_mixture_responsibilities(*(x.double() for x in inputs))
        errors.append(testing.relative_error(result, oracle))
    assert errors[1] <= 2 * errors[0]


@each_kernel
@given(
    rows=st.integers(0, 40),
    features=st.integers(0, 9),
    components=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_any_shape_matches_reference(implementation, rows, features, components, seed):
    torch.manual_seed(seed)
    value, loc = torch.randn(rows, features).double(), torch.randn(components, features).double()
    inputs = [value, torch.randn(components).double(), loc, 0.3 * torch.randn(components, features).double()]
    with hk.use_impl(implementation):
        for name in ("gaussian_mixture_log_prob", "gaussian_mixture_responsibilities"):
            close(getattr(F, name)(*inputs), getattr(reference, name)(*inputs))


@each_implementation
def test_infinitely_far_is_minus_infinity(implementation):
    value, *parameters = mixture(20, 5, dtype=torch.float32)
    value[3] = 1e30
    value[4] = math.nan
    with hk.use_impl(implementation):
        log_prob = F.gaussian_mixture_log_prob(value, *parameters)
    assert log_prob[3].item() == -math.inf
    assert torch.isnan(log_prob).nonzero().tolist() == [[4]]


def test_saves_its_inputs_alone():
    arguments = [x.requires_grad_() for x in mixture(64, 8, components=50)]
    with hk.use_impl("cpp"):
        saved = testing.saved_bytes(lambda: F.gaussian_mixture_log_prob(*arguments), arguments)
    assert saved == 50 * 8  # the weights, normalised


@each_implementation
@pytest.mark.parametrize("name", ["gaussian_mixture_log_prob", "gaussian_mixture_responsibilities"])
@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("value", torch.tensor(1.0), ValueError, r"value must be of shape \(\.\.\., d\), got a torch.float32"),
        ("value", torch.ones(4, 5, dtype=torch.int64), TypeError, "value must be a float32 or float64 tensor"),
        ("mixture_logits", torch.ones(3, 1), ValueError, r"mixture_logits must be of shape \(C,\) with C at least 1"),
        ("mixture_logits", torch.ones(0), ValueError, r"mixture_logits must be of shape \(C,\) with C at least 1"),
        ("loc", torch.ones(3, 4), ValueError, r"loc must be of shape \(4, 5\), got .* of shape \(3, 4\)"),
        ("log_scale", torch.ones(5), ValueError, r"log_scale must be of shape \(4, 5\)"),
        ("log_scale", torch.ones(4, 5, dtype=torch.float64), TypeError, "log_scale must have the dtype of value"),
        ("loc", [1.0], TypeError, "loc must be a tensor"),
    ],
)
def test_bad_input(implementation, name, argument, value, error, message):
    names = ("value", "mixture_logits", "loc", "log_scale")
    arguments = dict(zip(names, mixture(6, 5, dtype=torch.float32), strict=True)) | {argument: value}
    with hk.use_impl(implementation), pytest.raises(error, match=f"{name}: {message}"):
        getattr(F, name)(*arguments.values())


@each_kernel
def test_responsibilities_without_features_are_the_logits(implementation):
    logits = torch.tensor([0.0, 1.0], requires_grad=True)
    with hk.use_impl(implementation):
        share = F.gaussian_mixture_responsibilities(torch.zeros(3, 0), logits, torch.zeros(2, 0), torch.zeros(2, 0))
    (found,) = torch.autograd.grad(share[:, 0].sum(), logits)
    (expected,) = torch.autograd.grad(3 * logits.softmax(0)[0], logits)
    torch.testing.assert_close(found, expected)


@each_kernel
def test_a_collapsed_component_takes_no_digits_from_the_others(implementation):
    """Its density without exponent is so large that all others would be rounded to its digits."""
    errors = {}
    for log_scale in (0.0, -80.0):
        inputs = list(mixture(16, 784, components=16, dtype=torch.float32))
        inputs[3] = torch.zeros_like(inputs[3])
        inputs[3][0] = log_scale
        oracle = reference.gaussian_mixture_log_prob(*(x.double() for x in inputs))
        with hk.use_impl(implementation):
            errors[log_scale] = testing.relative_error(F.gaussian_mixture_log_prob(*inputs), oracle)
    assert errors[-80.0] <= 2 * errors[0.0]


@each_kernel
@pytest.mark.parametrize("switched_off", [-1e4, -1e9, -math.inf])
def test_components_that_are_switched_off_change_nothing(implementation, switched_off):
    """However many they are, and however it is done."""
    value, logits, loc, log_scale = mixture(16, 4, components=16, dtype=torch.float32)
    on = [3, 5]
    masked = torch.full_like(logits, switched_off)
    masked[on] = logits[on]
    with hk.use_impl(implementation):
        few = F.gaussian_mixture_log_prob(value, logits[on], loc[on], log_scale[on])
        torch.testing.assert_close(
            F.gaussian_mixture_log_prob(value, masked, loc, log_scale), few, rtol=1e-6, atol=1e-6
        )
