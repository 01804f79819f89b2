"""``leapfrog`` through any potential: equal to autograd through the unrolled formula, and what it promises beside."""

import contextlib
import copy
import math
import os
import subprocess
import sys
import threading
import types

import pytest
import torch
from torch import nn

import hvae_kernels as hk
from hvae_kernels import testing
from hvae_kernels.ops.gaussian_leapfrog.reference import trajectory
from hvae_kernels.ops.leapfrog import field, reference, statistics

leapfrog = hk.functional.leapfrog
FEATURES, PIXELS, ROWS, STEPS = 5, 16, 6, 4
each_memory = pytest.mark.parametrize("memory", ["reversible", "store"])


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


class Decoder(nn.Module):
    """``-log p(x, z)`` up to a constant, Bernoulli pixels."""

    def __init__(self, network, features=FEATURES):
        super().__init__()
        self.network = network
        self.register_buffer("x", torch.rand(ROWS, PIXELS))

    def forward(self, z):
        logits = self.network(z).flatten(1)
        fit = nn.functional.binary_cross_entropy_with_logits(logits, self.x[: len(z)], reduction="none")
        return fit.sum(-1) + z.flatten(1).square().sum(-1) / 2


def mlp():
    return Decoder(nn.Sequential(nn.Linear(FEATURES, 20), nn.Softplus(), nn.Linear(20, PIXELS)))


def batch_norm():
    layers = nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, 20), nn.Softplus(), nn.BatchNorm1d(20)
    return Decoder(nn.Sequential(*layers, nn.Linear(20, PIXELS)))


def convolution():
    layers = (
        nn.Linear(FEATURES, 8),
        nn.Unflatten(1, (2, 2, 2)),
        nn.Conv2d(2, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
    )
    return Decoder(nn.Sequential(*layers, nn.Softplus(), nn.Upsample(scale_factor=2), nn.Conv2d(3, 1, 3, padding=1)))


POTENTIALS = {"mlp": mlp, "batch norm": batch_norm, "convolution": convolution}
STEP_SHAPES = {"scalar": (), "features": (FEATURES,), "steps": (STEPS, FEATURES)}


def inputs(dtype=torch.float64, shape=(ROWS, FEATURES), step=(), n_steps=STEPS):
    """``z, rho, step_size, tempering``, leaves."""
    z, rho = torch.randn(2, *shape, dtype=torch.float64).to(dtype)
    step_size, tempering = 0.05 + 0.1 * torch.rand(step).to(dtype), 0.7 + 0.4 * torch.rand(n_steps).to(dtype)
    return [x.requires_grad_() for x in (z, rho, step_size, tempering)]


def results_and_gradients(op, potential, leaves, **options):
    """Both results, gradients of the inputs, and those of all parameters as one vector."""
    z, rho, step_size, tempering = leaves
    end = op(z, rho, potential, step_size, tempering, **options)
    torch.manual_seed(1)
    loss = sum((x * torch.randn(x.shape, dtype=torch.float64)).sum() + x.sin().sum() for x in end)
    of_inputs, of_parameters = (
        torch.autograd.grad(loss, x, retain_graph=True) for x in (leaves, [*potential.parameters()])
    )
    return *end, *of_inputs, torch.cat([x.flatten() for x in of_parameters])


def to(dtype, potential, leaves):
    """Copies in another precision."""
    return copy.deepcopy(potential).to(dtype), [x.detach().to(dtype).requires_grad_() for x in leaves]


# ---- The reference ----


@each_memory
@pytest.mark.parametrize("step", STEP_SHAPES)
@pytest.mark.parametrize("name", POTENTIALS)
def test_equals_autograd_through_the_formula(name, step, memory):
    potential, leaves = to(torch.float64, POTENTIALS[name](), inputs(step=STEP_SHAPES[step]))
    exact = results_and_gradients(reference.leapfrog, copy.deepcopy(potential), leaves)
    ours = results_and_gradients(leapfrog, potential, leaves, memory=memory)
    for result, oracle in zip(ours, exact, strict=True):
        assert testing.relative_error(result, oracle) < 1e-8


@each_memory
@pytest.mark.parametrize("name", POTENTIALS)
def test_float32_is_as_exact_as_the_formula(name, memory):
    potential = POTENTIALS[name]()

    def run(op, leaves, **options):
        return results_and_gradients(op, *to(leaves[0].dtype, potential, leaves), **options)

    testing.assert_as_exact(
        lambda *leaves: run(leapfrog, leaves, memory=memory),
        lambda *leaves: run(reference.leapfrog, leaves),
        lambda: inputs(torch.float32, step=(FEATURES,), n_steps=15),
    )


@each_memory
def test_detached_takes_gradients_of_the_potential_for_constants(memory):
    potential, leaves = to(torch.float64, mlp(), inputs(step=(FEATURES,)))

    def gradients(op, **options):
        end = op(leaves[0], leaves[1], potential, *leaves[2:], gradient="detached", **options)
        assert not any(p.grad for p in potential.parameters())
        return *end, *torch.autograd.grad(end[0].sin().sum() + end[1].cos().sum(), leaves)

    torch.testing.assert_close(gradients(leapfrog, memory=memory), gradients(reference.leapfrog))


@each_memory
@pytest.mark.parametrize("step", ["scalar", "features", "steps"])
def test_gaussian_potential_agrees_with_the_collapsed_map(step, memory):
    z, rho, step_size, tempering = leaves = inputs(step=STEP_SHAPES[step])
    precision, loc = (x.requires_grad_() for x in (double(FEATURES).exp(), double(FEATURES)))
    potential = hk.nn.GaussianPotential(precision, loc)
    ours = leapfrog(z, rho, potential, step_size, tempering, memory=memory)
    collapsed = hk.functional.gaussian_leapfrog(z, rho, precision, loc, step_size, tempering)
    torch.testing.assert_close(ours, collapsed)
    wanted = [*leaves, precision, loc]
    gradients = (torch.autograd.grad(a.sin().sum() + b.cos().sum(), wanted) for a, b in (ours, collapsed))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("batch", "event"), [((), (3,)), ((4,), ()), ((4,), (3,)), ((2, 4), (3,)), ((4,), (2, 3)), ((4,), (2, 1, 3))]
)
@each_memory
def test_any_shape_of_a_position(batch, event, memory):
    """The energies say which dimensions are the batch's; step sizes have a position's shape."""
    weight = double(*event)

    def potential(z):
        return (z + weight * z**3).square().reshape(*batch, -1).sum(-1)

    for step in ((), event, (3, *event)):
        z, rho, step_size, tempering = inputs(shape=(*batch, *event), step=step, n_steps=3)
        ours = leapfrog(z, rho, potential, step_size, tempering, memory=memory)
        rows = step_size.reshape(*step[: len(step) - len(event)], -1) if step else step_size
        flat = z.reshape(*batch, -1), rho.reshape(*batch, -1)
        law = reference.leapfrog(*flat, lambda z: potential(z.reshape(*batch, *event)), rows, tempering)
        torch.testing.assert_close(ours, tuple(x.reshape(z.shape) for x in law))
        assert torch.autograd.grad(ours[0].sum(), step_size)[0].shape == step_size.shape


# ---- Properties of the map ----


@each_memory
def test_reversible(memory):
    """Flip the momentum, divide by the tempering, step again: back at the start, one step at a time."""
    potential, (z, rho, step_size, tempering) = to(torch.float64, mlp(), inputs())
    with torch.no_grad():
        end, momentum = leapfrog(z, rho, potential, step_size, tempering, memory=memory)
        for alpha in tempering.flip(0):
            one = torch.ones(1, dtype=torch.float64)
            end, momentum = leapfrog(end, -momentum / alpha, potential, step_size, one, memory=memory)
            momentum = -momentum
    torch.testing.assert_close((end, momentum), (z.detach(), rho.detach()), rtol=1e-12, atol=1e-12)


@each_memory
def test_jacobian_determinant(memory):
    """``prod_k alpha_k^d``, by autograd's full Jacobian through the rebuilt trajectory."""
    potential, (_, _, step_size, tempering) = to(torch.float64, mlp(), inputs(step=(FEATURES,)))

    def flow(state):
        z, rho = state.view(2, 1, FEATURES)
        return torch.cat(leapfrog(z, rho, potential, step_size, tempering, memory=memory)).flatten()

    jacobian = torch.autograd.functional.jacobian(flow, double(2 * FEATURES))
    torch.testing.assert_close(torch.linalg.det(jacobian), tempering.detach().prod() ** FEATURES)


@each_memory
def test_runs_downhill(memory):
    """From rest and by a small step, the momentum is minus the step times finite differences of U."""
    potential = mlp().double()
    z, step_size, width = double(ROWS, FEATURES), torch.tensor(1e-6, dtype=torch.float64), 1e-5
    ones = torch.ones(1, dtype=torch.float64)
    with torch.no_grad():
        _, rho = leapfrog(z, torch.zeros_like(z), potential, step_size, ones, memory=memory)
        moved = width * torch.eye(FEATURES, dtype=torch.float64)
        slopes = [(potential(z + e) - potential(z - e)) / (2 * width) for e in moved]
    torch.testing.assert_close(rho / step_size, -torch.stack(slopes, -1), rtol=1e-5, atol=1e-5)


def test_rows_do_not_see_each_other():
    potential, (z, rho, step_size, tempering) = to(torch.float64, mlp(), inputs())
    whole = leapfrog(z, rho, potential, step_size, tempering)
    part = leapfrog(z[:2], rho[:2], potential, step_size, tempering)
    torch.testing.assert_close(part, tuple(x[:2] for x in whole))


@each_memory
def test_without_steps_returns_copies(memory):
    z, rho, step_size, tempering = inputs(n_steps=0)
    end = leapfrog(z, rho, lambda z: z.sum(-1), step_size, tempering, memory=memory)
    torch.testing.assert_close(end, (z, rho))
    assert end[0].data_ptr() != z.data_ptr()
    assert end[1].data_ptr() != rho.data_ptr()


# ---- What it costs ----


class Counted(nn.Module):
    def __init__(self, potential):
        super().__init__()
        self.potential, self.calls = potential, 0

    def forward(self, z):
        self.calls += 1
        return self.potential(z)


@pytest.mark.parametrize(("memory", "backward"), [("reversible", STEPS + 1), ("store", 0)])
def test_gradient_evaluations(memory, backward):
    """K + 1 forward; rebuilding takes as many again."""
    potential = Counted(mlp())
    leaves = inputs(torch.float32)
    z, _ = leapfrog(*leaves[:2], potential, *leaves[2:], memory=memory)
    assert potential.calls == STEPS + 1
    z.sum().backward()
    assert potential.calls == STEPS + 1 + backward


def kept(memory, n_steps):
    potential, leaves = mlp(), inputs(torch.float32, n_steps=n_steps)
    known = [*leaves, *potential.parameters(), *potential.buffers()]
    return testing.saved_bytes(lambda: leapfrog(*leaves[:2], potential, *leaves[2:], memory=memory), known)


def test_memory_does_not_grow_with_steps():
    """Kept in double are the end and K + 1 rows of coefficients, without a batch; stored trajectories keep graphs."""
    coefficients = {n: 8 * (n + 1) * (2 * FEATURES + 2) for n in (1, 50)}
    ends = 2 * 8 * ROWS * FEATURES
    assert {n: kept("reversible", n) for n in (1, 50)} == {n: ends + size for n, size in coefficients.items()}
    assert kept("store", 50) > 20 * kept("store", 1)


def test_bitwise_repeatable():
    potential, leaves = convolution(), inputs(torch.float32, step=(FEATURES,))
    runs = [results_and_gradients(leapfrog, potential, leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---- Derivatives ----


def test_second_derivative_raises():
    potential, leaves = mlp(), inputs(torch.float32)
    z, _ = leapfrog(*leaves[:2], potential, *leaves[2:])
    (grad,) = torch.autograd.grad(z.sum(), leaves[0], create_graph=True)
    for wanted in (leaves[0], leaves[2], potential.network[0].weight):
        with pytest.raises(RuntimeError, match="leapfrog: memory='reversible' is differentiable once"):
            torch.autograd.grad((grad * leaves[0]).sum() + wanted.sum(), wanted, retain_graph=True)


def test_stored_trajectory_differentiates_again():
    potential, leaves = to(torch.float64, mlp(), inputs())
    curvatures = []
    for op in (lambda *a: leapfrog(*a, memory="store"), reference.leapfrog):
        (grad,) = torch.autograd.grad(
            op(*leaves[:2], potential, *leaves[2:])[0].sin().sum(), leaves[0], create_graph=True
        )
        curvatures.append(torch.autograd.grad(grad.square().sum(), [*leaves, *potential.parameters()]))
    torch.testing.assert_close(*curvatures)


@each_memory
@pytest.mark.parametrize("implementation", ["cpp", "reference"])
def test_implementation_of_a_call(implementation, memory):
    """That of the updates, in the backward pass too; ``use_impl`` names one that no op has."""
    potential, leaves = mlp(), inputs(torch.float32)
    options = {"memory": memory, "implementation": implementation}
    with hk.use_impl(implementation):
        expected = results_and_gradients(leapfrog, potential, leaves, memory=memory)
    with hk.use_impl("cuda"):
        assert all(map(torch.equal, results_and_gradients(leapfrog, potential, leaves, **options), expected))
        z, rho, *steps = (x.detach() for x in leaves)
        with torch.inference_mode():
            results = leapfrog(z, rho, potential, *steps, **options)
        gradient = torch.func.grad(lambda z: leapfrog(z, rho, potential, *steps, **options)[0].sum())(z)
    torch.testing.assert_close(results, tuple(expected[:2]))
    assert gradient.shape == z.shape
    for name, error in (("cuda", RuntimeError), ("fast", ValueError)):
        with pytest.raises(error, match=f"implementation .*{name}"):
            leapfrog(z, rho, potential, *steps, implementation=name)


@pytest.mark.parametrize("index", range(4))
def test_partial_gradients(index):
    """Each input alone, and a module whose parameters are partly frozen."""
    potential, leaves = to(torch.float64, mlp(), inputs())
    potential.network[0].weight.requires_grad_(False)
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i == index)
    wanted = [leaves[index], *(p for p in potential.parameters() if p.requires_grad)]
    grads = [
        torch.autograd.grad(op(*leaves[:2], potential, *leaves[2:])[1].sin().sum(), wanted)
        for op in (leapfrog, reference.leapfrog)
    ]
    torch.testing.assert_close(*grads)


def test_params_of_a_function_are_given():
    """Leaves or not: the potential of a decoder whose context comes from an encoder."""
    weight, features = double(FEATURES, FEATURES).requires_grad_(), double(ROWS, FEATURES)
    leaves = inputs()
    context = (features @ weight).tanh()
    scale = double(FEATURES).exp().requires_grad_()

    def potential(z):
        return (scale * (z - context).square() + z**4).sum(-1)

    def gradients(op, **options):
        end = op(*leaves[:2], potential, *leaves[2:], **options)
        return torch.autograd.grad(end[0].sin().sum() + end[1].sum(), [*leaves, weight, scale], retain_graph=True)

    torch.testing.assert_close(gradients(leapfrog, params=[context, scale]), gradients(reference.leapfrog))
    for missing in ([context], [scale], None):
        with pytest.raises(ValueError, match="leapfrog: params must be all tensors that need gradients through potent"):
            leapfrog(*leaves[:2], potential, *leaves[2:], params=missing)
    leapfrog(*leaves[:2], potential, *leaves[2:], gradient="detached")  # needs none of them
    with torch.no_grad():
        leapfrog(*leaves[:2], potential, *leaves[2:])


# ---- A potential that stays the same ----


@each_memory
@pytest.mark.parametrize("as_module", [True, False])
def test_running_statistics_are_updated_once(as_module, memory):
    """By the batch at z_0, whether the potential is a module or a function that calls one."""
    module, once = batch_norm().double(), batch_norm().double()
    once.load_state_dict(module.state_dict())
    leaves = inputs()
    once(leaves[0])
    potential = module if as_module else lambda z: module(z)
    end = leapfrog(*leaves[:2], potential, *leaves[2:], params=list(module.parameters()), memory=memory)
    end[0].sum().backward()
    torch.testing.assert_close(dict(module.named_buffers()), dict(once.named_buffers()))
    assert all(m.track_running_stats for m in module.modules() if isinstance(m, nn.BatchNorm1d))


@each_memory
@pytest.mark.parametrize("norm", [nn.BatchNorm1d(PIXELS), nn.InstanceNorm1d(PIXELS, track_running_stats=True)])
def test_running_statistics_are_updated_once_by_each_of_several_threads(memory, norm):
    """One thread's trajectories hold the statistics while another one's begin."""
    n_threads, n_calls = 4, 20
    layers = nn.Linear(FEATURES, 3 * PIXELS), nn.Unflatten(1, (PIXELS, 3)), copy.deepcopy(norm), nn.AvgPool1d(3)
    module = Decoder(nn.Sequential(*layers)).double()
    once = copy.deepcopy(module)
    leaves, barrier = inputs(), threading.Barrier(n_threads)

    def work():
        barrier.wait()
        for _ in range(n_calls):
            end = leapfrog(*leaves[:2], module, *leaves[2:], memory=memory)
            torch.autograd.grad(end[0].sum(), leaves[:1])

    threads = [threading.Thread(target=work, daemon=True) for _ in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not any(thread.is_alive() for thread in threads)
    for _ in range(n_threads * n_calls):
        once(leaves[0])
    torch.testing.assert_close(dict(module.named_buffers()), dict(once.named_buffers()))
    assert not statistics._HELD
    assert not statistics._UPDATING


@contextlib.contextmanager
def updating(norm):
    updates = statistics.Updates()
    updates.begin(norm)
    try:
        yield
    finally:
        updates.end()


@pytest.mark.parametrize(
    ("first", "second"), [(updating, updating), (updating, statistics.held), (statistics.held, updating)]
)
def test_updates_wait_for_other_threads_and_are_waited_for(first, second):
    """The order that the threads above meet by chance."""
    norm, entered = nn.BatchNorm1d(PIXELS), threading.Event()

    def enter(block):
        return block([norm] if block is statistics.held else norm)

    def work():
        with enter(second):
            entered.set()

    thread = threading.Thread(target=work, daemon=True)
    with enter(first):
        thread.start()
        assert not entered.wait(0.2)
    assert entered.wait(60)
    thread.join(60)
    assert not statistics._HELD
    assert not statistics._UPDATING


@each_memory
def test_a_trajectory_inside_an_evaluation_of_another_updates_once(memory):
    """Both meet the same batch norm; in a thread, as neither may wait for the other."""
    inner, leaves = batch_norm().double(), inputs()
    given = [x.detach() for x in leaves[2:]]

    def potential(z):
        return inner(leapfrog(z, torch.zeros_like(z), inner, *given, memory="store")[0])

    def work():
        leapfrog(*leaves[:2], potential, *given, params=list(inner.parameters()), memory=memory)
        done.append(True)

    done, thread = [], threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert done
    for module in (m for m in inner.modules() if isinstance(m, nn.BatchNorm1d)):
        assert module.num_batches_tracked == 2  # at the start of the inner trajectory, and in the call beside it
    assert not statistics._HELD
    assert not statistics._UPDATING


def test_statistics_are_tracked_again_after_an_error():
    module, leaves = batch_norm(), inputs(torch.float32)

    def fail(m, _):
        assert m.track_running_stats, "not at the first evaluation"

    module.network[0].register_forward_pre_hook(fail)
    with pytest.raises(AssertionError, match="not at the first"):
        leapfrog(*leaves[:2], module, *leaves[2:])
    assert all(m.track_running_stats for m in module.modules() if isinstance(m, nn.BatchNorm1d))


def test_random_potential():
    """Refused where the trajectory is rebuilt; a stored one draws anew at each evaluation, as the formula does."""
    potential = Decoder(nn.Sequential(nn.Linear(FEATURES, 20), nn.Dropout(), nn.Linear(20, PIXELS))).double()
    leaves = inputs()
    with pytest.raises(ValueError, match="leapfrog: potential draws random numbers"):
        leapfrog(*leaves[:2], potential, *leaves[2:])
    both = []
    for op in (lambda *a: leapfrog(*a, memory="store"), reference.leapfrog):
        torch.manual_seed(7)
        both.append(results_and_gradients(op, potential, leaves))
    torch.testing.assert_close(*both)
    leapfrog(*leaves[:2], potential.eval(), *leaves[2:])
    with torch.no_grad():
        leapfrog(*leaves[:2], potential.train(), *leaves[2:])


def test_changes_before_the_backward_pass_are_seen():
    potential, leaves = batch_norm(), inputs(torch.float32)
    z, _ = leapfrog(*leaves[:2], potential, *leaves[2:])
    potential.eval()
    with pytest.raises(RuntimeError, match="leapfrog: a module of potential changed its mode"):
        z.sum().backward()
    potential.train()
    z, _ = leapfrog(*leaves[:2], potential, *leaves[2:])
    with torch.no_grad():
        potential.network[1].weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_a_change_of_params_is_seen_wherever_potential_holds_them():
    """Autograd watches those that the snapshot of what ``potential`` reads does not find: here, too deep for it."""
    (z, rho, *steps), weight = inputs(), double(FEATURES).requires_grad_()
    model = types.SimpleNamespace(layer=types.SimpleNamespace(weight=weight))
    z, _ = leapfrog(z, rho, lambda x: ((x * model.layer.weight) ** 4).sum(-1), *steps, params=[weight])
    with torch.no_grad():
        weight += 1e-9
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_autocast_is_the_same_in_the_backward_pass():
    potential, leaves = mlp(), inputs(torch.float32)
    seen = []
    potential.network[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        z, rho = leapfrog(*leaves[:2], potential, *leaves[2:])
    (z.sum() + rho.sum()).backward()
    assert seen == [torch.bfloat16] * (2 * STEPS + 2)
    assert z.dtype == rho.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        half = [x.detach().bfloat16() for x in leaves]
        assert leapfrog(*half[:2], potential, *half[2:])[0].dtype is torch.float32


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-10), (torch.float64, 1e-12)])
def test_drift_is_reported(dtype, bound):
    """Double's rounding, whatever the potential computes in; more than that where the potential has changed."""
    potential, leaves = to(dtype, mlp(), inputs(n_steps=60))
    drifts = []
    for change in (0, 1e-2):
        z, _ = leapfrog(*leaves[:2], potential, *leaves[2:], on_drift=drifts.append)
        potential.x.data += change  # data are not watched
        z.sum().backward()
    assert drifts[0] < bound < drifts[1]


# ---- Transforms and compilers ----


def test_vmap_over_chains():
    potential = mlp().double()
    z, rho, _, tempering = inputs(shape=(3, ROWS, FEATURES))
    chains = torch.func.vmap(lambda z, rho, step: leapfrog(z, rho, potential, step, tempering), in_dims=(0, 0, 0))
    steps = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64).requires_grad_()
    together = chains(z, rho, steps)
    alone = [reference.leapfrog(z[i], rho[i], potential, steps[i], tempering) for i in range(3)]
    torch.testing.assert_close(together, tuple(torch.stack(parts) for parts in zip(*alone, strict=True)))
    wanted = [z, rho, steps, tempering, *potential.parameters()]
    of_loop = torch.autograd.grad(sum(a.sin().sum() + b.cos().sum() for a, b in alone), wanted)
    torch.testing.assert_close(torch.autograd.grad(together[0].sin().sum() + together[1].cos().sum(), wanted), of_loop)


def test_vmap_over_single_positions():
    precision = double(FEATURES).exp()
    z, rho, step_size, tempering = inputs()
    potential = hk.nn.GaussianPotential(precision, torch.zeros_like(precision))
    rows = torch.func.vmap(lambda z, rho: leapfrog(z, rho, potential, step_size, tempering))(z, rho)
    torch.testing.assert_close(rows, reference.leapfrog(z, rho, potential, step_size, tempering))


def test_func_grad_and_jvp():
    potential, (z, rho, step_size, tempering) = to(torch.float64, mlp(), inputs())

    def loss(op):
        return lambda z, step: op(z, rho, potential, step, tempering)[0].sin().sum()

    ours = torch.func.grad(loss(leapfrog), argnums=(0, 1))(z, step_size)
    torch.testing.assert_close(ours, torch.autograd.grad(loss(reference.leapfrog)(z, step_size), (z, step_size)))
    tangents = torch.randn_like(z), torch.ones_like(step_size)
    _, tangent = torch.func.jvp(loss(leapfrog), (z, step_size), tangents)
    torch.testing.assert_close(tangent, sum((g * t).sum() for g, t in zip(ours, tangents, strict=True)))


@pytest.mark.parametrize("name", POTENTIALS)
def test_inside_a_compiled_function(name):
    """fullgraph: the formula is unrolled; running statistics are updated once here too."""
    torch._dynamo.reset()
    potential, leaves = to(torch.float64, POTENTIALS[name](), inputs(step=(FEATURES,)))
    once = copy.deepcopy(potential)
    once(leaves[0])
    exact = results_and_gradients(reference.leapfrog, copy.deepcopy(potential), leaves)
    compiled = torch.compile(lambda *a: leapfrog(*a), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results_and_gradients(compiled, potential, leaves), exact)
    torch.testing.assert_close(dict(potential.named_buffers()), dict(once.named_buffers()))


@each_memory
@pytest.mark.parametrize("name", ["batch norm", "convolution"])
def test_compiled_gradient(name, memory, monkeypatch):
    """Equal to the formula, and compiled once for any number of steps and any closure of the same code."""
    torch._dynamo.reset()
    field._compiled_gradient.cache_clear()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example)

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile(function, fullgraph=True, backend=backend))
    potential = POTENTIALS[name]().double()
    counts = []
    for n_steps in (2, 5, 9):
        _, leaves = to(torch.float64, potential, inputs(step=(FEATURES,), n_steps=n_steps))
        exact = results_and_gradients(reference.leapfrog, copy.deepcopy(potential), leaves)
        ours = results_and_gradients(leapfrog, potential, leaves, memory=memory, compile=True)
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)
        counts.append(len(graphs))
    assert counts == [{"reversible": 2, "store": 1}[memory]] * 3  # without and with its backward pass
    field._compiled_gradient.cache_clear()


def test_compiled_upsampling_keeps_to_its_memory():
    """Inductor's own choice of layouts made a kernel that wrote past the end of this decoder's tensors: a crash."""
    code = """
import torch, hvae_kernels as hk
from torch import nn
torch.manual_seed(0)
convolution = nn.Conv2d(32, 32, 5, padding=2)
grow = nn.Sequential(nn.Linear(8, 512), nn.Unflatten(1, (32, 4, 4)), convolution, nn.Upsample(7), nn.Softplus())
decoder = nn.Sequential(grow, nn.Conv2d(32, 1, 5, padding=2), nn.Flatten())
potential = lambda z: decoder(z).square().sum(-1) + z.square().sum(-1)
state, rest = torch.randn(2, 8, 8).unbind(), (torch.tensor(0.01), torch.ones(30))
with torch.no_grad():
    exact = hk.functional.leapfrog(*state, potential, *rest)
    torch.testing.assert_close(hk.functional.leapfrog(*state, potential, *rest, compile=True), exact)
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"OMP_NUM_THREADS": "2"})


# ---- The module ----


def test_flow_takes_any_potential():
    """Modules are rebuilt, functions stored, and both as the options say; leading dimensions are free."""
    potential, z, gamma = mlp().double(), double(2, ROWS, FEATURES), double(2, ROWS, FEATURES)
    potential.forward = lambda z, forward=potential.forward: forward(z.flatten(0, -2)[:ROWS]).expand(2, ROWS)
    flow = hk.nn.HamiltonianFlow(FEATURES, 3, "free").double()
    wanted = [*flow.parameters(), *potential.parameters()]

    def gradients(flow, *arguments, **options):
        z_K, rho_K, log_abs_det = flow(z, gamma, *arguments, **options)
        assert log_abs_det.shape == (2, ROWS)
        return torch.autograd.grad(z_K.sin().sum() + rho_K.cos().sum(), wanted)

    expected = gradients(flow, lambda z: potential(z))
    torch.testing.assert_close(gradients(flow, potential), expected)
    torch.testing.assert_close(gradients(flow, lambda z: potential(z), params=potential.parameters()), expected)
    known = [z, *wanted]
    saved = {
        memory: testing.saved_bytes(lambda m=memory: _with(flow, m)(z, gamma, potential), known)
        for memory in (None, "reversible", "store")
    }
    assert saved[None] == saved["reversible"] < saved["store"]


def _with(flow, memory):
    flow.memory = memory
    return flow


def test_flow_with_detached_gradients():
    potential, z, gamma = mlp(), torch.randn(ROWS, FEATURES), torch.randn(ROWS, FEATURES)
    for replicas in (None, 1):
        flow = hk.nn.HamiltonianFlow(FEATURES, 3, gradient="detached", replicas=replicas)
        state = (z, gamma) if replicas is None else (z[None], gamma[None])
        end = flow(*state, potential if replicas is None else lambda z: potential(z[0])[None])
        end[0].sum().backward()
        assert all(p.grad is None for p in potential.parameters())
        assert flow.step_size_logit.grad is not None


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "stored"},
        {"gradient": "none"},
        {"max_step_size": math.inf},
        {"init_step_size": math.nan},
        {"init_temperature": math.inf, "tempering": "free"},
    ],
)
def test_bad_flow_options(options):
    with pytest.raises(ValueError, match=f"HamiltonianFlow: {next(iter(options))} must be"):
        hk.nn.HamiltonianFlow(3, 2, **options)


# ---- Bad input ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z": torch.ones(4, 3, dtype=torch.int64)}, TypeError, "z must be a float32 or float64 tensor"),
        ({"z": torch.tensor(1.0)}, ValueError, r"z must be of shape \(B, \.\.\.\)"),
        ({"rho": torch.ones(4, 2)}, ValueError, r"rho must be of z's shape \(4, 3\)"),
        ({"rho": torch.ones(4, 3).double()}, TypeError, "rho must have the dtype of z"),
        ({"step_size": 0.1}, TypeError, "step_size must be a tensor, got float 0.1"),
        ({"step_size": torch.ones(4, 3)}, ValueError, r"step_size must be of shape \(\), \(3,\) or \(2, 3\)"),
        ({"step_size": torch.tensor(torch.nan)}, ValueError, "step_size must be finite"),
        ({"tempering": torch.ones(2, 2)}, ValueError, r"tempering must be of shape \(K,\)"),
        ({"tempering": torch.tensor([1.0, torch.inf])}, ValueError, "tempering must be finite"),
        ({"memory": "none"}, ValueError, "memory must be one of reversible, store, got none"),
        ({"gradient": "half"}, ValueError, "gradient must be one of full, detached"),
        ({"potential": lambda z: torch.ones(4)}, ValueError, "potential must be a differentiable function of z"),
        ({"potential": lambda z: 1.0}, ValueError, "potential must be a differentiable function of z, got float"),
        ({"potential": torch.sum}, ValueError, r"potential must be a function with energies \(B,\).* shape \(\)"),
        ({"potential": lambda z: z.sum(0)}, ValueError, r"potential must be a function with energies \(B,\)"),
    ],
)
@each_memory
def test_bad_input(change, error, message, memory):
    arguments = {"z": torch.ones(4, 3), "rho": torch.ones(4, 3), "potential": lambda z: z.square().sum(-1)}
    arguments |= {"step_size": torch.tensor(0.1), "tempering": torch.ones(2), "memory": memory}
    with pytest.raises(error, match=message) as caught:
        leapfrog(**arguments | change)
    assert str(caught.value).startswith("leapfrog: ")


def test_tempering_is_divided_by():
    z, rho, step_size, tempering = inputs()
    tempering.data[1] = 0
    with pytest.raises(ValueError, match="leapfrog: tempering must be nowhere zero with memory='reversible'"):
        leapfrog(z, rho, mlp().double(), step_size, tempering)
    leapfrog(z, rho, mlp().double(), step_size, tempering, memory="store")


@each_memory
def test_a_captured_tensor_may_depend_on_z(memory):
    """An encoder's features in the potential: autograd goes that way once, outside the trajectory."""
    weight, leaves = double(FEATURES).requires_grad_(), inputs()
    z, rho, step_size, tempering = leaves

    def gradients(op):
        context = torch.tanh(z * weight)
        z_K, rho_K = op(context)
        return torch.autograd.grad((z_K * rho_K).sum() + context.sum(), (*leaves, weight))

    def fused(context):
        options = {"params": [context]} if memory == "reversible" else {}
        potential = lambda position: ((position - context) ** 4).sum(-1)  # noqa: E731
        return leapfrog(z, rho, potential, step_size, tempering, memory=memory, **options)

    def by_hand(context):
        return trajectory(z, rho, lambda position: 4 * (position - context) ** 3, step_size, tempering)

    torch.testing.assert_close(gradients(fused), gradients(by_hand))


def test_params_made_from_one_another_are_refused():
    z, rho, step_size, tempering = inputs()
    scale = double(FEATURES).requires_grad_()
    square = scale**2

    def potential(position):
        return (position**2 * square + position * scale).sum(-1)

    with pytest.raises(ValueError, match="params must be tensors of which none is made from another"):
        leapfrog(z, rho, potential, step_size, tempering, params=[scale, square])


def test_looking_at_the_modules_leaves_flows_inside_fused(monkeypatch):
    """The hook that collects a potential's modules is on all modules, and is none that a flow has to call them for."""
    flow = hk.nn.MaskedAutoregressiveFlow(FEATURES, [8]).double()

    class Posterior(nn.Module):
        def __init__(self):
            super().__init__()
            self.flow = flow

        def forward(self, z):
            noise, log_abs_det = self.flow.inverse(z)
            return noise.square().sum(-1) / 2 - log_abs_det

    monkeypatch.setattr(hk.nn.MaskedLinear, "forward", None)
    leapfrog(double(ROWS, FEATURES), double(ROWS, FEATURES), Posterior(), double(1)[0] * 0.01, torch.ones(2).double())
