"""Torch's FLOP counter sees our ops' products, as it sees the reference's."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import hvae_kernels as hk
from hvae_kernels import _flops

F = hk.functional
ROWS, D = 6, 5


def leaves(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def linear(strict=False):
    x, weight, bias = leaves((2, 3, D), (7, D), (7,))
    degrees = torch.arange(D), torch.arange(7)
    return lambda: F.masked_linear(x, weight, bias, *degrees, strict=strict), [x, weight, bias]


def reparameterised():
    x, *weights = leaves((ROWS, D), (7, D), (7, D), (7,), (7,))
    return lambda: F.local_reparam_linear(x, *weights, torch.ones(ROWS, 7)), [x, *weights]


def flow(**options):
    model, z = hk.nn.InverseAutoregressiveFlow(D, [7, 8], **options), torch.randn(ROWS, D, requires_grad=True)
    context = torch.randn(ROWS, 2) if options else None
    return lambda: model(z, context)[0], [z, *model.parameters()]


def counts(make, implementation):
    """Of a forward pass, and of its backward pass."""
    call, inputs = make()
    with hk.use_impl(implementation):
        with FlopCounterMode(display=False) as forward:
            result = call()
        with FlopCounterMode(display=False) as backward:
            torch.autograd.grad(result.sum(), inputs)
    return forward.get_total_flops(), backward.get_total_flops()


CASES = {
    "masked_linear": linear,
    "strict": lambda: linear(strict=True),
    "local_reparam_linear": reparameterised,
    "flow": flow,
    "conditional": lambda: flow(context_features=2),
}


@pytest.mark.parametrize("name", CASES)
def test_products_are_counted_as_those_of_the_reference(name):
    forward, backward = counts(CASES[name], "cpp")
    assert forward > 0
    assert (forward, backward) == counts(CASES[name], "reference")


def test_the_inverse_is_a_pass_and_its_gradient_three():
    model, image = hk.nn.InverseAutoregressiveFlow(D, [7, 8]), torch.randn(ROWS, D, requires_grad=True)
    once = 2 * ROWS * sum(p.numel() for p in model.parameters() if p.dim() == 2)
    with FlopCounterMode(display=False) as forward:
        z, _ = model.inverse(image)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(z.sum(), [image, *model.parameters()])
    assert (forward.get_total_flops(), backward.get_total_flops()) == (once, 3 * once)


def test_planar_flows_project_and_combine():
    model, z = hk.nn.PlanarFlow(D, 4), torch.randn(ROWS, D, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        image, _ = model(z)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(image.sum(), [z, *model.parameters()])
    assert (forward.get_total_flops(), backward.get_total_flops()) == (4 * ROWS * D * 4, 8 * ROWS * D * 4)


@pytest.mark.parametrize(
    "first", ["hvae_kernels", "torch.utils.flop_counter", "hvae_kernels; find_spec('torch.utils.flop_counter')"]
)
def test_formulas_are_registered_whatever_comes_first(first):
    code = f"""
from importlib.util import find_spec
import {first}
import hvae_kernels, torch.utils.flop_counter, sys, torch
from torch.utils.flop_counter import flop_registry
assert torch.ops.hvae_kernels.masked_linear in flop_registry
assert not any(type(finder).__name__ == "_WhenImported" for finder in sys.meta_path)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_counter_is_not_imported_for_those_who_do_not_count():
    code = "import sys, hvae_kernels; assert 'torch.utils.flop_counter' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_formula_has_its_op():
    assert all(getattr(torch.ops.hvae_kernels, name) in flop_registry for name in _flops.FORMULAS)
