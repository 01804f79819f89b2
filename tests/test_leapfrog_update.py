"""Properties of one leapfrog update that no implementation can fake."""

import os

import pytest
import torch
from opspecs import OPSPECS

import hvae_kernels as hk
from hvae_kernels.ops.leapfrog_update import leapfrog_update, reference

SPEC = next(spec for spec in OPSPECS if spec.name == "leapfrog_update")
D = 5
each_implementation = pytest.mark.parametrize("implementation", SPEC.implementations)


def arguments(rows=4):
    z, rho, grad = torch.randn(3, rows, D, dtype=torch.float64)
    kick, drift = torch.rand(2, D, dtype=torch.float64)
    return z, rho, grad, torch.tensor(0.7, dtype=torch.float64), kick, drift


@each_implementation
def test_the_determinant_is_that_of_tempering(implementation):
    """Kick and drift are shears, whatever the potential is: what changes volume is the momentum's factor, d times."""
    z, rho, _, decay, kick, drift = arguments(rows=1)

    def update(x):
        results = leapfrog_update(x[:, :D], x[:, D:], x[:, :D].sin(), decay, kick, drift)
        return torch.cat(results, 1)

    with hk.use_impl(implementation):
        jacobian = torch.autograd.functional.jacobian(update, torch.cat([z, rho], 1)).reshape(2 * D, 2 * D)
    torch.testing.assert_close(torch.linalg.det(jacobian), decay**D)


@each_implementation
def test_an_update_is_undone(implementation):
    """Drift back first, then divide: the same update of other coefficients, where the gradient is one of ``z'``."""
    z, rho, grad, decay, kick, drift = arguments()
    none = torch.zeros(D, dtype=torch.float64)
    with hk.use_impl(implementation):
        image, momentum = leapfrog_update(z, rho, grad, decay, kick, drift)
        back, same = leapfrog_update(image, momentum, grad, torch.ones_like(decay), none, -drift)
        _, start = leapfrog_update(back, same, grad, 1 / decay, -kick / decay, none)
    torch.testing.assert_close((back, start), (z, rho))


@each_implementation
def test_updates_without_forces_add_up(implementation):
    z, rho, grad, decay, kick, drift = arguments()
    free = torch.zeros_like(kick)
    with hk.use_impl(implementation):
        twice = leapfrog_update(*leapfrog_update(z, rho, grad, decay, free, drift), grad, decay, free, drift)
        once = leapfrog_update(z, rho, grad, decay**2, free, (1 / decay + 1) * drift)
    torch.testing.assert_close(twice, once)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="of interpreted kernels")
def test_sums_of_several_programs_add_up(monkeypatch):
    from hvae_kernels.ops.leapfrog_update import triton

    monkeypatch.setattr(triton._Sums, "PARTS", 2)
    monkeypatch.setattr(triton._Sums, "BLOCK", 4)
    inputs = [torch.randn(900, 7, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    inputs += [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in ((), (7,), (7,))]
    expected = torch.autograd.grad(reference.leapfrog_update(*inputs), inputs, inputs[:2])
    with hk.use_impl("triton"):
        found = torch.autograd.grad(leapfrog_update(*inputs), inputs, inputs[:2])
    torch.testing.assert_close(found, expected)
