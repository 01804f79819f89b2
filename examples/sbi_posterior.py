"""Neural posterior estimation with sbi, accelerated from training to samples."""

import time

import torch
from sbi.inference import NPE
from sbi.neural_nets import posterior_nn

import hvae_kernels as hk

FEATURES, NOISE = 3, 0.5


def simulate(theta: torch.Tensor) -> torch.Tensor:
    """A linear Gaussian simulator, whose posterior is known."""
    return theta + NOISE * torch.randn_like(theta)


def exact(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the posterior under a standard normal prior."""
    return x / (1 + NOISE**2), torch.tensor(NOISE**2 / (1 + NOISE**2)).sqrt()


def main() -> None:
    """Train, accelerate, sample, compare with the exact posterior."""
    torch.manual_seed(0)
    prior = torch.distributions.MultivariateNormal(torch.zeros(FEATURES), torch.eye(FEATURES))
    theta = prior.sample((1000,))
    estimator = posterior_nn("maf_rqs", hidden_features=32, num_transforms=2)
    trainer = NPE(prior, density_estimator=estimator, show_progress_bars=False)
    trainer.append_simulations(theta, simulate(theta))
    trainer.train(max_num_epochs=20, training_batch_size=100, learning_rate=5e-3)
    posterior = trainer.build_posterior()

    observed = torch.tensor([[0.5, -1.0, 0.0]])
    options = {"x": observed, "show_progress_bars": False}
    torch.manual_seed(1)
    start = time.perf_counter()
    before = posterior.sample((5000,), **options)
    slow = time.perf_counter() - start

    posterior, report = hk.accelerate(posterior)
    print(report)
    torch.manual_seed(1)
    start = time.perf_counter()
    after = posterior.sample((5000,), **options)
    fast = time.perf_counter() - start

    print(f"largest difference of the samples: {(after - before).abs().max().item():.1e}")
    print(f"5,000 samples: {slow:.3f} s before, {fast:.3f} s after")
    mean, scale = exact(observed[0])
    for name, learned, known in (("mean", after.mean(0), mean), ("spread", after.std(0), scale.expand(FEATURES))):
        print(f"{name}: {[round(x, 2) for x in learned.tolist()]}, exact {[round(x, 2) for x in known.tolist()]}")
    assert (after - before).abs().mean() < 1e-3, "accelerated samples differ"
    assert (after.mean(0) - mean).abs().max() < 0.3, "this is not the posterior"


if __name__ == "__main__":
    main()
