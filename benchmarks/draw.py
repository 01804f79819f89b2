"""One training step of DRAW: ``python benchmarks/draw.py [--steps 32] [--read 2 5] [--no-attention] [--cpu SET]``.

The model of ``hvae draw``, 100 binary images of 28 x 28, forward, backward, clipping and Adam's step, float32. Rivals
take turns:

- *plain*: the paper's equations, written down, in the same parameters: filter banks in memory, two batched products a
  patch, the image through the encoder's weights in every step;
- *plain, compiled*: the same after ``torch.compile``, all T steps in one graph;
- *ours*: the study's own, eager;
- *ours, compiled*.

Before anything is timed, both models have to find the same bounds and gradients in float64.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "python"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from benchmarks import cpu  # noqa: E402 - needs the repository on the path, as the next lines do

if __name__ == "__main__":
    cpu.hold()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from hvae.draw import study  # noqa: E402
from hvae.draw.models import WRITE, Draw  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks import results, run  # noqa: E402
from benchmarks.timing import Candidate, Plan, interleave  # noqa: E402

SIDE = 28
PLAN = Plan(rounds=9, turn=0.5, cap=60.0, sample=0.0, fewest=5)
Bounds = Callable[[Tensor, Tensor], Tensor]


def filters(attention: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Banks ``(B, size, 28)`` down and across, normalised by softmax, and gamma ``(B, 1, 1)``."""
    x, y, log_variance, log_stride, log_gamma = attention[:, :, None, None].unbind(1)
    stride = (SIDE - 1) / max(size - 1, 1) * log_stride.exp()
    places = (torch.arange(size, dtype=attention.dtype) + 0.5 - size / 2)[:, None]
    pixels = torch.arange(1, SIDE + 1, dtype=attention.dtype)

    def bank(center: Tensor) -> Tensor:
        distance = pixels - (SIDE + 1) / 2 * (center + 1) - places * stride
        return torch.softmax(-distance.square() / (2 * log_variance.exp()), -1)

    return bank(y), bank(x), log_gamma.exp()


class Plain(nn.Module):
    """The model without any kernel of ours; its parameters are the same."""

    def __init__(self, model: Draw):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Bounds ``(B,)``."""
        model = self.model
        first, second, third, fourth = (state.expand(len(x), -1) for state in model.states)
        encoded, decoded = (first, second), (third, fourth)
        canvas = model.canvas.expand(len(x), -1)
        divergence = x.new_zeros(len(x))
        for step_noise in noise:
            seen = self.read(x, x - canvas.sigmoid(), decoded[0])
            cell = model.encoder
            encoded = nn.LSTMCell.forward(cell, torch.cat([seen, decoded[0]], -1), encoded)
            loc, log_scale = model.posterior(encoded[0]).chunk(2, -1)
            divergence = divergence + (loc**2 + (2 * log_scale).exp() - 2 * log_scale - 1).sum(-1) / 2
            decoded = model.decoder(loc + log_scale.exp() * step_noise, decoded)
            canvas = canvas + self.write(decoded[0])
        return -F.binary_cross_entropy_with_logits(canvas, x, reduction="none").sum(-1) - divergence

    def read(self, x: Tensor, error: Tensor, state: Tensor) -> Tensor:
        """Patches of both, or both."""
        if not self.model.attention:
            return torch.cat([x, error], -1)
        down, across, gamma = filters(self.model.read_at(state), self.model.read)
        patches = [gamma * (down @ image.unflatten(-1, (SIDE, SIDE)) @ across.mT) for image in (x, error)]
        return torch.cat([patch.flatten(1) for patch in patches], -1)

    def write(self, state: Tensor) -> Tensor:
        """What the canvas is given."""
        patch = self.model.write(state)
        if not self.model.attention:
            return patch
        down, across, gamma = filters(self.model.write_at(state), WRITE)
        return (down.mT @ patch.unflatten(-1, (WRITE, WRITE)) @ across / gamma).flatten(1)


def bounds_of(model: Draw) -> Bounds:
    """Ours."""
    return lambda x, noise: model(x, noise).bound


def batch(model: Draw, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images and noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(study.BATCH_SIZE, SIDE**2, generator=generator) < 0.2
    return images.to(dtype), torch.randn(model.steps, len(images), model.latent, generator=generator).to(dtype)


def agree(model: Draw) -> None:
    """Require the same bounds and gradients of both, in float64.

    Raises:
        AssertionError: they differ.
    """
    model = copy.deepcopy(model).double()
    inputs, found = batch(model, torch.float64), []
    for bounds in (Plain(model), bounds_of(model)):
        value = bounds(*inputs)
        found.append((value, torch.autograd.grad(value.sum(), tuple(model.parameters()))))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-8)


def training_step(bounds: Bounds, model: Draw) -> Callable[[], None]:
    """What the study does with a batch, on one batch again and again."""
    inputs = batch(model, torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), study.LEARNING_RATE, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (-bounds(*inputs).mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), study.LARGEST_GRADIENT)
        optimizer.step()

    return step


def compare(steps: int, reads: list[int], attention: bool, compiled: bool, plan: Plan) -> str:
    """The table: milliseconds a step, a row a kind of reading."""
    rows = []
    for read in reads if attention else [0]:
        torch.manual_seed(0)
        model = Draw(steps, attention, read=read) if attention else Draw(steps, attention)
        agree(model)
        rivals = {}
        for name, made in (("plain", Plain), ("ours", bounds_of)):
            for suffix in ("", ", compiled")[: 1 + compiled]:
                own = copy.deepcopy(model)
                bounds = made(own)
                rivals[name + suffix] = training_step(torch.compile(bounds) if suffix else bounds, own)
        candidates = [Candidate(name, lambda _, step=step: step(), int) for name, step in rivals.items()]
        taken = {name: timing.p20 for name, timing in interleave(candidates, "cpu", plan).items()}
        ours = taken["ours"]
        cells = (f"{results.duration(f'{us}')} ({us / ours:.3g}x)" for us in taken.values())
        rows.append((f"{read} x {read}" if attention else "the whole image", *cells))
    return results.table(("reads", *rivals), rows)


def main(arguments: list[str] | None = None) -> int:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=32, help="T")
    parser.add_argument("--read", type=int, nargs="+", default=[2, 5], help="filters along a side")
    parser.add_argument("--no-attention", action="store_true", help="the whole image")
    parser.add_argument("--no-compile", action="store_true", help="eager rivals alone")
    parser.add_argument("--quick", action="store_true", help="few rounds, for a look")
    options = cpu.parse(parser, arguments)
    plan = Plan(rounds=2, turn=0.2, cap=5.0, sample=0.0, fewest=2) if options.quick else PLAN
    table = compare(options.steps, options.read, not options.no_attention, not options.no_compile, plan)
    origin = run.provenance(torch.device("cpu"))
    print(
        f"DRAW, T = {options.steps}, B = {study.BATCH_SIZE}, {results.machine(origin)}, torch {origin['torch']}: "
        f"a training step, and times over ours\n"
    )
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
