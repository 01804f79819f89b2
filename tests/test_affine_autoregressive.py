"""Properties of the affine tail of autoregressive flows that no implementation can fake, and errors for bad input."""

import copy
import dataclasses
import math
import os
import pathlib
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.affine_autoregressive import autoregressive_inputs

import hvae_kernels as hk
from hvae_kernels import testing
from hvae_kernels.ops.affine_autoregressive import reference
from hvae_kernels.ops.affine_autoregressive.gates import CODES, DEFAULTS, PARAMETERS, decoded
from hvae_kernels.ops.autoregressive_network.network import ACTIVATION_CODES, ACTIVATIONS

F = hk.functional
#: Where there is a GPU, Triton compiles for it and has no business with these CPU tensors.
INTERPRETED = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ()
each_implementation = pytest.mark.parametrize("implementation", ["reference", "cpp", *INTERPRETED])
OTHERS = (
    F.Gate.clipped(-0.5, 0.25),
    F.Gate.soft_clipped(2.0),
    F.Gate.softplus(0.3),
    F.Gate.shifted_sigmoid(-1.0, 0.2),
    F.Gate.sigmoid(2.0),
)
GATES = {**DEFAULTS, **{f"{gate.name}-other": gate for gate in OTHERS}}
each_gate = pytest.mark.parametrize("gate", GATES.values(), ids=GATES)


def inputs(*shape, dtype=torch.float64, **options):
    return autoregressive_inputs(dtype, "cpu", shape=shape, **options)


def log_scale_of(gate, s):
    """The gates as their sources write them."""
    first, second = (*gate.parameters, None, None)[:2]
    return {
        "affine": lambda: s,
        "clipped": lambda: s.clamp(first, second),
        "soft-clipped": lambda: s / (1 + abs(s / first)),
        "softplus": lambda: torch.log(torch.logaddexp(s, torch.zeros_like(s)) + first),
        "shifted-sigmoid": lambda: torch.log(torch.sigmoid(s + first) + second),
        "sigmoid": lambda: torch.nn.functional.logsigmoid(s + first),
    }[gate.name]()


# ---- Properties ----


@each_implementation
@each_gate
def test_inverse_by_formula(implementation, gate):
    """Undoing scale and shift as the sources write them gives ``z`` back; their logarithms add up."""
    z, shift, s = inputs(5, 7, scale=2.0)
    with hk.use_impl(implementation):
        output, log_abs_det = F.affine_autoregressive(z, shift, s, gate=gate)
    log_scale = log_scale_of(gate, s)
    weight = 1 - log_scale.exp() if gate.name == "sigmoid" else 1
    torch.testing.assert_close((output - weight * shift) * (-log_scale).exp(), z)
    torch.testing.assert_close(log_abs_det, log_scale.sum(-1))


@each_implementation
@each_gate
def test_log_abs_det_is_the_jacobians(implementation, gate):
    """With shift and scale from earlier features only, by autograd's full Jacobian."""
    d = 5
    weights = torch.randn(2, d, d, dtype=torch.float64).tril(-1)

    def flow(z):
        return F.affine_autoregressive(z, weights[0] @ z, (weights[1] @ z).sin(), gate=gate)

    z = torch.randn(d, dtype=torch.float64)
    with hk.use_impl(implementation):
        jacobian = torch.func.jacrev(lambda z: flow(z)[0])(z)
        log_abs_det = flow(z)[1]
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, log_abs_det)


@each_implementation
def test_affine_is_torchs_transform(implementation):
    z, shift, s = inputs(4, 6)
    transform = torch.distributions.AffineTransform(shift, s.exp(), event_dim=1)
    with hk.use_impl(implementation):
        output, log_abs_det = F.affine_autoregressive(z, shift, s)
    torch.testing.assert_close(output, transform(z))
    torch.testing.assert_close(log_abs_det, transform.log_abs_det_jacobian(z, output))


@each_implementation
@given(
    rows=st.integers(0, 9),
    features=st.integers(0, 40),
    gate=st.sampled_from(list(GATES.values())),
    seed=st.integers(0, 99),
)
def test_any_shape_matches_reference(implementation, rows, features, gate, seed):
    torch.manual_seed(seed)
    arguments = inputs(rows, features, scale=2.0)
    with hk.use_impl(implementation):
        results = F.affine_autoregressive(*arguments, gate=gate)
    torch.testing.assert_close(results, reference.affine_autoregressive(*arguments, gate))


@pytest.mark.parametrize("implementation", ["reference", "cpp"])
@each_gate
def test_second_derivatives(implementation, gate):
    """Finite differences under every gate; the clamp is held where it is the identity, as its gradient claims."""
    z, shift, s = inputs(2, 3)
    s = 0.2 * s.clamp(-1, 1)
    arguments = [x.requires_grad_() for x in (z, shift, s)]
    with hk.use_impl(implementation):
        assert torch.autograd.gradgradcheck(lambda *x: F.affine_autoregressive(*x, gate=gate), arguments)


@each_implementation
def test_clamp_passes_gradients_straight_through(implementation):
    """Outside the clamp the derivative is that of an exponential at its end."""
    z, shift, s = (x.requires_grad_() for x in inputs(3, 8, scale=50.0))
    with hk.use_impl(implementation):
        output, log_abs_det = F.affine_autoregressive(z, shift, s, gate="clipped")
        through_output, through_determinant = (
            torch.autograd.grad(y.sum(), s, retain_graph=True)[0] for y in (output, log_abs_det)
        )
    torch.testing.assert_close(through_output, z * s.clamp(-5, 3).exp())
    torch.testing.assert_close(through_determinant, torch.ones_like(s))


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_gate
def test_finite_for_any_finite_scale(implementation, dtype, gate):
    """Values and gradients, at the ends of the number range too; ``affine`` overflows, so it has no large ones."""
    largest = torch.finfo(dtype).max
    ends = [-largest, -1e4, -104.0, -1e-40, 0.0, 1e-40, 50.0] + ([] if gate.name == "affine" else [1e4, largest])
    s = torch.tensor([ends], dtype=dtype).requires_grad_()
    z, shift = torch.ones_like(s).requires_grad_(), torch.full_like(s, 0.5).requires_grad_()
    with hk.use_impl(implementation):
        results = F.affine_autoregressive(z, shift, s, gate=gate)
        gradients = torch.autograd.grad([y.sum() for y in results], (z, shift, s))
    assert all(torch.isfinite(x).all() for x in (*results, *gradients))


@each_implementation
def test_underflow_leaves_the_shift(implementation):
    z, shift, _ = inputs(3, 4, dtype=torch.float32)
    for gate in ("affine", "sigmoid"):
        with hk.use_impl(implementation):
            output, log_abs_det = F.affine_autoregressive(z, shift, torch.full_like(z, -200.0), gate=gate)
        assert torch.equal(output, shift)
        assert torch.equal(log_abs_det, torch.full((3,), -800.0))


@pytest.mark.parametrize("implementation", ["cpp", *INTERPRETED])
def test_nan_shows(implementation):
    """Invalid numbers are not swallowed by clamps and selects."""
    for gate in GATES.values():
        z, shift, s = inputs(2, 20, dtype=torch.float32)
        s[0, 3] = math.nan
        with hk.use_impl(implementation):
            output, log_abs_det = F.affine_autoregressive(z, shift, s, gate=gate)
        assert torch.equal(torch.isnan(output), torch.isnan(s))
        assert torch.equal(torch.isnan(log_abs_det), torch.tensor([True, False]))


@pytest.mark.parametrize(("gate", "saved"), [("affine", 2), ("sigmoid", 3)])
def test_saves_only_what_derivatives_need(gate, saved):
    """Nothing beyond the inputs, and the shift only where it is weighed."""
    arguments = [x.requires_grad_() for x in inputs(64, 8)]
    assert testing.saved_bytes(lambda: F.affine_autoregressive(*arguments, gate=gate), arguments) == 0
    assert testing.saved_bytes(lambda: F.affine_autoregressive(*arguments, gate=gate), []) == saved * 64 * 8 * 8


@each_implementation
def test_gate_of_a_compiled_function_may_change(implementation):
    torch._dynamo.reset()
    arguments = [x.requires_grad_() for x in inputs(3, 4)]
    compiled = torch.compile(
        lambda *x, gate: F.affine_autoregressive(*x, gate=gate)[0], backend="aot_eager", fullgraph=True
    )
    with hk.use_impl(implementation):
        for gate in (F.Gate.sigmoid(0.5), F.Gate.sigmoid(1.5), F.Gate.sigmoid(2.5), "softplus"):
            result = compiled(*arguments, gate=gate)
            expected = F.affine_autoregressive(*arguments, gate=gate)[0]
            torch.testing.assert_close(result, expected)
            torch.testing.assert_close(
                torch.autograd.grad(result.sum(), arguments), torch.autograd.grad(expected.sum(), arguments)
            )


# ---- Bad input ----


@each_implementation
@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("z", torch.tensor(1.0), ValueError, r"z must be of shape \(\.\.\., d\), got a torch.float32 tensor of shape"),
        ("z", torch.ones(4, 3, dtype=torch.int64), TypeError, "z must be a float32 or float64 tensor"),
        ("shift", torch.ones(3), ValueError, r"shift must be of z's shape \(4, 3\), got .* of shape \(3,\)"),
        ("shift", 1.0, TypeError, "shift must be a tensor, got float 1.0"),
        ("shift", torch.ones(4, 3, device="meta"), ValueError, "shift must be on the device of z, cpu"),
        ("log_scale", torch.ones(4, 2), ValueError, r"log_scale must be of z's shape \(4, 3\)"),
        ("log_scale", torch.ones(4, 3).double(), TypeError, "log_scale must have the dtype of z, torch.float32"),
        (
            "gate",
            "tanh",
            ValueError,
            "gate must be a Gate or one of affine, clipped, soft-clipped, softplus, shifted-sigmoid, sigmoid, "
            "got 'tanh'",
        ),
        ("gate", 3, TypeError, "gate must be a name or a Gate, got int 3"),
    ],
)
def test_bad_input(implementation, argument, value, error, message):
    arguments = dict(zip(("z", "shift", "log_scale"), inputs(4, 3, dtype=torch.float32), strict=True))
    with hk.use_impl(implementation), pytest.raises(error, match=message) as caught:
        F.affine_autoregressive(**{**arguments, argument: value})
    assert str(caught.value).startswith("affine_autoregressive: ")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: F.Gate("tanh"), ValueError, "gate must be a Gate or one of affine, clipped, .*, got 'tanh'"),
        (lambda: F.Gate.clipped(3.0, -5.0), ValueError, "low must be below high, got low = 3.0, high = -5.0"),
        (lambda: F.Gate.clipped(math.nan), ValueError, "'clipped': low must be finite, got nan"),
        (lambda: F.Gate.soft_clipped(0.0), ValueError, "'soft-clipped': bound must be positive, .* got 0.0"),
        (lambda: F.Gate.softplus(-1e-3), ValueError, "'softplus': epsilon must be positive, .* got -0.001"),
        (lambda: F.Gate.shifted_sigmoid(2.0, 0.0), ValueError, "'shifted-sigmoid': epsilon must be positive"),
        (lambda: F.Gate.sigmoid("2"), TypeError, "'sigmoid': offset must be a number, got str '2'"),
        (lambda: F.Gate.sigmoid(math.inf), ValueError, "'sigmoid': offset must be finite, got inf"),
        (lambda: F.Gate("affine", (2.0,)), ValueError, r"'affine': parameters must be a tuple \(\), got \(2.0,\)"),
        (lambda: F.Gate("clipped", (2.0,)), ValueError, r"'clipped': parameters must be a tuple \(low, high\), got"),
        (lambda: F.Gate("clipped", [-1.0, 1.0]), TypeError, "parameters must be a tuple .* got list"),
    ],
)
def test_bad_gate(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_gate_defaults_are_the_sources():
    assert F.Gate("clipped") == F.Gate.clipped() == F.Gate("clipped", (-5.0, 3.0))
    assert F.Gate("soft-clipped").parameters == pytest.approx((-math.log(1e-3),))
    assert F.Gate("softplus").parameters == (1e-3,)
    assert F.Gate("shifted-sigmoid").parameters == (2.0, 1e-3)
    assert F.Gate("sigmoid").parameters == (0.0,)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_gates_are_values(gate):
    """Written as they are made, frozen, and the same when copied, pickled or encoded for the kernels."""
    copies = [copy.deepcopy(gate), pickle.loads(pickle.dumps(gate)), decoded(*gate.encoded)]
    for same in [*copies, eval(repr(gate), {"Gate": F.Gate}), F.Gate(gate.name, gate.parameters)]:
        assert (same, same.encoded) == (gate, gate.encoded)
        assert hash(same) == hash(gate)
    with pytest.raises(dataclasses.FrozenInstanceError):
        gate.parameters = ()
    assert F.Gate.sigmoid(1) == F.Gate.sigmoid(1.0) != F.Gate.sigmoid(2.0)
    assert repr(F.Gate("clipped")) == "Gate.clipped(low=-5.0, high=3.0)"


def in_kebab_case(name):
    return re.sub("(?<!^)(?=[A-Z])", "-", name).lower()


@pytest.mark.parametrize(
    ("codes", "file", "switch"),
    [
        (CODES, "affine_autoregressive.h", "with_gate"),
        (ACTIVATION_CODES, "autoregressive_network.h", "with_activation"),
    ],
)
def test_codes_are_those_of_the_kernels(codes, file, switch):
    """In C++ one has no number of its own: the default."""
    text = (pathlib.Path(__file__).parents[1] / "csrc" / "kernels" / file).read_text()
    body = text.partition(f"{switch}(int64_t")[2].partition("\n}\n")[0]
    cases = re.findall(r"(?:case (\d+)|default): return \w+\((?:activation::)?(\w+)", body)
    found = {in_kebab_case(name): int(code) for code, name in cases if code}
    (other,) = (in_kebab_case(name) for code, name in cases if not code)
    assert codes.keys() == {*found, other}
    assert codes == {**found, other: codes[other]}
    assert sorted(codes.values()) == list(range(len(codes)))


def test_every_gate_and_activation_is_complete():
    assert CODES.keys() == PARAMETERS.keys()
    assert ACTIVATION_CODES.keys() == ACTIVATIONS.keys()


@each_implementation
def test_without_a_cotangent_an_overflowing_scale_is_not_met(implementation):
    z, log_scale = torch.ones(1, 1, requires_grad=True), torch.full((1, 1), 100.0, requires_grad=True)
    with hk.use_impl(implementation):
        _, log_abs_det = F.affine_autoregressive(z, torch.zeros(1, 1), log_scale)
    found = torch.autograd.grad(log_abs_det.sum(), (z, log_scale), allow_unused=True, materialize_grads=True)
    assert [x.item() for x in found] == [0.0, 1.0]


def test_numbers_of_a_gate_may_be_numpys():
    numpy = pytest.importorskip("numpy")
    assert F.Gate.clipped(high=numpy.float32(3)) == F.Gate.clipped(high=3.0)
