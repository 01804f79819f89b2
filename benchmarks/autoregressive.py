"""One autoregressive step against other libraries': ``python benchmarks/autoregressive.py [--tiny] [--cpu SET] ...``.

The affine step with a masked network of ReLU layers, float32, on the CPU: forward + backward for the parameters, the
forward direction without gradients, and the inverse, which takes the others one network pass a feature. *no mask* is
the same network without any, the yardstick. Then how the inverse's time and its round trip's error grow with the
features. What takes half a second or more is measured once.
"""

from __future__ import annotations

import argparse
import itertools
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
from benchmarks.timing import QUICK, Plan  # noqa: E402

GROWTH = (64, 128, 256, 512, 784, 1568)
FIELDS = (
    *("features", "hidden", "batch", "dtype", "direction", "implementation"),
    *("min_us", "p20_us", "p50_us", "samples", "speedup_vs_best_peer", "times_of_no_mask", "times_of_forward"),
    *("peak_bytes", "saved_bytes", "round_trip_error"),
    *("device", "cpu", "threads", "torch", "python", "commit", "date"),
)


@dataclass(frozen=True)
class Size:
    """Features, widths of the hidden layers, rows of a call."""

    features: int
    hidden: tuple[int, ...]
    batch: int


SIZES = (Size(784, (1024, 1024), 128), Size(64, (640, 640), 256), Size(64, (640,), 256), Size(8, (64, 64), 10_000))
TINY = (Size(4, (8, 8), 3),)


# ---- The rivals: ``parallel`` and ``inverse``, both ``x -> (y, log_abs_det)`` ----


class Ours(nn.Module):
    """``hk.nn.InverseAutoregressiveFlow``."""

    def __init__(self, size: Size):
        super().__init__()
        self.flow = hk.nn.InverseAutoregressiveFlow(size.features, size.hidden)
        self.parallel, self.inverse = self.flow.forward, self.flow.inverse


class NoMask(nn.Module):
    """The same layers without masks, eager; it has no inverse."""

    def __init__(self, size: Size):
        super().__init__()
        widths = (size.features, *size.hidden)
        layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
        self.network = nn.Sequential(*layers, nn.Linear(widths[-1], 2 * size.features))

    def parallel(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The affine tail in plain PyTorch."""
        shift, log_scale = self.network(x).chunk(2, -1)
        return x * log_scale.exp() + shift, log_scale.sum(-1)


class Zuko(nn.Module):
    """``MaskedAutoregressiveTransform``."""

    def __init__(self, size: Size):
        super().__init__()
        from zuko.flows.autoregressive import MaskedAutoregressiveTransform

        self.step = MaskedAutoregressiveTransform(size.features, hidden_features=size.hidden)

    def parallel(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Its call with the log-determinant."""
        return self.step().call_and_ladj(x)

    def inverse(self, y: Tensor) -> tuple[Tensor, None]:
        """Its inverse alone: the log-determinant would cost one pass more."""
        return self.step().inv(y), None


class Nflows(nn.Module):
    """``MaskedAffineAutoregressiveTransform`` with feed-forward blocks."""

    def __init__(self, size: Size):
        super().__init__()
        from nflows.transforms import MaskedAffineAutoregressiveTransform

        self.step = MaskedAffineAutoregressiveTransform(
            size.features, size.hidden[0], num_blocks=len(size.hidden) - 1, use_residual_blocks=False
        )
        self.parallel, self.inverse = self.step.forward, self.step.inverse


class Pyro(nn.Module):
    """``AffineAutoregressive``."""

    def __init__(self, size: Size):
        super().__init__()
        from pyro.distributions.transforms import AffineAutoregressive
        from pyro.nn import AutoRegressiveNN

        self.step = AffineAutoregressive(AutoRegressiveNN(size.features, list(size.hidden)))

    def parallel(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Its call; a new object each time, as its cache goes by identity."""
        x = x.view_as(x)
        y = self.step(x)
        return y, self.step.log_abs_det_jacobian(x, y)

    def inverse(self, y: Tensor) -> tuple[Tensor, None]:
        """Its inverse."""
        return self.step.inv(y.view_as(y)), None


RIVALS = {"hvae_kernels": Ours, "no mask": NoMask, "zuko": Zuko, "nflows": Nflows, "pyro": Pyro}
PEERS = ("zuko", "nflows", "pyro")


# ---- What is timed ----


def directions(model: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """The three directions, as calls without arguments."""
    parameters = list(model.parameters())

    def step() -> object:
        y, log_abs_det = model.parallel(x)
        return torch.autograd.grad(y.square().sum() - log_abs_det.sum(), parameters)

    calls = {"forward+backward": step, "forward": torch.no_grad()(lambda: model.parallel(x))}
    if hasattr(model, "inverse"):
        with torch.no_grad():
            y = model.parallel(x)[0].clone()
        calls["inverse"] = torch.no_grad()(lambda: model.inverse(y))
    return calls


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """What a forward pass keeps for its backward pass, beyond parameters, buffers and x."""
    own = [x, *model.parameters(), *model.buffers()]
    return memory.saved_bytes(lambda *_: model.parallel(x), own)


def records(size: Size, plan: Plan) -> Iterator[dict[str, object]]:
    """A record for every rival and direction of one size."""
    torch.manual_seed(0)
    models = {name: rival(size) for name, rival in RIVALS.items()}
    x = torch.randn(size.batch, size.features)
    calls = {name: directions(model, x) for name, model in models.items()}
    own_forward = None
    for direction in ("forward", "inverse", "forward+backward"):
        timings = timing.measure({n: c[direction] for n, c in calls.items() if direction in c}, plan)
        best = min(timings[peer].p20 for peer in PEERS)
        own_forward = own_forward or timings["hvae_kernels"].p20
        for name, taken in timings.items():
            learns = direction == "forward+backward"
            yield {
                **{"features": size.features, "hidden": " x ".join(map(str, size.hidden)), "batch": size.batch},
                **{"dtype": "float32", "direction": direction, "implementation": name, "min_us": taken.min},
                **{"p20_us": taken.p20, "p50_us": taken.p50, "samples": len(taken.samples)},
                "speedup_vs_best_peer": best / taken.p20,
                "times_of_no_mask": taken.p20 / timings["no mask"].p20 if "no mask" in timings else None,
                "times_of_forward": taken.p20 / own_forward if direction == "inverse" else None,
                "peak_bytes": memory.peak_bytes(calls[name][direction], "cpu") if learns else None,
                "saved_bytes": kept_bytes(models[name], x) if learns else None,
            }


def growth(features: int, plan: Plan) -> dict[str, object]:
    """Time of our inverse and error of its round trip, float32, at 1.5 d hidden units twice."""
    torch.manual_seed(0)
    size = Size(features, (3 * features // 2,) * 2, 128)
    model, x = Ours(size), torch.randn(size.batch, features)
    calls = directions(model, x)
    taken = timing.measure({"forward": calls["forward"], "inverse": calls["inverse"]}, plan)
    with torch.no_grad():
        back = model.inverse(model.parallel(x)[0])[0]
    return {
        **{"features": features, "hidden": " x ".join(map(str, size.hidden)), "batch": size.batch, "dtype": "float32"},
        **{"direction": "growth", "implementation": "hvae_kernels", "min_us": taken["inverse"].min},
        **{"p20_us": taken["inverse"].p20, "p50_us": taken["inverse"].p50, "samples": len(taken["inverse"].samples)},
        "times_of_forward": taken["inverse"].p20 / taken["forward"].p20,
        "round_trip_error": ((back - x).norm() / x.norm()).item(),
    }


# ---- For people ----


def table(rows: list[dict[str, str]]) -> str:
    """All rivals of all sizes."""
    headers = ("step", "direction", "implementation", "p20", "best peer", "no mask", "own forward", "peak", "saved")
    return results.table(
        headers,
        [
            (
                f"d = {r['features']}, hidden {r['hidden']}, batch {r['batch']}",
                *(r["direction"], r["implementation"], results.duration(r["p20_us"])),
                results.times(r["speedup_vs_best_peer"]),
                *(f"{float(r[key]):.2f} of it" if r[key] else "" for key in ("times_of_no_mask", "times_of_forward")),
                *(results.size(r[key]) if r[key] else "" for key in ("peak_bytes", "saved_bytes")),
            )
            for r in rows
            if r["direction"] != "growth"
        ],
    )


def growth_table(rows: list[dict[str, str]]) -> str:
    """The inverse by features; a weight is a connection that its mask keeps."""
    body = []
    for r in rows:
        if r["direction"] == "growth":
            d, width = int(r["features"]), int(r["hidden"].split(" x ")[0])
            connections = (d * width + width * width + 2 * d * width) / 2
            each = f"{1e3 * float(r['p20_us']) / connections:.3f} ns"
            share = f"{float(r['times_of_forward']):.2f}"
            body.append((d, r["hidden"], results.duration(r["p20_us"]), each, share, r["round_trip_error"]))
    return results.table(("d", "hidden", "inverse", "a connection", "of own forward", "round trip error"), body)


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Time of the inverse against features, with lines of slope 2 (weights) and 3 (a pass a feature)."""
    from matplotlib import pyplot as plt

    points = [(int(r["features"]), float(r["p20_us"]) / 1e3) for r in rows if r["direction"] == "growth"]
    d, milliseconds = zip(*points, strict=True)
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    axis.loglog(d, milliseconds, "o-", label="hvae_kernels")
    for power, label in ((2, "linear in weights, d²"), (3, "d passes, d³")):
        axis.loglog(d, [milliseconds[-1] * (x / d[-1]) ** power for x in d], "--", label=label)
    axis.set(xlabel="features d (hidden 1.5 d twice, batch 128)", ylabel="inverse, ms")
    axis.legend()
    figure.savefig(path)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write the CSV and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny steps, to see that everything runs; writes no CSV")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where CSV and figure go (benchmarks/results/flows)")
    parser.add_argument(
        "--stock-allocator",
        action="store_true",
        help="leave freed memory to glibc, which gives it back to the system and pays for it again",
    )
    options = cpu.parse(parser, arguments)
    run.refuse_changes(not options.tiny and not options.out)
    if not options.stock_allocator:
        run.keep_freed_memory()
    origin = run.provenance(torch.device("cpu"))
    measured = [record for size in (TINY if options.tiny else SIZES) for record in _announced(size)]
    measured += [growth(features, QUICK) for features in ((4, 8) if options.tiny else GROWTH)]
    rows = [{key: results.text((record | origin).get(key)) for key in FIELDS} for record in measured]
    print(f"\n{results.machine(origin)}, torch {origin['torch']}\n\n{table(rows)}")
    print(f"\n{growth_table(rows)}")
    if options.out or not options.tiny:
        name = f"autoregressive-{results.stem(origin)}"
        folder = options.out or results.FLOWS
        results.write(folder / f"{name}.csv", rows, FIELDS)
        draw(rows, folder / f"{name}.svg")
        print(f"wrote {folder / name}.csv and .svg")
    if not options.out and not options.tiny:
        print(tables.update_flows(tables.MEASURED))
    return 0


def _announced(size: Size) -> list[dict[str, object]]:
    measured = list(records(size, QUICK))
    print(f"  timed d = {size.features}, hidden {size.hidden}, batch {size.batch}", flush=True)
    return measured


if __name__ == "__main__":
    sys.exit(main())
