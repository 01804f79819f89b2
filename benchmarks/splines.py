"""Whole neural spline flows against other libraries': ``python benchmarks/splines.py [--tiny] [--keep WORD] ...``.

Autoregressive and coupling flows at the sizes of their users, float32, on the CPU: density, the gradient of its mean by
the parameters, and sampling. Rivals are zuko and nflows, eager, compiled by ``torch.compile`` where that takes minutes
and not hours, and swapped by ``hk.accelerate``; and, where it is installed, flowjax, jitted by JAX. Rivals take turns;
what takes half a second or more is measured once, after a call that compiles. The memory of a gradient is what it
allocates beyond its inputs.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import cpu  # noqa: E402 - needs the repository on the path, as the next lines do

if __name__ == "__main__":
    cpu.hold()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import hvae_kernels as hk  # noqa: E402
from benchmarks import memory, results, run, tables, timing  # noqa: E402
from benchmarks.timing import FULL, Plan  # noqa: E402

BOUND = 5.0
FIELDS = (
    *("flow", "features", "context", "hidden", "layers", "bins", "batch", "dtype", "direction", "implementation"),
    *("min_us", "p20_us", "p50_us", "samples", "times_of_ours", "peak_bytes"),
    *("device", "cpu", "threads", "torch", "python", "commit", "date"),
)


Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Size:
    """A flow.

    Attributes:
        name: whose.
        features: d.
        hidden: units of each hidden layer of a layer's network.
        layers: how many.
        batch: rows of a call.
        bins: of the splines.
        context: features of the context.
        coupling: whether layers are coupling layers, or autoregressive.
        compiles: whether ``torch.compile`` of its rivals is measured.
    """

    name: str
    features: int
    hidden: tuple[int, ...]
    layers: int
    batch: int
    bins: int = 8
    context: int = 0
    coupling: bool = False
    compiles: bool = False

    def __str__(self) -> str:
        given = f" given {self.context}" if self.context else ""
        hidden = f"{len(self.hidden)} x {self.hidden[0]}"
        return (
            f"{self.name}: d = {self.features}{given}, {self.layers} x ({hidden}), {self.bins} bins, batch {self.batch}"
        )


SIZES = (
    Size("NSF", 64, (128, 128), 5, 256, compiles=True),
    Size("sbi NSF", 5, (50, 50), 5, 200, bins=10, compiles=True),
    Size("coupling", 64, (128, 128), 5, 256, coupling=True, compiles=True),
    Size("amplfi", 8, (512,) * 5, 20, 512, context=8),
    Size("dingo", 15, (1024,) * 11, 30, 1024, context=128, coupling=True),
)
TINY = (Size("tiny NSF", 4, (8, 8), 2, 3), Size("tiny coupling", 4, (8, 8, 8), 2, 3, context=2, coupling=True))


# ---- The rivals: a density of x given the context, and n samples ----


class Ours(nn.Module):
    """``hk.nn.FlowStack`` from x to standard normal variables."""

    def __init__(self, size: Size):
        super().__init__()
        options = {"context_features": size.context, "gate": hk.functional.Spline(size.bins, BOUND)}
        make = hk.nn.FlowStack.coupling if size.coupling else hk.nn.FlowStack.autoregressive
        kind = () if size.coupling else (hk.nn.MaskedAutoregressiveFlow,)
        self.flow, self.features = make(*kind, size.layers, size.features, size.hidden, **options), size.features

    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        """``(batch,)``."""
        z, log_abs_det = self.flow.inverse(x, context)
        return torch.distributions.Normal(0.0, 1.0, validate_args=False).log_prob(z).sum(-1) + log_abs_det

    def sample(self, n: int, context: Tensor | None) -> Tensor:
        """One row of the context each."""
        return self.flow(torch.randn(n, self.features), context)[0]


class Zuko(nn.Module):
    """``NSF``, or ``NICE`` with ``MonotonicRQSTransform``."""

    def __init__(self, size: Size):
        super().__init__()
        import zuko

        sizes = {"features": size.features, "context": size.context, "hidden_features": size.hidden}
        if size.coupling:
            shapes = [(size.bins,), (size.bins,), (size.bins - 1,)]
            univariate = {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": shapes}
            self.flow = zuko.flows.NICE(transforms=size.layers, **sizes, **univariate)
        else:
            self.flow = zuko.flows.NSF(transforms=size.layers, bins=size.bins, **sizes)

    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        """``(batch,)``."""
        return self.flow(context).log_prob(x)

    def sample(self, n: int, context: Tensor | None) -> Tensor:
        """One row of the context each."""
        return self.flow(context).rsample(() if context is not None else (n,))


class Nflows(nn.Module):
    """``MaskedPiecewiseRationalQuadraticAutoregressiveTransform``, or the coupling one with residual networks."""

    def __init__(self, size: Size):
        super().__init__()
        from nflows import distributions, flows, transforms

        layers = []
        for place in range(size.layers):
            layers += [self._layer(size, place), transforms.ReversePermutation(size.features)]
        base = distributions.StandardNormal([size.features])
        self.flow = flows.Flow(transforms.CompositeTransform(layers), base)

    @staticmethod
    def _layer(size: Size, place: int) -> nn.Module:
        from nflows import transforms
        from nflows.nn.nets import ResidualNet

        context = size.context or None
        spline = {"num_bins": size.bins, "tails": "linear", "tail_bound": BOUND}
        if not size.coupling:
            return transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                *(size.features, size.hidden[0], context),
                **{"num_blocks": len(size.hidden) - 1, "use_residual_blocks": False, **spline},
            )
        blocks = max(1, (len(size.hidden) - 1) // 2)
        return transforms.PiecewiseRationalQuadraticCouplingTransform(
            [(feature + place) % 2 for feature in range(size.features)],
            lambda a, b: ResidualNet(a, b, hidden_features=size.hidden[0], context_features=context, num_blocks=blocks),
            **spline,
        )

    def log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        """``(batch,)``."""
        return self.flow.log_prob(x, context)

    def sample(self, n: int, context: Tensor | None) -> Tensor:
        """One row of the context each."""
        return self.flow.sample(n) if context is None else self.flow.sample(1, context)[:, 0]


class Flowjax:
    """``masked_autoregressive_flow`` or ``coupling_flow`` with ``RationalQuadraticSpline``, every call jitted."""

    def __init__(self, size: Size):
        import equinox
        import jax
        from flowjax import bijections, distributions, flows

        self.jax, self.equinox, self.key = jax, equinox, jax.random.key(0)
        make = flows.coupling_flow if size.coupling else flows.masked_autoregressive_flow
        self.flow = make(
            self.key,
            base_dist=distributions.Normal(jax.numpy.zeros(size.features)),
            transformer=bijections.RationalQuadraticSpline(knots=size.bins, interval=BOUND),
            cond_dim=size.context or None,
            flow_layers=size.layers,
            nn_width=size.hidden[0],
            nn_depth=len(size.hidden),
        )

    def directions(self, x: Tensor, context: Tensor | None) -> Calls:
        """As those of the others, each waiting for its results."""
        x, context = (None if given is None else self.jax.numpy.asarray(given.numpy()) for given in (x, context))
        ready, jit = self.jax.block_until_ready, self.equinox.filter_jit
        shape = () if context is not None else (len(x),)
        density = jit(lambda flow: flow.log_prob(x, context))
        gradient = jit(self.equinox.filter_grad(lambda flow: -flow.log_prob(x, context).mean()))
        sample = jit(lambda flow, key: flow.sample(key, shape, context))
        self.gradient = gradient
        return {
            "density": lambda: ready(density(self.flow)),
            "gradient": lambda: ready(gradient(self.flow)),
            "sampling": lambda: ready(sample(self.flow, self.key)),
        }

    def peak_bytes(self) -> int:
        """Of the gradient: what XLA plans beyond arguments."""
        plan = self.gradient.lower(self.flow).compile().compiled.memory_analysis()
        return plan.temp_size_in_bytes + plan.output_size_in_bytes


def directions(model: nn.Module, x: Tensor, context: Tensor | None, compiled: bool = False) -> Calls:
    """What users do with a flow; sampling is not compiled, as autoregressive flows take a pass a feature."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    density = torch.compile(model.log_prob) if compiled else model.log_prob
    calls = {
        "density": torch.no_grad()(lambda: density(x, context)),
        "gradient": lambda: torch.autograd.grad(-density(x, context).mean(), parameters),
    }
    if not compiled:
        calls["sampling"] = torch.no_grad()(lambda: model.sample(len(x), context))
    return calls


#: Name, calls by direction, and the memory of a gradient.
Rival = tuple[str, Calls, Callable[[], int]]


def rivals(size: Size, x: Tensor, context: Tensor | None) -> Iterator[Rival]:
    """All that can run this flow here."""
    for name, kind in (("hvae_kernels", Ours), ("zuko", Zuko), ("nflows", Nflows)):
        torch.manual_seed(0)
        model = kind(size)
        yield _rival(name, model, x, context)
        if kind is Ours:
            continue
        if size.compiles:
            yield _rival(f"{name}, compiled", model, x, context, compiled=True)
        swapped, report = hk.accelerate(copy.deepcopy(model))
        if report.left or not report.swapped:
            raise AssertionError(str(report))
        yield _rival(f"{name}, accelerated", swapped, x, context)
    if importlib.util.find_spec("flowjax"):
        flow = Flowjax(size)
        yield "flowjax, jitted", flow.directions(x, context), flow.peak_bytes


def _rival(name: str, model: nn.Module, x: Tensor, context: Tensor | None, compiled: bool = False) -> Rival:
    calls = directions(model, x, context, compiled)
    return name, calls, lambda: memory.peak_bytes(calls["gradient"], "cpu")


# ---- What is timed ----


def records(size: Size, plan: Plan) -> Iterator[dict[str, object]]:
    """A record for every rival and direction of one flow."""
    torch.manual_seed(0)
    x = torch.randn(size.batch, size.features)
    context = torch.randn(size.batch, size.context) if size.context else None
    every = {name: (calls, peak) for name, calls, peak in rivals(size, x, context)}
    about = {
        **{"flow": size.name, "features": size.features, "context": size.context, "layers": size.layers},
        **{"hidden": f"{len(size.hidden)} x {size.hidden[0]}", "bins": size.bins, "batch": size.batch},
    }
    for direction in ("density", "gradient", "sampling"):
        timings = timing.measure(
            {name: calls[direction] for name, (calls, _) in every.items() if direction in calls}, plan
        )
        for name, taken in timings.items():
            yield {
                **about,
                **{"dtype": "float32", "direction": direction, "implementation": name, "min_us": taken.min},
                **{"p20_us": taken.p20, "p50_us": taken.p50, "samples": len(taken.samples)},
                "times_of_ours": taken.p20 / timings["hvae_kernels"].p20,
                "peak_bytes": every[name][1]() if direction == "gradient" else None,
            }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny flows, to see that everything runs; writes no CSV")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the CSV goes (benchmarks/results/flows)")
    parser.add_argument("--keep", default="", help="only flows whose name contains this")
    options = cpu.parse(parser, arguments)
    whole = not options.tiny and not options.keep
    run.refuse_changes(whole and not options.out)
    run.keep_freed_memory()
    origin, rows = run.provenance(torch.device("cpu")), []
    for size in TINY if options.tiny else SIZES:
        if options.keep in size.name:
            rows += [{k: results.text((r | origin).get(k)) for k in FIELDS} for r in records(size, FULL)]
            print(f"  timed {size}", flush=True)
            if options.out:  # as they come: what takes minutes is not lost with a run that is stopped
                tables.publish("splines", origin, rows, FIELDS, options.out, whole)
    print(f"\n{results.machine(origin)}, torch {origin['torch']}\n\n{tables.spline_table(rows, 'simple')}")
    if not options.out:
        tables.publish("splines", origin, rows, FIELDS, None, whole)
    return 0


if __name__ == "__main__":
    sys.exit(main())
