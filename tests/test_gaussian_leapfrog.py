"""Properties of the Hamiltonian flow that no implementation can fake, and the errors for bad input."""

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.gaussian_leapfrog import gaussian_inputs
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune

import hvae_kernels as hk
from hvae_kernels import testing
from hvae_kernels.ops.gaussian_leapfrog import reference

F = hk.functional
#: Where there is a GPU, Triton compiles for it and has no business with these CPU tensors.
INTERPRETED = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ()
IMPLEMENTATIONS = ("reference", "cpp", *INTERPRETED)
SCHEDULES = ("none", "quadratic", "quadratic-beta", "free")
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def double_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# ---- Properties ----


@each_implementation
@given(
    rows=st.integers(0, 9),
    features=st.integers(1, 40),
    n_steps=st.integers(0, 12),
    step=st.sampled_from(["scalar", "features", "steps"]),
    seed=st.integers(0, 99),
)
def test_any_shape_matches_reference(implementation, rows, features, n_steps, step, seed):
    torch.manual_seed(seed)
    inputs = gaussian_inputs(torch.float64, "cpu", shape=(rows, features), n_steps=n_steps, step=step)
    with hk.use_impl(implementation):
        results = F.gaussian_leapfrog(*inputs)
    torch.testing.assert_close(results, reference.gaussian_leapfrog(*inputs))


@each_implementation
@given(step_size=st.floats(1e-3, 0.9), n_steps=st.integers(1, 10), seed=st.integers(0, 99))
def test_reversible(implementation, step_size, n_steps, seed):
    """Divide by the tempering, flip the momentum, step again, flip: back at the start, one step at a time."""
    torch.manual_seed(seed)
    z, rho, precision, loc = double(5, 3), double(5, 3), double(3).exp(), double(3)
    tempering = 0.5 + torch.rand(n_steps)
    one, step = torch.ones(1), torch.tensor(step_size)
    with hk.use_impl(implementation):
        end, momentum = F.gaussian_leapfrog(z, rho, precision, loc, step, tempering)
        for alpha in tempering.flip(0):
            end, momentum = F.gaussian_leapfrog(end, -momentum / alpha, precision, loc, step, one)
            momentum = -momentum
    growth = (1 + precision.max().item() * step_size) ** (2 * n_steps)
    torch.testing.assert_close((end, momentum), (z, rho), rtol=0, atol=1e-13 * growth)


@pytest.mark.parametrize("implementation", ["cpp", *INTERPRETED])
def test_a_long_chain_costs_no_digits(implementation):
    """Its maps are composed in double: in float32, results and gradients to one unit in the last place."""
    inputs = gaussian_inputs(torch.float32, "cpu", shape=(70, 33), n_steps=200)[:5]
    inputs = [*inputs, torch.ones(200, dtype=torch.float32)]
    seeds = torch.randn(2, 70, 33, dtype=torch.float32)

    def run(op, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        results = op(*leaves)
        return *results, *torch.autograd.grad(results, leaves, tuple(seeds.to(dtype)))

    oracle = run(reference.gaussian_leapfrog, torch.float64)
    with hk.use_impl(implementation):
        results = run(F.gaussian_leapfrog, torch.float32)
    assert max(map(testing.relative_error, results, oracle)) <= torch.finfo(torch.float32).eps


@each_implementation
def test_jacobian_determinant(implementation):
    """``prod_k alpha_k^d`` for (z, rho), by autograd's full Jacobian."""
    _, _, *parameters = gaussian_inputs(torch.float64, "cpu", shape=(4, 3), n_steps=5)

    def flow(state):
        return torch.cat(F.gaussian_leapfrog(state[:3], state[3:], *parameters))

    with hk.use_impl(implementation):
        jacobian = torch.func.jacrev(flow)(double(6))
    torch.testing.assert_close(torch.linalg.det(jacobian), parameters[-1].prod() ** 3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n_steps", [0, 1, 4])
def test_flow_preserves_volume(schedule, n_steps):
    """The map (z, gamma) -> (z_K, rho_K) has determinant 1 for every schedule: ``log_abs_det`` is exactly zero."""
    flow = hk.nn.HamiltonianFlow(3, n_steps, tempering=schedule, init_step_size=0.3)
    potential = hk.nn.GaussianPotential(double(3).exp(), double(3))

    def transport(state):
        z, rho, log_abs_det = flow(state[:3], state[3:], potential)
        assert log_abs_det.shape == ()
        assert log_abs_det == 0
        return torch.cat([z, rho])

    jacobian = torch.func.jacrev(transport)(double(6))
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, torch.tensor(0.0), rtol=0, atol=1e-12)


@each_implementation
def test_energy_error_is_second_order(implementation):
    """Over a fixed time the energy error of untempered leapfrog falls by four when the step is halved."""
    z, rho, precision, loc = double(1000, 3), double(1000, 3), torch.tensor([0.5, 1.0, 2.0]), double(3)

    def energy(z, rho):
        return 0.5 * (precision * (z - loc).square() + rho.square()).sum(-1)

    errors = []
    with hk.use_impl(implementation):
        for n_steps in (20, 40, 80):
            step = torch.tensor(1.0 / n_steps)
            end = F.gaussian_leapfrog(z, rho, precision, loc, step, torch.ones(n_steps))
            errors.append((energy(*end) - energy(z, rho)).abs().max().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def test_nothing_saved_beyond_inputs():
    """The collapsed op keeps its inputs alone, however many steps; the plain formula keeps every step."""
    for n_steps in (1, 100):
        inputs = gaussian_inputs(torch.float32, "cpu", shape=(64, 8), n_steps=n_steps)
        inputs = [x.requires_grad_() for x in inputs]
        assert testing.saved_bytes(lambda i=inputs: F.gaussian_leapfrog(*i), inputs) == 0
    assert testing.saved_bytes(lambda: reference.gaussian_leapfrog(*inputs), inputs) > 100 * 64 * 8 * 4


@each_implementation
def test_vjp_is_the_backward_pass(implementation):
    """As a function of its own: the same gradients, differentiable again, and held to its arguments."""
    inputs = [x.requires_grad_() for x in gaussian_inputs(torch.float64, "cpu", shape=(5, 3), step="scalar")]
    upstream = double(5, 3), double(5, 3)
    expected = torch.autograd.grad(reference.gaussian_leapfrog(*inputs), inputs, upstream, create_graph=True)
    curvature = torch.autograd.grad(sum(g.sin().sum() for g in expected), inputs)
    with hk.use_impl(implementation):
        outputs, vjp = F.gaussian_leapfrog_with_vjp(*inputs)
        torch.testing.assert_close(outputs, reference.gaussian_leapfrog(*inputs))
        gradients = vjp(upstream)
        torch.testing.assert_close(gradients, expected)
        torch.testing.assert_close(torch.autograd.grad(sum(g.sin().sum() for g in gradients), inputs), curvature)
        with torch.no_grad():
            torch.testing.assert_close(F.gaussian_leapfrog_with_vjp(*inputs)[1](upstream), expected)
        with pytest.raises(ValueError, match="gaussian_leapfrog_with_vjp: grad_rho must be of z's shape"):
            vjp((upstream[0], upstream[1][:2]))
        with pytest.raises(TypeError, match="gaussian_leapfrog_with_vjp: grad_z must be a tensor"):
            vjp((None, upstream[1]))
        with pytest.raises(ValueError, match=r"gaussian_leapfrog: loc must be of shape \(3,\)"):
            F.gaussian_leapfrog_with_vjp(*inputs[:3], double(4), *inputs[4:])
        with pytest.raises(ValueError, match="step_size must be finite, got nan"):
            F.gaussian_leapfrog_with_vjp(*inputs[:4], torch.tensor(math.nan), inputs[5])
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(vjp(upstream), expected)
            half = [x.detach().bfloat16() for x in inputs]
            outputs, vjp = F.gaussian_leapfrog_with_vjp(*half)
            gradients = vjp(tuple(x.float() for x in upstream))
        assert {x.dtype for x in outputs} == {torch.float32}
        assert {x.dtype for x in gradients} == {torch.bfloat16}


@each_implementation
def test_vjp_keeps_the_implementation_of_its_call(implementation):
    inputs, upstream = gaussian_inputs(torch.float64, "cpu", shape=(9, 5)), (double(9, 5), double(9, 5))
    with hk.use_impl(implementation):
        _, expected = F.gaussian_leapfrog_with_vjp(*inputs)
    with hk.use_impl("cuda"):
        _, vjp = F.gaussian_leapfrog_with_vjp(*inputs, implementation=implementation)
        assert all(map(torch.equal, vjp(upstream), expected(upstream)))


def test_dense_with_diagonal_precision_is_the_diagonal_op():
    z, rho, precision, loc, step, tempering = gaussian_inputs(torch.float64, "cpu", shape=(6, 4))
    dense = F.dense_gaussian_leapfrog(z, rho, torch.diag(precision), loc, step, tempering)
    torch.testing.assert_close(dense, F.gaussian_leapfrog(z, rho, precision, loc, step, tempering))


def test_dense_sees_the_symmetric_part_only():
    z, rho, loc = double(6, 4), double(6, 4), double(4)
    skew = double(4, 4)
    precision = torch.eye(4) + (skew - skew.mT)
    rest = loc, torch.tensor(0.1), torch.ones(3)
    torch.testing.assert_close(
        F.dense_gaussian_leapfrog(z, rho, precision, *rest), F.dense_gaussian_leapfrog(z, rho, torch.eye(4), *rest)
    )


# ---- The modules ----


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    flow = hk.nn.HamiltonianFlow(2, 4, tempering=schedule, init_temperature=3.0)
    initial, alpha = flow.temperatures()
    temperature = torch.cat([initial, initial * alpha.cumprod(0)])
    k = torch.arange(5.0)
    expected = {
        "none": torch.ones(5),
        "quadratic": 1 + 2 * (1 - k**2 / 16),
        "quadratic-beta": torch.sqrt(1 + 8 * (1 - k**2 / 16)),
        "free": 3 ** (1 - k / 4),
    }[schedule]
    torch.testing.assert_close(temperature, expected)
    torch.testing.assert_close(flow.step_size, torch.full((2,), 0.005))


def test_flow_without_steps_is_the_identity():
    flow = hk.nn.HamiltonianFlow(3, 0)
    z, gamma = double(4, 3), double(4, 3)
    end = flow(z, gamma, lambda position: position.square().sum(-1))
    torch.testing.assert_close(end[:2], (z, gamma))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_any_potential_takes_the_same_path(schedule):
    """A callable potential, differentiated by autograd, gives the fused path's results and gradients."""
    flow = hk.nn.HamiltonianFlow(3, 3, tempering=schedule, init_step_size=0.2)
    precision, loc = torch.nn.Parameter(double(3).exp().detach()), torch.nn.Parameter(double(3))
    z, gamma = double(5, 3).requires_grad_(), double(5, 3).requires_grad_()
    potential = hk.nn.GaussianPotential(precision, loc)
    leaves = [z, gamma, *flow.parameters(), *potential.parameters()]

    def gradients(energy):
        z_final, rho_final, _ = flow(z, gamma, energy)
        return z_final, torch.autograd.grad((z_final.sin() + rho_final.cos()).sum(), leaves)

    torch.testing.assert_close(gradients(potential), gradients(lambda position: potential(position)))


def test_gradient_evaluations_are_one_more_than_steps():
    calls = []
    flow = hk.nn.HamiltonianFlow(3, 7)
    flow(double(5, 3), double(5, 3), lambda z: calls.append(1) or z.square().sum(-1))
    assert len(calls) == 8


def test_flow_without_recorded_gradients():
    flow = hk.nn.HamiltonianFlow(3, 2)
    with torch.no_grad():
        z, _, _ = flow(double(5, 3), double(5, 3), lambda position: position.square().sum(-1))
    assert not z.requires_grad


@pytest.mark.parametrize("precision", [torch.tensor([1.0, 2.0, 0.5]), torch.eye(3) + 0.1])
def test_replicas_share_a_potential(precision):
    flows, z, gamma = hk.nn.HamiltonianFlow(3, 4, replicas=2).double(), double(2, 5, 3), double(2, 5, 3)
    potential = hk.nn.GaussianPotential(torch.nn.Parameter(precision.double()), torch.nn.Parameter(double(3)))
    leaves = [*potential.parameters(), *flows.parameters()]

    def all_of(potential):
        z_K, rho_K, _ = flows(z, gamma, potential)
        return z_K, rho_K, *torch.autograd.grad((z_K.sin() + rho_K.cos()).sum(), leaves)

    torch.testing.assert_close(all_of(potential), all_of(lambda z: potential(z)))
    expected = flows(z, gamma, potential)
    with torch.inference_mode():
        torch.testing.assert_close(flows(z, gamma, potential), expected)
        torch.testing.assert_close(flows(z, gamma, lambda z: potential(z)), expected)


@pytest.mark.parametrize("replicas", [None, 2])
def test_flows_of_learned_step_sizes_compile_for_any_batch(replicas):
    flow = hk.nn.HamiltonianFlow(3, 4, replicas=replicas)
    potentials = [hk.nn.GaussianPotential(x, torch.zeros(3)) for x in (torch.ones(3), torch.eye(3))]
    potentials.append(lambda z: z.square().square().sum(-1))
    for potential in potentials:
        torch._dynamo.reset()
        compiled = torch.compile(flow, backend="aot_eager", fullgraph=True, dynamic=True)
        for rows in (5, 7):
            z, gamma = torch.randn(2, rows, 3).unbind() if replicas is None else torch.randn(2, replicas, rows, 3)
            torch.testing.assert_close(compiled(z, gamma, potential), flow(z, gamma, potential))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_replicas_are_independent_flows(schedule):
    flows = hk.nn.HamiltonianFlow(3, 4, tempering=schedule, replicas=2)
    for parameter in flows.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    precision, loc = double(2, 1, 3).exp(), double(2, 1, 3)
    z, gamma = double(2, 5, 3), double(2, 5, 3)
    together = flows(z, gamma, hk.nn.GaussianPotential(precision, loc))
    for r in range(2):
        flow = hk.nn.HamiltonianFlow(3, 4, tempering=schedule)
        state = {name: value[r].reshape(flow.state_dict()[name].shape) for name, value in flows.state_dict().items()}
        flow.load_state_dict(state)
        alone = flow(z[r], gamma[r], hk.nn.GaussianPotential(precision[r, 0], loc[r, 0]))
        torch.testing.assert_close(alone, tuple(part[r] for part in together))


def test_schedule_is_exact_in_the_parameters_dtype():
    torch.set_default_dtype(torch.float32)
    flow = hk.nn.HamiltonianFlow(2, 10).double()
    k = torch.arange(11, dtype=torch.float64)
    temperature = 1 + flow.log_excess_temperature.exp() * (1 - k**2 / 100)
    expected = temperature[1:] / temperature[:-1]
    torch.testing.assert_close(flow.temperatures()[1], expected, rtol=1e-14, atol=0)


def test_state_dict_and_repr():
    """The names in a state dict are a promise to checkpoints."""
    for schedule, names in {
        "none": ["step_size_logit"],
        "free": ["step_size_logit", "tempering_logit"],
        "quadratic": ["step_size_logit", "log_excess_temperature"],
    }.items():
        assert list(hk.nn.HamiltonianFlow(3, 2, tempering=schedule).state_dict()) == names
    assert repr(hk.nn.HamiltonianFlow(3, 2)) == "HamiltonianFlow(features=3, n_steps=2, tempering='quadratic')"
    potential = hk.nn.GaussianPotential(torch.nn.Parameter(torch.ones(3)), torch.zeros(3))
    assert repr(potential) == "GaussianPotential(precision=(3,))"
    assert list(potential.state_dict()) == ["precision", "loc"]
    assert [name for name, _ in potential.named_parameters()] == ["precision"]


def test_expected_bound_is_below_the_evidence():
    """On a conjugate Gaussian model the closed-form expectation of the flow's bound never exceeds ``log p(x)``.

    ``x ~ N(z, s^2)``, ``z ~ N(0, 1)``: the flow is affine in standard normal (z, gamma), so its expectation needs the
    map's Jacobian and offset only. At the exact posterior's own flow the bound is tight in the limit of long chains.
    """
    for seed in range(20):
        torch.manual_seed(seed)
        s, x = double(3).exp(), 3 * double(3)
        flow = hk.nn.HamiltonianFlow(3, seed % 5, init_step_size=0.4, init_temperature=1.1 + seed / 5)
        potential = hk.nn.GaussianPotential(1 + 1 / s**2, x / (s**2 + 1))

        def transport(state, flow=flow, potential=potential):
            return torch.cat(flow(state[:3], state[3:], potential)[:2])

        offset = transport(torch.zeros(6))
        second = torch.func.jacrev(transport)(torch.zeros(6)).square().sum(1) + offset.square()  # E (z_K, rho_K)^2
        z_mean, z_second, rho_second = offset[:3], second[:3], second[3:]
        log_joint = -0.5 * (z_second + (x**2 - 2 * x * z_mean + z_second) / s**2 + 2 * math.log(2 * math.pi)) - s.log()
        bound = (log_joint - 0.5 * rho_second + 1.0 + 0.5 * math.log(2 * math.pi)).sum()
        evidence = torch.distributions.Normal(0.0, torch.sqrt(1 + s**2)).log_prob(x).sum()
        assert bound <= evidence


class _Quartic(hk.nn.GaussianPotential):
    def forward(self, z):
        return super().forward(z) + 0.5 * z.pow(4).sum(-1)


class _CalledOtherwise(hk.nn.GaussianPotential):
    def __call__(self, z):
        return 3 * super().__call__(z)


def _own_forward(potential):
    potential.forward = lambda z: (z - 1).pow(2).sum(-1)


def _prior_precision(potential):
    """Half of it is pruned by a pre-hook, which computes ``precision`` at every call."""
    prune.random_unstructured(potential, "precision", 0.5)
    with torch.no_grad():
        potential.precision_orig.mul_(2)


NOT_GAUSSIAN = {
    "subclass": lambda potential: setattr(potential, "__class__", _Quartic),
    "class that is called otherwise": lambda potential: setattr(potential, "__class__", _CalledOtherwise),
    "forward of an instance": _own_forward,
    "hook": lambda potential: potential.register_forward_hook(lambda module, inputs, energy: 2 * energy),
    "pre-hook": lambda potential: potential.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)),
    "hook on all modules": lambda potential: register_module_forward_hook(lambda module, inputs, energy: 2 * energy),
    "prune": _prior_precision,
}


@pytest.mark.parametrize("shape", [(4,), (4, 4), (2, 1, 4)])
@pytest.mark.parametrize("case", NOT_GAUSSIAN)
def test_a_potential_that_is_more_than_gaussian_is_called(shape, case):
    flow = hk.nn.HamiltonianFlow(4, 5, init_step_size=0.2, replicas=2 if len(shape) == 3 else None)
    precision = torch.rand(shape) + 1 if shape != (4, 4) else torch.eye(4) + 0.1
    loc = torch.zeros(shape if len(shape) == 3 else 4)
    potential = hk.nn.GaussianPotential(torch.nn.Parameter(precision), loc)
    z, gamma = torch.randn(2, *shape[:1], 6, 4) if len(shape) == 3 else torch.randn(2, 6, 4)
    gaussian = flow(z, gamma, potential)[0]
    handle = NOT_GAUSSIAN[case](potential)
    results = flow(z, gamma, potential)
    expected = flow(z, gamma, lambda position: potential(position))
    if hasattr(handle, "remove"):
        handle.remove()
    torch.testing.assert_close(results, expected)
    assert not torch.allclose(results[0], gaussian)


def test_a_gaussian_potential_of_another_class_is_fused(monkeypatch):
    class Prior(hk.nn.GaussianPotential):
        def __init__(self):
            super().__init__(torch.ones(3), torch.zeros(3))

    flow, z, gamma = hk.nn.HamiltonianFlow(3, 2), double(5, 3), double(5, 3)
    expected = flow(z, gamma, hk.nn.GaussianPotential(torch.ones(3), torch.zeros(3)))
    monkeypatch.setattr(F, "leapfrog", None)
    torch.testing.assert_close(flow(z, gamma, Prior()), expected, rtol=0, atol=0)


# ---- Bad input ----


def good():
    return dict(
        zip(
            ("z", "rho", "precision", "loc", "step_size", "tempering"),
            gaussian_inputs(torch.float32, "cpu", shape=(4, 3), n_steps=2),
            strict=True,
        )
    )


@each_implementation
@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        (
            "z",
            torch.tensor(1.0),
            ValueError,
            r"z must be of shape \(\.\.\., d\), got a torch.float32 tensor of shape \(\)",
        ),
        ("z", torch.ones(4, 3, dtype=torch.int64), TypeError, "z must be a float32 or float64 tensor"),
        ("z", [1.0], TypeError, "z must be a tensor, got list"),
        ("rho", torch.ones(4, 2), ValueError, r"rho must be of z's shape \(4, 3\)"),
        ("rho", torch.ones(4, 3, dtype=torch.float64), TypeError, "rho must have the dtype of z, torch.float32"),
        ("rho", torch.ones(4, 3, device="meta"), ValueError, "rho must be on the device of z, cpu"),
        ("precision", torch.ones(4), ValueError, r"precision must be of shape \(3,\)"),
        ("precision", 2.0, TypeError, "precision must be a tensor, got float 2.0"),
        ("loc", torch.ones(1, 3), ValueError, r"loc must be of shape \(3,\)"),
        ("step_size", torch.ones(5, 3), ValueError, r"step_size must be of shape \(\), \(3,\) or \(K, d\) = \(2, 3\)"),
        ("step_size", torch.tensor([0.1, math.nan, 0.1]), ValueError, "step_size must be finite, got nan"),
        ("step_size", torch.tensor(math.inf), ValueError, "step_size must be finite, got inf"),
        ("tempering", torch.tensor([1.0, math.nan]), ValueError, "tempering must be finite, got nan"),
        ("tempering", torch.ones(()), ValueError, r"tempering must be of shape \(K,\), or \(R, K\) for replicas"),
        ("tempering", torch.ones(4, 2), ValueError, r"z must be of shape \(R, B, d\)"),
    ],
)
def test_bad_input(implementation, argument, value, error, message):
    with hk.use_impl(implementation), pytest.raises(error, match=message) as caught:
        F.gaussian_leapfrog(**{**good(), argument: value})
    assert str(caught.value).startswith("gaussian_leapfrog: ")


@each_implementation
@pytest.mark.parametrize(
    ("argument", "shape", "message"),
    [
        ("tempering", (2, 3), "tempering must be of shape"),
        ("precision", (3, 5), r"precision must be of shape \(R, 1, d\) = \(3, 1, 5\)"),
        ("loc", (5,), "loc must be of shape"),
        ("step_size", (3, 2, 5), r"step_size must be of shape \(R, 1, d\) or \(R, K, d\)"),
    ],
)
def test_bad_replicas(implementation, argument, shape, message):
    names = ("z", "rho", "precision", "loc", "step_size", "tempering")
    inputs = gaussian_inputs(torch.float64, "cpu", shape=(3, 4, 5), n_steps=3, replicas=True)
    arguments = dict(zip(names, inputs, strict=True))
    with hk.use_impl(implementation), pytest.raises(ValueError, match=message):
        F.gaussian_leapfrog(**{**arguments, argument: torch.ones(shape)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replicas": 0}, "replicas must be an integer of at least 1"),
        ({"n_steps": -1}, "n_steps must be an integer of at least 0"),
        ({"features": 0}, "features must be an integer of at least 1"),
        ({"tempering": "linear"}, "tempering must be one of none, quadratic"),
        ({"init_step_size": 0.7}, "init_step_size must be between 0 and max_step_size = 0.5"),
        ({"init_temperature": 1.0}, "init_temperature must be above 1"),
    ],
)
def test_bad_flow(arguments, message):
    with pytest.raises(ValueError, match=message):
        hk.nn.HamiltonianFlow(**{"features": 3, "n_steps": 2, **arguments})


def test_bad_flow_input():
    flow = hk.nn.HamiltonianFlow(3, 2)
    potential = hk.nn.GaussianPotential(torch.ones(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"z must be a tensor of shape \(\.\.\., 3\)"):
        flow(double(5, 4), double(5, 4), potential)
    with pytest.raises(ValueError, match=r"z must be of shape \(4, B, 3\)"):
        hk.nn.HamiltonianFlow(3, 2, replicas=4)(double(5, 3), double(5, 3), potential)
    with pytest.raises(ValueError, match="potential must be a differentiable function of z"):
        flow(double(5, 3), double(5, 3), lambda z: torch.ones(5))
    with pytest.raises(ValueError, match="gamma must be of z's shape"):
        flow(double(5, 3), double(4, 3), potential)


@pytest.mark.parametrize(
    ("precision", "loc", "message"),
    [
        (torch.tensor([1.0, -2.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64), "must be positive"),
        (torch.tensor([1.0, math.nan], dtype=torch.float64), torch.zeros(2, dtype=torch.float64), "must be positive"),
        (torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), r"of shape \(d,\) or \(d, d\)"),
        (torch.ones(4, 5, 3, dtype=torch.float64), torch.zeros(4, 5, 3, dtype=torch.float64), r"loc must be of shape"),
        (torch.ones(3, 3, dtype=torch.float64), torch.zeros(4, 1, 3, dtype=torch.float64), r"of shape \(R, 1, d\)"),
        (torch.ones(3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), "to go with loc"),
    ],
)
def test_bad_potential(precision, loc, message):
    with pytest.raises(ValueError, match=message):
        hk.nn.GaussianPotential(precision, loc)


@each_implementation
def test_a_distant_centre_costs_no_digits(implementation):
    """Of positions and of their cotangents' derivatives: both are near z, not near loc."""
    numbers = [[[1e-3]], [[0.5]], [1e-6], [1000.0], [1e-3], [1.0]]

    def results(dtype, implementation):
        z, rho, precision, loc, step_size, tempering = (torch.tensor(x, dtype=dtype) for x in numbers)
        inputs = z.requires_grad_(), rho, precision, loc.requires_grad_(), step_size, tempering
        position, _ = F.gaussian_leapfrog(*inputs, implementation=implementation)
        cotangent = torch.ones_like(position, requires_grad=True)
        by_z, by_loc = torch.autograd.grad(position, (z, loc), cotangent, create_graph=True)
        (along,) = torch.autograd.grad((z.detach() * by_z).sum() + (loc.detach() * by_loc).sum(), cotangent)
        return position.detach().double(), along.double()

    torch.testing.assert_close(
        results(torch.float32, implementation), results(torch.float64, "reference"), rtol=3e-7, atol=0
    )


@each_implementation
def test_no_steps_return_copies_of_whatever_comes(implementation):
    z, rho = torch.tensor([[[1.0, math.inf]], [[math.inf, 1.0]]])
    one, none = torch.ones(2), torch.ones(0)
    with hk.use_impl(implementation):
        found = F.gaussian_leapfrog(z, rho, one, one, one, none)
    assert torch.equal(found[0], z)
    assert torch.equal(found[1], rho)


def test_an_absent_cotangent_meets_no_infinity():
    """C of the map overflows, which a cotangent of the position does not need."""
    one = torch.ones(1, 1, dtype=torch.float32)
    z, precision, step_size = one.clone().requires_grad_(), one[0] * 1e20, one[0] / 10
    inputs = z, one, precision, one[0] * 0, step_size, torch.ones(2, dtype=torch.float32)
    found, expected = (
        torch.autograd.grad(F.gaussian_leapfrog(*inputs, implementation=name)[0].sum(), z)
        for name in ("cpp", "reference")
    )
    assert expected[0].isfinite().all()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["precision", "loc"])
def test_vmap_hides_no_bad_shape(name):
    inputs = {x: torch.ones(2) for x in ("precision", "loc", "step_size")} | {name: torch.ones(1, 2)}
    with pytest.raises(ValueError, match=rf"gaussian_leapfrog: {name} must be of shape \(2,\)"):
        torch.func.vmap(lambda z: F.gaussian_leapfrog(z, z, *inputs.values(), torch.ones(1)))(torch.ones(3, 4, 2))
