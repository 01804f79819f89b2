"""Every check on every op, implementation and device. Print the matrix with ``pytest tests/test_contract.py --matrix``.

The fast path proves itself against the float64 reference: values, first and second derivatives, all transforms, all
layouts, poisoned memory. A check that an op cannot meet is a defect of the op.
"""

from __future__ import annotations

import functools
import itertools
import math
import os

import pytest
import torch
from opspecs import OPSPECS

import hvae_kernels as hk
from hvae_kernels import _dispatch, _extension, _library, testing

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
#: What cannot be: C++ kernels on a GPU, and Triton on the CPU of a machine where it compiles for its GPU.
ABSENT = {("cpp", "cuda")} | (set() if os.environ.get("TRITON_INTERPRET") == "1" else {("triton", "cpu")})
DTYPES = (torch.float32, torch.float64)
#: For float64 the oracle has the same precision: this bounds the difference of two orders of summation.
DOUBLE_TOLERANCE = 1e-12


# An instruction set changes how a C++ kernel computes and which memory it touches. So the checks of numbers (budgets,
# extremes, finite differences) and of memory (within the budgets, and bitwise repeat) run for each set of this machine;
# what Python and torch do around the kernels is the same for all sets and is checked with the chosen one.
CHOSEN = [_extension.cpu_set()]
SETS = [name for name, reason in _extension.cpu_sets().items() if reason is None] or CHOSEN


def _rows(sets):
    for spec, device in itertools.product(OPSPECS, DEVICES):
        for implementation in spec.implementations:
            if (implementation, device) not in ABSENT:
                for cpu_set in sets if implementation == "cpp" else [None]:
                    yield (spec, implementation, device), cpu_set


def _param(row, cpu_set, name=None, sizes=None):
    """A row, or its case ``name``; conftest.py sets the instruction set that the mark says."""
    spec, implementation, device = row
    names = (spec.name, implementation if cpu_set is None else f"{implementation}-{cpu_set}", device)
    marks = () if cpu_set is None else pytest.mark.cpu_set(cpu_set)
    if name is None:
        return pytest.param(*row, id="/".join(names), marks=marks)
    return pytest.param(spec.at(sizes), implementation, device, sizes, id="/".join((*names, name)), marks=marks)


def _is_interpreted(implementation, device):
    """Where a kernel takes milliseconds: finite differences then go along random directions, not along each axis."""
    return (implementation, device) == ("triton", "cpu")


def _cases(spec, implementation, device):
    """Of the reference one, as it would be compared with itself; smaller ones in the interpreter, if there are any."""
    if implementation == "reference":
        return [("plain", spec.cases["plain"])]
    fewer = spec.interpreted if _is_interpreted(implementation, device) else {}
    return (spec.cases | fewer).items()


ROWS, ROWS_OF_EACH_SET = ([_param(*row) for row in _rows(sets)] for sets in (CHOSEN, SETS))
CASES = [_param(*row, *case) for row in _rows(SETS) for case in _cases(*row[0])]
EXTREMES = [
    _param(*row, *case) for row in _rows(SETS) if row[0][1] != "reference" for case in row[0][0].extremes.items()
]
LONG_SUMS = [
    _param(*row, "long_sums", row[0][0].long_sums) for row in _rows(SETS) if row[0][1] == "cpp" and row[0][0].long_sums
]
each_row = pytest.mark.parametrize(("spec", "implementation", "device"), ROWS)
each_row_of_each_set = pytest.mark.parametrize(("spec", "implementation", "device"), ROWS_OF_EACH_SET)
each_kernel_of_each_set = pytest.mark.parametrize(
    ("spec", "implementation", "device"), [row for row in ROWS_OF_EACH_SET if row.values[1] != "reference"]
)
each_public_row = pytest.mark.parametrize(
    ("spec", "implementation", "device"), [row for row in ROWS if row.values[0].name in hk.functional.__all__]
)
each_case = pytest.mark.parametrize(("spec", "implementation", "device", "case"), CASES)


def leaves(inputs, dtype=None):
    """Leaves of ``dtype`` with the memory layout of ``inputs``."""
    return tuple(x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs)


def random_like(tensors):
    return tuple(torch.randn_like(t) for t in tensors)


def first_order(function, inputs, upstream):
    return torch.autograd.grad(function(*inputs), inputs, upstream, materialize_grads=True)


def second_order(function, inputs, upstream, directions):
    """Gradients of ``sum <direction, gradient>`` for the cotangents and the inputs."""
    upstream = tuple(g.detach().requires_grad_() for g in upstream)
    gradients = torch.autograd.grad(function(*inputs), inputs, upstream, create_graph=True, materialize_grads=True)
    pairing = sum((h * g).sum() for h, g in zip(directions, gradients, strict=True))
    return torch.autograd.grad(pairing, (*upstream, *inputs), materialize_grads=True)


def compare(spec, implementation, device, case, order):
    """An implementation's results, or derivatives of this order, against the plain formula and the float64 oracle.

    In fresh memory that is NaN, where what is not written shows, under ``torch.use_deterministic_algorithms(True)``.
    Inputs keep their bits, and results own their memory.
    """
    n_inputs = len(spec.make(torch.float32, device, **case))

    def make(dtype=torch.float32):
        """Inputs, and what of cotangents and directions the order asks for."""
        inputs = spec.make(dtype, device, **case)
        upstream = random_like(spec.reference(*inputs)) if order > 0 else ()
        return *inputs, *upstream, *(random_like(inputs) if order > 1 else ())

    def run(function, tensors):
        inputs, given = leaves(tensors[:n_inputs]), tensors[n_inputs:]
        if order == 0:
            return function(*inputs)
        if order == 1:
            return first_order(function, inputs, given)
        return second_order(function, inputs, given[:-n_inputs], given[-n_inputs:])

    def op(*tensors):
        before = [x.clone() for x in tensors]
        with hk.use_impl(implementation), testing.poisoned_memory():
            results = run(spec.op, tensors)
        assert all(result.dtype == tensors[0].dtype for result in results)
        assert all(map(torch.equal, tensors, before)), "a kernel writes to its inputs"
        if order == 0:
            memory = {x.data_ptr() for x in tensors if x.numel()}
            assert not memory & {x.data_ptr() for x in results if x.numel()}, "a result is an input"
        return results

    def formula(*tensors):
        return run(spec.reference, tensors)

    testing.assert_as_exact(op, formula, make)
    tensors = make(torch.float64)
    assert max(map(testing.relative_error, op(*tensors), formula(*tensors))) <= DOUBLE_TOLERANCE


def small(spec, device, dtype=torch.float64):
    return leaves(spec.make(dtype, device, **spec.small))


def assert_equal(results, expected, tolerance=1e-9):
    for result, exact in zip(results, expected, strict=True):
        torch.testing.assert_close(result, exact, rtol=tolerance, atol=tolerance)


# ---- Values and derivatives ----


@each_case
def test_forward_budget(spec, implementation, device, case):
    compare(spec, implementation, device, case, 0)


@each_case
def test_backward_budget(spec, implementation, device, case):
    compare(spec, implementation, device, case, 1)


@each_case
def test_double_backward_budget(spec, implementation, device, case):
    compare(spec, implementation, device, case, 2)


@pytest.mark.parametrize(("spec", "implementation", "device", "case"), EXTREMES + LONG_SUMS)
def test_extremes(spec, implementation, device, case):
    compare(spec, implementation, device, case, 0)
    compare(spec, implementation, device, case, 1)


@each_row_of_each_set
def test_gradcheck(spec, implementation, device):
    inputs = small(spec, device)
    op = spec.held(inputs) if spec.held else spec.op
    with hk.use_impl(implementation):
        assert torch.autograd.gradcheck(
            op, inputs, check_batched_grad=True, fast_mode=_is_interpreted(implementation, device)
        )


@each_row_of_each_set
def test_gradgradcheck(spec, implementation, device):
    inputs = small(spec, device)
    op = spec.held(inputs) if spec.held else spec.op
    fast = _is_interpreted(implementation, device)
    with hk.use_impl(implementation):
        assert torch.autograd.gradgradcheck(op, inputs, fast_mode=fast)


@each_row
def test_third_order(spec, implementation, device):
    inputs = small(spec, device)
    upstream = random_like(spec.reference(*inputs))
    directions = random_like(inputs)

    def third(function):
        gradients = torch.autograd.grad(function(*inputs), inputs, upstream, create_graph=True)
        second = sum((h * g).sum() for h, g in zip(directions, gradients, strict=True))
        products = torch.autograd.grad(second, inputs, create_graph=True, materialize_grads=True)
        third = sum((h * p).sum() for h, p in zip(directions, products, strict=True))
        return torch.autograd.grad(third, inputs, materialize_grads=True)

    with hk.use_impl(implementation):
        results = third(spec.op)
    assert_equal(results, third(spec.reference))


@each_row
def test_partial_gradients(spec, implementation, device):
    """Each input alone needing a gradient, each output alone used."""
    inputs = spec.make(torch.float64, device, **spec.small)
    with hk.use_impl(implementation):
        for index, output in itertools.product(range(len(inputs)), range(len(spec.reference(*inputs)))):
            mixed = [x.clone().requires_grad_(i == index) for i, x in enumerate(inputs)]
            exact, result = spec.reference(*mixed)[output], spec.op(*mixed)[output]
            if not exact.requires_grad:  # this output does not depend on this input
                expected = [torch.zeros_like(mixed[index])]
            else:
                expected = torch.autograd.grad(exact.sum(), mixed[index], materialize_grads=True)
            if result.requires_grad or exact.requires_grad:
                assert_equal(torch.autograd.grad(result.sum(), mixed[index], materialize_grads=True), expected)


@each_row
def test_same_tensor_twice(spec, implementation, device):
    inputs = list(small(spec, device))
    inputs[spec.same[1]] = inputs[spec.same[0]]
    distinct = [x for i, x in enumerate(inputs) if i != spec.same[1]]
    upstream = random_like(spec.reference(*inputs))
    with hk.use_impl(implementation):
        results = torch.autograd.grad(spec.op(*inputs), distinct, upstream)
    assert_equal(results, torch.autograd.grad(spec.reference(*inputs), distinct, upstream))


# ---- What is not finite ----


def _spoiled(tensor, rows, value, first):
    """A copy of these rows' value: NaN everywhere, an infinity in one place of each row, another one in each."""
    copy = tensor.clone()
    if math.isnan(value):
        copy[rows] = value
        return copy
    for row in rows:
        copy[row].view(-1)[(first + row) % copy[row].numel()] = value
    return copy


@each_kernel_of_each_set
def test_rows_are_apart(spec, implementation, device):
    """What is no number in a row of an argument or of a cotangent leaves the bits of all other rows as they are.

    The rows whose number has a certain bit are spoiled at once, then all others: any two rows are told apart so (in the
    interpreter, which is slow, by every third bit alone). Widths and numbers of rows fill no vector, tile or block.
    """
    interpreted = implementation == "triton" and device == "cpu"
    sizes = [((70, 5), torch.float32)]
    sizes += [] if interpreted else [((37, 17), torch.float32), ((37, 5), torch.float64)]
    for shape, dtype in sizes:
        case = {"shape": shape, **spec.row_cases[0]}
        at = spec.at(case)
        inputs = at.make(dtype, device, **case)
        second = not spec.is_summed_by_torch("second")
        given = (*inputs, *random_like(at.reference(*inputs)))
        given += random_like(inputs) if second else ()
        n_inputs, n_given = len(inputs), len(given)
        n_results = n_given - n_inputs * (2 if second else 1)
        places = (*spec.rows, *range(n_inputs, n_inputs + n_results))
        places += tuple(n_inputs + n_results + place for place in spec.rows) if second else ()

        def rows_of(given, at=at, n_inputs=n_inputs, n_results=n_results, second=second):
            leaf, upstream = leaves(given[:n_inputs]), leaves(given[n_inputs : n_inputs + n_results])
            with hk.use_impl(implementation):
                results = at.op(*leaf)
                first = torch.autograd.grad(results, leaf, upstream, create_graph=second, materialize_grads=True)
                kept = [*results, *(first[place] for place in spec.rows)]
                if second:
                    wanted = (*upstream, *(leaf[place] for place in spec.rows))
                    directions = given[n_inputs + n_results :]
                    kept += torch.autograd.grad(first, wanted, directions, materialize_grads=True)
            return [x.detach() for x in kept]

        clean = rows_of(given)
        bits = range((shape[0] - 1).bit_length())[:: 3 if interpreted else 1]
        alone = [] if interpreted else [((place,), torch.nan, bit) for place in places for bit in bits]
        values = (torch.nan, torch.inf) if interpreted else (torch.nan, torch.inf, -torch.inf)
        together = [(places, value, bit) for value in values for bit in bits]
        for (spoiled, value, bit), one in itertools.product(alone + together, (0, 1)):
            bad = [row for row in range(shape[0]) if (row >> bit & 1) == one]
            good = [row for row in range(shape[0]) if (row >> bit & 1) != one]
            poisoned = [_spoiled(x, bad, value, bit) if i in spoiled else x for i, x in enumerate(given)]
            for i, (result, expected) in enumerate(zip(rows_of(poisoned), clean, strict=True)):
                assert torch.equal(result[good], expected[good]), (shape, dtype, spoiled, value, bit, i)


@each_kernel_of_each_set
def test_infinite_arguments(spec, implementation, device):
    """The plain formula's values at +-inf in every argument: NaN, infinite and finite alike, or a refusal."""
    interpreted = implementation == "triton" and device == "cpu"
    for shape, options in itertools.product(((7, 5),) if interpreted else ((6, 16), (7, 5)), spec.row_cases):
        case = {"shape": shape, **options}
        at = spec.at(case)
        inputs = at.make(torch.float32, device, **case)
        for place, value, where in itertools.product(range(len(inputs)), (torch.inf, -torch.inf), (0, -1, slice(None))):
            if interpreted and isinstance(where, slice):
                continue
            given = [x.clone() for x in inputs]
            given[place].view(-1)[where] = value
            try:
                formulas = [at.reference(*(x.to(dtype) for x in given)) for dtype in DTYPES]
                with hk.use_impl(implementation):
                    results = at.op(*given)
            except (RuntimeError, ValueError) as error:
                if not any(refusal in str(error) for refusal in ("must be finite, got", "so the map has no inverse")):
                    raise
                continue
            for result, single, exact in zip(results, *formulas, strict=True):
                fits = _same_kind(result, single) | _same_kind(result, exact)
                if place in spec.defined_at_infinity:
                    fits |= single.isnan() | exact.isnan()
                if place in spec.undefined_at_infinity:
                    fits |= result.isnan()
                assert fits.all(), (case, place, value, where)
                finite = result.isfinite() & exact.isfinite()
                torch.testing.assert_close(result[finite].double(), exact[finite], rtol=1e-3, atol=1e-3)


def _same_kind(result, other):
    """Where both are NaN, both finite, or both the same infinity."""
    other = other.to(result.dtype)
    return (result.isnan() & other.isnan()) | (result.isfinite() & other.isfinite()) | (result == other)


# ---- Repeatability ----


@pytest.mark.parametrize(
    ("spec", "implementation", "device", "case"),
    # the interpreter runs one program after the other: it always repeats
    [case for case in CASES if case.values[1:3] != ("triton", "cpu") or case.id.endswith("/plain")] + LONG_SUMS,
)
def test_bitwise_repeat(spec, implementation, device, case):
    """The same bits again: with another number of threads from our kernels, with the same one from torch's sums."""
    inputs = leaves(spec.make(torch.float32, device, **case))
    upstream, directions = random_like(spec.reference(*inputs)), random_like(inputs)

    def run(n_threads):
        with hk.use_impl(implementation), testing.threads(n_threads):
            orders = {
                "values": spec.op(*inputs),
                "first": first_order(spec.op, inputs, upstream),
                "second": second_order(spec.op, inputs, upstream, directions),
            }
        return {f"{order}/{i}": result for order, results in orders.items() for i, result in enumerate(results)}

    first = run(2)
    by_torch = {name: implementation == "reference" or spec.is_summed_by_torch(name) for name in first}
    again = run(2) if any(by_torch.values()) else None
    one = run(1) if not all(by_torch.values()) else None
    for name, result in first.items():
        other = again if by_torch[name] else one
        assert torch.equal(result, other[name]), name


# ---- The implementation of one call ----


@each_public_row
def test_implementation_of_a_call(spec, implementation, device):
    """What ``implementation=`` names gives the bits of ``use_impl``, in derivatives too.

    All runs where ``use_impl`` names one that no op has: whatever asked it would raise.
    """
    inputs = leaves(spec.make(torch.float32, device, **spec.cases["plain"]))
    upstream, directions = random_like(spec.reference(*inputs)), random_like(inputs)
    op = functools.partial(spec.op, implementation=implementation)

    def run(function):
        first = first_order(function, inputs, upstream)
        return [*function(*inputs), *first, *second_order(function, inputs, upstream, directions)]

    with hk.use_impl(implementation):
        expected = run(spec.op)
    values = expected[: len(upstream)]
    stacked = [torch.stack([x, x]) for x in inputs]
    half = (inputs[0].bfloat16(), *inputs[1:])
    torch._dynamo.reset()
    with hk.use_impl("cuda"):
        assert all(map(torch.equal, run(op), expected))
        compiled = torch.compile(lambda *x: op(*x), backend="aot_eager", fullgraph=True)
        for _ in range(2):
            assert_equal(compiled(*inputs), values, 1e-5)
        assert_equal(first_order(compiled, inputs, upstream), expected[len(upstream) :][: len(inputs)], 1e-5)
        assert_equal([x[1] for x in torch.func.vmap(op)(*stacked)], values, 1e-5)
        assert_equal(torch.func.vjp(op, *inputs)[1](upstream), first_order(op, inputs, upstream), 1e-5)
        with torch.autocast(device, torch.bfloat16):
            results = op(*half)
        assert all(result.dtype is torch.float32 for result in results)


@each_public_row
def test_implementation_of_a_call_never_falls_back(spec, implementation, device):
    """Chosen is what cannot be, under a choice that can."""
    inputs = small(spec, device)
    half = [x.bfloat16() for x in inputs]

    def op(*arguments):
        return spec.op(*arguments, implementation="cuda")

    torch._dynamo.reset()
    with hk.use_impl(implementation):
        spec.op(*inputs)
        batched = torch.func.vmap(lambda x: op(x, *inputs[1:]))
        for function in (op, functools.partial(torch.func.vjp, op), lambda x, *_: batched(x[None])):
            with pytest.raises(RuntimeError, match="'cuda' was asked for but cannot be used: no op has"):
                function(*inputs)
        with pytest.raises(Exception, match="'cuda' was asked for but cannot be used: no op has"):
            torch.compile(op, backend="eager", fullgraph=True)(*inputs)
        with pytest.raises(RuntimeError, match="cannot be used: no op has"), torch.autocast(device, torch.bfloat16):
            op(*half)
        with pytest.raises(
            ValueError, match=": implementation must be one of auto, triton, cpp, reference, got 'fast'"
        ):
            spec.op(*inputs, implementation="fast")


# ---- torch.compile, torch.func, autocast ----


@each_row
def test_opcheck(spec, implementation, device):
    """Schema, fake tensors and AOT dispatch of the raw kernels; the reference has none but the op itself."""
    inputs = spec.make(torch.float32, device, **spec.small)
    if implementation == "reference":
        return assert_equal(
            torch.compile(spec.reference, backend="eager", fullgraph=True)(*inputs), spec.op(*inputs), 1e-6
        )
    with hk.use_impl(implementation):
        spec.op(*inputs)  # loads the extension
        for raw in spec.raw:
            if implementation in raw.overloads:  # else it is made of other ops
                torch.library.opcheck(raw.overloads[implementation], raw.arguments(inputs))


#: Inductor sees of the other interpreted kernels what it sees of the C++ ones: the name of a raw op.
FOR_INDUCTOR = [row for row in ROWS if not _is_interpreted(*row.values[1:]) or row.values[0].composed]


@pytest.fixture
def unoptimised(monkeypatch):
    """What Inductor writes in C++ is compiled in a third of the time: the question is what it computes, not how fast.

    Scalar loops need no headers of vectors.
    """
    from torch._inductor import config, cpp_builder

    stock = cpp_builder._get_optimization_cflags

    def flags(*args, **kwargs):
        cflags, ldflags = stock(*args, **kwargs)
        return ["O0" if flag in ("O1", "O3") else flag for flag in cflags], ldflags

    monkeypatch.setattr(cpp_builder, "_get_optimization_cflags", flags)
    with config.patch("cpp.simdlen", 1):
        yield


@each_row
def test_compile(spec, implementation, device):
    """``fullgraph``, forward and backward, also through ``torch.func.grad`` inside the compiled function."""
    inputs = small(spec, device)
    upstream = random_like(spec.reference(*inputs))
    torch._dynamo.reset()
    with hk.use_impl(implementation):
        compiled = torch.compile(lambda *args: spec.op(*args), backend="aot_eager", fullgraph=True)
        assert_equal(compiled(*inputs), spec.reference(*inputs))
        assert_equal(first_order(compiled, inputs, upstream), first_order(spec.reference, inputs, upstream))
        compiled = torch.compile(
            lambda *args: gradient_within(spec.op, upstream, *args), backend="aot_eager", fullgraph=True
        )
        result = torch.autograd.grad(compiled(*inputs).square().sum(), inputs, materialize_grads=True)
    expected = gradient_within(spec.reference, upstream, *inputs).square().sum()
    assert_equal(result, torch.autograd.grad(expected, inputs, materialize_grads=True))


@pytest.mark.usefixtures("unoptimised")
@pytest.mark.parametrize(("spec", "implementation", "device"), FOR_INDUCTOR)
def test_compile_by_inductor(spec, implementation, device):
    """The same, values and gradient of one compiled function, as what Inductor writes takes seconds to build.

    Of the reference without the gradient inside, which is more of the same: operations of torch's own.
    """
    inputs = small(spec, device)
    upstream = random_like(spec.reference(*inputs))

    def both(function, first, *rest):
        if implementation == "reference":
            return function(first, *rest)
        values, pull_back = torch.func.vjp(lambda x: tuple(function(x, *rest)), first)
        return *values, *pull_back(tuple(g * y.cos() for g, y in zip(upstream, values, strict=True)))

    def derivatives(function):
        results = function(*inputs)
        values, gradients = results[: len(upstream)], results[len(upstream) :]
        total = sum((g * y).sum() for g, y in zip(upstream, values, strict=True))
        total = total + sum(gradient.square().sum() for gradient in gradients)
        return [*results, *torch.autograd.grad(total, inputs, materialize_grads=True)]

    torch._dynamo.reset()
    with hk.use_impl(implementation):
        compiled = torch.compile(lambda *args: both(spec.op, *args), backend="inductor", fullgraph=True)
        results = derivatives(compiled)
    assert_equal(results, derivatives(functools.partial(both, spec.reference)))


def gradient_within(function, upstream, first, *rest):
    """``torch.func.grad`` of ``<upstream, sin(results)>`` for the first argument."""

    def energy(x):
        return sum((g * y.sin()).sum() for g, y in zip(upstream, function(x, *rest), strict=True))

    return torch.func.grad(energy)(first)


SIZES = ("plain", "prime", "above_power", "no_rows")


@each_row
def test_compile_dynamic_shapes(spec, implementation, device):
    """One compiled function for many sizes, an empty batch among them; of the reference, which may loop, for two."""
    torch._dynamo.reset()
    with hk.use_impl(implementation):
        compiled = torch.compile(lambda *args: spec.op(*args), backend="aot_eager", fullgraph=True, dynamic=True)
        for name in ("plain", "no_rows") if implementation == "reference" else SIZES:
            inputs = leaves(spec.make(torch.float64, device, **spec.cases[name]))
            upstream = random_like(spec.reference(*inputs))
            assert_equal(first_order(compiled, inputs, upstream), first_order(spec.reference, inputs, upstream))


@pytest.mark.parametrize("argument", [0, -1])
@each_row
def test_pull_back_after_its_transform(spec, implementation, device, argument):
    """Gradients of what ``torch.func.vjp`` pulls back, for all inputs, by autograd and by another transform.

    Tensors saved under a transform that has ended are wrapped, and say that they require no gradients.
    """
    inputs = small(spec, device)
    argument %= len(inputs)
    upstream = random_like(spec.reference(*inputs))

    def pulled(function, *args):
        values, pull_back = torch.func.vjp(
            lambda x: tuple(function(*args[:argument], x, *args[argument + 1 :])), args[argument]
        )
        (gradient,) = pull_back(tuple(g * y.cos() for g, y in zip(upstream, values, strict=True)))
        return sum((g * y).sum() for g, y in zip(upstream, values, strict=True)) + gradient.square().sum()

    expected = torch.autograd.grad(pulled(spec.reference, *inputs), inputs, materialize_grads=True)
    with hk.use_impl(implementation):
        results = torch.autograd.grad(pulled(spec.op, *inputs), inputs, materialize_grads=True)
        within = torch.func.grad(functools.partial(pulled, spec.op), tuple(range(len(inputs))))(*inputs)
    assert_equal(results, expected)
    assert_equal(within, expected)


@each_row
def test_vmap(spec, implementation, device):
    """Over each argument alone and over all, values and gradients, nested once."""
    inputs = spec.make(torch.float64, device, **spec.small)
    upstream = random_like(spec.reference(*inputs))

    def gradient(*args):
        return torch.func.vjp(spec.op, *args)[1](upstream)

    with hk.use_impl(implementation):
        for batched in [*((i,) for i in range(len(inputs))), tuple(range(len(inputs)))]:
            dims = tuple(-1 if i in batched else None for i in range(len(inputs)))
            stacked = [torch.stack([x, 0.9 * x], -1) if i in batched else x for i, x in enumerate(inputs)]
            slices = [[x[..., n] if i in batched else x for i, x in enumerate(stacked)] for n in range(2)]
            for function, plain in ((spec.op, spec.op), (gradient, gradient)):
                results = torch.func.vmap(function, dims)(*stacked)
                expected = [torch.stack(pair) for pair in zip(*(plain(*s) for s in slices), strict=True)]
                assert_equal(results, expected)
        first_only = (0,) + (None,) * (len(inputs) - 1)
        twice = torch.func.vmap(torch.func.vmap(spec.op, first_only), first_only)
        nested = inputs[0] * torch.tensor([1.0, 0.5], dtype=torch.float64, device=device).view(2, 1, 1, 1)
        nested = nested.expand(2, 3, *inputs[0].shape)
        assert_equal(twice(nested, *inputs[1:])[0][1, 2:3], spec.reference(nested[1, 2], *inputs[1:])[0][None])


@each_row
def test_per_sample_second_order(spec, implementation, device):
    """``vmap`` over a Hessian-vector product."""
    inputs = spec.make(torch.float64, device, **spec.small)
    upstream = random_like(spec.reference(*inputs))

    def product(function, first, direction):
        def energy(x):
            return sum((g * y.sin()).sum() for g, y in zip(upstream, function(x, *inputs[1:]), strict=True))

        return torch.func.vjp(torch.func.grad(energy), first)[1](direction)[0]

    stacked = torch.stack([inputs[0], 2 * inputs[0]])
    directions = torch.randn_like(stacked)
    expected = torch.stack([product(spec.reference, x, v) for x, v in zip(stacked, directions, strict=True)])
    with hk.use_impl(implementation):
        results = torch.func.vmap(lambda x, v: product(spec.op, x, v))(stacked, directions)
    assert_equal([results], [expected])


@each_row
def test_forward_mode(spec, implementation, device):
    """``jvp``, and the Hessian as ``jacfwd`` of ``jacrev``."""
    inputs = spec.make(torch.float64, device, **spec.small)
    tangents = random_like(inputs)
    expected = torch.func.jvp(spec.reference, inputs, tangents)
    index = len(inputs) - 1

    def energy(function, last):
        return sum(y.square().sum() for y in function(*inputs[:index], last))

    with hk.use_impl(implementation):
        results = torch.func.jvp(spec.op, inputs, tangents)
        for result, exact in zip(results, expected, strict=True):
            assert_equal(result, exact)
        hessian = torch.func.hessian(lambda x: energy(spec.op, x))(inputs[index])
    assert_equal([hessian], [torch.func.hessian(lambda x: energy(spec.reference, x))(inputs[index])])


@each_row
def test_forward_mode_of_second_derivatives(spec, implementation, device):
    """``jvp`` of a gradient of a gradient's part."""
    inputs = spec.make(torch.float64, device, **spec.small)
    direction, tangents, every = random_like(inputs), random_like(inputs), tuple(range(len(inputs)))

    def third(function):
        def energy(*args):
            return sum(y.sin().sum() for y in function(*args))

        def pairing(*args):
            gradients = torch.func.grad(energy, every)(*args)
            return sum((h * g).sum() for h, g in zip(direction, gradients, strict=True))

        return torch.func.jvp(torch.func.grad(pairing, every), inputs, tangents)[1]

    with hk.use_impl(implementation):
        results = third(spec.op)
    assert_equal(results, third(spec.reference))


@each_row
def test_forward_mode_of_forward_mode(spec, implementation, device):
    """Torch loses the outer derivative of a kernel, so the reference runs there, or an explicit choice is refused."""
    inputs = spec.make(torch.float64, device, **spec.small)
    inner, outer = random_like(inputs), random_like(inputs)

    def twice(function):
        def once(*args):
            return torch.func.jvp(lambda *args: tuple(function(*args)), args, inner)[1]

        return torch.func.jvp(once, inputs, outer)[1]

    expected = twice(spec.reference)
    with hk.use_impl(implementation):
        if implementation == "reference":
            return assert_equal(twice(spec.op), expected)
        with pytest.raises(RuntimeError, match=f"implementation {implementation!r} .* jvp within jvp"):
            twice(spec.op)
    assert_equal(twice(spec.op), expected)


@each_row
def test_forward_mode_of_forward_mode_of_what_was_pulled_back(spec, implementation, device):
    """Of a kernel that ran before: right, or refused."""
    inputs = spec.make(torch.float64, device, **spec.small)
    cotangents = random_like(spec.reference(*inputs))
    inner, outer = random_like(cotangents), random_like(cotangents)

    def twice(function):
        _, pull = torch.func.vjp(lambda *args: tuple(function(*args)), *inputs)

        def once(*args):
            return torch.func.jvp(lambda *args: pull(tuple(x.square() for x in args)), args, inner)[1]

        return torch.func.jvp(once, cotangents, outer)[1]

    with hk.use_impl(implementation):
        try:
            results = twice(spec.op)
        except NotImplementedError as error:
            if "jvp within jvp" not in str(error):
                raise
            return
    assert_equal(results, twice(spec.reference))


@each_row
def test_functional_gradients(spec, implementation, device):
    """``torch.func.grad`` with an ordinary backward outside, and ``jacrev``."""
    inputs = small(spec, device)

    def energy(function, *args):
        return sum(y.sin().sum() for y in function(*args))

    def outer(function):
        gradient = torch.func.grad(lambda x: energy(function, x, *inputs[1:]))(inputs[0])
        return torch.autograd.grad(gradient.square().sum(), inputs)

    with hk.use_impl(implementation):
        results = outer(spec.op)
        jacobian = torch.func.jacrev(lambda x: spec.op(x, *inputs[1:])[0])(inputs[0])
    assert_equal(results, outer(spec.reference))
    assert_equal([jacobian], [torch.func.jacrev(lambda x: spec.reference(x, *inputs[1:])[0])(inputs[0])])


@each_row
def test_half_precision(spec, implementation, device):
    """bfloat16 and float16 where there are kernels for them (within the plain formula's error), a refusal elsewhere."""

    def op(*inputs):
        with hk.use_impl(implementation):
            results = spec.op(*inputs)
        assert all(result.dtype is inputs[0].dtype for result in results)
        return results

    for dtype in (torch.bfloat16, torch.float16):
        make = functools.partial(spec.make, dtype, device, **spec.cases["prime"])
        if implementation in _dispatch.OPS[spec.name].half_precision:
            testing.assert_as_exact(op, spec.reference, make)
        else:
            with pytest.raises(RuntimeError, match=f"no {str(dtype)[6:]} kernel"):
                op(*make())


@each_row
def test_autocast(spec, implementation, device):
    """Half-precision arguments, mixed with float32 ones, are computed in float32."""
    inputs = spec.make(torch.float32, device, **spec.small)
    half = (inputs[0].bfloat16().requires_grad_(), *inputs[1:])
    with hk.use_impl(implementation), torch.autocast(device, torch.bfloat16):
        results = spec.op(*half)
    assert all(result.dtype is torch.float32 for result in results)
    assert_equal(results, spec.reference(half[0].float(), *inputs[1:]), 1e-5)
    (gradient,) = torch.autograd.grad(results[0].sum(), half[0])
    assert gradient.dtype is torch.bfloat16


@each_row
def test_backward_inside_autocast(spec, implementation, device):
    """Taken inside the block, gradients are those taken outside it: in full precision.

    But for those of torch's own products, which the references and ``dense_gaussian_leapfrog`` are made of: bfloat16
    rounds by up to 2^-9, and on the way to a gradient up to eight times.
    """
    plain = implementation == "reference" or spec.name == "dense_gaussian_leapfrog"
    inputs = [x.requires_grad_(x.is_floating_point()) for x in spec.make(torch.float32, device, **spec.cases["plain"])]
    chosen = [x for x in inputs if x.requires_grad]
    with hk.use_impl(implementation):
        results = spec.op(*inputs)
        upstream = [torch.randn_like(y) for y in results]
        outside = torch.autograd.grad(results, chosen, upstream, retain_graph=True, materialize_grads=True)
        with torch.autocast(device, torch.bfloat16):
            inside = torch.autograd.grad(results, chosen, upstream, materialize_grads=True)
    if not plain:
        assert_equal(inside, outside, 1e-6)
    for result, expected in zip(inside, outside, strict=True):
        assert (result - expected).norm() <= 4 * 2**-8 * expected.norm()


@each_row
def test_no_gradients_recorded(spec, implementation, device, monkeypatch):
    """Nor a Function called, which costs as much as a small kernel."""
    inputs = small(spec, device)
    expected = [y.detach() for y in spec.reference(*inputs)]
    monkeypatch.setattr(_library.OpFunction, "apply", None)
    with hk.use_impl(implementation):
        for guard in (torch.no_grad(), torch.inference_mode()):
            with guard:
                results = spec.op(*inputs)
            assert not any(result.requires_grad for result in results)
            assert_equal(results, expected)
        assert_equal(spec.op(*(x.detach() for x in inputs)), expected)


@each_row
def test_checkpoint_and_make_fx(spec, implementation, device):
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.utils.checkpoint import checkpoint

    inputs = small(spec, device)
    upstream = random_like(spec.reference(*inputs))
    with hk.use_impl(implementation):
        recomputed = first_order(lambda *x: checkpoint(spec.op, *x, use_reentrant=False), inputs, upstream)
        assert_equal(recomputed, first_order(spec.reference, inputs, upstream))
        detached = [x.detach() for x in inputs]
        traced = make_fx(lambda *x: spec.op(*x))(*detached)  # which takes options by name for inputs
        assert_equal(traced(*detached), spec.reference(*detached))
