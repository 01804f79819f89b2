"""Hamiltonian flows through decoders: ``python benchmarks/hamiltonian.py [--figures speed memory compile ...] ...``.

Trajectory, final energy and all gradients, float32, on the CPU, by every rival:

- *speed*: rivals in turns, in one process;
- *memory*: the resident high-water mark of a fresh process a rival, against K;
- *compile*: first call (compilation included, caches off), time and memory of fresh processes, against K; what has not
  come to its end after 15 minutes is stopped, and says so;
- *pythae-hvae*: a training step of its HVAE, which drops the second order and takes 2K gradients, against ours on the
  same encoder and decoder: in turns, and the high-water mark of a fresh process each.
  Needs ``pip install --no-deps -r benchmarks/peers.txt``.
- *pythae-iwae*: the same for its IWAE, K samples.

Before anything is timed, every rival's gradients have to equal those of the formula in float64. A full run takes most
of an hour; ``--figures``, ``--decoder``, ``--steps``, ``--batch`` and ``--rivals`` choose, and replace only the rows
that they measure; ``--cpu`` holds all of them to one instruction set.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import cpu  # noqa: E402 - needs the repository on the path, as the next lines do

if __name__ == "__main__":
    cpu.hold()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import hvae_kernels as hk  # noqa: E402
from benchmarks import results, run  # noqa: E402
from benchmarks.timing import Candidate, Plan, Timing, interleave  # noqa: E402
from hvae_kernels import testing  # noqa: E402
from hvae_kernels.ops.gaussian_leapfrog import reference as formula  # noqa: E402
from hvae_kernels.ops.leapfrog import reference  # noqa: E402
from hvae_kernels.ops.leapfrog.field import INDUCTOR_OPTIONS  # noqa: E402

LATENT, PIXELS = 64, 784
#: Steps here take up to seconds: a sample is one call.
PLAN = Plan(rounds=7, turn=0.0, cap=30.0, sample=0.0, fewest=3)
STEPS = {"speed": [15], "memory": [1, 15, 60], "compile": [5, 15, 60], "pythae-hvae": [3, 15], "pythae-iwae": [40]}
KEY = ("figure", "decoder", "batch", "steps", "implementation")
FIELDS = (
    *KEY,
    *("first_call_s", "min_us", "p20_us", "p50_us", "samples", "speedup", "start_bytes", "peak_bytes"),
    *("device", "cpu", "threads", "torch", "python", "commit", "date"),
)
#: Seconds for a fresh process; its compilation may take longer than anyone would wait.
LIMIT = 900.0
State = tuple[Tensor, Tensor]


# ---- Decoders ----


def study() -> nn.Sequential:
    """The decoder of the MNIST study, 306,615 parameters.

    Batch norm takes the batch's statistics and keeps no running ones: compiled rivals cannot update them.
    """

    def norm(layer: type[nn.Module], features: int) -> nn.Module:
        return layer(features, track_running_stats=False)

    def convolution(features_in: int, features_out: int) -> nn.Module:
        return nn.Conv2d(features_in, features_out, 5, padding=2)

    return nn.Sequential(
        *(norm(nn.BatchNorm1d, LATENT), nn.Linear(LATENT, 450), nn.Softplus()),
        *(norm(nn.BatchNorm1d, 450), nn.Linear(450, 512), nn.Softplus(), nn.Unflatten(1, (32, 4, 4))),
        *(norm(nn.BatchNorm2d, 32), convolution(32, 32), nn.Upsample(7), nn.Softplus()),
        *(norm(nn.BatchNorm2d, 32), convolution(32, 16), nn.Upsample(14), nn.Softplus()),
        *(norm(nn.BatchNorm2d, 16), convolution(16, 16), nn.Upsample(28), nn.Softplus(), convolution(16, 1)),
    )


def mlp() -> nn.Sequential:
    """One hidden layer of 512."""
    return nn.Sequential(nn.Linear(LATENT, 512), nn.Softplus(), nn.Linear(512, PIXELS))


DECODERS = {"study": study, "mlp": mlp}


class Potential(nn.Module):
    """``-log p(x, z)`` up to a constant, Bernoulli pixels."""

    def __init__(self, decoder: nn.Module, x: Tensor):
        super().__init__()
        self.decoder, self.x = decoder, nn.Buffer(x)

    def forward(self, z: Tensor) -> Tensor:
        """Energies of the rows."""
        fit = F.binary_cross_entropy_with_logits(self.decoder(z).flatten(1), self.x, reduction="none")
        return fit.sum(-1) + z.square().sum(-1) / 2


# ---- Rivals: ``(z, rho, potential, step_size, tempering) -> (z_K, rho_K)`` ----


def twice(z: Tensor, rho: Tensor, potential: nn.Module, step_size: Tensor, tempering: Tensor) -> State:
    """The formula as it is usually written: two recorded gradients a step."""
    for alpha in tempering:
        rho = rho - step_size / 2 * reference.gradient_of(potential, z, True)[0]
        z = z + step_size * rho
        rho = alpha * (rho - step_size / 2 * reference.gradient_of(potential, z, True)[0])
    return z, rho


def functional(z: Tensor, rho: Tensor, potential: nn.Module, step_size: Tensor, tempering: Tensor) -> State:
    """K + 1 gradients by ``torch.func.grad``, to be compiled whole."""
    gradient = torch.func.grad(lambda position: potential(position).sum())
    return formula.trajectory(z, rho, gradient, step_size, tempering)


def ours(**options) -> Callable[..., State]:
    """``hk.functional.leapfrog`` with these options."""
    return lambda *arguments: hk.functional.leapfrog(*arguments, **options)


def traced() -> Callable[..., State]:
    """K + 1 recorded gradients, compiled whole under Dynamo's experimental flag."""
    torch._dynamo.config.trace_autograd_ops = True
    return compiled_whole(reference.leapfrog)


def compiled_whole(function: Callable[..., State]) -> Callable[..., State]:
    """With our options: Inductor's defaults crash on the study's decoder."""
    return torch.compile(function, fullgraph=True, options=INDUCTOR_OPTIONS["cpu"])


RIVALS: dict[str, Callable[[], Callable[..., State]]] = {
    "eager, 2K gradients": lambda: twice,
    "eager, K + 1 gradients": lambda: reference.leapfrog,
    "store": lambda: ours(memory="store"),
    "reversible": lambda: ours(),
    "store, compiled": lambda: ours(memory="store", compile=True),
    "reversible, compiled": lambda: ours(compile=True),
    "func.grad, compiled whole": lambda: compiled_whole(functional),
    "trace_autograd_ops, compiled whole": traced,
}
UNCOMPILED = ("eager, 2K gradients", "eager, K + 1 gradients", "store", "reversible")
BASE = UNCOMPILED[0]


class Problem:
    """One decoder, batch and K; calling it with a rival gives all gradients."""

    def __init__(self, decoder: str, batch: int, steps: int, dtype: torch.dtype = torch.float32):
        torch.manual_seed(0)
        self.potential = Potential(DECODERS[decoder](), torch.bernoulli(torch.full((batch, PIXELS), 0.3))).to(dtype)
        state = torch.randn(2, batch, LATENT).to(dtype).unbind()
        rest = torch.full((LATENT,), 0.005, dtype=dtype), torch.full((steps,), 0.997, dtype=dtype)
        self.inputs = [x.detach().requires_grad_() for x in (*state, *rest)]
        self.wanted = [*self.inputs, *self.potential.parameters()]

    def __call__(self, rival: Callable[..., State]) -> tuple[Tensor, ...]:
        """Forward and backward."""
        z, rho, step_size, tempering = self.inputs
        z_end, rho_end = rival(z, rho, self.potential, step_size, tempering)
        loss = self.potential(z_end).mean() + rho_end.square().sum(-1).mean() / 2
        return torch.autograd.grad(loss, self.wanted)


def agree(decoder: str, rivals: list[str]) -> None:
    """Require the formula's gradients of all rivals, in float64.

    Raises:
        AssertionError: one has others.
    """
    problem = Problem(decoder, 8, 3, torch.float64)
    exact = torch.cat([x.flatten() for x in problem(reference.leapfrog)])
    for name in rivals:
        gradients = torch.cat([x.flatten() for x in problem(RIVALS[name]())])
        error = testing.relative_error(gradients, exact)
        assert error < 1e-8, f"{name}: gradients are off by {error:.2g}"


# ---- Measurements ----


def compare(calls: dict[str, Callable[[], object]]) -> dict[str, Timing]:
    """Rivals in turns."""
    return interleave([Candidate(name, lambda _, call=call: call(), int) for name, call in calls.items()], "cpu", PLAN)


def speed(decoder: str, batch: int, steps: int, rivals: list[str]) -> Iterator[dict[str, object]]:
    """A record a rival; the speed-up is over the first."""
    problem = Problem(decoder, batch, steps)
    timings = compare({name: functools.partial(problem, RIVALS[name]()) for name in rivals})
    base = timings.get(BASE)
    for name, taken in timings.items():
        yield {"implementation": name, **_times(taken), "speedup": base.p20 / taken.p20 if base else None}


def _times(taken: Timing) -> dict[str, object]:
    return {"min_us": taken.min, "p20_us": taken.p20, "p50_us": taken.p50, "samples": len(taken.samples)}


def in_a_fresh_process(figure: str, decoder: str, batch: int, steps: int, rival: str) -> dict[str, object]:
    """What :func:`child` prints there."""
    command = [sys.executable, __file__, "--child", rival, "--figures", figure, "--decoder", decoder]
    command += ["--batch", str(batch), "--steps", str(steps)]
    environment = os.environ | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    try:
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"implementation": rival, "first_call_s": math.inf}
    except subprocess.CalledProcessError:  # it has said why
        return {"implementation": rival, "first_call_s": math.nan}
    return {"implementation": rival} | json.loads(done.stdout.splitlines()[-1])


def child(figure: str, decoder: str, batch: int, steps: int, rival: str) -> dict[str, object]:
    """First call, later ones, and the high-water mark of this process."""
    if figure in TRAINING:
        call, before, start = TRAINING[figure](batch, steps)[rival], high_water_mark(), time.perf_counter()
    else:
        problem = Problem(decoder, batch, steps)
        before, start = high_water_mark(), time.perf_counter()
        call = functools.partial(problem, RIVALS[rival]())
    call()
    seconds = [time.perf_counter() - start]
    for _ in range(3):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    first, *later = seconds
    taken = Timing(tuple(1e6 * x for x in later))
    return {"first_call_s": first, **_times(taken), "start_bytes": before, "peak_bytes": high_water_mark()}


def high_water_mark() -> int:
    """The most memory that this process ever had resident."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


# ---- Training steps of pythae's models, on its own MLP encoder and decoder (512), by name ----


def hvae_steps(batch: int, steps: int) -> dict[str, Callable[[], object]]:
    """Its HVAE and ours."""
    from pythae.models import HVAE, HVAEConfig

    torch.manual_seed(0)
    config = HVAEConfig(
        input_dim=(1, 28, 28), latent_dim=LATENT, reconstruction_loss="bce", n_lf=steps, eps_lf=0.005, beta_zero=0.9
    )
    theirs, x = HVAE(config), torch.bernoulli(torch.full((batch, 1, 28, 28), 0.3))
    flow = hk.nn.HamiltonianFlow(LATENT, steps, "quadratic", init_temperature=1.05)
    potential = Potential(nn.Sequential(_Reconstruction(theirs.decoder)), x.flatten(1))
    learned = [*theirs.encoder.parameters(), *theirs.decoder.parameters()]

    def ours(memory: str, gradient: str) -> object:
        flow.memory, flow.gradient = memory, gradient
        code = theirs.encoder(x)
        log_var = code.log_covariance
        z = code.embedding + F.softplus(log_var) * torch.randn_like(log_var)
        z, rho, _ = flow(z, torch.randn_like(z), potential)
        loss = (potential(z) + rho.square().sum(-1) / 2 - log_var.sum(-1) / 2).mean()
        return torch.autograd.grad(loss, learned)

    return {
        "pythae (first order only)": lambda: torch.autograd.grad(theirs({"data": x}).loss, learned),
        "ours, detached": functools.partial(ours, "store", "detached"),
        "ours, store": functools.partial(ours, "store", "full"),
        "ours, reversible": functools.partial(ours, "reversible", "full"),
    }


def iwae_steps(batch: int, samples: int) -> dict[str, Callable[[], object]]:
    """Its IWAE and ours, the same function of the same noise."""
    from pythae.models import IWAE, IWAEConfig

    torch.manual_seed(0)
    config = IWAEConfig(input_dim=(1, 28, 28), latent_dim=LATENT, reconstruction_loss="bce", number_samples=samples)
    theirs, x = IWAE(config), torch.bernoulli(torch.full((batch, 1, 28, 28), 0.3))
    learned = [*theirs.encoder.parameters(), *theirs.decoder.parameters()]
    hidden, (output, _) = theirs.decoder.layers

    def ours() -> tuple[Tensor, ...]:
        code = theirs.encoder(x)
        log_scale = code.log_covariance / 2
        noise = torch.randn(batch, samples, LATENT).transpose(0, 1)  # the order in which pythae draws
        z = code.embedding + log_scale.exp() * noise
        log_likelihood = hk.functional.bernoulli_log_prob(output(hidden(z)), x.flatten(1))
        log_weights = log_likelihood + (noise.square() - z.square()).sum(-1) / 2 + log_scale.sum(-1)
        return torch.autograd.grad(-hk.functional.iwae_bound(log_weights).mean(), learned)

    def peer() -> tuple[Tensor, ...]:
        return torch.autograd.grad(theirs({"data": x}).loss, learned)

    return {"pythae": peer, "ours": ours}


def agree_with_peer(calls: dict[str, Callable[[], tuple[Tensor, ...]]]) -> None:
    """Require the same gradients of two IWAEs.

    Raises:
        AssertionError: they differ.
    """
    found = []
    for call in calls.values():
        torch.manual_seed(1)
        found.append(torch.cat([gradient.flatten() for gradient in call()]))
    error = testing.relative_error(*found)
    assert error < 1e-4, f"pythae-iwae: gradients differ by {error:.2g}"


TRAINING = {"pythae-hvae": hvae_steps, "pythae-iwae": iwae_steps}


def training(figure: str, batch: int, steps: int) -> Iterator[dict[str, object]]:
    """A record a rival: times in turns, memory of a fresh process; the speed-up is over pythae."""
    calls = TRAINING[figure](batch, steps)
    if figure == "pythae-iwae":
        agree_with_peer(calls)
    timings = compare(calls)
    base = next(iter(timings.values())).p20
    for name, taken in timings.items():
        alone = in_a_fresh_process(figure, "mlp", batch, steps, name)
        memory = {key: alone.get(key) for key in ("first_call_s", "start_bytes", "peak_bytes")}
        yield {"implementation": name, **_times(taken), "speedup": base / taken.p20, **memory}


class _Reconstruction(nn.Module):
    """The tensor in what pythae's decoder returns."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder

    def forward(self, z: Tensor) -> Tensor:
        """Probabilities, which pythae takes for logits."""
        return self.decoder(z)["reconstruction"]


# ---- For people ----


def measure(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Records of the chosen figures."""
    compiled = [name for name in RIVALS if name != BASE]
    for figure in options.figures:
        for decoder in ["mlp"] if figure in TRAINING else options.decoder:
            rivals = options.rivals or (compiled if figure == "compile" else list(UNCOMPILED))
            if figure not in TRAINING:
                agree(decoder, [name for name in rivals if name in UNCOMPILED])
            for steps in options.steps or STEPS[figure]:
                for record in _records(figure, decoder, options.batch, steps, rivals):
                    print(f"  {figure}, {decoder}, K = {steps}: {record['implementation']}", flush=True)
                    yield {"figure": figure, "decoder": decoder, "batch": options.batch, "steps": steps} | record


def _records(figure: str, decoder: str, batch: int, steps: int, rivals: list[str]) -> Iterator[dict[str, object]]:
    if figure in TRAINING:
        return training(figure, batch, steps)
    if figure == "speed":
        return speed(decoder, batch, steps, rivals)
    return (in_a_fresh_process(figure, decoder, batch, steps, name) for name in rivals)


def _first_call(seconds: str) -> str:
    if not seconds:
        return ""
    if math.isnan(float(seconds)):
        return "failed"
    return f"over {LIMIT:.0f} s" if math.isinf(float(seconds)) else f"{float(seconds):.3g} s"


def table(rows: list[dict[str, str]]) -> str:
    """All rows of all figures."""
    headers = ("figure", "decoder", "K", "implementation", "first call", "p20", "over base", "peak", "above start")
    return results.table(
        headers,
        [
            (
                *(r["figure"], f"{r['decoder']}, B = {r['batch']}", r["steps"], r["implementation"]),
                _first_call(r["first_call_s"]),
                *(
                    results.duration(r["p20_us"]) if r["p20_us"] else "",
                    results.times(r["speedup"]),
                    results.size(r["peak_bytes"]),
                ),
                results.size(str(float(r["peak_bytes"]) - float(r["start_bytes"]))) if r["peak_bytes"] else "",
            )
            for r in rows
        ],
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--decoder", nargs="+", choices=DECODERS, default=["study"])
    parser.add_argument("--steps", nargs="+", type=int, help="K (by default those of each figure)")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, help="(by default those of each figure)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the CSV goes; without it nothing is written")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = cpu.parse(parser, arguments)
    if options.child:
        print(json.dumps(child(options.figures[0], options.decoder[0], options.batch, options.steps[0], options.child)))
        return 0
    origin = run.provenance(torch.device("cpu"))
    name = f"hamiltonian-{results.stem(origin)}.csv"
    new = []
    for record in measure(options):
        new.append({key: results.text((record | origin).get(key)) for key in FIELDS})
        if options.out and not _failed(new[-1]):  # now, as the next may take long
            _keep(options.out / name, new[-1])
    print(f"\n{results.machine(origin)}, torch {origin['torch']}\n\n{table(new)}")
    return 1 if any(map(_failed, new)) else 0


def _failed(row: dict[str, str]) -> bool:
    return row["first_call_s"] == "nan"


def _keep(path: Path, new: dict[str, str]) -> None:
    """Behind the others, without the row of the same key."""
    key = [new[name] for name in KEY]
    kept = [row for row in results.read(path) if [row[name] for name in KEY] != key]
    results.write(path, [*kept, new], FIELDS)


if __name__ == "__main__":
    sys.exit(main())
