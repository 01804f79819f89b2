"""Bayesian linear regression, and how much the gradient of its bound varies.

``python -m hvae.regression [--out DIR]`` trains the factorised Gaussian posterior of a linear model twice, with local
reparameterisation and with one sample of the weights that all rows of a batch share, compares both with the best such
posterior, which has a closed form, and measures the variance of both gradients against the batch size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hvae import experiment, runs, terminal
from hvae_kernels.nn import LocalReparamLinear

ROWS, FEATURES, NOISE_SCALE = 10_000, 20, 1.0
BATCH_SIZES = (1, 4, 16, 64, 256, 1024)
STEPS, BATCH, LEARNING_RATE, DRAWS = 1_500, 256, 0.01, 500

Predict = Callable[[LocalReparamLinear, Tensor], Tensor]


@dataclass(frozen=True)
class Data:
    """Inputs ``(N, d)`` and targets ``(N, 1)``, ``y | x ~ N(x w, NOISE_SCALE^2)``."""

    x: Tensor
    y: Tensor

    def batch(self, size: int) -> Data:
        """Rows drawn with replacement."""
        rows = torch.randint(len(self.x), (size,))
        return Data(self.x[rows], self.y[rows])

    def posterior(self) -> tuple[Tensor, Tensor]:
        """``(loc, scale)`` of the factorised Gaussian closest to the posterior under the prior N(0, I)."""
        precision = self.x.mT @ self.x / NOISE_SCALE**2 + torch.eye(FEATURES)
        loc = torch.linalg.solve(precision, self.x.mT @ self.y / NOISE_SCALE**2)
        return loc[:, 0], precision.diagonal().rsqrt()


def make_data() -> Data:
    """A data set from the model itself."""
    x = torch.randn(ROWS, FEATURES)
    return Data(x, x @ torch.randn(FEATURES, 1) + NOISE_SCALE * torch.randn(ROWS, 1))


def local(layer: LocalReparamLinear, x: Tensor) -> Tensor:
    """Activations with noise of their own in every row."""
    return layer(x)


def shared(layer: LocalReparamLinear, x: Tensor) -> Tensor:
    """Activations of one sample of the weights."""
    noise = torch.randn_like(layer.weight_loc)
    return torch.nn.functional.linear(x, layer.weight_loc + layer.weight_log_scale.exp() * noise)


ESTIMATORS: dict[str, Predict] = {"local": local, "shared weights": shared}


def negative_bound(layer: LocalReparamLinear, predict: Predict, batch: Data) -> Tensor:
    """An unbiased estimate of the negative bound, up to a constant, over the number of rows."""
    return (predict(layer, batch.x) - batch.y).square().mean() / (2 * NOISE_SCALE**2) + layer.kl() / ROWS


def train(data: Data, predict: Predict) -> LocalReparamLinear:
    """A posterior after ``STEPS`` steps of Adam."""
    layer = LocalReparamLinear(FEATURES, 1, bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        optimizer.zero_grad()
        negative_bound(layer, predict, data.batch(BATCH)).backward()
        optimizer.step()
        schedule.step()
    return layer


def gradient_variance(layer: LocalReparamLinear, predict: Predict, batch: Data) -> float:
    """The variance of one batch's gradient over the noise, summed over the parameters."""
    parameters = tuple(layer.parameters())

    def gradient() -> Tensor:
        gradients = torch.autograd.grad(negative_bound(layer, predict, batch), parameters)
        return torch.cat([g.flatten() for g in gradients])

    return torch.stack([gradient() for _ in range(DRAWS)]).var(0).sum().item()


def exact_layer(data: Data) -> LocalReparamLinear:
    """A layer that holds the best posterior."""
    layer = LocalReparamLinear(FEATURES, 1, bias=False)
    loc, scale = data.posterior()
    with torch.no_grad():
        layer.weight_loc.copy_(loc)
        layer.weight_log_scale.copy_(scale.log())
    return layer


def distances(data: Data, layer: LocalReparamLinear) -> tuple[float, float]:
    """Root mean squares of the distances from the best means, in standard deviations, and from the best log-scales."""
    loc, scale = data.posterior()
    in_scales = (layer.weight_loc[0] - loc) / scale
    log_ratios = layer.weight_log_scale[0] - scale.log()
    return _root_mean_square(in_scales), _root_mean_square(log_ratios)


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def draw(path: Path, variances: dict[str, list[float]]) -> None:
    """Variance against batch size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in variances.items():
        axes.plot(BATCH_SIZES, values, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="variance of the gradient")
    axes.legend()
    with runs.writing(path) as partial:
        figure.savefig(partial, dpi=120)


def run(out: Path, seed: int) -> tuple[list[str], list[list[Any]]]:
    """The whole example; writes ``report.md`` and ``variance.png`` in ``out`` and returns the table to print."""
    torch.manual_seed(seed)
    data = make_data()
    best = exact_layer(data)
    batches = [data.batch(size) for size in BATCH_SIZES]
    variances = {
        name: [gradient_variance(best, predict, batch) for batch in batches] for name, predict in ESTIMATORS.items()
    }
    measured = [[m, a, b, b / a] for m, a, b in zip(BATCH_SIZES, *variances.values(), strict=True)]
    headers = ["batch", *variances, "ratio"]
    trained = [[name, *distances(data, train(data, predict))] for name, predict in ESTIMATORS.items()]
    report = f"""# The gradient's variance in Bayesian linear regression

{ROWS:,} rows, {FEATURES} features, `y | x ~ N(x w, {NOISE_SCALE:g})`, `w ~ N(0, I)`. Made by
`python -m hvae.regression --seed {seed} --out DIR`.

The variance over the noise of the gradient of the bound, per row of the data, for one batch at the best factorised
posterior, summed over the parameters ({DRAWS} draws):

{experiment.table(headers, measured)}

![variance](variance.png)

With noise of its own in every row it falls like one over the batch size; a sample of the weights is shared by all rows,
so a larger batch does not average it away. The variance over the choice of the batch comes on top of both.

After {STEPS:,} steps of Adam with batches of {BATCH}: root mean squares of the means' distance from the exact ones, in
posterior standard deviations, and of the logarithm of the ratio of the standard deviations.

{experiment.table(["sampled", "means", "log-scales"], trained)}
"""
    runs.write(out / "report.md", report.encode())
    draw(out / "variance.png", variances)
    return headers, measured


def main(arguments: list[str] | None = None) -> int:
    """Run the example and print its table; returns its exit status."""
    parser = argparse.ArgumentParser(prog="hvae.regression", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/regression"), metavar="DIR")
    parser.add_argument("--seed", type=experiment.seed, default=12345)
    experiment.add_quiet(parser.add_argument)
    options = parser.parse_args(arguments)
    if not options.quiet:
        print(f"hvae.regression: results go to {options.out}", file=sys.stderr, flush=True)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        headers, lines = run(options.out, options.seed)
    except (runs.StudyError, OSError) as error:
        print(f"hvae.regression: {error}", file=sys.stderr)
        return 1
    terminal.show(headers, lines, None if options.quiet else options.out / "report.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
