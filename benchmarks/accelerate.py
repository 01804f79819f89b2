"""Other libraries' flows before and after ``hk.accelerate``: ``python benchmarks/accelerate.py [--tiny] [--cpu SET]``.

Masked autoregressive flows of zuko, nflows, normflows and pyro, affine and of splines, and coupling flows of both, on
the CPU: density takes one pass through every network, sampling an autoregressive flow one a feature before and one in
all after. A flow and its swapped copy take turns; the ratio is that
of their 20th percentiles. What takes half a second or more before is measured once: it is d passes, and noise is small.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import itertools
import math
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
from benchmarks import results, run, tables, timing  # noqa: E402
from benchmarks.timing import FULL, Candidate, Plan, Timing, interleave  # noqa: E402

#: Seconds from which on a call before is measured once.
SLOW = 0.5
FIELDS = (
    *("library", "version", "features", "hidden", "layers", "batch", "dtype", "direction"),
    *("before_us", "after_us", "before_samples", "after_samples", "speedup"),
    *("device", "cpu", "threads", "torch", "python", "commit", "date"),
)


@dataclass(frozen=True)
class Size:
    """A flow: features, units of each of two hidden layers, layers, rows of a call, and bins of its splines."""

    features: int
    hidden: int
    layers: int
    batch: int
    bins: int = 8


SIZES = (Size(64, 128, 5, 256), Size(784, 1024, 1, 128))
#: The second is that of sbi's flows.
SPLINE_SIZES = (Size(64, 128, 5, 256), Size(5, 50, 5, 200, bins=10))
TINY = (Size(4, 8, 2, 3),)


# ---- The libraries: a flow with its density, and samples with theirs ----


class Zuko(nn.Module):
    """``MAF``."""

    name, package = "zuko", "zuko"

    def __init__(self, size: Size):
        super().__init__()
        import zuko

        self.flow = zuko.flows.MAF(size.features, transforms=size.layers, hidden_features=(size.hidden,) * 2)

    def log_prob(self, x: Tensor) -> Tensor:
        """``(batch,)``."""
        return self.flow().log_prob(x)

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """``n`` samples and their densities."""
        return self.flow().rsample_and_log_prob((n,))


class Nflows(nn.Module):
    """``MaskedAffineAutoregressiveTransform`` with feed-forward blocks, reversed in between."""

    name, package = "nflows", "nflows"

    def __init__(self, size: Size):
        super().__init__()
        from nflows import distributions, flows, transforms

        steps = []
        for _ in range(size.layers):
            steps += [self.layer(size), transforms.ReversePermutation(size.features)]
        self.flow = flows.Flow(transforms.CompositeTransform(steps), distributions.StandardNormal([size.features]))

    def layer(self, size: Size) -> nn.Module:
        """One of them."""
        from nflows import transforms

        return transforms.MaskedAffineAutoregressiveTransform(
            size.features, size.hidden, num_blocks=1, use_residual_blocks=False
        )

    def log_prob(self, x: Tensor) -> Tensor:
        """``(batch,)``."""
        return self.flow.log_prob(x)

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """``n`` samples and their densities."""
        return self.flow.sample_and_log_prob(n)


class Normflows(nn.Module):
    """``MaskedAffineAutoregressive`` with feed-forward blocks inside ``Reverse``, permuted in between."""

    name, package = "normflows", "normflows"

    def __init__(self, size: Size):
        super().__init__()
        import normflows as nf

        steps = []
        for _ in range(size.layers):
            step = nf.flows.MaskedAffineAutoregressive(size.features, size.hidden, use_residual_blocks=False)
            steps += [nf.flows.Reverse(step), nf.flows.Permute(size.features, mode="swap")]
        self.flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(size.features, trainable=False), steps)

    def log_prob(self, x: Tensor) -> Tensor:
        """``(batch,)``."""
        return self.flow.log_prob(x)

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """``n`` samples and their densities."""
        return self.flow.sample(n)


class Pyro(nn.Module):
    """``AffineAutoregressive``, inverted."""

    name, package = "pyro", "pyro-ppl"

    def __init__(self, size: Size):
        super().__init__()
        from pyro.distributions import transforms

        self.features = size.features
        hidden = [size.hidden] * 2
        self.steps = nn.ModuleList(transforms.affine_autoregressive(size.features, hidden) for _ in range(size.layers))

    def distribution(self):
        """The flow as pyro's distribution."""
        from pyro import distributions as dist

        base = dist.Normal(torch.zeros(self.features), 1.0, validate_args=False).to_event(1)
        return dist.TransformedDistribution(base, [step.inv for step in self.steps], validate_args=False)

    def log_prob(self, x: Tensor) -> Tensor:
        """``(batch,)``."""
        return self.distribution().log_prob(x.view_as(x))  # a new object: pyro's caches go by identity

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """``n`` samples and their densities."""
        flow = self.distribution()
        x = flow.rsample((n,))
        return x, flow.log_prob(x)


class ZukoSplines(Zuko):
    """``NSF``."""

    name = "zuko NSF"

    def __init__(self, size: Size):
        nn.Module.__init__(self)
        import zuko

        self.flow = zuko.flows.NSF(
            size.features, transforms=size.layers, hidden_features=(size.hidden,) * 2, bins=size.bins
        )


class NflowsSplines(Nflows):
    """``MaskedPiecewiseRationalQuadraticAutoregressiveTransform``."""

    name = "nflows splines"

    def layer(self, size: Size) -> nn.Module:
        """One of them."""
        from nflows import transforms

        return transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            size.features,
            size.hidden,
            num_bins=size.bins,
            tails="linear",
            tail_bound=3.0,
            num_blocks=1,
            use_residual_blocks=False,
        )


class NflowsAffineCoupling(Nflows):
    """``AffineCouplingTransform`` with residual networks of one block."""

    name = "nflows affine coupling"
    kind = "AffineCouplingTransform"

    def layer(self, size: Size) -> nn.Module:
        """One of them."""
        from nflows import transforms
        from nflows.nn.nets import ResidualNet

        return getattr(transforms, self.kind)(
            [place % 2 for place in range(size.features)],
            lambda inputs, outputs: ResidualNet(inputs, outputs, hidden_features=size.hidden, num_blocks=1),
            **self.options(size),
        )

    def options(self, size: Size) -> dict[str, object]:
        """Of the layer."""
        return {}


class NflowsCoupling(NflowsAffineCoupling):
    """``PiecewiseRationalQuadraticCouplingTransform``."""

    name = "nflows spline coupling"
    kind = "PiecewiseRationalQuadraticCouplingTransform"

    def options(self, size: Size) -> dict[str, object]:
        """Of the layer."""
        return {"num_bins": size.bins, "tails": "linear", "tail_bound": 3.0}


class ZukoAffineCoupling(Zuko):
    """``NICE``."""

    name = "zuko affine coupling"

    def __init__(self, size: Size):
        nn.Module.__init__(self)
        import zuko

        self.flow = zuko.flows.NICE(
            size.features, transforms=size.layers, hidden_features=(size.hidden,) * 2, **self.options(size)
        )

    def options(self, size: Size) -> dict[str, object]:
        """Of the coupling layers."""
        return {}


class ZukoSplineCoupling(ZukoAffineCoupling):
    """``NICE`` with ``MonotonicRQSTransform``."""

    name = "zuko spline coupling"

    def options(self, size: Size) -> dict[str, object]:
        """Of the coupling layers."""
        from zuko.transforms import MonotonicRQSTransform

        return {"univariate": MonotonicRQSTransform, "shapes": [(size.bins,), (size.bins,), (size.bins - 1,)]}


class NormflowsCircular(Normflows):
    """``CircularCoupledRationalQuadraticSpline``, every third feature circular; a layer has two splines."""

    name = "normflows circular coupling"
    swaps = 2

    def __init__(self, size: Size):
        nn.Module.__init__(self)
        import normflows as nf

        steps = [
            nf.flows.CircularCoupledRationalQuadraticSpline(
                *(size.features, 1, size.hidden, list(range(0, size.features, 3))),
                num_bins=size.bins,
                tail_bound=5.0,
                reverse_mask=bool(place % 2),
            )
            for place in range(size.layers)
        ]
        self.flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(size.features, trainable=False), steps)


class NormflowsAffineCoupling(Normflows):
    """``AffineCouplingBlock``, halves exchanged in between."""

    name = "normflows affine coupling"

    def __init__(self, size: Size):
        nn.Module.__init__(self)
        import normflows as nf

        moved, steps = size.features // 2, []
        for place in range(size.layers):
            mode, inputs = ("channel", size.features - moved) if place % 2 == 0 else ("channel_inv", moved)
            widths = [inputs, size.hidden, size.hidden, 2 * (size.features - inputs)]
            steps.append(nf.flows.AffineCouplingBlock(nf.nets.MLP(widths), split_mode=mode))
        self.flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(size.features, trainable=False), steps)


class PyroSplineCoupling(Pyro):
    """``SplineCoupling`` of order quadratic, inverted: a layer's two splines are swapped."""

    name = "pyro spline coupling"
    swaps = 2

    def __init__(self, size: Size):
        nn.Module.__init__(self)
        from pyro.distributions import transforms
        from pyro.nn import DenseNN

        self.features, split = size.features, size.features // 2
        widths = [(size.features - split) * bins for bins in (size.bins, size.bins, size.bins - 1)]
        self.steps = nn.ModuleList(
            transforms.SplineCoupling(
                size.features, split, DenseNN(split, [size.hidden] * 2, widths), size.bins, 3.0, "quadratic"
            )
            for _ in range(size.layers)
        )


LIBRARIES = (Zuko, Nflows, Normflows, Pyro)
SPLINES = (ZukoSplines, NflowsSplines, NflowsCoupling, NormflowsCircular, PyroSplineCoupling, ZukoSplineCoupling)
AFFINE_COUPLING = (NflowsAffineCoupling, NormflowsAffineCoupling, ZukoAffineCoupling)


# ---- What is timed ----


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[object], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # every step of the same work on the same flow

    def step(_: object) -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def directions(model: nn.Module, x: Tensor) -> dict[str, Callable[[object], object]]:
    """What users do with a flow."""

    def reverse_kl() -> Tensor:
        samples, log_prob = model.sample(len(x))
        return (log_prob + samples.square().sum(-1) / 2).mean()

    return {
        "sampling": torch.no_grad()(lambda _: model.sample(len(x))),
        "density": torch.no_grad()(lambda _: model.log_prob(x)),
        "training step (data)": _step(model, lambda: -model.log_prob(x).mean()),
        "training step (samples)": _step(model, reverse_kl),
    }


def compare(before: Candidate, after: Candidate, plan: Plan) -> tuple[Timing, Timing]:
    """Timings of both, in turns."""
    with timing.no_collection():
        first = timing._seconds_cpu(before, 1)
        if first >= SLOW:
            timing._seconds_cpu(after, 1)
            times = [timing._seconds_cpu(after, 1) for _ in range(max(plan.fewest, 5))]
            return Timing((1e6 * first,)), Timing(tuple(1e6 * seconds for seconds in times))
    both = interleave([before, after], "cpu", plan)
    return both[before.name], both[after.name]


def agree(before: nn.Module, after: nn.Module, x: Tensor) -> None:
    """Require one density, and of float64 copies samples whose density is what comes with them.

    In float32 two ways to the density of a sample differ by as much as a nat in pyro's own splines.

    Raises:
        AssertionError: they differ.
    """
    with torch.no_grad():
        torch.testing.assert_close(after.log_prob(x), before.log_prob(x), rtol=1e-4, atol=1e-3)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            before = copy.deepcopy(before).double()
            samples, log_prob = hk.accelerate(copy.deepcopy(before))[0].sample(len(x))
            torch.testing.assert_close(before.log_prob(samples), log_prob, rtol=1e-8, atol=1e-8)
        finally:
            torch.set_default_dtype(default)


def measure(library: type, size: Size, plan: Plan) -> Iterator[dict[str, object]]:
    """A record for every direction of one flow."""
    torch.manual_seed(0)
    before = library(size)
    after, report = hk.accelerate(copy.deepcopy(before))
    if len(report.swapped) != getattr(library, "swaps", 1) * size.layers or report.left:
        raise AssertionError(str(report))
    x = torch.randn(size.batch, size.features)
    agree(before, after, x)
    origin = {"library": library.name, "version": importlib.metadata.version(library.package)}
    ours = directions(after, x)
    for direction, call in directions(before, x).items():
        most = math.inf if "coupling" in library.name else 16 if library in SPLINES else 100
        if direction.endswith("(samples)") and size.features > most:
            continue  # before, the graph of d passes does not fit into memory
        pair = (Candidate("before", call, lambda i: i), Candidate("after", ours[direction], lambda i: i))
        slow, fast = compare(*pair, plan)
        yield {
            **origin,
            **{"features": size.features, "hidden": f"2 x {size.hidden}", "layers": size.layers, "batch": size.batch},
            **{"dtype": "float32", "direction": direction, "before_us": slow.p20, "after_us": fast.p20},
            **{"before_samples": len(slow.samples), "after_samples": len(fast.samples)},
            "speedup": slow.p20 / fast.p20,
        }


def table(records: list[dict[str, str]]) -> str:
    """For people."""
    headers = ("library", "flow", "direction", "before", "after", "speed-up")
    rows = [
        (
            f"{r['library']} {r['version']}",
            f"d = {r['features']}, {r['layers']} x ({r['hidden']}), batch {r['batch']}",
            *(r["direction"], results.duration(r["before_us"]), results.duration(r["after_us"])),
            results.times(r["speedup"]),
        )
        for r in records
    ]
    return results.table(headers, rows)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny flows, to see that everything runs; writes no CSV")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the CSV goes (benchmarks/results/flows)")
    parser.add_argument("--keep", default="", help="only libraries whose name contains this")
    options = cpu.parse(parser, arguments)
    whole = not options.tiny and not options.keep
    run.refuse_changes(whole and not options.out)
    run.keep_freed_memory()
    device = torch.device("cpu")
    origin, records = run.provenance(device), []
    for libraries, sizes in ((LIBRARIES, SIZES), (SPLINES + AFFINE_COUPLING, SPLINE_SIZES)):
        for library, size in itertools.product(libraries, TINY if options.tiny else sizes):
            if options.keep not in library.name:
                continue
            for record in measure(library, size, FULL):
                records.append({key: results.text((record | origin).get(key)) for key in FIELDS})
            print(f"  timed {records[-1]['library']}, d = {size.features}", flush=True)
    print(f"\n{results.machine(origin)}, torch {origin['torch']}\n\n{table(records)}")
    tables.publish("accelerate", origin, records, FIELDS, options.out, whole)
    return 0


if __name__ == "__main__":
    sys.exit(main())
