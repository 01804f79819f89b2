"""Properties of planar flows that no implementation can fake, and errors for bad input."""

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.planar_flow import planar_inputs

import hvae_kernels as hk
from hvae_kernels import testing
from hvae_kernels.ops.planar_flow import autograd as planar_autograd
from hvae_kernels.ops.planar_flow import reference as planar_reference

F = hk.functional
#: Where there is a GPU, Triton compiles for it and has no business with these CPU tensors.
INTERPRETED = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ()
each_implementation = pytest.mark.parametrize("implementation", ["reference", "cpp", *INTERPRETED])
each_constraint = pytest.mark.parametrize("constrain", [False, True])


def planar(*shape, dtype=torch.float64, **options):
    return planar_inputs(dtype, "cpu", shape=shape, **options)


def close(results, expected):
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-9)


def assert_jacobians_determinant(flow, z):
    jacobian = torch.func.jacrev(lambda z: flow(z)[0])(z)
    close(flow(z)[1], torch.linalg.slogdet(jacobian).logabsdet)


@each_implementation
@each_constraint
def test_planar_log_abs_det_is_the_jacobians(implementation, constrain):
    _, u, w, b = planar(1, 5)
    u = u - 3 * w  # some determinants are negative without the constraint
    with hk.use_impl(implementation):
        for z in torch.randn(4, 5, dtype=torch.float64):
            assert_jacobians_determinant(lambda z: F.planar_flow(z, u, w, b, constrain=constrain), z)


@each_implementation
@each_constraint
@pytest.mark.parametrize(
    "case",
    [
        {"shape": (6, 5)},
        {"shape": (2, 3, 5)},
        {"shape": (2, 6, 5), "replicas": True},
        {"shape": (2, 3, 5), "amortised": True},
    ],
)
def test_planar_vjp_is_the_backward_pass(implementation, constrain, case):
    case = dict(case)
    inputs = planar(*case.pop("shape"), **case, n_layers=4)
    cotangents = torch.randn_like(inputs[0]), torch.randn(inputs[0].shape[:-1], dtype=torch.float64)
    with hk.use_impl(implementation):
        outputs, pullback = torch.func.vjp(lambda *x: F.planar_flow(*x, constrain=constrain), *inputs)
        for context in (torch.no_grad, torch.enable_grad):  # in the second the way that is recorded
            with context():
                results, vjp = F.planar_flow_with_vjp(*inputs, constrain=constrain)
                close(results, outputs)
                close(vjp(cotangents), pullback(cotangents))


def test_planar_vjp_inside_autocast_and_cotangents_that_do_not_fit():
    inputs = planar(6, 5, dtype=torch.float32)
    with torch.no_grad():
        _, vjp = F.planar_flow_with_vjp(*inputs, constrain=True)
    z, grad = inputs[0], torch.randn(6)
    outside = vjp((z, grad))
    with torch.autocast("cpu", torch.bfloat16):
        close([x.double() for x in vjp((z, grad))], [x.double() for x in outside])
    for cotangents, argument in (((z.mT, grad), "grad_z"), ((z, z), "grad_log_abs_det")):
        with pytest.raises(ValueError, match=f"planar_flow_with_vjp: {argument} must be of shape"):
            vjp(cotangents)
    for cotangents, argument in (((None, grad), "grad_z"), ((z, grad.double()), "grad_log_abs_det")):
        with pytest.raises(TypeError, match=argument):
            vjp(cotangents)


@each_implementation
def test_no_planar_replicas(implementation):
    with hk.use_impl(implementation):
        z, log_abs_det = F.planar_flow(*planar(0, 4, 3, replicas=True))
    assert (z.shape, log_abs_det.shape) == ((0, 4, 3), (0, 4))


@each_implementation
@each_constraint
def test_planar_layers_compose(implementation, constrain):
    """K layers at once are K single ones."""
    z, u, w, b = planar(6, 5, n_layers=7)
    with hk.use_impl(implementation):
        whole = F.planar_flow(z, u, w, b, constrain=constrain)
        total = torch.zeros(6, dtype=torch.float64)
        for k in range(7):
            z, log_abs_det = F.planar_flow(z, u[k : k + 1], w[k : k + 1], b[k : k + 1], constrain=constrain)
            total = total + log_abs_det
    close(whole, (z, total))


@each_implementation
@given(
    rows=st.integers(0, 70),
    features=st.integers(1, 9),
    n_layers=st.integers(0, 5),
    constrain=st.booleans(),
    seed=st.integers(0, 99),
)
def test_planar_any_shape_matches_reference(implementation, rows, features, n_layers, constrain, seed):
    torch.manual_seed(seed)
    arguments = planar(rows, features, n_layers=n_layers)
    with hk.use_impl(implementation):
        results = F.planar_flow(*arguments, constrain=constrain)
    close(results, planar_reference.planar_flow(*arguments, constrain))


@each_implementation
def test_planar_without_u_is_the_identity(implementation):
    z, u, w, b = planar(9, 5, dtype=torch.float32)
    with hk.use_impl(implementation):
        output, log_abs_det = F.planar_flow(z, 0 * u, w, b)
    assert torch.equal(output, z)
    assert torch.equal(log_abs_det, torch.zeros(9))


def test_constrained_planar_is_invertible():
    """``u.w >= -1`` however negative it was; along w the map then increases."""
    u, w = 30 * torch.randn(2, 50, 5, dtype=torch.float64)
    constrained = F.constrain_planar(u, w)
    assert ((constrained * w).sum(-1) >= -1 - 1e-9).all()  # rounding of terms of size 1e3
    line = torch.linspace(-3, 3, 200, dtype=torch.float64)
    for u_k, w_k in zip(0.1 * u, 0.1 * w, strict=True):
        z = line[:, None] * w_k / w_k.norm()
        image, _ = F.planar_flow(z, u_k[None], w_k[None], torch.zeros(1, dtype=torch.float64), constrain=True)
        assert ((image @ w_k).diff() > 0).all()


@each_implementation
def test_constrained_planar_determinant_does_not_cancel(implementation):
    """``u.w = -60``: ``1 + u_hat.w`` is 8.8e-27, which no difference of float32 numbers can hold."""
    z, w, b = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.zeros(1)
    u = (-60.0 * w).requires_grad_()
    with hk.use_impl(implementation):
        _, log_abs_det = F.planar_flow(z, u, w, b, constrain=True)
        (gradient,) = torch.autograd.grad(log_abs_det.sum(), u)
    torch.testing.assert_close(log_abs_det, torch.tensor([-60.0]))
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 0.0]]))


@each_implementation
def test_unconstrained_planar_shows_a_zero_determinant(implementation):
    z, w, b = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), torch.zeros(1)
    with hk.use_impl(implementation):
        _, log_abs_det = F.planar_flow(z, -w, w, b)
    assert log_abs_det.item() == -math.inf


@pytest.mark.parametrize("implementation", ["cpp", *INTERPRETED])
def test_planar_constrained_derivatives(implementation):
    arguments = [x.requires_grad_() for x in planar(3, 4)]
    flow = lambda *x: F.planar_flow(*x, constrain=True)  # noqa: E731
    with hk.use_impl(implementation):
        assert torch.autograd.gradcheck(flow, arguments)
        assert torch.autograd.gradgradcheck(flow, arguments)
        torch._dynamo.reset()
        compiled = torch.compile(flow, backend="aot_eager", fullgraph=True)(*arguments)
        close(
            torch.autograd.grad([y.sum() for y in compiled], arguments),
            torch.autograd.grad([y.sum() for y in flow(*arguments)], arguments),
        )


@pytest.mark.parametrize("implementation", ["cpp", *INTERPRETED])
def test_planar_tanh_is_rounded_once(implementation):
    """A second feature that only receives ``tanh`` shows it: 2^-24 of rounding and what the kernel claims, 1e-8."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-30, 2, 1000)])
    z, u, w = torch.stack([x, 0 * x], -1), torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    with hk.use_impl(implementation):
        tanh = F.planar_flow(z, u, w, torch.zeros(1))[0][:, 1]
    expected = torch.tanh(x.double())
    assert ((tanh - expected).abs() <= (2**-24 + 1e-8) * expected.abs()).all()


def test_planar_saves_two_numbers_a_layer_and_row():
    arguments = [x.requires_grad_() for x in planar(64, 8, n_layers=5)]
    with hk.use_impl("cpp"):
        assert testing.saved_bytes(lambda: F.planar_flow(*arguments), arguments) == 2 * 5 * 64 * 8


@pytest.mark.parametrize("implementation", ["cpp", *INTERPRETED])
def test_amortised_planar_saves_a_number_a_layer_and_row(implementation):
    arguments = [x.requires_grad_() for x in planar(64, 8, n_layers=5, amortised=True)]
    with hk.use_impl(implementation):
        assert testing.saved_bytes(lambda: F.planar_flow(*arguments, constrain=True), arguments) == 5 * 64 * 8


def amortised_and_row_by_row(shape, constrain, n_layers):
    """Values and gradients of one call, and of a call a row with layers that are that row's, one after the other."""
    inputs = [x.requires_grad_() for x in planar(*shape, n_layers=n_layers, amortised=True)]
    cotangents = torch.randn(shape, dtype=torch.float64), torch.randn(shape[:-1], dtype=torch.float64)

    def rows(z, u, w, b):
        total = torch.zeros(shape[:-1], dtype=torch.float64)
        for k in range(n_layers):
            one = u[..., k : k + 1, :], w[..., k : k + 1, :], b[..., k : k + 1]
            parts = [x.reshape(-1, *x.shape[len(shape) - 1 :]).unbind() for x in (z, *one)]
            results = [F.planar_flow(x[None], *layer, constrain=constrain) for x, *layer in zip(*parts, strict=True)]
            z = torch.cat([x for x, _ in results]).view(shape)
            total = total + torch.cat([x for _, x in results]).view(shape[:-1])
        return z, total

    for flow in (lambda *x: F.planar_flow(*x, constrain=constrain), rows):
        results = flow(*inputs)
        yield *results, *torch.autograd.grad(results, inputs, cotangents)


@each_implementation
@each_constraint
@pytest.mark.parametrize("shape", [(5, 3), (19, 40), (2, 3, 2, 7)])
def test_amortised_planar_is_each_row_by_itself(implementation, constrain, shape):
    with hk.use_impl(implementation):
        together, apart = amortised_and_row_by_row(shape, constrain, n_layers=4)
    close(together, apart)


@each_implementation
def test_planar_shared_layers_are_the_same_ones_for_every_row(implementation):
    z, u, w, b = planar(11, 6)
    with hk.use_impl(implementation):
        amortised = F.planar_flow(z, *(x.expand(11, *x.shape) for x in (u, w, b)), constrain=True)
        close(amortised, F.planar_flow(z, u, w, b, constrain=True))


@each_implementation
@given(
    rows=st.integers(0, 20),
    features=st.integers(0, 19),
    n_layers=st.integers(0, 5),
    constrain=st.booleans(),
    seed=st.integers(0, 99),
)
def test_amortised_planar_any_shape_matches_reference(implementation, rows, features, n_layers, constrain, seed):
    torch.manual_seed(seed)
    arguments = planar(rows, features, n_layers=n_layers, amortised=True)
    with hk.use_impl(implementation):
        results = F.planar_flow(*arguments, constrain=constrain)
    close(results, planar_reference.planar_flow(*arguments, constrain))


@each_implementation
def test_amortised_planar_determinant_does_not_cancel(implementation):
    """As of shared layers."""
    z, w, b = torch.zeros(2, 2), torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]), torch.zeros(2, 1)
    u = (-60.0 * w).requires_grad_()
    with hk.use_impl(implementation):
        _, log_abs_det = F.planar_flow(z, u, w, b, constrain=True)
        (gradient,) = torch.autograd.grad(log_abs_det.sum(), u)
        _, zero = F.planar_flow(z, -w, w, b)
    torch.testing.assert_close(log_abs_det, torch.tensor([-60.0, -60.0]))
    torch.testing.assert_close(gradient, w)
    assert (zero == -math.inf).all()


@each_implementation
@each_constraint
def test_amortised_planar_gradients_of_one_result(implementation, constrain):
    """Of more rows than are taken together: what the first ones leave must not reach those that follow."""
    inputs = [x.requires_grad_() for x in planar(19, 5, amortised=True)]
    for result in (0, 1):
        with hk.use_impl(implementation):
            gradients = torch.autograd.grad(F.planar_flow(*inputs, constrain=constrain)[result].sum(), inputs)
        expected = planar_reference.planar_flow(*inputs, constrain)[result].sum()
        close(gradients, torch.autograd.grad(expected, inputs, materialize_grads=True))


@each_implementation
@pytest.mark.parametrize("size", [0, 3])
def test_amortised_planar_over_a_vmapped_dimension(implementation, size):
    inputs = [x.expand(size, *x.shape) for x in planar(4, 5, amortised=True)]
    with hk.use_impl(implementation):
        z, log_abs_det = torch.func.vmap(F.planar_flow)(*inputs)
        flat = F.planar_flow(*(x.flatten(0, 1) for x in inputs))
    assert (z.shape, log_abs_det.shape) == ((size, 4, 5), (size, 4))
    close((z.flatten(0, 1), log_abs_det.flatten()), flat)


@each_implementation
def test_amortised_planar_implementation_of_a_call(implementation):
    inputs = planar(6, 5, amortised=True)
    cotangents = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    with hk.use_impl(implementation), torch.no_grad():
        expected, pullback = F.planar_flow_with_vjp(*inputs, constrain=True)
    with hk.use_impl("cuda"), torch.no_grad():
        results = F.planar_flow(*inputs, constrain=True, implementation=implementation)
        again, vjp = F.planar_flow_with_vjp(*inputs, constrain=True, implementation=implementation)
        gradients = vjp(cotangents)
    assert all(map(torch.equal, (*results, *again, *gradients), (*expected, *expected, *pullback(cotangents))))


def test_planar_recursion_has_the_same_bits_on_any_number_of_threads():
    """The linear recursion without torch's products around it."""
    constant, slope, table = torch.randn(13, 3001), torch.rand(13, 3001), 0.1 * torch.randn(13, 13)

    def run(n_threads):
        with testing.threads(n_threads):
            return [planar_autograd.RAW_SOLVE["cpp"](constant, slope, table, way) for way in (False, True)]

    with hk.use_impl("cpp"):
        F.planar_flow(*planar(1, 2))  # loads the extension
    alone = run(1)
    for n_threads in (2, 3):
        assert all(map(torch.equal, run(n_threads), alone))


@each_implementation
@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("z", torch.tensor(1.0), ValueError, r"planar_flow: z must be of shape \(\.\.\., d\), got a torch.float32"),
        ("z", torch.ones(4, 5, dtype=torch.int64), TypeError, "z must be a float32 or float64 tensor"),
        ("u", torch.ones(5), ValueError, r"u must be of shape \(K, 5\), or \(4, K, 5\), got .* of shape \(5,\)"),
        ("u", torch.ones(3, 4), ValueError, r"u must be of shape \(K, 5\), or \(4, K, 5\), got .* of shape \(3, 4\)"),
        (
            "u",
            torch.ones(2, 3, 5),
            ValueError,
            r"u must be of shape \(K, 5\), or \(4, K, 5\), got .* of shape \(2, 3, 5\)",
        ),
        (
            "u",
            torch.ones(4, 3, 4),
            ValueError,
            r"u must be of shape \(K, 5\), or \(4, K, 5\), got .* of shape \(4, 3, 4\)",
        ),
        ("u", torch.ones(4, 3, 5), ValueError, r"w must be of u's shape \(4, 3, 5\)"),
        ("w", torch.ones(2, 5), ValueError, r"w must be of u's shape \(3, 5\)"),
        ("w", torch.ones(3, 5, dtype=torch.float64), TypeError, "w must have the dtype of z"),
        ("b", torch.ones(3, 1), ValueError, r"b must be of shape \(3,\)"),
        ("b", [1.0], TypeError, "b must be a tensor"),
    ],
)
def test_planar_bad_input(implementation, argument, value, error, message):
    arguments = dict(zip("zuwb", planar(4, 5, dtype=torch.float32), strict=True)) | {argument: value}
    with hk.use_impl(implementation), pytest.raises(error, match=message):
        F.planar_flow(*arguments.values())


def test_amortised_planar_bad_input():
    z, u, w, b = planar(4, 2, 5, amortised=True, dtype=torch.float32)
    shapes = r"\(K, 5\), or \(4, 2, K, 5\), or \(4, K, 5\)"
    with pytest.raises(ValueError, match=rf"planar_flow: u must be of shape {shapes}, got .* of shape \(2, 4, 3, 5\)"):
        F.planar_flow(z, u.transpose(0, 1), w, b)
    with pytest.raises(ValueError, match=r"w must be of u's shape \(4, 2, 3, 5\)"):
        F.planar_flow(z, u, w[0], b)
    with pytest.raises(ValueError, match=r"b must be of shape \(4, 2, 3\), got .* of shape \(4, 3\)"):
        F.planar_flow(z, u, w, b[:, 0])
    with pytest.raises(ValueError, match=r"planar_flow: u must be of shape \(K, 5\), got .* of shape \(1, 3, 5\)"):
        F.planar_flow(z[0, 0], u[0, :1], w[0, :1], b[0, :1])


def test_constrain_planar_bad_input():
    with pytest.raises(ValueError, match=r"constrain_planar: w must be of u's shape \(3, 5\)"):
        F.constrain_planar(torch.ones(3, 5), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"u must be of shape \(\.\.\., d\)"):
        F.constrain_planar(torch.tensor(1.0), torch.tensor(1.0))


def test_replicas_lie_on_a_grids_first_axis():
    """A GPU ends the others at 65,535."""
    triton = pytest.importorskip("hvae_kernels.ops.planar_flow.triton")
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: grids.append(grid)

    triton._launch(Kernel(), torch.empty(70_000, 2, 33))
    assert grids == [(140_000,)]


@each_implementation
def test_constrained_layers_without_features(implementation):
    b = torch.zeros(3, requires_grad=True)
    none = torch.zeros(3, 0)
    with hk.use_impl(implementation):
        _, log_abs_det = F.planar_flow(torch.zeros(5, 0), none, none, b, constrain=True)
    assert log_abs_det.isfinite().all()
    assert torch.autograd.grad(log_abs_det.sum(), b)[0].isfinite().all()


@each_implementation
@pytest.mark.parametrize("amortised", [False, True])
def test_without_its_cotangent_a_singular_determinant_is_not_met(implementation, amortised):
    shape = (1, 1, 1) if amortised else (1, 1)
    given = [torch.zeros(1, 1), torch.full(shape, -1.0), torch.ones(shape), torch.zeros(shape[:-1])]
    inputs = [x.requires_grad_() for x in given]
    with hk.use_impl(implementation):
        found = torch.autograd.grad(F.planar_flow(*inputs)[0].sum(), inputs)
    assert [x.item() for x in found] == [0.0, 0.0, 0.0, -1.0]


@each_implementation
def test_a_saturated_layer_moves_nothing(implementation):
    """Its slope is zero, not merely tiny: w^2 would make something of that."""
    z = torch.ones(1, 1, requires_grad=True)
    with hk.use_impl(implementation):
        output, log_abs_det = F.planar_flow(z, torch.ones(1, 1), torch.full((1, 1), 1e20), torch.zeros(1))
    assert torch.autograd.grad((output + log_abs_det).sum(), z)[0].item() == 1
