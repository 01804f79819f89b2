"""``leapfrog`` rebuilds its trajectory with the potential of the forward pass, wherever that has gone since.

``memory="store"`` evaluates nothing again, so it says what is right.
"""

import contextlib
import functools
import types

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize

import hvae_kernels as hk

leapfrog = hk.functional.leapfrog
D, ROWS = 4, 6
STEPS = torch.tensor(0.3, dtype=torch.float64), torch.tensor([0.9, 0.8, 1.1], dtype=torch.float64)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning"),
]


def double(*shape):
    return torch.randn(shape, dtype=torch.float64)


def leaf(*shape):
    return double(*shape).requires_grad_()


def network(*first):
    return nn.Sequential(*first, nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)).double()


class Model(nn.Module):
    """A decoder, and a trajectory through it or through what ``energy`` makes of it."""

    def __init__(self, decoder, energy=None):
        super().__init__()
        self.decoder, self.energy = decoder, energy

    def forward(self, z, rho, **options):
        potential = self.decoder if self.energy is None else functools.partial(self.energy, self.decoder)
        if self.energy is not None:
            options["params"] = list(self.decoder.parameters())
        return leapfrog(z, rho, potential, *STEPS, **options)[0].square().sum()


# Each case takes a trajectory with **options, and returns its loss and what to differentiate it by.


def substituted(change, decoder=network, energy=None):
    """A model called with other parameters than its own."""

    def case(z, rho, **options):
        model = Model(decoder(), energy)
        own = [p for p in model.parameters() if p.requires_grad]
        other = {name: change(p) for name, p in model.named_parameters()}
        loss = functional_call(model, other, (z, rho), options)
        return loss, [x for x in (*own, *other.values()) if x.requires_grad]

    return case


def another_leaf(p):
    return (p.detach() + 0.3 * torch.randn_like(p)).requires_grad_()


def a_gradient_step(p):
    return p - 0.3 * (p * p)


def frozen(p):
    return p.detach() + 0.3


def read_directly(decoder, z):
    """Layers that are not called."""
    return (z @ decoder[0].weight.T + decoder[0].bias).tanh().sum(-1)


def parametrized():
    return network(parametrizations.weight_norm(nn.Linear(D, D)))


def parameter_replaced(z, rho, **options):
    decoder = network()
    old = list(decoder.parameters())
    end = leapfrog(z, rho, decoder, *STEPS, **options)[0]
    decoder[0].weight = nn.Parameter(double(8, D))
    return end.square().sum(), [*old, *decoder.parameters()]


def layer_replaced(z, rho, **options):
    decoder = network()
    old = list(decoder.parameters())
    end = leapfrog(z, rho, decoder, *STEPS, **options)[0]
    decoder[0] = nn.Linear(D, 8).double()
    return end.square().sum(), old


def frozen_since(z, rho, **options):
    decoder = network()
    end = leapfrog(z, rho, decoder, *STEPS, **options)[0]
    decoder[0].requires_grad_(False)
    return end.square().sum(), [decoder[2].weight]


def given(choose):
    def case(z, rho, **options):
        decoder = network()
        decoder[0].requires_grad_(False)
        end = leapfrog(z, rho, decoder, *STEPS, params=choose(decoder), **options)[0]
        return end.square().sum(), [decoder[2].weight]

    return case


def tied(z, rho, **options):
    decoder = network(first := nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))
    decoder[2].weight = first.weight
    end = leapfrog(z, rho, decoder, *STEPS, params=[*decoder.parameters(), first.weight], **options)[0]
    return end.square().sum(), [first.weight, first.bias]


def used_as_a_view(z, rho, **options):
    weight = leaf(2 * D)
    end = leapfrog(z, rho, lambda z: (z**2 @ weight.view(2, D).T).sum(-1), *STEPS, params=[weight], **options)[0]
    return end.square().sum(), [weight]


def hypernetwork(z, rho, **options):
    """Its output is made once, before the evaluations that share it; its parameters are those that are given."""
    hyper = nn.Sequential(nn.Linear(3, D), nn.Tanh()).double()
    weight = hyper(double(3))
    end = leapfrog(z, rho, lambda z: (z * weight).cos().sum(-1), *STEPS, params=hyper.parameters(), **options)[0]
    return end.square().sum() + weight.sum(), list(hyper.parameters())


def copy_for_a_device(z, rho, **options):
    """As ``nn.DataParallel`` makes them: parameters that are not leaves, as attributes."""
    layer = nn.Linear(D, 1).double()
    copy = layer._replicate_for_data_parallel()
    copy._former_parameters = {name: p * 1 for name, p in layer.named_parameters()}
    vars(copy).update(copy._former_parameters)
    potential = nn.Sequential(nn.Tanh(), layer, nn.Tanh(), nn.Flatten(0))
    potential._modules["1"] = copy
    end = leapfrog(z, rho, potential, *STEPS, **options)[0]
    return end.square().sum(), list(layer.parameters())


def cached_parametrization(z, rho, **options):
    decoder = parametrized()
    with parametrize.cached():
        end = leapfrog(z, rho, decoder, *STEPS, **options)[0]
    return end.square().sum(), list(decoder.parameters())


def weight_norm_by_hooks(z, rho, **options):
    """Sets its layer's weight anew at each call."""
    decoder = network(nn.utils.weight_norm(nn.Linear(D, D)))
    end = leapfrog(z, rho, decoder, *STEPS, **options)[0]
    return end.square().sum(), list(decoder.parameters())


WHOSE = {
    "substituted": substituted(another_leaf),
    "substituted, not leaves": substituted(a_gradient_step),
    "substituted, frozen": substituted(frozen),
    "substituted, layers not called": substituted(another_leaf, energy=read_directly),
    "substituted, layers not called, frozen": substituted(frozen, energy=read_directly),
    "substituted, parametrized": substituted(another_leaf, parametrized),
    "parameter replaced": parameter_replaced,
    "layer replaced": layer_replaced,
    "frozen since": frozen_since,
    "given, partly frozen": given(lambda decoder: decoder.parameters()),
    "given twice": given(lambda decoder: [*decoder.parameters(), decoder[2].weight]),
    "tied": tied,
    "used as a view": used_as_a_view,
    "hypernetwork": hypernetwork,
    "copy for a device": copy_for_a_device,
    "cached parametrization": cached_parametrization,
    "weight norm by hooks": weight_norm_by_hooks,
}


class Data(nn.Module):
    """Energies that depend on data, in whatever form an attribute may have."""

    def __init__(self, x, read=lambda x: x):
        super().__init__()
        self.x, self.read = x, read

    def forward(self, z):
        return ((z - self.read(self.x)) ** 4).sum(-1)


def attribute_replaced(make, read=lambda x: x):
    def case(z, rho, **options):
        potential = Data(make(), read)
        first = leapfrog(z, rho, potential, *STEPS, **options)[0]
        potential.x = make()
        second = leapfrog(z, rho, potential, *STEPS, **options)[0]
        return (first * second).sum(), [z]

    return case


def buffer_replaced(z, rho, **options):
    potential = Data(None)
    del potential.x
    potential.register_buffer("x", double(D))
    end = leapfrog(z, rho, potential, *STEPS, **options)[0]
    potential.x = double(D)
    return end.square().sum(), [z]


def loop_variable(z, rho, **options):
    """A closure binds its variables late: all of these see the last one when the backward pass comes."""
    loss = 0
    for x in double(3, D).unbind():
        loss = loss + leapfrog(z, rho, lambda z: ((z - x) ** 4).sum(-1), *STEPS, **options)[0].square().sum()  # noqa: B023
    return loss, [z]


def global_variable(z, rho, **options):
    space = {"x": double(D)}
    potential = types.FunctionType((lambda z: ((z - x) ** 4).sum(-1)).__code__, space | {"__name__": "script"})  # noqa: F821
    end = leapfrog(z, rho, potential, *STEPS, **options)[0]
    potential.__globals__["x"] = double(D)
    return end.square().sum(), [z]


def within_a_dict(z, rho, **options):
    batch = {"x": double(D)}
    end = leapfrog(z, rho, lambda z: ((z - batch["x"]) ** 4).sum(-1), *STEPS, **options)[0]
    batch["x"] = double(D)
    return end.square().sum(), [z]


def method(z, rho, **options):
    class Posterior:
        def energy(self, z):
            return ((z - self.x) ** 4).sum(-1) * self.temperature

    posterior = Posterior()
    posterior.x, posterior.temperature = double(D), 0.7
    end = leapfrog(z, rho, posterior.energy, *STEPS, **options)[0]
    posterior.x, posterior.temperature = double(D), 0.2
    return end.square().sum(), [z]


def callable_object(z, rho, **options):
    class Posterior:
        def __call__(self, z):
            return ((z - self.x) ** 4).sum(-1)

    posterior = Posterior()
    posterior.x = double(D)
    end = leapfrog(z, rho, posterior, *STEPS, **options)[0]
    posterior.x = double(D)
    return end.square().sum(), [z]


def training_statistics(z, rho, **options):
    """Written by the decoder's other calls, and not read in training mode."""
    decoder = network(nn.BatchNorm1d(D))
    end = leapfrog(z, rho, decoder, *STEPS, **options)[0]
    return end.square().sum() + decoder(double(ROWS, D)).sum(), list(decoder.parameters())


def counted(z, rho, **options):
    decoder, calls = network(), []

    def potential(z):
        calls.append(z)
        decoder.calls = len(calls)
        return decoder(z)

    end = leapfrog(z, rho, potential, *STEPS, params=decoder.parameters(), **options)[0]
    return end.square().sum(), list(decoder.parameters())


def inside(context, potential):
    def case(z, rho, **options):
        made = potential()
        with context():
            end = leapfrog(z, rho, made, *STEPS, **options)[0]
        return end.square().sum(), [z]

    return case


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(D, 2, batch_first=True), nn.Linear(D, 1)
        self.double()

    def forward(self, z):
        tokens = z[:, None] * torch.arange(1.0, 4.0, dtype=z.dtype)[:, None]
        return self.out(self.attention(tokens, tokens, tokens, need_weights=False)[0][:, 0]).squeeze(-1)


@contextlib.contextmanager
def setting(put, get, value):
    """A setting of the process, within a context."""
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def default_dtype():
    other = torch.float64 if torch.get_default_dtype() is torch.float32 else torch.float32
    return setting(torch.set_default_dtype, torch.get_default_dtype, other)


def in_default_precision():
    return lambda z: ((z - torch.tensor([0.1] * D)) ** 4).sum(-1)


def on_default_device():
    def potential(z):
        if torch.empty(0).device.type != "meta":
            z = 2 * z
        return (z**4).sum(-1)

    return potential


def with_our_kernels():
    """Another function where other kernels are asked for, to see which ones are."""

    def potential(z):
        return (z**4).sum(-1) * (2 if hk._dispatch.requested() == "reference" else 1)

    return potential


SAME = {
    "attribute": attribute_replaced(lambda: double(D)),
    "number": attribute_replaced(lambda: double().item()),
    "module": attribute_replaced(lambda: nn.Linear(1, D, dtype=torch.float64).requires_grad_(False), lambda x: x.bias),
    "list": attribute_replaced(lambda: [double(D), double(D)], lambda x: x[0] * x[1]),
    "distribution": attribute_replaced(lambda: torch.distributions.Normal(double(D), 1), lambda x: x.mean),
    "buffer": buffer_replaced,
    "loop variable": loop_variable,
    "global variable": global_variable,
    "dict": within_a_dict,
    "method": method,
    "callable object": callable_object,
    "training statistics": training_statistics,
    "counted": counted,
    "attention's kernels": inside(lambda: sdpa_kernel(SDPBackend.MATH), Attention),
    "default dtype": inside(default_dtype, in_default_precision),
    "default device": inside(lambda: torch.device("meta"), on_default_device),
    "our kernels": inside(lambda: hk.use_impl("reference"), with_our_kernels),
    "oneDNN": inside(
        lambda: setting(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled, False),
        lambda: lambda z: (z**4).sum(-1) * (1 + torch.backends.mkldnn.enabled),
    ),
    "deterministic": inside(
        lambda: setting(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode, 1),
        lambda: lambda z: (z**4).sum(-1) * (1 + torch.get_deterministic_debug_mode()),
    ),
}


@pytest.mark.parametrize("case", [*WHOSE.values(), *SAME.values()], ids=[*WHOSE, *SAME])
def test_gradients_are_those_of_the_forward_pass(case):
    def run(memory):
        torch.manual_seed(0)
        z, rho = leaf(ROWS, D), leaf(ROWS, D)
        loss, wanted = case(z, rho, memory=memory)
        found = torch.autograd.grad(loss, [z, rho, *wanted], allow_unused=True, materialize_grads=True)
        return loss, *found

    ours, right = run("reversible"), run("store")
    torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-11)
    assert right[1].abs().sum() > 0


def test_later_state_stays():
    """What was put back for the backward pass is away again after it, also after an error."""
    z, rho = leaf(ROWS, D), double(ROWS, D)
    potential, later = Data(double(D)), double(D)
    end = leapfrog(z, rho, potential, *STEPS)[0]
    potential.x = later
    end.sum().backward()
    assert potential.x is later
    end = leapfrog(z, rho, potential, *STEPS)[0]
    del potential.x
    end.sum().backward()
    assert not hasattr(potential, "x")
    before = torch.get_default_dtype()
    with default_dtype():
        end = leapfrog(z, rho, network(), *STEPS)[0]
    end.sum().backward()
    assert torch.get_default_dtype() is before


def test_backward_pass_in_inference_mode():
    z, rho, decoder = leaf(ROWS, D), double(ROWS, D), network()
    gradients = []
    for memory in ("reversible", "store"):
        loss = leapfrog(z, rho, decoder, *STEPS, memory=memory)[0].square().sum()
        with torch.inference_mode():
            gradients.append(torch.autograd.grad(loss, [z, *decoder[:2].parameters()]))
    torch.testing.assert_close(*gradients)


def test_flow_under_functional_call():
    class WithFlow(nn.Module):
        def __init__(self, memory):
            super().__init__()
            self.decoder = network()
            self.flow = hk.nn.HamiltonianFlow(D, 3, init_step_size=0.2, memory=memory).double()

        def forward(self, z, gamma):
            return self.flow(z, gamma, self.decoder)[0].square().sum()

    def gradients(memory):
        torch.manual_seed(0)
        model = WithFlow(memory)
        adapted = {name: another_leaf(p) for name, p in model.named_parameters()}
        loss = functional_call(model, adapted, (double(ROWS, D), double(ROWS, D)))
        wanted = [*adapted.values(), *model.parameters()]
        return torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)

    torch.testing.assert_close(gradients(None), gradients("store"))


# ---- Refused ----


@pytest.mark.parametrize(
    ("params", "came"),
    [
        (lambda m: m.named_parameters(), "got tuple"),
        (lambda m: m.state_dict(), "got str"),
        (lambda m: m[0].weight, "got one tensor alone"),
    ],
)
def test_params_are_tensors(params, came):
    decoder = network()
    with pytest.raises(TypeError, match=rf"leapfrog: params must be tensors, as \[tensor\] or .*, {came}"):
        leapfrog(double(ROWS, D), double(ROWS, D), decoder, *STEPS, params=params(decoder))


def test_a_view_among_params_is_not_its_tensor():
    weight = leaf(D)
    z, rho, params = double(ROWS, D), double(ROWS, D), [weight.view(2, 2)]
    with pytest.raises(ValueError, match="params must be all tensors that need gradients"):
        leapfrog(z, rho, lambda z: (z**2 * weight).sum(-1), *STEPS, params=params)


def instance_norm():
    norm = nn.InstanceNorm1d(1, affine=True, track_running_stats=True)
    return nn.Sequential(nn.Unflatten(1, (1, D)), norm, nn.Flatten())


class Moving(nn.Module):
    def __init__(self, move):
        super().__init__()
        self.register_buffer("state", torch.ones(D, dtype=torch.float64))
        self.move = move

    def forward(self, z):
        self.move(self)
        return (z**4 * self.state).sum(-1)


def replace(module):
    module.state = module.state * 1.1


def moving_closure():
    state = torch.ones(D, dtype=torch.float64)
    return lambda z: (z**4 * state.mul_(1.1)).sum(-1)


MOVING = {
    "spectral norm": lambda: network(parametrizations.spectral_norm(nn.Linear(D, D))),
    "spectral norm by hooks": lambda: network(nn.utils.spectral_norm(nn.Linear(D, D))),
    "buffer written": lambda: Moving(lambda module: module.state.mul_(1.1)),
    "buffer replaced": lambda: Moving(replace),
    "closure": moving_closure,
}


@pytest.mark.parametrize("name", MOVING)
def test_state_that_moves_at_each_evaluation(name):
    potential, z, rho = MOVING[name](), double(ROWS, D), leaf(ROWS, D)
    with pytest.raises(ValueError, match=r"leapfrog: potential changes .* at every evaluation .* memory='store'"):
        leapfrog(z, rho, potential, *STEPS)
    leapfrog(z, rho, potential, *STEPS, memory="store")
    if isinstance(potential, nn.Sequential):
        leapfrog(z, rho, potential.eval(), *STEPS)[0].sum().backward()


def test_instance_norm_updates_its_statistics_once():
    decoder = network(instance_norm())
    once = nn.InstanceNorm1d(1, affine=True, track_running_stats=True).double()
    z, rho = leaf(ROWS, D), double(ROWS, D)
    once(z[:, None])
    gradients = []
    for memory in ("reversible", "store"):
        decoder[0][1].reset_running_stats()
        end = leapfrog(z, rho, decoder, *STEPS, memory=memory)[0]
        gradients.append(torch.autograd.grad(end.square().sum(), [z, decoder[0][1].weight, decoder[1].weight]))
        torch.testing.assert_close(dict(decoder[0][1].named_buffers()), dict(once.named_buffers()))
    torch.testing.assert_close(*gradients)


WRITTEN = {
    "running statistics": lambda x: (network(batch := nn.BatchNorm1d(D)).eval(), batch.running_mean),
    "attribute": lambda x: (Data(x), x),
    "list": lambda x: (Data([x], lambda x: x[0]), x),
    "closure": lambda x: (lambda z: ((z - x) ** 4).sum(-1), x),
    "argument": lambda x: (functools.partial(lambda x, z: ((z - x) ** 4).sum(-1), x), x),
    "default": lambda x: (lambda z, x=x: ((z - x) ** 4).sum(-1), x),
    "method": lambda x: (Data(x).forward, x),
}


@pytest.mark.parametrize("gradient", ["full", "detached"])
@pytest.mark.parametrize("name", WRITTEN)
def test_tensors_written_in_place(name, gradient):
    potential, x = WRITTEN[name](double(D))
    end = leapfrog(leaf(ROWS, D), double(ROWS, D), potential, *STEPS, gradient=gradient)[0]
    x.add_(1)
    with pytest.raises(RuntimeError, match=r"leapfrog: .*was modified by an inplace operation .*: put a new tensor"):
        end.sum().backward()


def test_an_optimizer_step_under_detached_gradients():
    decoder = network()
    end = leapfrog(leaf(ROWS, D), double(ROWS, D), decoder, *STEPS, gradient="detached")[0]
    with torch.no_grad():
        decoder[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"leapfrog: 'weight' .*was modified by an inplace operation"):
        end.sum().backward()


def test_what_cannot_be_watched_is_seen_by_its_gradient():
    """Data behind torch's back, and a generator of one's own; ``on_drift`` takes the distance instead."""
    x, generator = double(D), torch.Generator().manual_seed(0)

    def noisy(z):
        return ((z + torch.rand(D, generator=generator)) ** 4).sum(-1)

    for potential in (lambda z: ((z - x) ** 4).sum(-1), noisy):
        for on_drift in (None, (drifts := []).append):
            end = leapfrog(leaf(ROWS, D), double(ROWS, D), potential, *STEPS, on_drift=on_drift)[0]
            x.data += 0.1
            if on_drift is None:
                with pytest.raises(RuntimeError, match=r"leapfrog: potential has another gradient .*, and on_drift"):
                    end.sum().backward()
            else:
                end.sum().backward()
                assert drifts[0] > 1e-3


# ---- At the border of what can be differentiated ----


BORDER = {
    "linear": lambda w: (lambda z: z.sum(-1), []),
    "linear, a parameter": lambda w: (lambda z: z @ w, [w]),
    "linear in rows": lambda w: (lambda z: z @ w.detach() + (w**2).sum(), [w]),
    "absolute value": lambda w: (lambda z: z.abs().sum(-1), []),
    "piecewise linear": lambda w: (lambda z: (w * z).relu().sum(-1), [w]),
    "zero": lambda w: (lambda z: (0 * z).sum(-1), []),
    "rounded": lambda w: (lambda z: (z.round() * w).sum(-1), [w]),
}


@pytest.mark.parametrize("name", BORDER)
def test_potentials_without_curvature(name):
    z, rho, w = leaf(ROWS, D), leaf(ROWS, D), leaf(D)
    potential, params = BORDER[name](w)
    gradients = []
    for memory in ("reversible", "store"):
        end = leapfrog(z, rho, potential, *STEPS, memory=memory, params=params)
        loss = end[0].square().sum() + end[1].sin().sum()
        gradients.append(torch.autograd.grad(loss, [z, rho, w], allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("memory", ["reversible", "store"])
def test_a_constant_is_refused(memory):
    w = leaf(D)
    with pytest.raises(ValueError, match="leapfrog: potential must be a differentiable function of z, got energies th"):
        leapfrog(leaf(ROWS, D), leaf(ROWS, D), lambda z: w.sum().expand(ROWS), *STEPS, params=[w], memory=memory)


class BuiltAtFirstCall(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = None

    def forward(self, z):
        if self.weight is None:
            self.weight = nn.Parameter(torch.randn(z.shape[-1], dtype=z.dtype))
        return (z**4 * self.weight).sum(-1)


LAZY = {
    "linear": lambda: nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0)).double(),
    "batch norm": lambda: nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyLinear(1), nn.Tanh(), nn.Flatten(0)).double(),
    "by hand": BuiltAtFirstCall,
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", LAZY)
def test_lazy_layers(name, given):
    """Parameters are drawn at the first call and no more; statistics are updated once then too."""
    potential, z, rho = LAZY[name](), leaf(ROWS, D), double(ROWS, D)
    params = potential.parameters() if given and name != "by hand" else None
    ours = leapfrog(z, rho, potential, *STEPS, params=params)[0]
    wanted = [z, next(potential.parameters())]
    ours = ours, *torch.autograd.grad(ours.sum(), wanted)
    if name == "batch norm":
        assert potential[0].num_batches_tracked == 1
    right = leapfrog(z, rho, potential, *STEPS, memory="store")[0]
    torch.testing.assert_close(ours, (right, *torch.autograd.grad(right.sum(), wanted)))


def test_dropout_behind_a_lazy_layer_is_still_refused():
    potential = nn.Sequential(nn.LazyLinear(8), nn.Dropout(), nn.Linear(8, 1), nn.Flatten(0)).double()
    with pytest.raises(ValueError, match="leapfrog: potential draws random numbers"):
        leapfrog(leaf(ROWS, D), double(ROWS, D), potential, *STEPS)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


def test_functions_that_are_differentiable_once():
    """torch takes one's gradient for a constant, where its own cotangent is."""
    z, rho, w = leaf(ROWS, D), leaf(ROWS, D), leaf(D)

    def potential(z):
        return Cube.apply(z).sum(-1) + z.square().sum(-1)

    with pytest.raises(ValueError, match=r"leapfrog: potential must be twice differentiable, .* got Cube, which is"):
        leapfrog(z, rho, potential, *STEPS)
    ours = leapfrog(z, rho, potential, *STEPS, gradient="detached")[0]
    right = leapfrog(z, rho, lambda z: (z**3 + z**2).sum(-1), *STEPS, gradient="detached")[0]
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), [z, rho]), torch.autograd.grad(right.sum(), [z, rho]))
    ends = (
        leapfrog(z, rho, lambda z, f=f: (z**2 * f(w)).sum(-1), *STEPS, params=[w])[0]
        for f in (Cube.apply, lambda w: w**3)
    )  # on the way to a parameter once is enough
    torch.testing.assert_close(*(torch.autograd.grad(end.sum(), [z, rho, w]) for end in ends))


def test_attention_says_what_to_do():
    end = leapfrog(leaf(ROWS, D), double(ROWS, D), Attention(), *STEPS)[0]
    with pytest.raises(RuntimeError, match=r"leapfrog: potential cannot be differentiated twice, .*SDPBackend\.MATH"):
        end.sum().backward()


@pytest.mark.parametrize("memory", ["reversible", "store"])
def test_inference_mode(memory):
    decoder, z, rho = network(), double(ROWS, D), double(ROWS, D)
    flow = hk.nn.HamiltonianFlow(D, 3, memory=memory).double()
    right = flow(z, rho, decoder)
    with torch.inference_mode():
        torch.testing.assert_close(flow(z, rho, decoder), right)
        torch.testing.assert_close(flow(z * 1, rho * 1, decoder), right)


def test_an_energy_without_gradients_is_refused():
    decoder = network()

    @torch.no_grad()
    def potential(z):
        return decoder(z)

    with pytest.raises(ValueError, match="leapfrog: potential must be a differentiable function of z"):
        leapfrog(leaf(ROWS, D), double(ROWS, D), potential, *STEPS)
