"""``hk.accelerate``: the same numbers as the untouched flow, in both directions, with every gradient."""

import copy
import io
import pickle
import re
import subprocess
import sys
from unittest import mock

import peers
import pytest
import torch
from peers import FLOWS
from torch import nn

import hvae_kernels as hk
from hvae_kernels import testing
from hvae_kernels.compat import _network

FEATURES, ROWS = 5, 7
each_flow = pytest.mark.parametrize("name", FLOWS)
#: ``auto`` leaves small calls of the parallel direction to the library, an explicit choice fuses both.
each_choice = pytest.mark.parametrize("choice", ["auto", "cpp"])


@pytest.fixture(autouse=True)
def double_precision():
    """pyro's and normflows' own sequential directions need it as the default; with the settings of zuko."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with peers.settings():
        yield
    torch.set_default_dtype(before)


def make(name, seed=0, spread=0.7):
    """A flow with parameters that matter: libraries start their last layers near zero."""
    torch.manual_seed(seed)
    flow = FLOWS[name].build(FEATURES, FLOWS[name].context)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.normal_(std=spread * max(1, parameter.shape[-1]) ** -0.5)
    return flow


def points(name, dtype=torch.float64, seed=1, rows=ROWS):
    """Features and, where the flow takes one, context."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    c = torch.randn(rows, FLOWS[name].context, generator=generator, dtype=torch.float64).to(dtype)
    return x, c if FLOWS[name].context else None


def fused(flow, layers=None):
    flow, report = hk.accelerate(copy.deepcopy(flow))
    assert layers is None or (len(report.swapped), report.left) == (layers, [])
    return flow


class Passes:
    """Counts calls of the libraries' masked layers."""

    def __enter__(self):
        self.count, self.patches = 0, []
        for kind in peers.MASKED:
            patch = mock.patch.object(kind, "forward", self.counting(kind.forward))
            patch.start()
            self.patches.append(patch)
        return self

    def counting(self, forward):
        def counted(*args):
            self.count += 1
            return forward(*args)

        return counted

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()


# ---- The map ----


@each_flow
@each_choice
def test_log_determinant_is_that_of_the_jacobian(name, choice):
    """Value, sign and direction, by autograd's full Jacobian; and there and back again."""
    library, flow = FLOWS[name].library, fused(make(name), FLOWS[name].layers)
    x, c = points(name)
    with hk.use_impl(choice):
        y, ladj = library.there(flow, x, c)
        back, minus = library.back(flow, y, c)
        torch.testing.assert_close((back, minus), (x, -ladj), rtol=1e-9, atol=1e-9)
        for direction, at, expected in ((library.there, x, ladj), (library.back, y, minus)):
            jacobian = torch.autograd.functional.jacobian(lambda v, f=direction: f(flow, v, c)[0].sum(0), at)
            sign, logarithm = torch.linalg.slogdet(jacobian.transpose(0, 1))
            assert (sign == 1).all()
            torch.testing.assert_close(logarithm, expected, rtol=1e-9, atol=1e-9)


def quantities(library, flow, x, c):
    """Everything that a flow is used for: values both ways, the density, and the gradients of both directions."""
    results = []
    for direction in (library.there, library.back):
        at = x.clone().requires_grad_()
        context = None if c is None else c.clone().requires_grad_()
        y, ladj = direction(flow, at, context)
        parameters = [p for p in flow.parameters() if p.requires_grad]
        leaves = [at, *parameters] if c is None else [at, context, *parameters]
        gradients = torch.autograd.grad((y * y).sum() + (y.sin().sum(-1) * ladj).sum(), leaves, allow_unused=True)
        results += [y, ladj, *(g for g in gradients if g is not None)]
    return [*results, library.log_prob(flow, x, c)]


@each_flow
@each_choice
def test_same_numbers_and_gradients_in_float64(name, choice):
    flow, inputs = make(name), points(name)
    ours = fused(flow)
    expected = quantities(FLOWS[name].library, flow, *inputs)
    with hk.use_impl(choice):
        results = quantities(FLOWS[name].library, ours, *inputs)
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-9)


@each_flow
@each_choice
def test_float32_stays_within_the_error_budget(name, choice):
    """A mild flow and many rows: an ill-conditioned inverse multiplies whatever rounding came first, theirs or ours."""
    library = FLOWS[name].library
    x, c = points(name, torch.float32, rows=64)
    torch.set_default_dtype(torch.float32)
    plain = make(name, spread=0.25).float()
    ours, exact = fused(plain), copy.deepcopy(plain).double()
    rival = quantities(library, plain, x, c)
    with hk.use_impl(choice):
        results = quantities(library, ours, x, c)
    torch.set_default_dtype(torch.float64)
    oracle = quantities(library, exact, x.double(), None if c is None else c.double())
    testing.assert_within_budget(results, rival, oracle)


@each_flow
def test_samples_follow_the_seed(name):
    flow, (_, c) = make(name), points(name)
    samples = []
    for either in (flow, fused(flow)):
        torch.manual_seed(5)
        samples.append(FLOWS[name].library.sample(either, ROWS, c))
    torch.testing.assert_close(*samples, rtol=1e-9, atol=1e-9)


@each_flow
def test_no_pass_through_the_librarys_network(name):
    library, flow, (x, c) = FLOWS[name].library, make(name), points(name)
    counts = []
    for either in (flow, fused(flow)):
        with hk.use_impl("cpp"), Passes() as passes:
            library.there(either, x, c)
            library.back(either, x, c)
            library.sample(either, ROWS, c)
        counts.append(passes.count)
    assert counts[0] >= 2 * FEATURES
    assert counts[1] == 0


# ---- What a module is besides ----


@each_flow
def test_parameters_and_state_dict_are_the_same_objects(name):
    flow = make(name)
    before = {key: (value, value.clone()) for key, value in flow.state_dict(keep_vars=True).items()}
    same, report = hk.accelerate(flow)
    assert same is flow
    assert len(report.swapped) == FLOWS[name].layers
    after = flow.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for key, (value, copied) in before.items():
        assert after[key] is value
        assert torch.equal(value, copied)
    FLOWS[name].library.back(flow, *points(name))
    assert list(flow.state_dict()) == list(before)


@each_flow
def test_training_follows_the_original(name):
    """An optimiser made before the swap, training through the sequential direction."""
    library, flow = FLOWS[name].library, make(name)
    x, c = points(name)
    losses = []
    for either in (flow, copy.deepcopy(flow)):
        optimizer = torch.optim.Adam(either.parameters(), lr=0.01)
        if either is not flow:
            hk.accelerate(either)
        for _ in range(3):
            optimizer.zero_grad()
            z, ladj = library.back(either, x, c)
            loss = (z.square().sum(-1) / 2 - ladj).mean()
            loss.backward()
            optimizer.step()
        losses.append((loss, library.log_prob(either, x, c)))
    torch.testing.assert_close(*losses, rtol=1e-8, atol=1e-8)


@each_flow
def test_copies_and_loaded_states(name):
    """Masks and orders are part of the state: after loading them the degrees are those of the loaded ones."""
    library, flow, (x, c) = FLOWS[name].library, make(name), points(name)
    ours = fused(flow)
    with torch.no_grad():
        library.back(ours, x, c)  # so that it remembers its masks
    file = io.BytesIO()
    pickle.dump(ours, file)
    for either in (copy.deepcopy(ours), pickle.loads(file.getvalue())):
        torch.testing.assert_close(library.back(either, x, c), library.back(flow, x, c), rtol=1e-9, atol=1e-9)
    other = make(name, seed=3)
    for assign in (False, True):
        for target in (ours, flow):
            target.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        # pyro and zuko compute from attributes what is not in the state: loaded flows are compared with loaded flows
        torch.testing.assert_close(library.there(ours, x, c), library.there(flow, x, c), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(library.back(ours, x, c), library.back(flow, x, c), rtol=1e-9, atol=1e-9)
        with hk.use_impl("cpp"), Passes() as passes:
            library.back(ours, x, c)
        assert passes.count == 0
