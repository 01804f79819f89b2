"""``python -m hvae_kernels bench OP``: one op at your sizes, ours beside its plain formula, eager and compiled.

A look at the machine at hand, fit for an issue. The figures that the project publishes come from its ``benchmarks``.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvae_kernels import functional, testing
from hvae_kernels._dispatch import config

DIRECTIONS = ("forward", "forward + backward")
#: Seconds that one sample lasts at least, and samples that every candidate gets at least.
SAMPLE, FEWEST = 1e-3, 5

Make = Callable[..., Sequence[Tensor]]
Call = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Problem:
    """An op of :mod:`hvae_kernels.functional`.

    Attributes:
        sizes: names and defaults of the sizes.
        make: ``make(**sizes)``: its floating-point arguments, float32, from torch's random numbers.
        call: ``call(function, *arguments, **options)``, where it takes more than those arguments.
        constants: how many of the last arguments need no gradient.
    """

    sizes: Mapping[str, int]
    make: Make
    call: Callable[..., Any] = lambda function, *arguments, **options: function(*arguments, **options)
    constants: int = 0


def _leapfrog(batch: int, features: int, steps: int) -> Sequence[Tensor]:
    z, rho = torch.randn(2, batch, features)
    precision, loc, share = torch.rand(3, features)
    return z, rho, precision + 0.5, loc, 0.2 * share + 0.02, torch.rand(steps).mul(0.2).add(0.8) ** (1 / steps)


def _dense_leapfrog(batch: int, features: int, steps: int) -> Sequence[Tensor]:
    z, rho, _, *rest = _leapfrog(batch, features, steps)
    root = torch.randn(features, features)
    return z, rho, torch.eye(features) / 2 + root @ root.mT / features, *rest


def _planar(batch: int, features: int, steps: int) -> Sequence[Tensor]:
    u, w = torch.randn(2, steps, features) / features**0.5
    return torch.randn(batch, features), functional.constrain_planar(u, w), w, torch.zeros(steps) + 0.1


def _radial(batch: int, features: int, steps: int) -> Sequence[Tensor]:
    alpha, share = torch.rand(2, steps) + 0.5
    return torch.randn(batch, features), torch.randn(steps, features), alpha, alpha * (share - 0.75)


def _bernoulli(samples: int, batch: int, features: int) -> Sequence[Tensor]:
    return torch.randn(samples, batch, features), (torch.rand(batch, features) < 0.2).float()


def _mixture(batch: int, features: int, components: int) -> Sequence[Tensor]:
    loc, log_scale = torch.randn(2, components, features)
    return torch.randn(batch, features), torch.randn(components), loc / 2, log_scale / 10


def _local_reparam(batch: int, inputs: int, outputs: int) -> Sequence[Tensor]:
    weights, biases = torch.randn(2, outputs, inputs), torch.randn(2, outputs)
    noise = torch.randn(batch, outputs)
    return torch.randn(batch, inputs), weights[0], weights[1] / 10 - 3, biases[0], biases[1] / 10 - 3, noise


def _masked(batch: int, inputs: int, outputs: int) -> Sequence[Tensor]:
    return torch.randn(batch, inputs), torch.randn(outputs, inputs), torch.randn(outputs)


def _staircase(function: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    """Degrees that rise evenly: half of all connections."""
    outputs, inputs = weight.shape
    into, out = torch.arange(inputs, device=x.device) * outputs, torch.arange(outputs, device=x.device) * inputs
    return function(x, weight, bias, into, out, **options)


def _spline(batch: int, features: int, bins: int) -> Sequence[Tensor]:
    return torch.randn(batch, features), torch.randn(batch, features, 3 * bins - 1)


def _with_bins(function: Callable[..., Any], x: Tensor, parameters: Tensor, **options: Any) -> Any:
    return function(x, parameters, functional.Spline((parameters.shape[-1] + 1) // 3), **options)


def _attention(batch: int) -> Tensor:
    return torch.randn(batch, 5) / 3


def _images(batch: int, side: int, filters: int) -> Sequence[Tensor]:
    return torch.rand(batch, 1, side, side), _attention(batch), torch.zeros(filters)


def _patches(batch: int, side: int, filters: int) -> Sequence[Tensor]:
    return torch.randn(batch, 1, filters, filters), _attention(batch), torch.zeros(side)


def _read(function: Callable[..., Tensor], images: Tensor, attention: Tensor, size: Tensor, **options: Any) -> Tensor:
    return function(images, attention, len(size), **options)


def _write(function: Callable[..., Tensor], patch: Tensor, attention: Tensor, side: Tensor, **options: Any) -> Tensor:
    return function(patch, attention, (len(side), len(side)), **options)


_STEPS = {"batch": 1024, "features": 64, "steps": 10}
_LINEAR = {"batch": 256, "inputs": 256, "outputs": 256}
_GRID = {"batch": 128, "side": 28, "filters": 5}
_WEIGHTS = {"samples": 40, "batch": 256}


def _log_weights(samples: int, batch: int) -> Sequence[Tensor]:
    return (5 * torch.randn(samples, batch),)


PROBLEMS = {
    "gaussian_leapfrog": Problem(_STEPS, _leapfrog),
    "dense_gaussian_leapfrog": Problem(_STEPS, _dense_leapfrog),
    "planar_flow": Problem(_STEPS, _planar),
    "radial_flow": Problem(_STEPS, _radial),
    "affine_autoregressive": Problem(
        {"batch": 1024, "features": 64}, lambda batch, features: torch.randn(3, batch, features).unbind()
    ),
    "rational_quadratic_spline": Problem({"batch": 1024, "features": 16, "bins": 8}, _spline, _with_bins),
    "masked_linear": Problem(_LINEAR, _masked, _staircase),
    "local_reparam_linear": Problem(_LINEAR, _local_reparam),
    "bernoulli_log_prob": Problem({"samples": 1, "batch": 256, "features": 784}, _bernoulli, constants=1),
    "gaussian_mixture_log_prob": Problem({"batch": 1024, "features": 16, "components": 100}, _mixture),
    "draw_read": Problem(_GRID, _images, _read, constants=1),
    "draw_write": Problem(_GRID, _patches, _write, constants=1),
    "iwae_bound": Problem(_WEIGHTS, _log_weights),
    "dreg_surrogate": Problem(_WEIGHTS, _log_weights),
    "stl_surrogate": Problem(_WEIGHTS, _log_weights),
}
SIZES = tuple(dict.fromkeys(size for problem in PROBLEMS.values() for size in problem.sizes))


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("op", nargs="?", metavar="OP", help="without one: the ops and their sizes")
    for size in SIZES:
        parser.add_argument(f"--{size}", type=_count, metavar="N")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each candidate and direction (default: 1)")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes up to a minute")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def main(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Check, time and print; 1 if the op is wrong, 2 by the parser's error if the options are."""
    if options.op is None:
        for name, problem in PROBLEMS.items():
            print(name, *(f"--{size} {default}" for size, default in problem.sizes.items()))
        return 0
    if options.op not in PROBLEMS:
        parser.error(f"no op {options.op!r}; there are: {', '.join(PROBLEMS)}")
    problem = PROBLEMS[options.op]
    given = {size: value for size in SIZES if (value := getattr(options, size)) is not None}
    for size in given.keys() - problem.sizes.keys():
        parser.error(f"{options.op} has no --{size}; it has {', '.join(f'--{name}' for name in problem.sizes)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if not 0 < options.seconds < float("inf"):
        parser.error(f"--seconds must be positive and finite, got {options.seconds}")
    sizes = {**problem.sizes, **given}

    def make() -> list[Tensor]:
        return [x.to(options.device, getattr(torch, options.dtype)) for x in problem.make(**sizes)]

    ours, formula = _calls(options.op, problem)
    torch.manual_seed(0)
    try:
        testing.assert_as_exact(
            _with_gradients(ours, problem.constants), _with_gradients(formula, problem.constants), make
        )
    except AssertionError as error:
        print(f"{options.op} is WRONG here and was not timed: {error}")
        return 1
    candidates = {"ours": ours, "eager": formula}
    if not options.no_compile:
        print("torch.compile at work, for up to a minute (--no-compile leaves it out)", file=sys.stderr, flush=True)
        candidates["compiled"] = torch.compile(formula, fullgraph=True, dynamic=False)
    rows = [
        _row(direction, _timed(candidates, direction, make(), problem.constants, options)) for direction in DIRECTIONS
    ]
    print(f"{options.op}: {', '.join(f'{size} {value}' for size, value in sizes.items())}, {options.dtype}")
    print(f"{_machine(options.op, options.device)}\n")
    rivals = [name for name in candidates if name != "ours"]
    print(_table(["", *candidates, *(f"vs {name}" for name in rivals)], rows))
    print("\n20th percentiles of calls in turns; eager and compiled: the reference formula. Both agree with float64.")
    return 0


def _calls(name: str, problem: Problem) -> tuple[Call, Call]:
    """The op, and its plain formula, each from the arguments to a tuple."""
    function = getattr(functional, name)

    def ours(*arguments: Tensor) -> tuple[Tensor, ...]:
        result = problem.call(function, *arguments)
        return result if isinstance(result, tuple) else (result,)

    def formula(*arguments: Tensor) -> tuple[Tensor, ...]:
        result = problem.call(function, *arguments, implementation="reference")
        return result if isinstance(result, tuple) else (result,)

    return ours, formula


def _leaves(arguments: Sequence[Tensor], constants: int) -> list[Tensor]:
    n_variables = len(arguments) - constants
    return [x.detach().requires_grad_(i < n_variables) for i, x in enumerate(arguments)]


def _with_gradients(call: Call, constants: int) -> Callable[..., list[Tensor]]:
    """Outputs, then the gradients of their sum of squares, by every argument that is no constant."""

    def both(*arguments: Tensor) -> list[Tensor]:
        leaves = _leaves(arguments, constants)
        outputs = call(*leaves)
        total = sum((x.square().sum() for x in outputs), outputs[0].new_zeros(()))
        return [*(x.detach() for x in outputs), *torch.autograd.grad(total, [x for x in leaves if x.requires_grad])]

    return both


def _timed(
    candidates: Mapping[str, Call],
    direction: str,
    arguments: Sequence[Tensor],
    constants: int,
    options: argparse.Namespace,
) -> dict[str, float]:
    """Seconds a call: 20th percentiles, as noise only ever adds time; candidates take turns."""
    leaves = _leaves(arguments, constants)
    variables = [x for x in leaves if x.requires_grad]

    def sample(call: Call, repeats: int) -> float:
        _wait(options.device)
        start = time.perf_counter()
        for _ in range(repeats):
            if direction == "forward":
                with torch.no_grad():
                    call(*leaves)
            else:
                outputs = call(*leaves)
                torch.autograd.grad(outputs, variables, [torch.ones_like(x) for x in outputs])
        _wait(options.device)
        return (time.perf_counter() - start) / repeats

    repeats, samples = {}, {}
    for name, call in candidates.items():
        sample(call, 2)  # compiles, loads, warms
        repeats[name] = max(1, min(1000, round(SAMPLE / max(sample(call, 1), 1e-7))))
        samples[name] = [sample(call, repeats[name])]
    while any(_unfinished(samples[name], repeats[name], options.seconds) for name in candidates):
        for name, call in candidates.items():
            if _unfinished(samples[name], repeats[name], options.seconds):
                samples[name].append(sample(call, repeats[name]))
    return {name: sorted(values)[len(values) // 5] for name, values in samples.items()}


def _unfinished(samples: Sequence[float], repeats: int, seconds: float) -> bool:
    return len(samples) < FEWEST or sum(samples) * repeats < seconds


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _row(direction: str, seconds: Mapping[str, float]) -> list[str]:
    ratios = [f"{value / seconds['ours']:.3g}x" for name, value in seconds.items() if name != "ours"]
    return [direction, *(_duration(value) for value in seconds.values()), *ratios]


def _duration(seconds: float) -> str:
    unit, scale = ("us", 1e6) if seconds < 1e-3 else ("ms", 1e3) if seconds < 1 else ("s", 1.0)
    return f"{seconds * scale:.3g} {unit}"


def _machine(op: str, device: str) -> str:
    """What it was measured on, in one line."""
    found = config()
    versions = f"hvae_kernels {found['versions']['hvae_kernels']}, torch {torch.__version__}"
    chosen = found["ops"][op][device]["chosen"]
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, {chosen}, {versions}"
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads > 1)}, {chosen} ({found['cpu']['chosen']}), {versions}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1] for line in lines if line.startswith("model name"))
    return " ".join(next(names, platform.processor() or platform.machine()).split())


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, aligned for the terminal."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    lines = [headers, ["-" * width for width in widths], *rows]
    return "\n".join(f"| {' | '.join(x.ljust(w) for x, w in zip(line, widths, strict=True))} |" for line in lines)
