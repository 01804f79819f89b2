"""Splines against other libraries and against the form in which nothing cancels; what is wrong in others' code."""

import math
import os

import peers
import pytest
import torch
from nflows.transforms.splines import rational_quadratic as nflows
from nflows.utils import torchutils
from normflows.utils import splines as normflows
from ops.rational_quadratic_spline import SPLINES, spline_inputs
from pyro.distributions.transforms.spline import _monotonic_rational_spline as pyro_spline
from torch import nn

import hvae_kernels as hk
from hvae_kernels import testing

F = hk.functional
#: Where there is a GPU, Triton compiles for it and has no business with these CPU tensors.
INTERPRETED = ("triton",) if os.environ.get("TRITON_INTERPRET") == "1" else ()
each_implementation = pytest.mark.parametrize("implementation", ["reference", "cpp", *INTERPRETED])
each_kernel = pytest.mark.parametrize("implementation", ["cpp", *INTERPRETED])
each_direction = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
THREADED = {"nflows": nflows, "normflows": normflows}


def call(x, parameters, spline, inverse=False, **options):
    """Of vectors of elements, each with its log-determinant."""
    y, log = F.rational_quadratic_spline(x[:, None], parameters[:, None], spline, inverse=inverse, **options)
    return y[:, 0], log


def inputs(n, spline, scale, dtype=torch.float64, spread=1.0):
    left, right, *_ = spline.interval
    x = spread * (left + (right - left) * torch.rand(n, dtype=dtype))
    return x, scale * torch.randn(n, spline.parameters, dtype=dtype)


def split(parameters, spline):
    return parameters.split((spline.bins, spline.bins, spline.parameters - 2 * spline.bins), -1)


# ---- Other libraries ----


def of_threaded(module):
    """nflows' function, of which normflows has a copy."""

    def peer(x, parameters, spline, inverse):
        options = {"min_bin_width": spline.min_width, "min_bin_height": spline.min_height}
        options |= {"min_derivative": spline.min_derivative, "inverse": inverse}
        if spline.tails is None:
            ends = dict(zip(("left", "right", "bottom", "top"), spline.interval, strict=True))
            return module.rational_quadratic_spline(x, *split(parameters, spline), **options, **ends)
        return module.unconstrained_rational_quadratic_spline(
            x, *split(parameters, spline), tails=spline.tails, tail_bound=spline.interval[1], **options
        )

    return peer


def of_zuko(x, parameters, spline, inverse):
    *_, bound = spline.interval
    transform = peers.zuko.transforms.MonotonicRQSTransform(
        *split(parameters, spline), bound=bound, slope=spline.min_derivative
    )
    if not inverse:
        return transform.call_and_ladj(x)
    y = transform.inv(x)
    return y, -transform.call_and_ladj(y)[1]


def of_pyro(x, parameters, spline, inverse):
    widths, heights, slopes = split(parameters, spline)
    shares = widths.softmax(-1), heights.softmax(-1)
    numbers = {"min_bin_width": spline.min_width, "min_bin_height": spline.min_height}
    return pyro_spline(
        x, *shares, nn.functional.softplus(slopes), inverse=inverse, bound=spline.interval[1], eps=0.0,
        min_derivative=spline.min_derivative, **numbers,
    )  # fmt: skip


PEERS = {
    "nflows": (of_threaded(nflows), F.Spline(8)),
    "nflows_none": (of_threaded(nflows), F.Spline(5, (-2.0, 4.0, -1.0, 2.0), tails=None)),
    "nflows_floors": (of_threaded(nflows), F.Spline(5, 2.0, min_width=0.05, min_height=0.02, min_derivative=0.1)),
    "normflows": (of_threaded(normflows), F.Spline(8, 4.0)),
    "normflows_circular": (of_threaded(normflows), F.Spline(6, math.pi, tails="circular")),
    "zuko": (of_zuko, F.Spline(8, 5.0, style="zuko")),
    "zuko_slope": (of_zuko, F.Spline(5, 2.0, style="zuko", min_derivative=0.05)),
    "pyro": (of_pyro, F.Spline(8, style="pyro")),
    "pyro_floors": (of_pyro, F.Spline(5, 2.0, style="pyro", min_width=0.05, min_derivative=0.1)),
}


@each_direction
@each_implementation
@pytest.mark.parametrize("name", PEERS)
def test_spline_is_the_libraries(name, implementation, inverse):
    """Values, log-determinants and gradients, inside and outside."""
    peer, spline = PEERS[name]
    x, parameters = inputs(100, spline, 1.0, spread=1.0 if spline.tails is None else 1.3)
    if spline.tails is None and inverse:
        left, right, bottom, top = spline.interval
        x = bottom + (x - left) / (right - left) * (top - bottom)
    leaves = x.requires_grad_(), parameters.requires_grad_()
    seeds = torch.randn_like(x), torch.randn_like(x)

    def with_gradients(results):
        return *results, *torch.autograd.grad(results, leaves, seeds)

    ours = with_gradients(call(*leaves, spline, inverse, implementation=implementation))
    theirs = with_gradients(peer(*leaves, spline, inverse))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# ---- Accuracy ----


def knots_of(parameters, spline):
    """Knots, lengths and slopes of nflows' parameters with linear tails, in double."""
    bins, (low, high, *_) = spline.bins, spline.interval
    widths, heights, slopes = split(parameters.double(), spline)

    def lengths(raw, floor):
        return (high - low) * (floor + (1 - bins * floor) * raw.softmax(-1))

    w, h = lengths(widths, spline.min_width), lengths(heights, spline.min_height)
    columns, rows = (low + nn.functional.pad(x.cumsum(-1), (1, 0)) for x in (w, h))
    columns[:, -1], rows[:, -1] = high, high
    d = nn.functional.pad(spline.min_derivative + nn.functional.softplus(slopes), (1, 1), value=1.0)
    return columns, rows, w, h, d


def exact_form(x, knots, inverse):
    """The spline and its log-determinant, from both knots, in the precision of ``x``."""
    columns, rows, w, h, d = (k.to(x.dtype) for k in knots)
    k = (x[:, None] >= (rows if inverse else columns)[:, 1:-1]).sum(-1, keepdim=True)
    x0, x1, y0, y1, d0, d1 = (of.gather(-1, k + i)[:, 0] for of in (columns, rows, d) for i in (0, 1))
    w, h = (of.gather(-1, k)[:, 0] for of in (w, h))
    s = h / w
    if inverse:
        t, q = (x - y0) / h, (y1 - x) / h
        u = d0 * q - d1 * t
        r = (u * u + 4 * s * s * t * q).sqrt()
        n, m = torch.where(u >= 0, 2 * s * t, r - u), torch.where(u >= 0, u + r, 2 * s * q)
        z, zc = n / (n + m), m / (n + m)
        y = torch.where(z < 0.5, x0 + z * w, x1 - zc * w)
    else:
        z, zc = (x - x0) / w, (x1 - x) / w
    den = s * (z * z + zc * zc) + (d0 + d1) * z * zc
    log = (s * s * (d1 * z * z + 2 * s * z * zc + d0 * zc * zc)).log() - 2 * den.log()
    if inverse:
        return y, -log
    low, high = h * z * (s * z + d0 * zc) / den, h * zc * (s * zc + d1 * z) / den
    return torch.where(low < high, y0 + low, y1 - high), log


def errors(results, exact):
    return [(x.double() - y).abs().max().item() for x, y in zip(results, exact, strict=True)]


def at_bounds(knots):
    """The bounds and their neighbours inside."""
    ends = torch.tensor([-3.0, 3.0])
    ends = torch.cat([ends, torch.nextafter(ends, torch.zeros(2)), ends * (1 - 1e-6)])
    return ends.repeat(len(knots) // len(ends))


def beside_knots(knots):
    """An inner knot of each element, or what is four units in the last place to one side of it."""
    rows = torch.arange(len(knots))
    inner = knots[rows, 1 + rows // 3 % (knots.shape[1] - 2)].float()
    unit = torch.nextafter(inner.abs(), torch.tensor(math.inf)) - inner.abs()
    return inner + 4 * unit * (rows % 3 - 1)


@each_direction
@each_kernel
@pytest.mark.parametrize("scale", [1.0, 4.0, 10.0])
def test_spline_is_as_exact_as_from_given_knots(implementation, scale, inverse):
    """Twice the error that float32 makes with knots that are exact.

    Beside a knot where it is in float32 matters too: four units in the last place of the parameters, where more.
    """
    spline, n = F.Spline(8), 600 if implementation == "triton" else 19_998
    x, parameters = inputs(n, spline, scale, torch.float32)
    knots = knots_of(parameters, spline)
    known = knots[1 if inverse else 0]
    for where, points in {"anywhere": x, "at bounds": at_bounds(known), "beside knots": beside_knots(known)}.items():
        exact = exact_form(points.double(), knots, inverse)
        budgets = [2 * error for error in errors(exact_form(points, knots, inverse), exact)]
        if where == "beside knots":
            unit = torch.finfo(torch.float32).eps
            moved = parameters.double() * (1 + unit * torch.randint(-1, 2, parameters.shape))
            conditions = errors(exact_form(points.double(), knots_of(moved, spline), inverse), exact)
            budgets = [max(b, testing.FLOOR_ULP * c) for b, c in zip(budgets, conditions, strict=True)]
        results = call(points, parameters, spline, inverse, implementation=implementation)
        for error, budget in zip(errors(results, exact), budgets, strict=True):
            assert error <= budget, where


@each_direction
@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPLINES)
def test_spline_is_finite_with_its_gradients(name, dtype, implementation, inverse):
    """At raw parameters of every size, at bounds, beside knots and far outside."""
    spline = SPLINES[name]
    low, high = spline.interval[2:] if inverse else spline.interval[:2]
    for scale in (0.0, 1.0, 10.0, 1e3, 1e9):
        x = low + (high - low) * torch.rand(40, dtype=dtype)
        x[:2] = torch.tensor([low, high])
        if spline.tails:
            x[2:8] = torch.tensor([-3e38, -1e20, 1e20, 3e38, -math.inf, math.inf])
        parameters = scale * torch.randn(40, spline.parameters, dtype=dtype)
        leaves = x.requires_grad_(), parameters.requires_grad_()
        y, log = call(*leaves, spline, inverse, implementation=implementation)
        gradients = torch.autograd.grad(y[y.isfinite()].sum() + log.sum(), leaves)
        assert torch.equal(y.isinf(), x.isinf())
        assert not y.isnan().any()
        assert all(result.isfinite().all() for result in (log, *gradients)), scale


@each_direction
@each_implementation
@pytest.mark.parametrize("name", [name for name, spline in SPLINES.items() if spline.tails])
def test_spline_is_the_identity_outside(name, implementation, inverse):
    """To the bit, with gradient 1, and 0 for the parameters; and nothing of second order."""
    spline = SPLINES[name]
    high = torch.tensor(spline.interval[1])
    far = torch.cat([torch.nextafter(high, high + 1)[None], high + torch.tensor([0.1, 7.0, 1e10, 1e38])])
    x = torch.cat([far, -far]).requires_grad_()
    parameters = torch.randn(len(x), spline.parameters, requires_grad=True)
    y, log = call(x, parameters, spline, inverse, implementation=implementation)
    assert torch.equal(y, x)
    assert torch.equal(log, torch.zeros_like(x))
    seeds = torch.randn_like(x), torch.randn_like(x)
    dx, dp = torch.autograd.grad((y, log), (x, parameters), seeds, create_graph=True)
    assert torch.equal(dx, seeds[0])
    assert torch.equal(dp, torch.zeros_like(dp))
    second = torch.autograd.grad((dx.sin().sum() + dp.sin().sum()), (x, parameters), materialize_grads=True)
    assert not any(result.any() for result in second)


@each_direction
@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["linear", "circular", "none", "zuko", "pyro", "two", "many"])
def test_spline_there_and_back(name, dtype, implementation, inverse):
    """At scale 4: to what rounding the image costs, a unit in the last place by the slope there."""
    spline = SPLINES[name]
    left, right, bottom, top = spline.interval
    x, parameters = inputs(200 if implementation == "triton" else 5000, spline, 4.0, dtype)
    if inverse:
        x = bottom + (x - left) / (right - left) * (top - bottom)
    y, log = call(x, parameters, spline, inverse, implementation=implementation)
    back, minus = call(y, parameters, spline, not inverse, implementation=implementation)
    error = (back - x).abs() / (top - bottom if inverse else right - left)
    fair = log > -3
    assert (error * log.exp().clamp(max=1)).max() < 4 * torch.finfo(dtype).eps
    assert error[fair].max() < 1e-5
    if dtype == torch.float64:
        torch.testing.assert_close(minus, -log, rtol=1e-7, atol=1e-7)


@each_direction
@each_kernel
def test_spline_far_from_zero_is_as_exact_as_at_it(implementation, inverse):
    """What is exact is ``x - x0``, not the knot: between 1000 and 1001 float32 has 14 bits."""
    near, far = (F.Spline(8, (low, low + 1, low, low + 1), tails=None) for low in (0.0, 1000.0))
    x, parameters = torch.arange(1, 256) / 256, torch.randn(255, near.parameters)
    y, log = call(x, parameters, near, inverse, implementation=implementation)
    moved, same = call(1000 + x, parameters, far, inverse, implementation=implementation)
    torch.testing.assert_close(moved, 1000 + y, rtol=torch.finfo(torch.float32).eps, atol=0)
    torch.testing.assert_close(same, log, rtol=1e-5, atol=1e-5)


@each_direction
@each_kernel
def test_spline_adds_up_small_bins(implementation, inverse):
    """Two hundred after a large one, each less than half of a unit in its last place."""
    spline = F.Spline(201, tails=None, min_width=0.0, min_height=0.0)
    x, parameters = -2.9 + 5.8 * torch.rand(50), torch.zeros(50, spline.parameters)
    sides = split(parameters, spline)
    sides[0 if inverse else 1][:, 1:] = -17.5
    y, _ = call(x, parameters, spline, inverse, implementation=implementation)
    exact, _ = call(x.double(), parameters.double(), spline, inverse, implementation="reference")
    assert (y - exact).abs().max() < 1e-6


# ---- What is wrong in others' code ----


def steep(spline):
    """Raw parameters of size 6, and what their splines make of uniform numbers."""
    x, parameters = inputs(20_000, spline, 6.0, torch.float32)
    return call(x, parameters, spline, implementation="cpp")[0], parameters


@each_implementation
def test_inverse_has_no_discriminant(implementation):
    """nflows#87, normflows' copy, and others: an assertion that rounding breaks while one samples."""
    spline = F.Spline(8)
    y, parameters = steep(spline)
    for module in THREADED.values():
        with pytest.raises(AssertionError):
            of_threaded(module)(y, parameters, spline, inverse=True)
    n = 500 if implementation == "triton" else len(y)
    assert all(x.isfinite().all() for x in call(y[-n:], parameters[-n:], spline, True, implementation=implementation))


@each_direction
@each_implementation
def test_gradients_far_outside_are_no_nan(implementation, inverse):
    """flowjax#239: the branch that is not taken overflows, and 0 times its derivative is NaN; so in pyro and zuko."""
    x = torch.tensor([-math.inf, -1e20, 1e20, math.inf])
    for peer, spline in ((of_pyro, F.Spline(8, style="pyro")), (of_zuko, F.Spline(8, style="zuko"))):
        leaves = x.clone().requires_grad_(), torch.randn(4, spline.parameters, requires_grad=True)
        dx, dp = torch.autograd.grad(peer(*leaves, spline, inverse)[0].sum(), leaves)
        assert dx.isnan().any()
        assert dp.isnan().any()
        y, log = call(*leaves, spline, inverse, implementation=implementation)
        dx, dp = torch.autograd.grad((y, log), leaves, (torch.ones(4), torch.ones(4)))
        assert torch.equal(dx, torch.ones(4))
        assert torch.equal(dp, torch.zeros_like(dp))


@each_direction
@each_implementation
def test_nothing_of_the_callers_is_written(implementation, inverse):
    """nflows' and normflows' search for the bin adds 1e-6 to the caller's last knot."""
    for search in (torchutils.searchsorted, normflows.searchsorted):
        knots = torch.linspace(-3, 3, 9)
        search(knots, torch.zeros(()))
        assert knots[-1] > 3
    spline = F.Spline(8)
    x, parameters = inputs(50, spline, 1.0, torch.float32, spread=1.5)
    given = x[:, None].requires_grad_(), parameters[:, None].requires_grad_()
    before, versions = [t.detach().clone() for t in given], [t._version for t in given]
    y, log = F.rational_quadratic_spline(*given, spline, inverse=inverse, implementation=implementation)
    torch.autograd.grad(y.sum() + log.sum(), given)
    assert all(map(torch.equal, given, before))
    assert [t._version for t in given] == versions


class Threaded(nn.Module):
    """A library's spline of one feature's parameters."""

    def __init__(self, module, spline):
        super().__init__()
        self.peer, self.spline = of_threaded(module), spline

    def forward(self, x, parameters):
        return self.peer(x, parameters, self.spline, False)


class Layer(nn.Module):
    def __init__(self, spline, **options):
        super().__init__()
        self.spline, self.options = spline, options
        self.conditioner = nn.Linear(3, 3 * spline.parameters)

    def forward(self, x):
        parameters = self.conditioner(x).view(*x.shape, self.spline.parameters)
        return F.rational_quadratic_spline(x, parameters, self.spline, **self.options)


def test_masks_of_others_break_tools():
    """normflows' PR 74, nflows#77: sizes that depend on the data are nothing to trace, export or batch."""
    spline = F.Spline(8)
    given = torch.randn(7), torch.randn(7, spline.parameters)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Threaded(nflows, spline), backend="eager", fullgraph=True)(*given)
    with pytest.raises(torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode):
        torch.export.export(Threaded(nflows, spline), given, strict=False)
    for module in THREADED.values():
        with pytest.raises(RuntimeError):
            torch.func.vmap(Threaded(module, spline))(*(x[None] for x in given))


@each_direction
@each_implementation
@pytest.mark.parametrize("strict", [False, True])
def test_spline_is_exported(implementation, inverse, strict):
    """With a batch of any size; through the reference as operators of torch alone, which others can translate."""
    layer, x = Layer(F.Spline(8), inverse=inverse, implementation=implementation), 2 * torch.randn(5, 3)
    batch = torch.export.Dim("batch", min=2, max=1024)
    program = torch.export.export(layer, (x,), dynamic_shapes=((batch, None),), strict=strict)
    for rows in (5, 9):
        x = 2 * torch.randn(rows, 3)
        torch.testing.assert_close(program.module()(x), layer(x))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    own = {name for name in names if name.startswith("hvae_kernels")}
    assert (own == set()) == (implementation == "reference")
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


# ---- Memory ----


@each_direction
@each_kernel
def test_spline_saves_nothing_but_its_inputs(implementation, inverse):
    x, parameters = (t.requires_grad_() for t in spline_inputs(torch.float32, "cpu", shape=(40, 3)))

    def run(which):
        return F.rational_quadratic_spline(x, parameters, SPLINES["linear"], inverse=inverse, implementation=which)

    assert testing.saved_bytes(lambda: run(implementation), [x, parameters]) == 0
    assert testing.saved_bytes(lambda: run("reference"), [x, parameters]) > 10 * x.numel() * 4


def largest_allocation(function):
    """In bytes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")


@each_direction
@pytest.mark.parametrize("layout", ["contiguous", "planes", "split"])
def test_parameters_are_read_and_their_gradients_written_as_they_lie(layout, inverse):
    """What a network hands on as (P, d) is not copied; nor are the parameters of a slice of its outputs."""
    spline, shape = SPLINES["linear"], (257, 7)
    x, parameters = spline_inputs(torch.float32, "cpu", shape=shape)
    if layout == "planes":
        parameters = parameters.mT.contiguous().mT
    if layout == "split":
        parameters = torch.cat([parameters, parameters], -1)[..., : spline.parameters]
    parameters.requires_grad_()
    nbytes = parameters.numel() * 4

    def run(parameters):
        return F.rational_quadratic_spline(x, parameters, spline, inverse=inverse, implementation="cpp")

    run(parameters)
    assert largest_allocation(lambda: run(parameters)) < nbytes / 4
    results, dense = run(parameters), parameters.detach().clone(memory_format=torch.contiguous_format)
    seeds = [torch.randn_like(y) for y in results]
    (gradient,) = torch.autograd.grad(results, parameters, seeds)
    torch.testing.assert_close(results, run(dense), rtol=0, atol=0)
    if layout == "planes":
        assert gradient.mT.is_contiguous()
    else:
        assert gradient.is_contiguous()
    dense.requires_grad_()
    assert torch.equal(gradient, torch.autograd.grad(run(dense), dense, seeds)[0])


@each_direction
@each_kernel
@pytest.mark.parametrize("order", [(1, 0, 2, 3), (3, 0, 1, 2), (2, 3, 1, 0)])
def test_parameters_of_any_strides(order, implementation, inverse):
    spline, back = SPLINES["two"], [order.index(i) for i in range(4)]
    x, parameters = spline_inputs(torch.float64, "cpu", shape=(2, 3, 4), spline="two")
    strided = parameters.permute(order).contiguous().permute(back)
    leaves = [p.detach().requires_grad_() for p in (parameters, strided)]
    every = []
    for p in leaves:
        results = F.rational_quadratic_spline(x, p, spline, inverse=inverse, implementation=implementation)
        (gradient,) = torch.autograd.grad([y.sin().sum() for y in results], p, create_graph=True)
        every.append((*results, gradient, *torch.autograd.grad(gradient.sin().sum(), p)))
    torch.testing.assert_close(every[0], every[1], rtol=0, atol=0)


@each_direction
@pytest.mark.parametrize("name", ["linear", "zuko", "circular"])
@pytest.mark.parametrize("shape", [(20_011, 3), (3, 20_011), (60_001,)])
def test_spline_has_the_same_bits_on_any_number_of_threads(shape, name, inverse):
    x, parameters = (t.requires_grad_() for t in spline_inputs(torch.float32, "cpu", shape=shape, spline=name))
    every = []
    for n_threads in (1, 2, 3):
        with testing.threads(n_threads):
            results = F.rational_quadratic_spline(x, parameters, SPLINES[name], inverse=inverse, implementation="cpp")
            every.append((*results, *torch.autograd.grad([y.sum() for y in results], (x, parameters))))
    for other in every[1:]:
        assert all(map(torch.equal, every[0], other))


# ---- Bad input ----


@each_direction
@each_implementation
def test_nan_stays_in_its_element(implementation, inverse):
    """In values and gradients, whichever parameter it is."""
    spline = SPLINES["linear"]
    given = spline_inputs(torch.float32, "cpu", shape=(6, 5), spread=0.9)
    seeds = torch.randn(6, 5), torch.randn(6, 5)

    def run(x, parameters):
        leaves = x.clone().requires_grad_(), parameters.clone().requires_grad_()
        options = {"inverse": inverse, "event_ndims": 0, "implementation": implementation}
        results = F.rational_quadratic_spline(*leaves, spline, **options)
        return *results, *torch.autograd.grad(results, leaves, seeds)

    sound, rest = run(*given), torch.ones(6, 5, dtype=torch.bool)
    rest[2, 3] = False
    x, parameters = (t.clone() for t in given)
    x[2, 3] = math.nan
    for result, expected in zip(run(x, parameters), sound, strict=True):
        assert torch.equal(result[rest], expected[rest])
    assert all(result[2, 3].isnan() for result in run(x, parameters)[:2])
    for index in (0, spline.bins - 1, spline.bins, 2 * spline.bins - 1, slice(None)):
        x, parameters = (t.clone() for t in given)
        parameters[2, 3, index] = math.nan
        results = run(x, parameters)
        assert all(result[2, 3].isnan() for result in results[:2]), index
        for result, expected in zip(results, sound, strict=True):
            assert torch.equal(result[rest], expected[rest])


def bad_calls():
    x, parameters, spline = torch.ones(4, 5), torch.ones(4, 5, 11), F.Spline(4)
    shape = r"parameters must be of x's shape and 11 more, \(4, 5, 11\), got a torch.float32 tensor of shape"
    return [
        ({"x": torch.tensor(1.0)}, ValueError, r"x must be of shape \(\.\.\., d\), got a torch.float32"),
        ({"x": [1.0]}, TypeError, r"x must be a tensor, got list \[1.0\]"),
        ({"x": x.long()}, TypeError, "x must be"),
        ({"parameters": None}, TypeError, "parameters must be a tensor, got None"),
        ({"parameters": parameters.double()}, TypeError, "parameters must have the dtype of x, torch.float32"),
        ({"parameters": parameters[..., :-1]}, ValueError, shape + r" \(4, 5, 10\)"),
        ({"parameters": parameters[0]}, ValueError, shape + r" \(5, 11\)"),
        ({"parameters": parameters[:1]}, ValueError, shape + r" \(1, 5, 11\)"),
        ({"spline": F.Spline(5)}, ValueError, r"parameters must be of x's shape and 14 more"),
        ({"spline": 4}, TypeError, "spline must be a Spline, got int 4"),
        ({"inverse": 1}, TypeError, "inverse must be True or False, got int 1"),
        ({"event_ndims": -1}, ValueError, "event_ndims must be an integer of at least 0, got int -1"),
        ({"event_ndims": 3}, ValueError, "event_ndims must be at most 2, x's number of dimensions, got int 3"),
        ({"event_ndims": 1.0}, TypeError, "event_ndims must be an integer of at least 0, got float 1.0"),
    ], {"x": x, "parameters": parameters, "spline": spline}


@each_implementation
def test_spline_bad_input(implementation):
    bad, fine = bad_calls()
    for changed, error, message in bad:
        with pytest.raises(error, match=f"rational_quadratic_spline: {message}"):
            F.rational_quadratic_spline(**{**fine, **changed}, implementation=implementation)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bins": 1}, ValueError, "bins must be an integer of at least 2, got int 1"),
        ({"bins": 8.0}, TypeError, "bins must be an integer of at least 2, got float 8.0"),
        ({"bound": 0.0}, ValueError, "bound must be positive, or .left, right, bottom, top., got float 0"),
        ({"bound": "3"}, TypeError, "bound must be a number"),
        ({"bound": math.inf}, ValueError, "bound must be finite, got float inf"),
        ({"bound": (1.0, 2.0)}, ValueError, "bound must be one number or .left, right, bottom, top."),
        ({"bound": (0.0, -1.0, 0.0, 1.0), "tails": None}, ValueError, "bound must be in order, left < right"),
        ({"bound": (0.0, 1.0, 0.0, 2.0)}, ValueError, "bound must be of one interval on both axes, as linear tails"),
        ({"bound": (0.0, 1.0, 0.0, 2.0), "tails": "circular"}, ValueError, "bound must be .* as circular tails"),
        ({"tails": "cubic"}, ValueError, "tails must be one of linear, circular"),
        ({"tails": 1}, TypeError, "tails must be one of linear, circular, got int 1"),
        ({"style": "normflows"}, ValueError, "style must be one of nflows, zuko, pyro"),
        ({"min_width": 0.25}, ValueError, "min_width must be at least 0 and below 1 / bins = 0.25, got float 0.25"),
        ({"min_height": -0.1}, ValueError, "min_height must be at least 0 and below 1 / bins = 0.25, got float -0.1"),
        ({"min_height": math.nan}, ValueError, "min_height must be finite, got float nan"),
        ({"min_derivative": -1e-3}, ValueError, "min_derivative must be at least 0, got float -0.001"),
        ({"min_derivative": 1.0, "style": "zuko"}, ValueError, "min_derivative must be between 0 and 1 for 'zuko'"),
        ({"min_derivative": 0.0, "style": "zuko"}, ValueError, "min_derivative must be between 0 and 1 for 'zuko'"),
        ({"min_derivative": 1.0, "style": "pyro"}, ValueError, "min_derivative must be below 1 for 'pyro'"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be positive, got float 0"),
        ({"logit_scale": None}, TypeError, "logit_scale must be a number, got None"),
    ],
)
def test_spline_bad_settings(options, error, message):
    with pytest.raises(error, match=f"Spline: {message}"):
        F.Spline(**{"bins": 4, **options})
