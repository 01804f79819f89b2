"""One line for a zuko flow: the same parameters and samples, one pass of work a layer instead of one a feature."""

import time

import torch
import zuko

import hvae_kernels as hk

FEATURES, STEPS, BATCH = 16, 60, 256


def data(count: int) -> torch.Tensor:
    """A random walk with steps of growing size, bent: no Gaussian, and every feature depends on those before."""
    walk = torch.cumsum(torch.randn(count, FEATURES) * torch.linspace(0.2, 1, FEATURES), -1)
    return torch.tanh(walk) + 0.1 * walk


def train(flow: torch.nn.Module) -> float:
    """Maximum likelihood by Adam; the last step's negative log-likelihood."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    for _ in range(STEPS):
        loss = -flow().log_prob(data(BATCH)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def sample(flow: torch.nn.Module) -> tuple[torch.Tensor, float]:
    """A thousand samples from one seed, and the seconds that they took."""
    torch.manual_seed(1)
    start = time.perf_counter()
    with torch.no_grad():
        samples = flow().sample((1000,))
    return samples, time.perf_counter() - start


def main() -> None:
    """Train, sample, accelerate, sample again, train on."""
    torch.manual_seed(0)
    flow = zuko.flows.MAF(features=FEATURES, transforms=3, hidden_features=(64, 64))
    print(f"negative log-likelihood after {STEPS} steps: {train(flow):.3f}")
    before, slow = sample(flow)

    flow, report = hk.accelerate(flow)
    print(report)

    sample(flow)  # the first call loads the kernels
    after, fast = sample(flow)
    difference = (after - before).abs().max().item()
    print(f"largest difference of the samples: {difference:.1e}")
    print(f"sampling: {1e3 * slow:.1f} ms before, {1e3 * fast:.1f} ms after")
    assert difference < 1e-3, "accelerated samples differ"

    print(f"and it trains on, to {train(flow):.3f}")
    layer = hk.restore(flow).transform.transforms[0]  # zuko's own again, with what was learned
    print(f"restored: a layer of {type(layer).__module__}")


if __name__ == "__main__":
    main()
