"""Schemas, fakes, and the implicit derivative of the inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from hvae_kernels import _library
from hvae_kernels._library import OpFunction

IMPLEMENTATIONS = ("cpp",)

_NETWORK = (
    "Tensor[] weights, Tensor[] biases, Tensor[] offsets, Tensor[] gates, Tensor[] degrees, int[] program, "
    "int gate, float first, float second"
)


def _map_fake(known, *network):
    return torch.empty_like(known, memory_format=torch.contiguous_format), known.new_empty(known.shape[:1])


def _solve_fake(grad, x, *network):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _define(name: str, arguments: str, results: str, fake) -> dict:
    return _library.define(name, f"({arguments}, {_NETWORK}) -> {results}", fake, IMPLEMENTATIONS)


RAW_FORWARD = _define("autoregressive_forward", "Tensor x", "(Tensor, Tensor)", _map_fake)
RAW_INVERSE = _define("autoregressive_inverse", "Tensor y", "(Tensor, Tensor)", _map_fake)
RAW_SOLVE = _define("autoregressive_solve", "Tensor grad, Tensor x", "Tensor", _solve_fake)


class ImplicitInverse(OpFunction):
    r"""``x`` with :math:`f(x; \theta) = y` as a function of the residual :math:`y - f(x; \theta)`, which is 0.

    By the implicit function theorem :math:`dx = J^{-1} (dy - df)`, so the cotangent of the residual is the solution v of
    :math:`J^\top v = g`: one triangular solve with the network's own structure. Parameters get theirs through f.
    """

    @staticmethod
    def forward(implementation, counts, settings, x, residual, *tensors):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, ctx.counts, ctx.settings, _, _, *tensors = inputs
        ctx.save_for_backward(output, *tensors)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "autoregressive_inverse: second derivatives through the inverse are not provided (create_graph=True); "
                "differentiate the forward direction twice, or use hk.use_impl('reference')"
            )
        x, *tensors = ctx.saved_tensors
        lists, (program, gate, first, second) = unflattened(tensors, ctx.counts), ctx.settings
        solution = RAW_SOLVE[ctx.implementation](grad.contiguous(), x, *lists, list(program), gate, first, second)
        return (None, None, None, None, solution, *(None for _ in tensors))


def flattened(arguments: tuple) -> tuple[tuple[int, ...], tuple, tuple[Tensor, ...]]:
    """Counts of the five lists of tensors, the plain numbers, and all tensors in a row."""
    *lists, program, gate, first, second = arguments
    return tuple(map(len, lists)), (tuple(program), gate, first, second), tuple(x for xs in lists for x in xs)


def unflattened(tensors: list[Tensor], counts: tuple[int, ...]) -> list[list[Tensor]]:
    """The five lists of tensors again."""
    remaining = iter(tensors)
    return [[next(remaining) for _ in range(count)] for count in counts]


@_library.in_graph
def implicit(implementation: str, counts, settings, x: Tensor, residual: Tensor, *tensors: Tensor) -> Tensor:
    """The differentiable inverse at its solution ``x``."""
    return ImplicitInverse.apply(implementation, counts, settings, x, residual, *tensors)
