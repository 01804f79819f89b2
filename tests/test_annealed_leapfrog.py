"""Annealed Hamiltonian flows: equal to the formula, unbiased, never above the evidence, flat in memory."""

import itertools
import math
import os
import weakref
from unittest import mock

import pytest
import torch
from torch import nn

import hvae_kernels as hk
from hvae_kernels import functional, testing
from hvae_kernels.nn import AnnealedHamiltonianFlow, GaussianPotential
from hvae_kernels.ops.annealed_leapfrog import annealed_leapfrog_update, autograd, reference
from hvae_kernels.ops.leapfrog import field

B, D = 5, 3
KINDS = [(1, 1, 0.9, None), (4, 1, 0.9, None), (3, 3, 0.5, None), (3, 2, 0.0, None), (4, 2, 0.7, 6)]
RECOMPUTED = ("states", "reversible")
memories = pytest.mark.parametrize("memory", ["states", "store", "reversible"])
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="for Triton's interpreter")


class Problem:
    """A model with parameters, and a base density made by an encoder whose outputs its closure holds."""

    def __init__(self, dtype=torch.float64):
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 1)).to(dtype)
        self.loc, self.log_scale = torch.randn(B, D, dtype=dtype), 0.1 * torch.randn(B, D, dtype=dtype)
        self.leaves = [x.requires_grad_() for x in (self.loc, self.log_scale)]

    def potential(self, z):
        return self.net(z).squeeze(-1) + z.square().sum(-1) / 2

    def base(self):
        shifted = 2 * self.loc
        return lambda z: (((z - shifted) * (-self.log_scale).exp()) ** 2).sum(-1) / 2 + self.log_scale.sum(-1)


def flow_of(n_bridges, leapfrog_steps, refreshment, score_features, memory, dtype=torch.float64, **options):
    torch.manual_seed(1)
    flow = AnnealedHamiltonianFlow(
        D, n_bridges, leapfrog_steps, refreshment, init_step_size=0.1, memory=memory, score_features=score_features,
        bridge_step_sizes=True, dtype=dtype, **options,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    z, noise = torch.randn(B, D, dtype=dtype), torch.randn(n_bridges + 1, B, D, dtype=dtype)
    return flow, z.requires_grad_(), noise.requires_grad_()


def plain(flow, z, noise, potential, base):
    """The formula, with two gradients a bridge."""
    return reference.annealed_leapfrog(
        z, noise, potential, base, flow.step_size, flow.betas()[0], flow.refreshment()[0],
        leapfrog_steps=flow.leapfrog_steps, score=flow.score, gradient=flow.gradient,
    )  # fmt: skip


def gradients_of(result, leaves):
    z, log_weight = result
    loss = (z * torch.arange(1, D + 1)).sum() + (log_weight * torch.arange(1, 1 + len(log_weight))).sum()
    return torch.autograd.grad(loss, leaves, materialize_grads=True)


# ---- Equal to the formula ----


@memories
@pytest.mark.parametrize("gradient", ["full", "detached"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_values_and_gradients_are_the_formulas(kind, gradient, memory):
    if memory == "reversible" and kind[2] == 0:
        with pytest.raises(ValueError, match="memory must be 'states' or 'store' where refreshment is 0"):
            flow_of(*kind, memory)
        return
    problem = Problem()
    flow, z, noise = flow_of(*kind, memory, gradient=gradient)
    ours, theirs = (run(z, noise, problem.potential, problem.base()) for run in (flow, lambda *x: plain(flow, *x)))
    leaves = [z, noise, *problem.leaves, *flow.parameters(), *problem.net.parameters()]
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients_of(ours, leaves), gradients_of(theirs, leaves), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("memory", RECOMPUTED)
def test_float32_is_as_near_to_float64_as_the_formula_is(memory):
    errors = {}
    for name in ("ours", "plain"):
        results = []
        for dtype in (torch.float32, torch.float64):
            problem, problem64 = Problem(dtype), Problem()
            problem.net.load_state_dict(problem64.net.state_dict())
            for x, y in zip(problem.leaves, problem64.leaves, strict=True):
                x.data.copy_(y.data)
            flow, *_ = flow_of(12, 1, 0.8, None, memory, dtype)
            exact, z, noise = flow_of(12, 1, 0.8, None, memory)
            flow.load_state_dict(exact.state_dict())
            start = [x.detach().float().to(dtype).requires_grad_() for x in (z, noise)]
            run = flow if name == "ours" else (lambda *x, flow=flow: plain(flow, *x))
            result = run(*start, problem.potential, problem.base())
            leaves = [*start, *problem.leaves, *flow.parameters(), *problem.net.parameters()]
            results.append([x.double() for x in (*result, *gradients_of(result, leaves))])
        errors[name] = max((a - b).norm() / b.norm() for a, b in zip(*results, strict=True))
    assert errors["ours"] < 2 * errors["plain"] < 1e-3


def test_store_is_differentiable_again_and_the_others_say_that_they_are_not():
    problem = Problem()
    for memory in ("states", "reversible", "store"):
        flow, z, noise = flow_of(2, 1, 0.7, None, memory)
        _, log_weight = flow(z, noise, problem.potential, problem.base())
        (first,) = torch.autograd.grad(log_weight.sum(), z, create_graph=True)
        if memory == "store":
            _, expected = plain(flow, z, noise, problem.potential, problem.base())
            (theirs,) = torch.autograd.grad(expected.sum(), z, create_graph=True)
            second, others = (torch.autograd.grad(x.square().sum(), noise)[0] for x in (first, theirs))
            torch.testing.assert_close(second, others)
        else:
            with pytest.raises(RuntimeError, match=r"AnnealedHamiltonianFlow: memory='states' or .* once"):
                torch.autograd.grad(first.square().sum(), noise)


def test_gaussian_potentials_take_the_fused_path():
    precision, loc = torch.tensor([4.0, 1.0, 0.5]).double(), torch.tensor([1.0, 0.0, -2.0]).double()
    potential = GaussianPotential(nn.Parameter(precision), nn.Parameter(loc))
    base = GaussianPotential(torch.ones(D).double(), nn.Parameter(torch.zeros(D).double()))
    for kind, gradient in itertools.product(KINDS[:4], ("full", "detached")):
        flow, z, noise = flow_of(*kind, "states", gradient=gradient)
        leaves = [z, noise, *flow.parameters(), *potential.parameters(), base.loc]
        with mock.patch.object(functional, "gaussian_leapfrog", wraps=functional.gaussian_leapfrog) as fused:
            ours = flow(z, noise, potential, base)
        assert fused.call_count == (kind[0] if gradient == "full" else 0)
        theirs = plain(flow, z, noise, potential, base)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradients_of(ours, leaves), gradients_of(theirs, leaves))


def test_gaussian_potentials_that_do_not_fit():
    flow, z, noise = AnnealedHamiltonianFlow(D, 2), torch.randn(B, D), torch.randn(3, B, D)
    good = GaussianPotential(torch.ones(D), torch.zeros(D))
    for features in (1, D + 2):
        bad = GaussianPotential(torch.ones(features), torch.zeros(features))
        with pytest.raises(
            ValueError, match=r"Flow: base_potential must be a GaussianPotential with loc of shape .3,."
        ):
            flow(z, noise, good, bad)
        with pytest.raises(ValueError, match="Flow: potential must be a GaussianPotential with loc of shape"):
            flow(z, noise, bad, good)
    with pytest.raises(TypeError, match="Flow: base_potential must have the dtype of z"):
        flow(z, noise, good, GaussianPotential(torch.ones(D).double(), torch.zeros(D).double()))
    with pytest.raises(ValueError, match="Flow: potential must be on the device of z, cpu"):
        flow(z, noise, GaussianPotential(torch.ones(D, device="meta"), torch.zeros(D, device="meta")), good)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(flow(z.bfloat16(), noise, good, good), flow(z.bfloat16().float(), noise, good, good))


@pytest.mark.parametrize("how", ["compiled", "vmap", "functional"])
def test_inside_transforms_and_compiled_functions(how):
    problem = Problem()
    flow, z, noise = flow_of(2, 1, 0.7, None, "states")
    base = problem.base()

    def value(z):
        return flow(z, noise, problem.potential, base)[1]

    expected = plain(flow, z, noise, problem.potential, base)[1]
    if how == "compiled":
        torch.testing.assert_close(torch.compile(value, fullgraph=True, backend="aot_eager")(z), expected)
    elif how == "functional":
        ours = torch.func.grad(lambda z: value(z).sum())(z)
        torch.testing.assert_close(ours, torch.autograd.grad(expected.sum(), z)[0])
    else:
        torch.testing.assert_close(torch.func.vmap(value)(z[None])[0], expected)


def test_without_gradients_and_in_inference_mode():
    problem = Problem()
    flow, z, noise = flow_of(3, 2, 0.7, None, "states")
    expected = plain(flow, z, noise, problem.potential, problem.base())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            ours = flow(z, noise, problem.potential, problem.base())
        torch.testing.assert_close(tuple(x.clone() for x in ours), tuple(x.detach() for x in expected))


@memories
@pytest.mark.parametrize("score_features", [None, 6])
def test_autocast_leaves_the_state_alone(memory, score_features):
    problem = Problem(torch.float32)
    flow, z, noise = flow_of(2, 1, 0.7, score_features, memory, torch.float32)
    z = z.detach().bfloat16().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = flow(z.bfloat16(), noise, problem.potential, problem.base())
    assert [x.dtype for x in ours] == [torch.float32] * 2
    theirs = plain(flow, z, noise, problem.potential, problem.base())
    leaves = [z, noise, *problem.leaves, *flow.parameters(), *problem.net.parameters()]
    found, expected = ((*x, *gradients_of(x, leaves)) for x in (ours, theirs))
    assert {x.dtype for x in found} == {torch.float32}
    assert max(testing.relative_error(a, b.double()) for a, b in zip(found, expected, strict=True)) < 0.1


@memories
def test_a_score_is_squared_in_the_precision_of_the_state(memory):
    """Autocast hands it over in bfloat16, where the square of this one does not fit."""
    flow = AnnealedHamiltonianFlow(D, 1, refreshment=0.6, score_features=2, memory=memory)
    with torch.no_grad():
        flow.score.network[-1].bias.fill_(1 + 2**-7)
    z, noise = torch.zeros(B, D), torch.zeros(2, B, D)
    plainly = flow(z, noise, lambda z: z.square().sum(-1), lambda z: z.square().sum(-1))
    with torch.autocast("cpu", torch.bfloat16):
        ours = flow(z, noise, lambda z: z.square().sum(-1), lambda z: z.square().sum(-1))
    torch.testing.assert_close(ours, plainly, rtol=1e-6, atol=0)


# ---- What makes it a bound ----


def gaussian_evidence(loc, scale):
    """``U(z) = |z - loc|^2 / (2 scale^2) - 0.7``: the evidence is the Gaussian's integral times ``e^0.7``."""
    return 0.7 + D * math.log(scale) + D / 2 * math.log(2 * math.pi)


def mixture_potential(z):
    first = -((z - 1.0) ** 2).sum(-1) / 2
    second = -((z + 1.5) ** 2).sum(-1) / (2 * 0.5**2) + 0.4
    return -torch.logaddexp(first, second)


MIXTURE_EVIDENCE = D / 2 * math.log(2 * math.pi) + math.log(1 + math.exp(0.4) * 0.5**D)


def log_weights(flow, potential, n, seed):
    """Logarithms of weights whose expectation is the evidence, of a base density N(0, 1.5^2)."""
    torch.manual_seed(seed)

    def base(z):
        return (z / 1.5).square().sum(-1) / 2 + D * math.log(1.5) + D / 2 * math.log(2 * math.pi)

    z = 1.5 * torch.randn(n, D, dtype=torch.float64)
    noise = torch.randn(flow.n_bridges + 1, n, D, dtype=torch.float64)
    with torch.no_grad():
        z_end, log_weight = flow(z, noise, potential, base)
        return -potential(z_end) + base(z) + log_weight


@pytest.mark.parametrize("refreshment", [0, 0.5, 0.99])
@pytest.mark.parametrize("leapfrog_steps", [1, 3])
@pytest.mark.parametrize("n_bridges", [1, 4, 32])
@pytest.mark.parametrize("target", ["gaussian", "mixture"])
def test_weights_are_unbiased_and_their_logarithms_below(target, n_bridges, leapfrog_steps, refreshment):
    if target == "gaussian":
        exact = gaussian_evidence(0.8, 0.6)
        potential = lambda z: ((z - 0.8) / 0.6).square().sum(-1) / 2 - 0.7  # noqa: E731
    else:
        exact, potential = MIXTURE_EVIDENCE, mixture_potential
    score = 4 if n_bridges == 4 else None
    torch.manual_seed(3)
    flow = AnnealedHamiltonianFlow(
        D, n_bridges, leapfrog_steps, refreshment, init_step_size=0.2, score_features=score, dtype=torch.float64
    )
    if score:
        with torch.no_grad():
            for parameter in flow.score.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    logs = log_weights(flow, potential, 10_000, seed=11) - exact
    weights = logs.exp()
    standard_error = weights.std() / len(weights) ** 0.5
    assert standard_error < 0.1
    assert abs(weights.mean() - 1) < 4 * standard_error
    assert logs.mean() < 4 * logs.std() / len(logs) ** 0.5


def test_the_bound_grows_with_the_number_of_bridges():
    bounds = []
    for n_bridges in (1, 2, 4, 8, 16, 32):
        flow = AnnealedHamiltonianFlow(D, n_bridges, refreshment=0.5, init_step_size=0.3, dtype=torch.float64)
        bounds.append(log_weights(flow, mixture_potential, 20_000, seed=2).mean() - MIXTURE_EVIDENCE)
    assert all(later > earlier for earlier, later in itertools.pairwise(bounds))


def test_a_score_that_knows_the_reverse_leaves_no_slack():
    """One refreshment of stationary momenta, then nothing: any other mean than the exact one loses."""
    flow = AnnealedHamiltonianFlow(D, 1, refreshment=0.6, score_features=2, dtype=torch.float64)
    potential = lambda z: z.square().sum(-1) / 2  # noqa: E731
    with torch.no_grad():
        flow.step_size_logit.fill_(-40.0)  # the leapfrog step stands still

    def spread(shift):
        torch.manual_seed(0)
        flow.score.network[-1].bias.data.fill_(shift)
        z, noise = torch.randn(100, D).double(), torch.randn(2, 100, D).double()
        return flow(z, noise, potential, potential)[1].std().item()

    assert spread(0.0) < 1e-12 < 0.1 < spread(0.5)


# ---- Work and memory ----


def test_gradient_evaluations_are_counted():
    """M L + 1 of each potential going, as many again coming back."""
    calls = {"potential": 0, "base": 0}
    problem = Problem()
    base = problem.base()

    def counted(name, function):
        def call(z):
            calls[name] += 1
            return function(z)

        return call

    flow, z, noise = flow_of(5, 2, 0.9, None, "states")
    _, log_weight = flow(z, noise, counted("potential", problem.potential), counted("base", base))
    assert calls == {"potential": 11, "base": 11}
    log_weight.sum().backward()
    assert calls == {"potential": 22, "base": 22}


class Kept:
    """A tensor that a graph keeps for as long as it keeps this."""

    def __init__(self, x):
        self.x = x


def saved_bytes(memory, n_bridges):
    problem, kept = Problem(), weakref.WeakSet()
    wide = nn.Sequential(nn.Linear(D, 512), nn.Tanh(), nn.Linear(512, 1)).double()

    def pack(x):
        holder = Kept(x)
        kept.add(holder)
        return holder

    flow, z, noise = flow_of(n_bridges, 1, 0.9, None, memory)
    base = problem.base()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.x):
        result = flow(z, noise, lambda z: wide(z).squeeze(-1), base)
    storages = {holder.x.untyped_storage().data_ptr(): holder.x.untyped_storage().nbytes() for holder in kept}
    del result
    return sum(storages.values())


def test_bytes_kept():
    """States alone, or not even those; a graph of the network a bridge where all is stored."""
    state = 2 * B * D * 8
    grown = {memory: saved_bytes(memory, 20) - saved_bytes(memory, 4) for memory in ("states", "reversible", "store")}
    tables = 16 * (5 * D + 2 + 1) * 8 * 4 + 16 * B * D * 8 * 2  # coefficients, on their way too, and the noise itself
    assert grown["reversible"] <= tables
    assert grown["states"] <= 16 * state + tables
    assert grown["store"] > 16 * B * 512 * 8


# ---- Parameters ----


def test_betas_and_refreshment_lose_nothing_to_cancellation():
    flow = AnnealedHamiltonianFlow(D, 6, dtype=torch.float64)
    with torch.no_grad():
        flow.beta_logits.copy_(torch.tensor([0.0, 1.0, -2.0, 0.5, -40.0, -45.0]))
        flow.refreshment_logit.fill_(40.0)
    beta, rest = flow.betas()
    assert beta[-1] == 1
    assert rest[-1] == 0
    increments = flow.beta_logits.softmax(-1)
    torch.testing.assert_close(rest[-2], increments[-1], rtol=1e-12, atol=0)
    torch.testing.assert_close(beta + rest, torch.ones_like(beta))
    eta, sigma = flow.refreshment()
    torch.testing.assert_close(sigma, torch.tensor(2 * math.exp(-40.0), dtype=torch.float64).sqrt(), rtol=1e-12, atol=0)
    assert eta <= 1


def test_given_betas_stay_and_state_dicts_come_back():
    given = torch.tensor([0.2, 0.2, 1.0])
    flow = AnnealedHamiltonianFlow(D, 3, betas=given, learn_refreshment=False)
    torch.testing.assert_close(flow.betas(), (given, 1 - given))
    assert [name for name, _ in flow.named_parameters()] == ["step_size_logit"]
    other = AnnealedHamiltonianFlow(D, 3, betas=torch.ones(3), learn_refreshment=False, refreshment=0.1)
    other.load_state_dict(flow.state_dict())
    torch.testing.assert_close(other.refreshment(), flow.refreshment())
    torch.testing.assert_close(other.betas(), flow.betas())


def test_no_bridges_are_the_identity():
    flow, z, noise = AnnealedHamiltonianFlow(D, 0), torch.randn(B, D), torch.randn(1, B, D)
    z_end, log_weight = flow(z, noise, Problem().potential, Problem().base())
    assert torch.equal(z_end, z)
    assert torch.equal(log_weight, torch.zeros(B))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 0}, "features must be an integer of at least 1"),
        ({"n_bridges": -1}, "n_bridges must be an integer of at least 0"),
        ({"leapfrog_steps": 0}, "leapfrog_steps must be an integer of at least 1"),
        ({"refreshment": 1.0}, r"refreshment must be in \[0, 1\)"),
        ({"init_step_size": 0.6}, "init_step_size must be between 0 and max_step_size"),
        ({"memory": "none"}, "memory must be one of states, store, reversible"),
        (
            {"betas": torch.tensor([0.5, 0.2])},
            "betas must be of shape .2,. with values in .*, the last one 1, got list",
        ),
        ({"betas": torch.tensor([math.nan, 1.0])}, "betas must be of shape .2,. with values in .*, got list .nan, 1"),
        ({"max_step_size": math.inf}, "max_step_size must be finite, got float inf"),
        ({"init_step_size": math.nan}, "init_step_size must be finite"),
        ({"refreshment": math.nan}, "refreshment must be finite"),
        ({"betas": torch.tensor([1.0])}, "betas must be of shape"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises((TypeError, ValueError), match=f"AnnealedHamiltonianFlow: {message}"):
        AnnealedHamiltonianFlow(**{"features": D, "n_bridges": 2, **options})


def test_bad_calls():
    flow, z, noise = AnnealedHamiltonianFlow(D, 2), torch.randn(B, D), torch.randn(3, B, D)
    problem = Problem(torch.float32)
    good = problem.potential
    for arguments, message in (
        ((z, noise[:2], good, good), "noise must be of shape .*: M . 1 of z's"),
        ((z[:, :2], noise, good, good), "z must be a tensor of shape"),
        ((z, noise, 3, good), "potential must be a function or a torch.nn.Module"),
        ((z, noise, good, lambda z: z.square()), "base_potential must be a function with energies"),
        ((z, noise, lambda z: torch.ones(B), good), "potential must be a differentiable function of z"),
        ((z, noise, good, lambda z: torch.ones(B)), "base_potential must be a differentiable function of z"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"AnnealedHamiltonianFlow: {message}"):
            flow(*arguments)
    with pytest.raises(ValueError, match="AnnealedHamiltonianFlow: base_potential must be a function with energies"):
        torch.func.grad(lambda z: flow(z, noise, good, lambda z: z.square())[1].sum())(z)


def test_what_is_not_given_is_refused_and_what_is_random_too():
    problem = Problem(torch.float32)
    flow, z, noise = AnnealedHamiltonianFlow(D, 2), torch.randn(B, D), torch.randn(3, B, D)
    with pytest.raises(ValueError, match="AnnealedHamiltonianFlow: params must be all tensors"):
        flow(z, noise, problem.potential, problem.base(), params=[problem.loc])
    with pytest.raises(ValueError, match="AnnealedHamiltonianFlow: potential draws random numbers"):
        flow(z, noise, lambda z: nn.functional.dropout(z).sum(-1), problem.base())
    with pytest.raises(ValueError, match="AnnealedHamiltonianFlow: base_potential draws random numbers"):
        flow(z, noise, problem.potential, lambda z: nn.functional.dropout(z).sum(-1))


@pytest.mark.parametrize("implementation", ["cpp", "triton", "reference"])
def test_a_point_is_undone(implementation):
    """Backwards with exchanged kicks, the inverse refreshment and a drift before: the momentum comes back."""
    z, rho, base_grad, grad, noise = torch.randn(5, B, D, dtype=torch.float64)
    kicks, eta, sigma = torch.rand(5, D, dtype=torch.float64), 0.6, 0.8
    mixing = torch.tensor([eta, sigma], dtype=torch.float64)
    z_next, rho_next, _ = annealed_leapfrog_update(
        z, rho, base_grad, grad, noise, kicks, mixing, implementation=implementation
    )
    none, start = torch.zeros(D, dtype=torch.float64), z_next - kicks[4] * rho_next
    back = torch.stack([-kicks[2], -kicks[3], -kicks[0], -kicks[1], none])
    inverse = torch.tensor([1 / eta, -sigma / eta], dtype=torch.float64)
    _, momentum, _ = annealed_leapfrog_update(
        start, rho_next, base_grad, grad, noise, back, inverse, implementation=implementation
    )
    torch.testing.assert_close((start, momentum), (z, rho))


@pytest.mark.parametrize("memory", RECOMPUTED)
def test_compiled_gradient(memory):
    """Of the potential, everywhere but at the first point going."""
    problem = Problem(torch.float32)
    flow, z, noise = flow_of(3, 1, 0.9, None, memory, torch.float32, compile=True)
    leaves = [z, *flow.parameters(), *problem.net.parameters()]
    with mock.patch.object(field, "_compiled_gradient", wraps=field._compiled_gradient) as compiled:
        ours = flow(z, noise, problem.potential, problem.base())
        gradients = gradients_of(ours, leaves)
    assert compiled.call_count == 3 + 4
    theirs = plain(flow, z, noise, problem.potential, problem.base())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, gradients_of(theirs, leaves), rtol=1e-3, atol=1e-4)


def quadratic(locs, scale):
    """About each row of ``locs``."""
    return lambda z: sum(((z - loc) * scale).square().sum(-1) for loc in locs)


#: What two tensors are made from, and the second one of the first.
MADE = {
    "leaf": (lambda leaf: leaf, lambda near: near * 3),
    "scaled": (lambda leaf: leaf.sin(), lambda near: near * 2),
    "saved": (lambda leaf: leaf.sin(), lambda near: near * near.exp()),
    "part": (lambda leaf: leaf, lambda near: (near + 1)[:1]),
}


@memories
@pytest.mark.parametrize("where", ["potential", "base", "both", "both, the other way"])
@pytest.mark.parametrize("made", MADE)
def test_tensors_made_from_one_another_count_once(made, where, memory):
    """Both in the closure of one potential, or one in each."""
    first, second = MADE[made]
    values, found = torch.randn(2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), {}
    for kept in ("store", memory):
        leaf = values.clone().requires_grad_()
        whole = first(leaf)
        made_of_it = second(whole)
        near, far, other = quadratic(whole, 0.7), quadratic(made_of_it, 0.4), quadratic(torch.zeros(1), 0.5)

        def together(z, near=near, far=far):
            return near(z) + far(z)

        potential, base = {
            "potential": (together, other),
            "base": (other, together),
            "both": (near, far),
            "both, the other way": (far, near),
        }[where]
        flow, z, noise = flow_of(3, 1, 0.7, None, kept)
        found[kept] = gradients_of(flow(z, noise, potential, base), [leaf])[0]
    assert found["store"].abs().max() > 1e-2
    torch.testing.assert_close(found[memory], found["store"], rtol=1e-9, atol=1e-9)
    if "both" in where and memory != "store":
        with pytest.raises(ValueError, match="params must be tensors of which none is made from another"):
            flow(z, noise, potential, base, params=[whole, made_of_it, leaf])


# ---- The score in the backward pass ----


def score_case(memory, dtype=torch.float64, n_bridges=3):
    """A flow with a score, under parameters that stand in for its own, and what made them."""
    flow, z, noise = flow_of(n_bridges, 1, 0.7, 6, memory, dtype)
    scale = torch.full((), 0.9, dtype=dtype, requires_grad=True)
    return flow, z, noise, scale, {name: x.detach() * scale for name, x in flow.named_parameters()}


@pytest.mark.parametrize("memory", RECOMPUTED)
@pytest.mark.parametrize("shared", [False, True])
def test_a_score_under_functional_call(shared, memory):
    """Its tensors are gone when the backward pass needs them, and may be made from what a potential reads."""
    results = []
    for kept in ("store", memory):
        problem = Problem()
        flow, z, noise, scale, others = score_case(kept)
        base = quadratic([scale], 0.5) if shared else problem.base()
        ours = torch.func.functional_call(flow, others, (z, noise, problem.potential, base))
        leaves = [scale, z, *problem.leaves, *([] if shared else others.values())]
        results.append([*ours, *gradients_of(ours, leaves)])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)
    assert results[0][2].abs() > 1e-3


@pytest.mark.parametrize("memory", RECOMPUTED)
def test_a_frozen_score_that_is_written_in_place_is_refused(memory):
    problem = Problem()
    flow, z, noise = flow_of(3, 1, 0.7, 6, memory)
    flow.score.requires_grad_(False)
    _, log_weight = flow(z, noise, problem.potential, problem.base())
    with torch.no_grad():
        flow.score.network[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"AnnealedHamiltonianFlow: 'weight' .*, which score reads, was modified"):
        log_weight.sum().backward()


@memories
def test_a_score_in_single_precision(memory):
    problem, results = Problem(torch.float32), []
    for kept in ("store", memory):
        flow, z, noise = flow_of(4, 2, 0.7, 6, kept, torch.float32)
        ours = flow(z, noise, problem.potential, problem.base())
        results.append([*ours, *gradients_of(ours, [z, noise, *problem.leaves, *flow.parameters()])])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


# ---- What cannot be rebuilt ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gradient", ["full", "detached"])
def test_momenta_that_do_not_come_back_are_refused(gradient, dtype):
    """Each bridge divides by eta; where that is near 1 the same number of bridges comes back."""
    problem, results = Problem(dtype), []
    for memory in ("states", "reversible"):
        flow, z, noise = flow_of(40, 1, 0.3, None, memory, dtype, gradient=gradient, learn_refreshment=False)
        _, log_weight = flow(z, noise, problem.potential, problem.base())
        if memory == "reversible":
            with pytest.raises(RuntimeError, match=r"AnnealedHamiltonianFlow: .* missed .*: use memory='states'"):
                log_weight.sum().backward()
        else:
            log_weight.sum().backward()
        flow, z, noise = flow_of(64, 1, 0.9, None, memory, dtype, gradient=gradient, learn_refreshment=False)
        ours = flow(z, noise, problem.potential, problem.base())
        results.append(gradients_of(ours, [z, noise, *problem.leaves, *flow.parameters()]))
    exactness = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(*results, **exactness)


def test_momenta_that_were_never_finite_are_not_blamed_on_the_way_back():
    flow, z, noise = flow_of(2, 1, 0.7, None, "reversible")
    _, log_weight = flow(z, noise, lambda z: z.square().sum(-1) * math.inf, lambda z: z.square().sum(-1))
    log_weight.sum().backward()


@pytest.mark.parametrize("memory", RECOMPUTED)
@pytest.mark.parametrize("argument", ["potential", "base_potential"])
def test_errors_of_the_backward_pass_name_the_potential(argument, memory):
    def run(module):
        flow, z, noise = flow_of(2, 1, 0.7, None, memory)
        potentials = {"potential": lambda z: z.square().sum(-1), "base_potential": lambda z: z.square().sum(-1)}
        return flow(z, noise, **potentials | {argument: lambda z: module(z).sum(-1)})[1].sum()

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, z):
            self.count += 1
            return z.square()

    def said(words):
        return pytest.raises((ValueError, RuntimeError), match=f"^AnnealedHamiltonianFlow: {words}")

    with said(f"{argument} changes 'count' .* at every evaluation"):
        run(Counting())
    net = nn.Sequential(nn.Linear(D, 4), nn.Tanh()).double().requires_grad_(False)
    loss = run(net)
    net[0].weight += 1
    with said(f"'weight' .*, which {argument} reads, was modified"):
        loss.backward()
    loss = run(net.train())
    net.eval()
    with said(f"a module of {argument} changed its mode"):
        loss.backward()
    loss = run(net)
    net[0].weight.data += 1
    with said(f"{argument} has another gradient in the backward pass .* keeps what it was$"):
        loss.backward()


def test_the_choice_of_implementation_reaches_the_updates(monkeypatch):
    problem = Problem()
    flow, z, noise = flow_of(2, 1, 0.7, None, "states")
    called = []

    def recorded(implementation, *inputs):
        called.append(implementation)
        return call(implementation, *inputs)

    call = autograd.call
    monkeypatch.setattr(autograd, "call", recorded)
    for implementation, expected in (("cpp", {"cpp"}), ("reference", set())):
        called.clear()
        with hk.use_impl(implementation):
            _, log_weight = flow(z, noise, problem.potential, problem.base())
        log_weight.sum().backward()  # outside of the block: the backward pass keeps to the choice
        assert set(called) == expected


@interpreted
@pytest.mark.parametrize("changed", [{"_MOST_PROGRAMS": 2}, {"_BLOCK": 4, "_FINISHED": 4, "_PARTS": 2}])
def test_programs_that_take_several_tiles(changed, monkeypatch):
    """As on a GPU from 65,537 rows on; and several programs' sums, in parts and in groups of columns."""
    from hvae_kernels.ops.annealed_leapfrog import triton

    for name, value in changed.items():
        monkeypatch.setattr(triton, name, value)
    state = [torch.randn(900, 7, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    kicks = torch.rand(5, 7, dtype=torch.float64, requires_grad=True)
    inputs = (*state, kicks, torch.tensor([0.6, 0.8], dtype=torch.float64, requires_grad=True))
    upstream = [torch.randn_like(y) for y in reference.annealed_leapfrog_update(*inputs)]
    expected = torch.autograd.grad(reference.annealed_leapfrog_update(*inputs), inputs, upstream)
    with hk.use_impl("triton"):
        found = torch.autograd.grad(annealed_leapfrog_update(*inputs), inputs, upstream)
    torch.testing.assert_close(found, expected)
