"""Makes Triton's interpreter several times as fast, with the same bits.

Nearly all its time goes to types and checks in Python, hardly any to NumPy. So what the first program of a launch asks
of NumPy is written down, on a :class:`Tape`, and played for all others, in later launches of the kernel too: for other
numbers, addresses and sizes, as these are what it reads. Where a kernel branches on a number, a tape has a branch for
each outcome; the program that meets a new one runs the kernel again, with the results so far handed to it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

TensorHandle = interpreter.TensorHandle
#: Written down next to ``create_...`` and ``get_...``; lambdas of the builder only delegate to these.
PRIMITIVES = ("binary_op", "unary_op", "ternary_op", "cast_impl", "create_reshape")
#: How often a step is played: never (its result is kept), once a launch, in each program.
CONSTANT, UNIFORM, VARYING = range(3)
EFFECTS = {
    "create_get_program_id", "create_load", "create_masked_load", "create_store", "create_masked_store",
    "create_atomic_rmw", "create_atomic_cas", "create_assert", "create_assume", "create_print", "create_barrier",
}  # fmt: skip
REDUCTIONS = {
    tl.standard._sum_combine: np.sum,
    tl.standard._elementwise_max: np.nanmax,
    tl.standard._elementwise_min: np.nanmin,
}
#: Larger constants are made in each launch; all tapes are dropped when they hold so many steps.
LARGEST_CONSTANT, MOST_STEPS = 4096, 400_000
#: Programs along the second and the third axis that a GPU takes.
LARGEST_GRID = 65_535


@dataclasses.dataclass(eq=False)
class Segment:
    """What a kernel does up to a branch: all that it asks, what of this NumPy does first, and in later programs."""

    asked: list[tuple] = dataclasses.field(default_factory=list)
    steps: list[tuple] = dataclasses.field(default_factory=list)
    varying: list[tuple] = dataclasses.field(default_factory=list)
    guard: tuple[int, Callable] | None = None
    branches: dict[Any, Segment] = dataclasses.field(default_factory=dict)


class Tape:
    """What a kernel does for arguments of some types. Values have numbers, those of the arguments first."""

    def __init__(self, n_arguments: int):
        self.root, self.is_recorded, self.is_usable = Segment(), False, True
        self.levels = [UNIFORM] * n_arguments
        self.constants: list[Any] = [None] * n_arguments


class Recording:
    """One run of a kernel's Python code, which writes a tape on after a path of known branches and one that is new."""

    def __init__(self, tape: Tape, values: list, handles: list, path: Sequence[tuple[Segment, Any]]):
        self.tape, self.values, self.kept, self.busy = tape, values, list(handles), False
        self.numbers = {id(handle): number for number, handle in enumerate(handles)}
        self.known: list[tuple] = []
        for segment, outcome in path:
            self.known += (*segment.asked, ("branch", segment.guard[0], outcome))
        self.known.reverse()
        self.segment = tape.root
        if path:
            segment, outcome = path[-1]
            self.segment = segment.branches[outcome] = Segment()
        self.recorded = [self.segment]

    def is_off(self) -> bool:
        return self.busy or not self.tape.is_usable

    def call(self, name: str, method: Callable, args: tuple, kwargs: dict) -> Any:
        """A method of the builder: known, or done and written down."""
        builder = interpreter.interpreter_builder
        if self.is_off():
            return method(builder, *args, **kwargs)
        numbers, hidden = [], False
        for x in (*args, *kwargs.values()):
            if type(x) is TensorHandle:
                numbers.append(self.numbers.get(id(x), -1))
            elif type(x) in (list, tuple):
                hidden |= any(isinstance(y, TensorHandle) for y in x)
        numbers = tuple(numbers)
        if self.known:
            return self.recall(name, numbers)
        self.busy = True
        try:
            result = method(builder, *args, **kwargs)
        finally:
            self.busy = False
        # shifts convert unsigned numbers where they stand; results that are no handles are of pointers to blocks
        converts = name == "create_ashr" and any(x.data.dtype != args[0].data.dtype for x in (result, args[1]))
        if hidden or converts or -1 in numbers or not (result is None or type(result) is TensorHandle):
            self.tape.is_usable = False
        else:
            self.write(name, numbers, lambda: _step(name, method, args, kwargs, result), result)
        return result

    def reduce(self, operation: Any, inputs: tuple, stock: Callable) -> Any:
        """A reduction, which the interpreter does past its builder."""
        function = REDUCTIONS.get(operation.combine_fn)
        if self.is_off() or function is None or len(inputs) != 1:
            self.tape.is_usable &= self.busy
            return stock(operation, inputs)
        numbers = (self.numbers.get(id(inputs[0].handle), -1),)
        if self.known:
            handle, kind = self.recall("reduce", numbers)
            return tl.tensor(handle, kind)
        result = stock(operation, inputs)
        axis, keep, dtype = operation.axis, operation.keep_dims, result.handle.data.dtype

        def step(data: np.ndarray) -> np.ndarray:
            found = function(data, axis=axis, keepdims=keep)
            return found.astype(dtype) if found.shape else np.array([found], dtype=dtype)

        if -1 in numbers:
            self.tape.is_usable = False
        else:
            self.write("reduce", numbers, lambda: step, result.handle, result.type)
        return result

    def branch(self, handle: TensorHandle, outcome_of: Callable) -> Any:
        """The outcome with which the kernel goes on, a number or a truth."""
        number = self.numbers.get(id(handle), -1)
        self.tape.is_usable &= number != -1
        if self.is_off() or self.tape.levels[number] == CONSTANT:
            return outcome_of(handle.data)
        if self.known:
            known, asked, outcome = self.known.pop()
            assert (known, asked) == ("branch", number), "the kernel does not repeat what it did"
            return outcome
        outcome = outcome_of(handle.data)
        self.segment.guard = number, outcome_of
        self.segment.branches[outcome] = following = Segment()
        self.segment = following
        self.recorded.append(following)
        return outcome

    def recall(self, name: str, numbers: tuple[int, ...]) -> Any:
        known, inputs, number, dtype, kind = self.known.pop()
        assert (known, inputs) == (name, numbers), "the kernel does not repeat what it did"
        if number is None:
            return None
        handle = TensorHandle(self.values[number], dtype)
        self.keep(handle, number)
        return handle if kind is None else (handle, kind)

    def write(self, name: str, numbers: tuple, step: Callable, handle: TensorHandle | None, kind: Any = None) -> None:
        """``step()`` is what is done; of a constant it is not asked."""
        levels = self.tape.levels
        level = VARYING if name in EFFECTS else max([levels[i] for i in numbers], default=CONSTANT)
        if level == CONSTANT and (name == "create_get_num_programs" or handle.data.size > LARGEST_CONSTANT):
            level = UNIFORM
        number = dtype = None
        if handle is not None:
            number, dtype = len(levels), handle.dtype
            levels.append(level)
            self.tape.constants.append(handle.data if level == CONSTANT else None)
            self.values.append(handle.data)
            self.keep(handle, number)
        self.segment.asked.append((name, numbers, number, dtype, kind))
        if level != CONSTANT:
            done = step(), numbers, number
            self.segment.steps.append(done)
            if level == VARYING:
                self.segment.varying.append(done)

    def keep(self, handle: TensorHandle, number: int) -> None:
        self.numbers[id(handle)] = number
        self.kept.append(handle)  # so that no other gets its id


def _step(name: str, method: Callable, args: tuple, kwargs: dict, result: TensorHandle | None) -> Callable:
    """From the arrays of the handles among the arguments to that of the result; without handles where it is short."""
    if name in ("binary_op", "ternary_op", "unary_op"):
        *handles, function = args
        dtype = result.data.dtype
        if function(*(x.data for x in handles)).dtype == dtype:
            return function
        return lambda *arrays: function(*arrays).astype(dtype)
    if name == "cast_impl" and tl.bfloat16 not in (args[0].dtype.scalar, args[1].scalar):
        dtype = result.data.dtype
        return lambda array: array.astype(dtype)
    if name == "create_masked_load" and args[2] is not None:
        dtype = result.data.dtype
        return lambda pointers, mask, other: interpreter._interpreter.load(pointers, mask, other, dtype)
    if name == "create_masked_store":
        return lambda pointers, value, mask: interpreter._interpreter.store(pointers, value, mask)
    if name == "create_addptr":
        size = max(1, args[0].get_element_ty().primitive_bitwidth // 8)
        return lambda pointers, offset: pointers + size * offset.astype(np.uint64)
    if name in ("create_broadcast", "create_expand_dims"):
        function = np.broadcast_to if name == "create_broadcast" else np.expand_dims
        where = args[1]
        return lambda array: function(array, where)
    if name == "create_splat":
        shape, dtype = args[0].shape, result.data.dtype
        return lambda array: np.full(shape, array.reshape(-1)[:1], dtype=dtype)

    dtypes = [x.dtype if isinstance(x, TensorHandle) else None for x in (*args, *kwargs.values())]
    others = [None if isinstance(x, TensorHandle) else x for x in (*args, *kwargs.values())]

    def step(*arrays: np.ndarray) -> Any:
        left = iter(arrays)
        given = [x if t is None else TensorHandle(next(left), t) for t, x in zip(dtypes, others, strict=True)]
        by_name = dict(zip(kwargs, given[len(args) :], strict=True))
        found = method(interpreter.interpreter_builder, *given[: len(args)], **by_name)
        return None if found is None else found.data

    return step


_recording: Recording | None = None
_tapes: dict[Any, Tape] = {}
_patched: set[frozenset[str]] = set()


def _truth(data: np.ndarray) -> bool:
    return bool(data)


def _number(data: np.ndarray) -> int:
    return int(data.squeeze())


def _play(tape: Tape, values: list, done: set[Segment]) -> list[tuple[Segment, Any]] | None:
    """Do what a program does; what is returned is the path to a branch that is new, if it comes to one."""
    path: list[tuple[Segment, Any]] = []
    segment = tape.root
    while True:
        for step, inputs, output in segment.varying if segment in done else segment.steps:
            result = step(*[values[i] for i in inputs])
            if output is not None:
                values[output] = result
        done.add(segment)
        if segment.guard is None:
            return None
        number, outcome_of = segment.guard
        outcome = outcome_of(values[number])
        path.append((segment, outcome))
        if outcome not in segment.branches:
            return path
        segment = segment.branches[outcome]


def _record(recording: Recording, kernel: Callable, args: dict[str, Any]) -> None:
    """Run a program."""
    global _recording
    _recording, tape = recording, recording.tape
    try:
        kernel(**args)
    except BaseException:
        tape.is_usable = False
        raise
    finally:
        _recording = None
    tape.is_recorded = True


def _modules(function: Callable) -> frozenset[str]:
    found = (x for x in function.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core))
    return frozenset(x.__name__ for x in found)


def _handles(arg: Any) -> list[TensorHandle]:
    if isinstance(arg, tuple | tl.tuple):
        return [handle for x in arg for handle in _handles(x)]
    return [arg.handle] if isinstance(arg, tl.tensor) else []


def _kind(arg: Any) -> Any:
    """The type of a tensor, the value of anything else."""
    if isinstance(arg, tuple | tl.tuple):
        return tuple(map(_kind, arg))
    return str(arg.type) if isinstance(arg, tl.tensor) else (type(arg), arg)


def _tape_of(kernel: Callable, args: dict[str, Any], n_handles: int) -> Tape:
    """That of the kernel for arguments of these kinds."""
    key = (kernel, *map(_kind, args.values()))
    if key not in _tapes:
        if sum(len(tape.levels) for tape in _tapes.values()) > MOST_STEPS:
            _tapes.clear()
        _tapes[key] = Tape(n_handles)
    return _tapes[key]


def _require_exact_numbers(arg: Any) -> None:
    """A GPU takes Python's floats in single precision; the interpreter would not show it."""
    if isinstance(arg, float):
        raise TypeError(f"a kernel is given the number {arg}, which a GPU rounds to float32")
    if isinstance(arg, tuple | list):
        for x in arg:
            _require_exact_numbers(x)


def _launch(self, *args_dev: Any, **kwargs: Any) -> None:
    """As ``GridExecutor.__call__``, with tapes; ``triton.language`` is patched where Python code runs."""
    names = inspect.getfullargspec(self.fn).args
    kwargs = {name: x for name, x in kwargs.items() if name in names}
    args_hst, kwargs_hst = self._init_args_hst(args_dev, kwargs)
    args = inspect.getcallargs(self.fn, *args_hst, **kwargs_hst)
    _require_exact_numbers([x for name, x in args.items() if name not in self.constexprs])
    args = {name: x if name in self.constexprs else interpreter._implicit_cvt(x) for name, x in args.items()}
    grid = self.grid(args) if callable(self.grid) else self.grid
    grid += (1,) * (3 - len(grid))
    if max(grid[1:]) > LARGEST_GRID:
        raise ValueError(f"a grid of {grid}: all but the first axis end at {LARGEST_GRID}")
    builder = interpreter.interpreter_builder
    builder.set_grid_dim(*grid)
    handles = _handles(tuple(args.values()))
    tape = _tape_of(self.fn, args, len(handles))
    values, done = list(tape.constants), set()
    values[: len(handles)] = [x.data for x in handles]
    scope = None
    try:
        for place in itertools.product(*map(range, grid)):
            builder.set_grid_idx(*place)
            path: list | None = []
            if tape.is_usable and tape.is_recorded:
                path = _play(tape, values, done)
            if path is None:
                continue
            if scope is None:
                _patched.clear()
                scope = interpreter._patch_lang(self.fn)
                _patched.add(_modules(self.fn))
            if tape.is_usable:
                recording = Recording(tape, values, handles, path)
                _record(recording, self.fn, args)
                done.update(recording.recorded)
            else:
                self.fn(**args)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error
    finally:
        if scope is not None:
            scope.restore()
    self._restore_args_dev(args_dev, args_hst, kwargs, kwargs_hst)


def _call(self, *args: Any, **kwargs: Any) -> Any:
    """As ``InterpretedFunction.__call__``, which patches ``triton.language`` at every call."""
    if not hasattr(self, "modules"):
        self.modules = _modules(self.fn)
    if self.modules not in _patched:
        interpreter._patch_lang(self.fn)
        _patched.add(self.modules)
    return self.rewrite()(*args, **kwargs)


def _recorded(name: str, method: Callable) -> Callable:
    @functools.wraps(method)
    def call(self, *args: Any, **kwargs: Any) -> Any:
        if _recording is None:
            return method(self, *args, **kwargs)
        return _recording.call(name, method, args, kwargs)

    return call


def _quick_types() -> None:
    """What semantics derive from types, once for each of them; operands of one type need no conversion."""
    check = tl.semantic.TritonSemantic.binary_op_type_checking_impl
    alike = {x.name for x in (tl.float32, tl.float64, tl.int32, tl.int64, tl.int1)}

    def init(self, handle: Any, type: Any) -> None:
        facts = type.__dict__.get("facts")
        if facts is None:
            stock_init(self, handle, type)
            type.facts = self.shape, self.numel, self.dtype
        else:
            self.handle, self.type = handle, type
            self.shape, self.numel, self.dtype = facts

    def checked(self, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            isinstance(lhs, tl.tensor)
            and isinstance(rhs, tl.tensor)
            and lhs.dtype.name in alike
            and lhs.type == rhs.type
        ):
            return lhs, rhs
        return check(self, lhs, rhs, *args, **kwargs)

    stock_init = tl.tensor.__init__
    tl.tensor.__init__ = init
    tl.semantic.TritonSemantic.binary_op_type_checking_impl = checked


def install() -> None:
    """Patch Triton, once."""
    _quick_types()
    builder = interpreter.InterpreterBuilder
    for name, method in list(vars(builder).items()):
        delegates = getattr(method, "__name__", "") == "<lambda>" and name not in PRIMITIVES
        makes = name.startswith(("create_", "get_")) and not name.endswith("_ty")
        if callable(method) and not delegates and (makes or name in PRIMITIVES):
            setattr(builder, name, _recorded(name, method))

    for operations in (interpreter.ReduceOps, interpreter.ScanOps):

        def apply_impl(self, inputs: tuple, stock: Callable = operations.apply_impl) -> Any:
            return stock(self, inputs) if _recording is None else _recording.reduce(self, inputs, stock)

        operations.apply_impl = apply_impl

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)

        def truth(self) -> bool:
            if self.handle.data.size != 1:
                return True
            return _truth(self.handle.data) if _recording is None else _recording.branch(self.handle, _truth)

        def index(self) -> int:
            return _number(self.handle.data) if _recording is None else _recording.branch(self.handle, _number)

        scope.set_attr(tensor, "__bool__", truth)
        scope.set_attr(tensor, "__index__", index)

    interpreter._patch_lang_tensor = patch_lang_tensor
    # what is computed for assertions of sums is not asserted, as this is no run for debugging
    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    interpreter.GridExecutor.__call__ = _launch
    interpreter.InterpretedFunction.__call__ = _call
