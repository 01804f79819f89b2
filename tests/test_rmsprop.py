"""The fused optimiser step: torch's own, row by row, and nothing changed by a gradient that is not finite."""

import math

import pytest
import torch

import hvae_kernels as hk
from hvae_kernels import testing
from hvae_kernels.ops.rmsprop import rmsprop_step_

each_implementation = pytest.mark.parametrize("implementation", ["reference", "cpp"])
DTYPES = (torch.float32, torch.float64)


@each_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_norm", [1e-4, 1.0, 1e4, math.inf])
@pytest.mark.parametrize("size", [1, 7, 16, 33, 40_000])
def test_it_is_torchs_rmsprop_after_torchs_clipping(implementation, dtype, max_norm, size):
    rows = [torch.nn.Parameter(torch.randn(size, dtype=dtype)) for _ in range(3)]
    parameter = torch.stack([row.detach() for row in rows])
    square_average = torch.zeros_like(parameter)
    optimizer = torch.optim.RMSprop(rows, lr=1e-3)
    for step in range(20):
        gradient = torch.randn(3, size, dtype=dtype) * 10.0 ** (step - 12)  # exponents from -12 to 7 bring out eps
        for row, g in zip(rows, gradient, strict=True):
            row.grad = g.clone()
            torch.nn.utils.clip_grad_norm_([row], max_norm)
        before = gradient.clone()
        with hk.use_impl(implementation):
            assert rmsprop_step_(parameter, gradient, square_average, 1e-3, max_norm=max_norm)
        assert torch.equal(gradient, before)
        optimizer.step()
        tolerance = 1e-6 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(parameter, torch.stack([*rows]).detach(), rtol=tolerance, atol=tolerance)


@each_implementation
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(implementation, value):
    parameter, gradient, square_average = torch.rand(3, 2, 20_000)
    before = parameter.clone(), square_average.clone()
    gradient[1, 17_001] = value
    with hk.use_impl(implementation):
        assert not rmsprop_step_(parameter, gradient, square_average, 1e-3)
    assert torch.equal(parameter, before[0])
    assert torch.equal(square_average, before[1])


@each_implementation
def test_a_large_gradient_is_clipped_all_the_same(implementation):
    parameter, gradient, square_average = torch.zeros(3, 1, 4)
    gradient += 1e30
    with hk.use_impl(implementation):
        assert rmsprop_step_(parameter, gradient, square_average, 1e-3, max_norm=1.0)
    torch.testing.assert_close(parameter, torch.full((1, 4), -0.01))  # learning rate / sqrt(1 - alpha)


@each_implementation
def test_autograd_sees_the_change(implementation):
    parameter, gradient, square_average = torch.rand(3, 1, 4)
    leaf = torch.ones(1, 4, requires_grad=True)
    result = (leaf * parameter).sum()
    with hk.use_impl(implementation):
        rmsprop_step_(parameter, gradient, square_average, 1e-3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


def test_repeats_to_the_bit_on_any_number_of_threads():
    inputs = torch.rand(3, 2, 100_003)
    results = []
    for threads in (1, 2, 1):
        with testing.threads(threads):
            parameter, gradient, square_average = inputs.clone()
            rmsprop_step_(parameter, gradient, square_average, 1e-3, max_norm=0.1)
            results.append(parameter)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_bad_input():
    x = torch.ones(2, 3)
    for arguments, argument in (
        ((torch.ones(3), x, x), "parameter"),
        ((torch.ones(3, 2).mT, x, x), "parameter"),
        ((x, torch.ones(2, 4), x), "gradient"),
        ((x, x, torch.ones(3, 2).mT), "square_average"),
    ):
        with pytest.raises(ValueError, match=f"rmsprop_step_: {argument} must be contiguous, of shape"):
            rmsprop_step_(*arguments, 1e-3)
    for max_norm in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm must be above 0"):
            rmsprop_step_(x, x, x, 1e-3, max_norm=max_norm)
    with pytest.raises(TypeError, match="gradient must have the dtype of parameter"):
        rmsprop_step_(x, x.double(), x, 1e-3)
