"""Properties of radial flows that no implementation can fake, and errors for bad input."""

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.radial_flow import radial_inputs

import hvae_kernels as hk
from hvae_kernels import testing
from hvae_kernels.ops.radial_flow import reference as radial_reference

F = hk.functional
#: Where there is a GPU, Triton compiles for it and has no business with these CPU tensors.
INTERPRETED = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ()
each_implementation = pytest.mark.parametrize("implementation", ["reference", "cpp", *INTERPRETED])


def radial(*shape, dtype=torch.float64, **options):
    return radial_inputs(dtype, "cpu", shape=shape, **options)


def close(results, expected):
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-9)


def assert_jacobians_determinant(flow, z):
    jacobian = torch.func.jacrev(lambda z: flow(z)[0])(z)
    close(flow(z)[1], torch.linalg.slogdet(jacobian).logabsdet)


@each_implementation
def test_radial_log_abs_det_is_the_jacobians(implementation):
    _, *layers = radial(1, 5)
    with hk.use_impl(implementation):
        for z in torch.randn(4, 5, dtype=torch.float64):
            assert_jacobians_determinant(lambda z: F.radial_flow(z, *layers), z)


@each_implementation
def test_radial_layers_compose(implementation):
    z, center, alpha, beta = radial(6, 5, n_layers=7)
    with hk.use_impl(implementation):
        whole = F.radial_flow(z, center, alpha, beta)
        total = torch.zeros(6, dtype=torch.float64)
        for k in range(7):
            z, log_abs_det = F.radial_flow(z, center[k : k + 1], alpha[k : k + 1], beta[k : k + 1])
            total = total + log_abs_det
    close(whole, (z, total))


@each_implementation
@given(rows=st.integers(0, 70), features=st.integers(1, 40), n_layers=st.integers(0, 5), seed=st.integers(0, 99))
def test_radial_any_shape_matches_reference(implementation, rows, features, n_layers, seed):
    torch.manual_seed(seed)
    arguments = radial(rows, features, n_layers=n_layers)
    with hk.use_impl(implementation):
        results = F.radial_flow(*arguments)
    close(results, radial_reference.radial_flow(*arguments))


@each_implementation
def test_radial_at_a_centre(implementation):
    """The centre stays; the map there is the isotropic stretch 1 + beta / alpha, with finite gradients."""
    z = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    alpha, beta = (torch.tensor([x], dtype=torch.float64) for x in (0.5, 1.0))
    with hk.use_impl(implementation):
        output, log_abs_det = F.radial_flow(z, torch.zeros(1, 3, dtype=torch.float64), alpha, beta)
        (gradient,) = torch.autograd.grad(output.sum(), z)
    assert torch.equal(output, z)
    close(log_abs_det, torch.full((1,), 3 * math.log(3.0), dtype=torch.float64))
    close(gradient, torch.full((1, 3), 3.0, dtype=torch.float64))


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [0, 5, 10, 15, 20])
def test_radial_near_a_centre_is_as_precise_as_at_the_origin(implementation, dtype, exponent):
    """Where ``z - c`` is exact only it matters: |z| is up to a million times larger."""
    y = torch.randint(-8, 9, (37, 11)).to(dtype) * 2.0**-exponent
    center = torch.randint(-3, 4, (1, 11)).to(dtype)
    alpha, beta = torch.tensor([[0.7], [0.9]], dtype=dtype)
    seed, seed_log = torch.randn(37, 11, dtype=dtype), torch.randn(37, dtype=dtype)

    def derivatives(*arguments):
        arguments = [x.detach().requires_grad_() for x in arguments]
        output, log_abs_det = F.radial_flow(*arguments)
        return log_abs_det, *torch.autograd.grad((output, log_abs_det), arguments, (seed, seed_log))

    with hk.use_impl(implementation):
        results = derivatives(center + y, center, alpha, beta)
        expected = derivatives(y, 0 * center, alpha, beta)
    torch.testing.assert_close(results, expected)


@each_implementation
@pytest.mark.parametrize("distance", [1.0, 1e-1, 1e-2, 1e-3, 1e-4])
def test_radial_near_a_later_centre_is_within_budget(implementation, distance):
    """The second layer's centre is where the first one takes a point that all rows surround; many such points.

    Closer than this the rounding of z alone is a share of the radius, and both errors are chance.
    """

    def draw():
        base, center, alpha, beta = radial(1, 11, n_layers=2)
        center[1:] = radial_reference.radial_flow(base, center[:1], alpha[:1], beta[:1])[0]
        z = base + distance * torch.randn(5, 11, dtype=torch.float64)
        return [x.float() for x in (z, center, alpha, beta, torch.randn(5, 11), torch.randn(5))]

    def run(function, draws):
        results = []
        for *leaves, seed, seed_log in zip(*draws, strict=True):
            leaves = [x.detach().requires_grad_() for x in leaves]
            outputs = function(*leaves)
            results.append((*outputs, *torch.autograd.grad(outputs, leaves, (seed, seed_log))))
        return [torch.stack(result) for result in zip(*results, strict=True)]

    def op(*draws):
        with hk.use_impl(implementation):
            return run(F.radial_flow, draws)

    def make():
        return [torch.stack(tensors) for tensors in zip(*(draw() for _ in range(50)), strict=True)]

    testing.assert_as_exact(op, lambda *draws: run(radial_reference.radial_flow, draws), make)


@each_implementation
def test_radial_many_layers_stay_in_range(implementation):
    """The product of the stretches leaves float64's range; the sum of their logarithms does not."""
    n_layers = 400
    z, center = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(n_layers, 3, dtype=torch.float64)
    alpha, beta = (torch.full((n_layers,), x, dtype=torch.float64) for x in (1.0, 9.0))
    with hk.use_impl(implementation):
        log_abs_det = F.radial_flow(z, center, alpha, beta)[1]
    close(log_abs_det, torch.full((2,), 3 * n_layers * math.log(10.0), dtype=torch.float64))


@each_implementation
@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("z", torch.tensor(1.0), ValueError, r"radial_flow: z must be of shape \(\.\.\., d\), got a torch.float32"),
        ("center", torch.ones(3, 4), ValueError, r"center must be of shape \(K, 5\), got .* of shape \(3, 4\)"),
        ("alpha", torch.ones(()), ValueError, r"alpha must be of shape \(3,\)"),
        ("beta", torch.ones(2), ValueError, r"beta must be of shape \(3,\)"),
        ("beta", torch.ones(3, dtype=torch.float64), TypeError, "beta must have the dtype of z"),
    ],
)
def test_radial_bad_input(implementation, argument, value, error, message):
    names = ("z", "center", "alpha", "beta")
    arguments = dict(zip(names, radial(4, 5, dtype=torch.float32), strict=True)) | {argument: value}
    with hk.use_impl(implementation), pytest.raises(error, match=message):
        F.radial_flow(*arguments.values())


@each_implementation
def test_without_its_cotangent_a_singular_determinant_is_not_met(implementation):
    """alpha = 1, beta = -2 at a distance of 1: the layer turns the sphere inside out."""
    z, center = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2)
    inputs = [x.requires_grad_() for x in (z, center, torch.ones(1), torch.full((1,), -2.0))]
    with hk.use_impl(implementation):
        found = torch.autograd.grad(F.radial_flow(*inputs)[0].sum(), inputs)
    expected = [[[0.5, 0.0]], [[0.5, 1.0]], [0.5], [0.5]]
    torch.testing.assert_close(found, tuple(map(torch.tensor, expected)))


@each_implementation
def test_all_derivatives_at_a_centre_count_it_as_flat(implementation):
    z = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    center, one = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    with hk.use_impl(implementation):
        derivative = F.radial_flow(z, center, one, one)[0].sum()
        for expected in (2.0, 0.0, 0.0):
            (derivative,) = torch.autograd.grad(derivative, z, create_graph=True)
            assert torch.equal(derivative, torch.full_like(z, expected))
            derivative = derivative.sum()
