"""What ``torch.utils.flop_counter`` counts of our ops: their matrix products, two operations a multiply-add.

As torch does, a product is counted whole, whatever its mask leaves out, and what is no product (densities, bounds,
gates, Gaussian trajectories of one precision a feature) is not counted. Products that torch takes for us, those of
dense precisions among them, it counts itself.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"
Shape = Sequence[int]


def _masked_linear(x: Shape, weight: Shape, *_, **__) -> int:
    return 2 * math.prod(x[:-1]) * math.prod(weight)


def _masked_linear_weight_grad(grad: Shape, x: Shape, *_, **__) -> int:
    return 2 * math.prod(grad) * x[-1]


def _local_reparam_linear(x: Shape, weight: Shape, *_, **__) -> int:
    return 2 * _masked_linear(x, weight)  # means and variances


def _local_reparam_linear_backward(
    grad: Shape, x: Shape, weight: Shape, log_scale: Shape, noise: Shape, std: Shape, needs_x, needs_log_scale, **__
) -> int:
    return (2 * needs_x + needs_log_scale) * _masked_linear(x, weight)


def _network(known: Shape, weights: Sequence[Shape], *_, **__) -> int:
    return 2 * known[0] * sum(map(math.prod, weights))


def _network_backward(
    grad: Shape,
    grad_log_abs_det: Shape,
    x: Shape,
    tape: Shape,
    inverse: bool,
    needs_known: bool,
    needs_parameters: bool,
    weights: Sequence[Shape],
    *_,
    **__,
) -> int:
    """Values anew where no tape has them, cotangents, and the weights' gradients."""
    return (int(not math.prod(tape)) + 1 + needs_parameters) * _network(x, weights)


def _network_solve(grad: Shape, grad_log_abs_det: Shape, x: Shape, weights, *_, **__) -> int:
    return 2 * _network(x, weights)


def _planar_flow(z: Shape, u: Shape, *_, **__) -> int:
    return 4 * math.prod(z) * u[-2]


def _planar_flow_backward(
    grad_output: Shape, grad_log_abs_det: Shape, grad_h: Shape, z: Shape, u: Shape, *_, **__
) -> int:
    return 2 * _planar_flow(z, u)


FORMULAS: dict[str, Callable[..., int]] = {
    "masked_linear": _masked_linear,
    "masked_linear_input_grad": _masked_linear,
    "masked_linear_weight_grad": _masked_linear_weight_grad,
    "local_reparam_linear": _local_reparam_linear,
    "local_reparam_linear_backward": _local_reparam_linear_backward,
    "autoregressive_forward": _network,
    "autoregressive_training": _network,
    "autoregressive_inverse": _network,
    "autoregressive_backward": _network_backward,
    "autoregressive_solve": _network_solve,
    "planar_flow": _planar_flow,
    "planar_flow_backward": _planar_flow_backward,
}


class _WhenImported:
    """Registers when the counter is first imported: it imports Triton, which takes longer than all of ours."""

    def __init__(self) -> None:
        self._asks_others = False

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name != _COUNTER or self._asks_others:
            return None
        self._asks_others = True
        try:
            spec: Any = find_spec(name)
        finally:
            self._asks_others = False
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            sys.meta_path.remove(self)  # not before: some only ask whether there is such a module
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register
        return spec


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.hvae_kernels, name))(formula)


def tell_torch() -> None:
    """Register the formulas, now or when they are asked for."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
