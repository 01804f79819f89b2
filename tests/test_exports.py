"""Flows of splines for other tools: ``torch.export``, and ONNX by way of it, run by ONNX' own evaluator."""

import itertools
import warnings

import pytest
import torch
from torch import nn

import hvae_kernels as hk
from hvae_kernels.functional import Spline

FLOWS = {
    "coupling": lambda **options: hk.nn.CouplingFlow(3, [4], gate=Spline(3), **options),
    "masked": lambda **options: hk.nn.MaskedAutoregressiveFlow(2, [4], gate=Spline(3, style="pyro"), **options),
    "inverse": lambda **options: hk.nn.InverseAutoregressiveFlow(
        2, [4], gate=Spline(3, style="zuko", tails="circular"), **options
    ),
}


class BothDirections(nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x, context=None):
        return *self.flow(x, context), *self.flow.inverse(x, context)


def rows_of(flow, n):
    """Some of them outside the splines' interval."""
    return 3 * torch.randn(n, flow.features)


def exported(flow, *given):
    """With any number of rows."""
    rows = torch.export.Dim("rows", min=1)
    return torch.export.export(BothDirections(flow), given, dynamic_shapes=tuple({0: rows} for _ in given))


@pytest.mark.parametrize("implementation", ["cpp", "reference"])
@pytest.mark.parametrize("kind", list(FLOWS))
def test_flows_are_exported(kind, implementation):
    """With a context; through the reference as operators of torch alone, which others can translate."""
    flow = FLOWS[kind](context_features=2)
    with hk.use_impl(implementation), torch.no_grad():
        program = exported(flow, rows_of(flow, 5), torch.randn(5, 2))
        for n in (5, 1, 8):
            given = rows_of(flow, n), torch.randn(n, 2)
            torch.testing.assert_close(program.module()(*given), BothDirections(flow)(*given))
    own = [node for node in program.graph.nodes if str(node.target).startswith("hvae_kernels")]
    assert bool(own) == (implementation == "cpp")


@pytest.mark.parametrize("kind", ["coupling", "inverse"])
def test_flows_are_translated_to_onnx(kind):
    """In single precision: torch's translator rounds all constants to that."""
    from onnx.reference import ReferenceEvaluator

    flow = FLOWS[kind]()
    with hk.use_impl("reference"), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that are not there, of what torch itself calls
        program = torch.onnx.export(exported(flow, rows_of(flow, 5)), dynamo=True, verbose=False)
        evaluator = ReferenceEvaluator(program.model_proto)
        for n in (5, 2):
            x = rows_of(flow, n)
            results = map(torch.from_numpy, evaluator.run(None, {"x": x.numpy()}))
            for result, expected in itertools.zip_longest(results, BothDirections(flow)(x)):
                torch.testing.assert_close(result, expected)
