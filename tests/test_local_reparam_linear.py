"""What makes local reparameterisation right, whatever computes it; its module; errors for bad input."""

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.local_reparam_linear import local_reparam_inputs

import hvae_kernels as hk
from hvae_kernels import testing
from hvae_kernels.ops.local_reparam_linear import reference

F = hk.functional
linear = torch.nn.functional.linear
#: Where there is a GPU, Triton compiles for it and has no business with these CPU tensors.
INTERPRETED = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ()
each_implementation = pytest.mark.parametrize("implementation", ["reference", "cpp", *INTERPRETED])
NAMES = ("x", "weight_loc", "weight_log_scale", "bias_loc", "bias_log_scale", "noise")
#: Standard errors that a mean of many draws may be off: 1 in 15,000 for one number; the seed is fixed.
SIGMAS = 4.0


def layer(rows=6, inputs=5, outputs=3, dtype=torch.float64, **options):
    x, loc, log_scale, noise, *biases = local_reparam_inputs(dtype, "cpu", shape=(rows, inputs), out=outputs, **options)
    return dict(zip(NAMES, (x, loc, log_scale, *biases, noise), strict=True))


def close(results, expected):
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-9)


def assert_mean(samples, expected):
    """The mean of ``samples`` over the first dimension is ``expected`` to within what its own spread allows."""
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - expected).abs() <= SIGMAS * error).all()


def weight_samples(arguments, n):
    """``n`` draws of the activations by sampling the weights, as every row of ``x`` shares them."""
    shape, bias_shape = arguments["weight_loc"].shape, arguments["bias_loc"].shape
    weights = arguments["weight_loc"] + arguments["weight_log_scale"].exp() * torch.randn(n, *shape).double()
    biases = arguments["bias_loc"] + arguments["bias_log_scale"].exp() * torch.randn(n, *bias_shape).double()
    return arguments["x"] @ weights.mT + biases[:, None]


def local_samples(arguments, n):
    """``n`` draws of the activations by the op, in one call."""
    x = arguments["x"].expand(n, *arguments["x"].shape)
    noise = torch.randn(n, *arguments["noise"].shape).double()
    return F.local_reparam_linear(**{**arguments, "x": x, "noise": noise})


# ---- The distribution ----


@pytest.mark.parametrize("implementation", ["reference", "cpp"])
def test_moments_are_those_of_sampled_weights(implementation):
    arguments, n = layer(), 20_000
    with hk.use_impl(implementation):
        local = local_samples(arguments, n)
    shared = weight_samples(arguments, n)
    mean = linear(arguments["x"], arguments["weight_loc"], arguments["bias_loc"])
    variances = ((2 * arguments[name]).exp() for name in ("weight_log_scale", "bias_log_scale"))
    variance = linear(arguments["x"].square(), *variances)
    for samples in (local, shared):
        assert_mean(samples, mean)
        assert_mean((samples - mean).square(), variance)


def test_rows_are_independent():
    """Rows share sampled weights, and so covary; in the op they do not. That is where the variance goes."""
    arguments, n = layer(rows=2), 20_000
    x, variance = arguments["x"], (2 * arguments["weight_log_scale"]).exp()
    covariance = variance @ (x[0] * x[1]) + (2 * arguments["bias_log_scale"]).exp()
    mean = linear(x, arguments["weight_loc"], arguments["bias_loc"])
    for sample, expected in ((local_samples, 0 * covariance), (weight_samples, covariance)):
        centred = sample(arguments, n) - mean
        assert_mean(centred[:, 0] * centred[:, 1], expected)
    assert covariance.abs().min() > 0.1, "a zero covariance would tell nothing"


@pytest.mark.parametrize("implementation", ["reference", "cpp"])
def test_gradients_are_unbiased_and_vary_less_than_those_of_sampled_weights(implementation):
    """A squared error's expectation is known; both estimators have its gradient, ours with a tenth of the variance."""
    arguments, n = layer(rows=64, log_scale=-1.0), 2_000
    wanted = ("weight_loc", "weight_log_scale", "bias_loc", "bias_log_scale")
    target = torch.randn(64, 3).double()

    def expected_loss(values):
        mean = linear(arguments["x"], values["weight_loc"], values["bias_loc"])
        variances = ((2 * values[name]).exp() for name in ("weight_log_scale", "bias_log_scale"))
        return ((mean - target).square() + linear(arguments["x"].square(), *variances)).sum()

    def gradients(sample):
        """Of each draw on its own, all parameters in one row."""
        copies = {name: arguments[name].expand(n, *arguments[name].shape).clone() for name in wanted}
        per_draw = torch.func.vmap(
            lambda values: (sample(arguments | values, 1)[0] - target).square().sum(), randomness="different"
        )
        parameters = tuple(x.requires_grad_() for x in copies.values())
        loss = per_draw(dict(zip(wanted, parameters, strict=True))).sum()
        return torch.cat([g.flatten(1) for g in torch.autograd.grad(loss, parameters)], -1)

    leaves = {name: arguments[name].clone().requires_grad_() for name in wanted}
    exact = torch.autograd.grad(expected_loss(leaves), tuple(leaves.values()))
    exact = torch.cat([g.flatten() for g in exact])
    with hk.use_impl(implementation):
        local, shared = gradients(local_samples), gradients(weight_samples)
    for samples in (local, shared):
        assert_mean(samples, exact)
    assert local.var(0).sum() < 0.1 * shared.var(0).sum()


# ---- Where nothing varies ----


@each_implementation
def test_without_scale_it_is_a_linear_layer(implementation):
    """A standard deviation of exactly zero: no NaN, no gradient, of first and second order."""
    arguments = layer()
    for name in ("weight_log_scale", "bias_log_scale"):
        arguments[name] = torch.full_like(arguments[name], -math.inf)
    leaves = [x.requires_grad_() for x in arguments.values()]
    with hk.use_impl(implementation):
        y = F.local_reparam_linear(*leaves)
        close(y, linear(arguments["x"], arguments["weight_loc"], arguments["bias_loc"]))
        first = torch.autograd.grad(y.sin().sum(), leaves)
        y = F.local_reparam_linear(*leaves)
        recorded = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in recorded), leaves)
    for gradients in (first, second):
        by_name = dict(zip(NAMES, gradients, strict=True))
        for name in ("weight_log_scale", "bias_log_scale", "noise"):
            assert torch.equal(by_name[name], torch.zeros_like(by_name[name])), name
        assert all(torch.isfinite(g).all() and g.any() for g in (by_name["x"], by_name["weight_loc"]))


@each_implementation
def test_a_row_of_zeros_has_no_part_in_the_scales_gradient(implementation):
    arguments = layer(rows=2, dtype=torch.float32)
    biases = {"bias_loc": None, "bias_log_scale": None}
    arguments["x"] = torch.stack([torch.zeros(5), arguments["x"][1]]).requires_grad_()
    arguments["weight_log_scale"].requires_grad_()

    def gradients(rows):
        picked = arguments | biases | {"x": arguments["x"][rows], "noise": arguments["noise"][rows]}
        wanted = (arguments["x"], arguments["weight_log_scale"])
        return torch.autograd.grad(F.local_reparam_linear(**picked).sum(), wanted)

    with hk.use_impl(implementation):
        (d_x, d_log_scale), (_, expected) = gradients(slice(0, 2)), gradients(slice(1, 2))
    torch.testing.assert_close(d_log_scale, expected)
    torch.testing.assert_close(d_x[0], arguments["weight_loc"].sum(0))


@each_implementation
@pytest.mark.parametrize("absent", ["bias_loc", "bias_log_scale"])
def test_either_bias_may_be_absent(implementation, absent):
    arguments = layer() | {absent: None}
    neutral = torch.zeros(3).double() if absent == "bias_loc" else torch.full((3,), -math.inf).double()
    with hk.use_impl(implementation):
        result = F.local_reparam_linear(**arguments)
        close(result, F.local_reparam_linear(**arguments | {absent: neutral}))


@each_implementation
@given(
    rows=st.integers(0, 70),
    inputs=st.integers(0, 40),
    outputs=st.integers(0, 40),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_matches_reference(implementation, rows, inputs, outputs, bias, seed):
    torch.manual_seed(seed)
    arguments = layer(rows, inputs, outputs)
    if not bias:
        arguments |= {"bias_loc": None, "bias_log_scale": None}
    with hk.use_impl(implementation):
        close(F.local_reparam_linear(**arguments), reference.local_reparam_linear(**arguments))


def test_several_threads():
    """More elements than one thread takes at a time."""
    leaves = [x.requires_grad_() for x in layer(131, 133, 137).values()]
    with hk.use_impl("cpp"), testing.threads(2):
        y = F.local_reparam_linear(*leaves)
        gradients = torch.autograd.grad(y.sin().sum(), leaves)
    expected = reference.local_reparam_linear(*leaves)
    close((y, *gradients), (expected, *torch.autograd.grad(expected.sin().sum(), leaves)))


def test_between_the_products_bits_do_not_depend_on_the_threads():
    """With one term in every sum torch's products are exact in any order, and what remains is ours."""
    n = 211  # more elements than one thread takes at a time, and no multiple of a vector's lanes
    arguments = layer(n, n, n, dtype=torch.float32) | {"x": torch.eye(n)}
    leaves, upstream = [x.requires_grad_() for x in arguments.values()], torch.randn(n).diag()

    def run(n_threads):
        with hk.use_impl("cpp"), testing.threads(n_threads):
            y = F.local_reparam_linear(*leaves)
            return y.detach(), *torch.autograd.grad(y, leaves, upstream)

    alone = run(1)
    for n_threads in (2, 3):
        assert all(map(torch.equal, run(n_threads), alone))


@each_implementation
def test_nan_stays_in_its_row(implementation):
    arguments = layer(rows=20)
    arguments["x"][3, 1] = math.nan
    with hk.use_impl(implementation):
        y = F.local_reparam_linear(**arguments)
    assert torch.isnan(y).any(-1).nonzero().tolist() == [[3]]


def test_saves_the_standard_deviation_alone():
    arguments = layer(rows=64)
    leaves = [x.requires_grad_() for x in arguments.values()]
    with hk.use_impl("cpp"):
        saved = testing.saved_bytes(lambda: F.local_reparam_linear(*leaves), leaves)
    assert saved == arguments["noise"].nbytes


# ---- The module ----


def module(**options):
    built = hk.nn.LocalReparamLinear(5, 3, **options).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return built


def posterior(built):
    names = ("weight", "bias") if built.bias_loc is not None else ("weight",)
    pairs = [(getattr(built, f"{name}_loc"), getattr(built, f"{name}_log_scale")) for name in names]
    loc, log_scale = (torch.cat([x.flatten() for x in column]) for column in zip(*pairs, strict=True))
    return torch.distributions.Normal(loc, log_scale.exp())


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"prior_scale": 0.3}])
def test_kl_is_the_divergence(options):
    built = module(**options)
    q, prior = posterior(built), torch.distributions.Normal(torch.zeros(()).double(), options.get("prior_scale", 1.0))
    close(built.kl(), torch.distributions.kl_divergence(q, prior).sum())
    draws = q.sample((20_000,))
    assert_mean((q.log_prob(draws) - prior.log_prob(draws)).sum(-1), built.kl())


def test_kl_has_its_minimum_at_the_prior():
    built = hk.nn.LocalReparamLinear(5, 3, prior_scale=0.5).double()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.fill_(math.log(0.5) if name.endswith("log_scale") else 0.0)
    close(built.kl(), torch.zeros(()).double())
    gradients = torch.autograd.grad(built.kl(), tuple(built.parameters()))
    close(gradients, tuple(torch.zeros_like(g) for g in gradients))


def test_noise_comes_from_a_generator():
    built, x = module(), torch.randn(4, 2, 5).double()
    first, again = (built(x, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, built(x))
    torch.manual_seed(7)
    globally = built(x)
    torch.manual_seed(7)
    assert torch.equal(globally, built(x))


def test_eval_predicts_with_the_mean():
    built, x = module(), torch.randn(4, 5).double()
    samples = torch.stack([built(x) for _ in range(2_000)])
    prediction = built.eval()(x)
    close(prediction, linear(x, built.weight_loc, built.bias_loc))
    assert_mean(samples, prediction)


def test_posterior_of_linear_regression_is_exact():
    """Gaussian noise: the best factorised posterior has a closed form, which training finds.

    A squared error is quadratic in the one normal of its row, so the expectation is the mean over 1 and -1.
    """
    x, noise_scale = torch.randn(200, 3).double(), 0.5
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]]).double() + noise_scale * torch.randn(200, 1).double()
    noise = torch.tensor([1.0, -1.0]).double().expand(200, 1, 2).movedim(-1, 0)
    built = hk.nn.LocalReparamLinear(3, 1, bias=False).double()
    optimizer = torch.optim.LBFGS(built.parameters(), max_iter=500, line_search_fn="strong_wolfe", tolerance_change=0.0)

    def negative_bound():
        optimizer.zero_grad()
        samples = F.local_reparam_linear(x.expand(2, -1, -1), *built.parameters(), None, None, noise)
        loss = (samples - y).square().mean(0).sum() / (2 * noise_scale**2) + built.kl()
        loss.backward()
        return loss

    optimizer.step(negative_bound)
    precision = x.mT @ x / noise_scale**2 + torch.eye(3).double()
    best = torch.linalg.solve(precision, x.mT @ y / noise_scale**2)[:, 0]
    torch.testing.assert_close(built.weight_loc[0], best, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(built.weight_log_scale[0].exp(), precision.diagonal().rsqrt(), rtol=1e-6, atol=0)


def test_module_reads_well_and_keeps_its_names():
    assert repr(hk.nn.LocalReparamLinear(5, 3)) == "LocalReparamLinear(in_features=5, out_features=3)"
    other = hk.nn.LocalReparamLinear(5, 3, bias=False, prior_scale=0.1)
    assert repr(other) == "LocalReparamLinear(in_features=5, out_features=3, bias=False, prior_scale=0.1)"
    assert list(other.state_dict()) == ["weight_loc", "weight_log_scale"]
    built = module()
    assert list(built.state_dict()) == ["weight_loc", "weight_log_scale", "bias_loc", "bias_log_scale"]
    copy = hk.nn.LocalReparamLinear(5, 3).double()
    copy.load_state_dict(built.state_dict())
    close(copy.kl(), built.kl())


def test_initial_values():
    built = hk.nn.LocalReparamLinear(400, 30)
    for loc, log_scale in ((built.weight_loc, built.weight_log_scale), (built.bias_loc, built.bias_log_scale)):
        assert 0.9 / 20 < loc.abs().max() <= 1 / 20
        assert (log_scale == -5).all()


@pytest.mark.parametrize("implementation", ["cpp", *INTERPRETED])
@pytest.mark.parametrize("create_graph", [False, True])
def test_backward_inside_autocast_is_the_same(implementation, create_graph):
    leaves = [x.requires_grad_() for x in layer(dtype=torch.float32).values()]
    with hk.use_impl(implementation):
        expected = torch.autograd.grad(F.local_reparam_linear(*leaves).sum(), leaves, create_graph=create_graph)
        with torch.autocast("cpu", torch.bfloat16):
            y = F.local_reparam_linear(*leaves)
            results = torch.autograd.grad(y.sum(), leaves, create_graph=create_graph)
    torch.testing.assert_close(results, expected)


def test_module_under_compile():
    built, x = hk.nn.LocalReparamLinear(5, 3), torch.randn(4, 5)
    torch._dynamo.reset()
    compiled = torch.compile(built, backend="aot_eager", fullgraph=True)(x)
    assert torch.isfinite(torch.autograd.grad(compiled.sum(), built.weight_log_scale)[0]).all()


def test_a_compiled_module_takes_a_last_short_batch():
    built = torch.compile(hk.nn.LocalReparamLinear(5, 3), backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    assert [len(built(torch.randn(n, 5))) for n in (8, 3, 5)] == [8, 3, 5]


def test_the_mean_is_float32_under_autocast_as_samples_are():
    built, x = hk.nn.LocalReparamLinear(5, 3), torch.randn(4, 5)
    expected = built.eval()(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(built(x), expected)
        assert built(x.bfloat16()).dtype == built.train()(x).dtype == torch.float32
        half = hk.nn.LocalReparamLinear(5, 3, dtype=torch.bfloat16)
        assert half(x).dtype == half.eval()(x).dtype == half(x.bfloat16()).dtype == torch.float32
        with pytest.raises(TypeError, match="must have the dtype of weight_loc"):
            built.eval()(x.double())


# ---- Bad input ----


@each_implementation
@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("x", torch.tensor(1.0), ValueError, r"x must be of shape \(\.\.\., in\), got a torch.float32 tensor"),
        ("x", torch.ones(4, 5, dtype=torch.int64), TypeError, "x must be a float32 or float64 tensor"),
        ("x", [1.0], TypeError, "x must be a tensor, got list"),
        ("weight_loc", torch.ones(3, 4), ValueError, r"weight_loc must be of shape \(out, in\) with in = 5"),
        ("weight_log_scale", torch.ones(5, 3), ValueError, r"weight_log_scale must be of weight_loc's shape \(3, 5\)"),
        ("weight_log_scale", torch.ones(3, 5).double(), TypeError, "weight_log_scale must have the dtype of x"),
        ("bias_loc", torch.ones(5), ValueError, r"bias_loc must be of shape \(3,\) or None"),
        ("bias_log_scale", 0.0, TypeError, "bias_log_scale must be a tensor, got float 0.0"),
        ("bias_log_scale", torch.ones(1), ValueError, r"bias_log_scale must be of shape \(3,\) or None"),
        ("noise", None, TypeError, "noise must be a tensor, got NoneType"),
        ("noise", torch.ones(4, 5), ValueError, r"noise must be of shape \(4, 3\)"),
        ("noise", torch.ones(3), ValueError, r"noise must be of shape \(4, 3\)"),
        ("noise", torch.ones(4, 3, device="meta"), ValueError, "noise must be on the device of x, cpu"),
    ],
)
def test_bad_input(implementation, argument, value, error, message):
    arguments = layer(rows=4, dtype=torch.float32) | {argument: value}
    with hk.use_impl(implementation), pytest.raises(error, match=message) as caught:
        F.local_reparam_linear(**arguments)
    assert str(caught.value).startswith("local_reparam_linear: ")


def test_module_bad_input():
    with pytest.raises(
        ValueError, match="LocalReparamLinear: out_features must be an integer of at least 0, got int -1"
    ):
        hk.nn.LocalReparamLinear(2, -1)
    with pytest.raises(ValueError, match="prior_scale must be positive and finite, got 0"):
        hk.nn.LocalReparamLinear(2, 1, prior_scale=0)
    with pytest.raises(ValueError, match=r"LocalReparamLinear: x must be a tensor of shape \(\.\.\., 2\)"):
        hk.nn.LocalReparamLinear(2, 1)(torch.ones(4, 3))
    for mode in (True, False):
        with pytest.raises(TypeError, match="must have the dtype of"):
            hk.nn.LocalReparamLinear(2, 1).train(mode)(torch.ones(4, 2).double())
