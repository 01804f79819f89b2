"""Path gradients through flows: ``python benchmarks/path_gradient.py [--figures time variance fit] ...``.

- *time*: of the gradient of ``mean(log q(x) - log p(x))``, float32, on the CPU: the plain one by reparameterisation,
  the path gradient alone (``hk.path_log_prob``), and the path gradient whose sequential direction takes d passes of the
  network, as it does without our kernels. Rivals take turns.
- *variance*: of both estimators, summed over all parameters, and the norm of their mean, for targets that are the flow
  itself with noise of a scale added to its parameters.
- *fit*: a flow fitted to another one by both estimators, from the same start with the same noise: the divergence that
  is left, by a sample of its own, with its standard error, and the processor's seconds of the steps until then;
  ``--picture FILE`` draws it against those.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
import time
from collections.abc import Callable
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
from benchmarks import results, run  # noqa: E402
from benchmarks.timing import Candidate, Plan, interleave  # noqa: E402

FEATURES, HIDDEN, LAYERS, BATCH = 64, [256, 256], 2, 256
PLAN = Plan(rounds=7, turn=0.2, cap=20.0, sample=0.0, fewest=3)
SCALES = (0.0, 0.001, 0.01, 0.1)
STEPS, LEARNING_RATE, EVALUATED = 1000, 1e-3, 20_000
#: Noise on the parameters of the flow that is fitted: far from its start, and near.
DISTANCES = (0.1, 0.02)
#: ``log(2 pi) / 2`` a dimension, which path_log_prob's standard normal has.
CONSTANT = 0.9189385332046727
SPLINE = hk.functional.Spline(8, bound=5.0)
FLOWS: dict[str, tuple[type[nn.Module], object]] = {
    "IAF": (hk.nn.InverseAutoregressiveFlow, "soft-clipped"),
    "MAF": (hk.nn.MaskedAutoregressiveFlow, "soft-clipped"),
    "IAF of splines": (hk.nn.InverseAutoregressiveFlow, SPLINE),
    "MAF of splines": (hk.nn.MaskedAutoregressiveFlow, SPLINE),
}


def flow_of(name: str, features: int = FEATURES) -> hk.nn.FlowStack:
    """Two layers, orders reversed in between, away from the identity."""
    torch.manual_seed(0)
    kind, gate = FLOWS[name]
    return hk.nn.FlowStack.autoregressive(kind, LAYERS, features, HIDDEN, gate=gate)


def in_d_passes(flow: hk.nn.FlowStack) -> hk.nn.FlowStack:
    """A copy whose networks must be called, as with any module's hook: so each feature takes a pass."""
    flow = copy.deepcopy(flow)
    for layer in flow.flows:
        layer.made.register_forward_hook(lambda module, inputs, output: None)
    return flow


def log_normal(x: Tensor) -> Tensor:
    """Of N(0, I), up to its constant."""
    return -x.square().sum(-1) / 2


def log_density(flow: nn.Module) -> Callable[[Tensor], Tensor]:
    """A held flow's."""
    held = copy.deepcopy(flow).requires_grad_(False)

    def log_p(x: Tensor) -> Tensor:
        z, log_abs_det = held.inverse(x)
        return log_normal(z) + log_abs_det

    return log_p


def divergence(flow: nn.Module, log_p: Callable[[Tensor], Tensor], z: Tensor, path: bool) -> Tensor:
    """``log q(x) - log p(x)``, up to the normal's constant."""
    if path:
        x, log_q = hk.path_log_prob(flow, z)
        return log_q + CONSTANT * z.shape[-1] - log_p(x)
    x, log_abs_det = flow(z)
    return log_normal(z) - log_abs_det - log_p(x)


def gradient(flow: nn.Module, log_p: Callable[[Tensor], Tensor], z: Tensor, path: bool) -> Tensor:
    """Of the mean, all parameters together."""
    loss = divergence(flow, log_p, z, path).mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(flow.parameters()))])


def times(names: list[str]) -> str:
    """The first table."""
    rows = []
    for name in names:
        flow, z = flow_of(name), torch.randn(BATCH, FEATURES)
        passes = in_d_passes(flow)
        calls = {
            "plain": functools.partial(gradient, flow, log_normal, z, False),
            "path": functools.partial(gradient, flow, log_normal, z, True),
            "path, d passes": functools.partial(gradient, passes, log_normal, z, True),
        }
        torch.testing.assert_close(calls["path"](), calls["path, d passes"](), rtol=1e-3, atol=1e-4)
        candidates = [Candidate(key, lambda _, call=call: call(), int) for key, call in calls.items()]
        taken = interleave(candidates, "cpu", PLAN)
        plain, path, slow = (taken[key].p20 for key in calls)
        cells = (results.duration(f"{t}") for t in (plain, path, slow))
        rows.append((name, *cells, f"{path / plain:.2f}x", f"{slow / path:.1f}x"))
    headers = ("flow", "plain", "path", "path, d passes", "path over plain", "d passes over path")
    return results.table(headers, rows)


def variances(names: list[str], n: int = 200) -> str:
    """The second table, of batches of 16."""
    rows = []
    for name in names:
        for scale in SCALES:
            flow = flow_of(name)
            target = copy.deepcopy(flow)
            with torch.no_grad():
                for parameter in target.parameters():
                    parameter += scale * torch.randn_like(parameter)
            log_p, found = log_density(target), []
            for path in (False, True):
                torch.manual_seed(1)
                samples = torch.stack(
                    [gradient(flow, log_p, torch.randn(16, FEATURES), path).double() for _ in range(n)]
                )
                found.append((samples.var(0).sum().item(), samples.mean(0).norm().item()))
            (plain, _), (path_variance, size) = found
            rows.append((name, scale, f"{size:.2g}", f"{plain:.2g}", f"{path_variance:.2g}"))
    headers = ("flow", "noise on the target's parameters", "norm of the mean", "variance, plain", "variance, path")
    return results.table(headers, rows)


def fit(name: str, picture: Path | None) -> str:
    """The last table: the target is a flow of the same kind, with noise added to its parameters."""
    curves = {(noise, path): training(name, noise, path) for noise in DISTANCES for path in (False, True)}
    if picture:
        draw(picture, name, curves)
    rows = []
    for noise in DISTANCES:
        for plain, ours in list(zip(curves[noise, False], curves[noise, True], strict=True))[::4]:
            cells = (f"{nats:.4f} +- {error:.4f}, {seconds:.1f} s" for _, seconds, nats, error in (plain, ours))
            rows.append((noise, plain[0], *cells))
    return results.table(("noise on the target's parameters", "step", f"{name}: nats left, plain", "path"), rows)


def training(name: str, noise: float, path: bool) -> list[tuple[int, float, float, float]]:
    """``(step, seconds, nats, their standard error)`` of a fit, at 21 steps."""
    flow, target = flow_of(name), flow_of(name)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter += noise * torch.randn_like(parameter)
    log_p = log_density(target)
    optimizer = torch.optim.Adam(flow.parameters(), LEARNING_RATE)
    torch.manual_seed(7)
    curve, seconds = [], 0.0
    for step in range(STEPS + 1):
        if step % (STEPS // 20) == 0:
            curve.append((step, seconds, *measured(flow, log_p)))
        start = time.process_time()
        optimizer.zero_grad()
        divergence(flow, log_p, torch.randn(BATCH, FEATURES), path).mean().backward()
        optimizer.step()
        seconds += time.process_time() - start
    return curve


@torch.no_grad()
def measured(flow: nn.Module, log_p: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """The divergence, and its standard error, from the same sample each time."""
    z = torch.randn(EVALUATED, FEATURES, generator=torch.Generator().manual_seed(11))
    values = divergence(flow, log_p, z, False).double()
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


def draw(path: Path, name: str, curves: dict[tuple[float, bool], list[tuple[int, float, float, float]]]) -> None:
    """Nats left against seconds, an axis for each distance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for noise, axes in zip(DISTANCES, figure.subplots(1, len(DISTANCES)), strict=True):
        for by_path, label in ((False, "plain gradient"), (True, "path gradient")):
            _, seconds, nats, errors = zip(*curves[noise, by_path], strict=True)
            axes.errorbar(seconds, nats, errors, label=label)
        axes.set(xlabel="seconds of processor", yscale="log", title=f"target's parameters off by {noise} N(0, 1)")
    figure.axes[0].set_ylabel(f"KL(q | p), nats; {name}, d = {FEATURES}")
    figure.axes[0].legend()
    figure.savefig(path, dpi=80)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    figures = ("time", "variance", "fit")
    parser.add_argument("--figures", nargs="+", choices=figures, default=list(figures))
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=list(FLOWS))
    parser.add_argument("--picture", type=Path, help="of the fit, of the first of the flows")
    options = cpu.parse(parser, arguments)
    origin = run.provenance(torch.device("cpu"))
    print(
        f"{results.machine(origin)}, torch {origin['torch']}, commit {origin['commit']}; d = {FEATURES}, B = {BATCH}\n"
    )
    if "time" in options.figures:
        print(times(options.flows), "\n", flush=True)
    if "variance" in options.figures:
        print(variances(options.flows), "\n", flush=True)
    if "fit" in options.figures:
        print(fit(options.flows[0], options.picture))
    return 0


if __name__ == "__main__":
    sys.exit(main())
