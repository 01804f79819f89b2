"""Annealed Hamiltonian flows through decoders: ``python benchmarks/annealed.py [--figures bounds drift] ...``.

- *bounds*: the bound of B images and all its gradients, float32, on the CPU, by every rival, for M bridges: the formula
  as it is usually written, two recorded gradients a bridge; the same with M + 1; ours with each memory; and, where JAX
  is installed, the algorithm as a jitted scan, with what it stores and with ``jax.checkpoint``, and numpyro's
  ``AutoDAIS`` (``pip install numpyro``). Each in a fresh process: first call, later calls, and the resident high-water
  mark.
- *drift*: errors of all gradients against float64, MLP decoder, 16 rows, by eta and M.

Before anything is timed, every rival's gradients have to equal those of the formula: torch's in float64, JAX's in
float32 to 1e-3. AutoDAIS alone has none to compare: its integrator is another one, with M gradients, and to its guide
the decoder is a constant, so that it does less. What has not come to its end after ten minutes is stopped, and says so.
``--decoder``, ``--bridges``, ``--batch`` and ``--rivals`` choose, and replace only the rows that they measure.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
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

import hvae_kernels as hk  # noqa: E402
from benchmarks import results, run  # noqa: E402
from benchmarks.hamiltonian import DECODERS, LATENT, PIXELS, Potential, high_water_mark  # noqa: E402
from hvae_kernels import testing  # noqa: E402
from hvae_kernels.ops.annealed_leapfrog import reference  # noqa: E402

BRIDGES = (8, 64, 256)
STEP_SIZE, REFRESHMENT = 0.05, 0.9
LIMIT = 600.0
AUTO_DAIS = "numpyro, AutoDAIS"
KEY = ("decoder", "batch", "bridges", "implementation")
FIELDS = (
    *KEY,
    *("first_call_s", "fastest_s", "median_s", "calls", "start_bytes", "peak_bytes"),
    *("device", "cpu", "threads", "torch", "python", "commit", "date"),
)
Bound = Callable[[], tuple[Tensor, ...]]


class Base(nn.Module):
    """``-log q0(z)`` of a Gaussian a row, up to a constant."""

    def __init__(self, loc: Tensor, log_scale: Tensor):
        super().__init__()
        self.loc, self.log_scale = nn.Parameter(loc), nn.Parameter(log_scale)

    def forward(self, z: Tensor) -> Tensor:
        """Energies of the rows."""
        return (((z - self.loc) * (-self.log_scale).exp()).square() / 2 + self.log_scale).sum(-1)


class Problem:
    """One decoder, batch and number of bridges, with all that is random."""

    def __init__(
        self, decoder: str, batch: int, bridges: int, dtype: torch.dtype = torch.float32, eta: float = REFRESHMENT
    ):
        torch.manual_seed(0)
        pixels = torch.bernoulli(torch.full((batch, PIXELS), 0.3))
        self.potential = Potential(DECODERS[decoder](), pixels).to(dtype)
        self.base = Base(0.1 * torch.randn(batch, LATENT), torch.full((batch, LATENT), -0.5)).to(dtype)
        self.first = torch.randn(batch, LATENT).to(dtype)
        self.noise = torch.randn(bridges + 1, batch, LATENT).to(dtype)
        self.flow = hk.nn.AnnealedHamiltonianFlow(
            LATENT, bridges, refreshment=eta, init_step_size=STEP_SIZE, dtype=dtype
        )
        self.learned = [*self.potential.parameters(), *self.base.parameters(), *self.flow.parameters()]

    def gradients(self, run: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        """Of minus the mean bound for decoder, base density and flow."""
        z_0 = self.base.loc + self.base.log_scale.exp() * self.first
        z, log_weight = run(z_0, self.noise, self.potential, self.base)
        loss = (self.potential(z) - self.base(z_0) - log_weight).mean()
        return torch.autograd.grad(loss, self.learned)

    def formula(self, *arguments) -> tuple[Tensor, Tensor]:
        """Two recorded gradients a bridge."""
        flow = self.flow
        return reference.annealed_leapfrog(*arguments, flow.step_size, flow.betas()[0], flow.refreshment()[0])

    def ours(self, memory: str, implementation: str = "auto") -> Bound:
        """The module, with this memory."""
        self.flow.memory = memory

        def call() -> tuple[Tensor, ...]:
            with hk.use_impl(implementation):
                return self.gradients(self.flow)

        return call


# ---- JAX: the algorithm as a jitted scan ----


class Jax:
    """The same bound, with gradients for the same tensors."""

    def __init__(self, problem: Problem, decoder: str, checkpoint: bool):
        import jax
        from jax import numpy as jnp

        self.jax, self.jnp, self.decoder, self.checkpoint = jax, jnp, decoder, checkpoint
        self.weights = [jnp.asarray(x.detach().numpy()) for x in problem.learned]
        self.n_decoder = len(list(problem.potential.parameters()))
        data = problem.potential.x, problem.first, problem.noise
        self.data = [jnp.asarray(x.numpy()) for x in data]
        self.gradient = jax.jit(jax.grad(self.loss))

    def __call__(self) -> tuple[Tensor, ...]:
        """The gradients."""
        return self.jax.block_until_ready(self.gradient(self.weights, *self.data))

    def loss(self, weights, pixels, first, noise):
        """Minus the mean bound."""
        jax, jnp = self.jax, self.jnp
        decoder, (loc, log_scale, step_logit, eta_logit, beta_logits) = (
            weights[: self.n_decoder],
            weights[self.n_decoder :],
        )
        step, eta = 0.5 * jax.nn.sigmoid(step_logit), jax.nn.sigmoid(eta_logit)
        betas = jnp.cumsum(jax.nn.softmax(beta_logits)).at[-1].set(1.0)

        def potential(z):
            return self.misfit(self.logits(decoder, z), pixels).sum(-1) + jnp.square(z).sum(-1) / 2

        def base(z):
            return (jnp.square((z - loc) * jnp.exp(-log_scale)) / 2 + log_scale).sum(-1)

        gradients = tuple(jax.grad(lambda z, u=u: u(z).sum()) for u in (base, potential))

        def bridge(state, inputs):
            z, rho, g_0, g, total = state
            beta, xi = inputs
            begun = eta * rho + jnp.sqrt(1 - eta**2) * xi
            half = begun - step / 2 * ((1 - beta) * g_0 + beta * g)
            z = z + step * half
            g_0, g = (gradient(z) for gradient in gradients)
            rho = half - step / 2 * ((1 - beta) * g_0 + beta * g)
            return (z, rho, g_0, g, total + (jnp.square(begun) - jnp.square(rho)).sum(-1) / 2), None

        z_0 = loc + jnp.exp(log_scale) * first
        state = z_0, noise[0], *(gradient(z_0) for gradient in gradients), jnp.zeros(len(z_0))
        body = jax.checkpoint(bridge) if self.checkpoint else bridge
        (z, *_, total), _ = jax.lax.scan(body, state, (betas, noise[1:]))
        return (potential(z) - base(z_0) - total).mean()

    def misfit(self, logits, pixels):
        """Minus a pixel's log probability."""
        jnp = self.jnp
        return jnp.maximum(logits, 0) - logits * pixels + jnp.log1p(jnp.exp(-jnp.abs(logits)))

    def logits(self, weights, z):
        """The decoder."""
        jax = self.jax
        rest = iter(weights)

        def linear(x):
            weight, bias = next(rest), next(rest)
            return x @ weight.T + bias

        if self.decoder == "mlp":
            return linear(jax.nn.softplus(linear(z)))
        x = jax.nn.softplus(linear(self.norm(z, next(rest), next(rest), (0,))))
        x = jax.nn.softplus(linear(self.norm(x, next(rest), next(rest), (0,)))).reshape(-1, 32, 4, 4)
        for size in (7, 14, 28):
            x = self.convolution(self.norm(x, next(rest), next(rest), (0, 2, 3)), next(rest), next(rest))
            place = self.jnp.arange(size) * x.shape[-1] // size
            x = jax.nn.softplus(x[:, :, place][:, :, :, place])
        return self.convolution(x, next(rest), next(rest)).reshape(len(z), -1)

    def norm(self, x, weight, bias, dims):
        """Of a batch's own statistics."""
        mean = x.mean(dims, keepdims=True)
        variance = self.jnp.square(x - mean).mean(dims, keepdims=True)
        shape = [1, -1] + [1] * (x.ndim - 2)
        return (x - mean) / self.jnp.sqrt(variance + 1e-5) * weight.reshape(shape) + bias.reshape(shape)

    def convolution(self, x, weight, bias):
        """5 x 5, padded."""
        return self.jax.lax.conv(x, weight, (1, 1), "SAME") + bias[None, :, None, None]


class AutoDais(Jax):
    """numpyro's bound with M bridges of the whole batch, by its own integrator, and gradients as above."""

    def __init__(self, problem: Problem, decoder: str):
        super().__init__(problem, decoder, False)
        import numpyro
        from numpyro import distributions
        from numpyro.infer import SVI, Trace_ELBO
        from numpyro.infer.autoguide import AutoDAIS

        weights, (pixels, *_) = self.weights[: self.n_decoder], self.data

        def model(weights, pixels):
            prior = distributions.Normal(self.jnp.zeros((len(pixels), LATENT)), 1.0).to_event(2)
            logits = self.logits(weights, numpyro.sample("z", prior))
            numpyro.factor("x", -self.misfit(logits, pixels).sum())

        guide = AutoDAIS(model, K=problem.flow.n_bridges)
        key = self.jax.random.PRNGKey(0)
        svi = SVI(model, guide, numpyro.optim.Adam(1e-3), Trace_ELBO())
        parameters = svi.get_params(svi.init(key, weights, pixels))

        def loss(both, pixels):
            parameters, weights = both
            return Trace_ELBO().loss(key, parameters, model, guide, weights, pixels) / len(pixels)

        self.gradient = self.jax.jit(self.jax.grad(loss))
        self.weights, self.data = (parameters, weights), [pixels]


RIVALS: dict[str, Callable[[Problem, str], Bound]] = {
    "eager, 2M gradients": lambda problem, _: functools.partial(problem.gradients, problem.formula),
    "eager, M + 1 gradients": lambda problem, _: problem.ours("store", "reference"),
    "store": lambda problem, _: problem.ours("store"),
    "states": lambda problem, _: problem.ours("states"),
    "reversible": lambda problem, _: problem.ours("reversible"),
    "JAX, scan": lambda problem, decoder: Jax(problem, decoder, False),
    "JAX, scan, checkpoint": lambda problem, decoder: Jax(problem, decoder, True),
    AUTO_DAIS: AutoDais,
}


def present() -> list[str]:
    """The rivals that are installed."""
    missing = [library for library in ("jax", "numpyro") if not importlib.util.find_spec(library)]
    return [name for name in RIVALS if not any(name.lower().startswith(library) for library in missing)]


def agree(decoder: str, rivals: list[str]) -> None:
    """Require the formula's gradients of all rivals.

    Raises:
        AssertionError: one has others.
    """
    for name in set(rivals) - {AUTO_DAIS}:
        dtype, budget = (torch.float32, 1e-3) if "JAX" in name else (torch.float64, 1e-8)
        problem = Problem(decoder, 8, 3, dtype)
        exact, found = problem.gradients(problem.formula), RIVALS[name](problem, decoder)()
        for block, (x, y) in enumerate(zip(found, exact, strict=True)):
            error = testing.relative_error(torch.tensor(x.tolist(), dtype=dtype), y)
            assert error < budget, f"{name}: gradient {block} is off by {error:.2g}"


def in_a_fresh_process(decoder: str, batch: int, bridges: int, rival: str) -> dict[str, object]:
    """What :func:`child` prints there."""
    command = [sys.executable, __file__, "--child", rival, "--decoder", decoder]
    command += ["--batch", str(batch), "--bridges", str(bridges)]
    try:
        done = subprocess.run(command, env=os.environ, check=True, stdout=subprocess.PIPE, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"first_call_s": math.inf}
    except subprocess.CalledProcessError:  # it has said why, or was killed for its memory
        return {"first_call_s": math.nan}
    return json.loads(done.stdout.splitlines()[-1])


def child(decoder: str, batch: int, bridges: int, rival: str) -> dict[str, object]:
    """First call, later ones, and the high-water mark of this process."""
    call, before = RIVALS[rival](Problem(decoder, batch, bridges), decoder), high_water_mark()
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 8 and sum(seconds) < 60):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    first, *later = seconds
    taken = {"fastest_s": min(later), "median_s": sorted(later)[len(later) // 2], "calls": len(later)}
    return {"first_call_s": first, **taken, "start_bytes": before, "peak_bytes": high_water_mark()}


def drift() -> str:
    """The table: relative errors of all gradients together, against the formula in float64."""
    rows = []
    for bridges in (8, 64):
        for eta in (0.5, 0.9, 0.99):
            exact = Problem("mlp", 16, bridges, torch.float64, eta)
            problem = Problem("mlp", 16, bridges, torch.float32, eta)
            wide, narrow = exact.gradients(exact.formula), problem.gradients(problem.formula)
            errors = [_error(lambda narrow=narrow: narrow, wide)]
            errors += [_error(problem.ours(memory), wide) for memory in ("states", "reversible")]
            errors += [_error(exact.ours("reversible"), wide)]
            rows.append((bridges, eta, f"{eta**bridges:.1g}", *errors))
    headers = ("M", "eta", "eta^M", "plain, float32", "states", "reversible", "reversible, float64")
    return results.table(headers, rows)


def _error(call: Bound, exact: tuple[Tensor, ...]) -> str:
    try:
        found = call()
    except RuntimeError as error:
        if "rebuilding the trajectory missed" not in str(error):
            raise
        return "refused"
    both = (torch.cat([x.double().flatten() for x in xs]) for xs in (found, exact))
    return f"{testing.relative_error(*both):.2g}"


def table(rows: list[dict[str, str]]) -> str:
    """All rows."""
    lines = []
    for r in rows:
        first = float(r["first_call_s"])
        stopped = "failed" if math.isnan(first) else f"over {LIMIT:.0f} s" if math.isinf(first) else f"{first:.3g} s"
        later = [results.duration(str(1e6 * float(r[name]))) if r[name] else "" for name in ("fastest_s", "median_s")]
        size = results.size(r["peak_bytes"]) if r["peak_bytes"] else ""
        lines.append((f"{r['decoder']}, B = {r['batch']}", r["bridges"], r["implementation"], stopped, *later, size))
    return results.table(("decoder", "M", "implementation", "first call", "fastest", "median", "peak"), lines)


def measure(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Records of the chosen rivals."""
    rivals = options.rivals or present()
    for decoder in options.decoder:
        agree(decoder, rivals)
        for bridges in options.bridges:
            for name in rivals:
                print(f"  {decoder}, M = {bridges}: {name}", flush=True)
                key = {"decoder": decoder, "batch": options.batch, "bridges": bridges, "implementation": name}
                yield key | in_a_fresh_process(decoder, options.batch, bridges, name)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figures", nargs="+", choices=("bounds", "drift"), default=["bounds", "drift"])
    parser.add_argument("--decoder", nargs="+", choices=DECODERS, default=["study"])
    parser.add_argument("--bridges", nargs="+", type=int, default=list(BRIDGES))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, help="(by default all that are installed)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the CSV goes; without it nothing is written")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = cpu.parse(parser, arguments)
    if options.child:
        print(json.dumps(child(options.decoder[0], options.batch, options.bridges[0], options.child)))
        return 0
    if "drift" in options.figures:
        print(drift())
    if "bounds" not in options.figures:
        return 0
    origin, new = run.provenance(torch.device("cpu")), []
    for record in measure(options):
        new.append({key: results.text((record | origin).get(key)) for key in FIELDS})
        if options.out:  # now, as the next may take long
            path = options.out / f"annealed-{results.stem(origin)}.csv"
            key = [new[-1][name] for name in KEY]
            kept = [row for row in results.read(path) if [row[name] for name in KEY] != key]
            results.write(path, [*kept, new[-1]], FIELDS)
    print(f"\n{results.machine(origin)}, torch {origin['torch']}\n\n{table(new)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
