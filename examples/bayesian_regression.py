"""Bayesian linear regression by local reparameterisation, beside the posterior that is known exactly."""

import torch

import hvae_kernels as hk

ROWS, FEATURES, NOISE, STEPS, BATCH = 4_000, 8, 1.0, 1_000, 250


def make_data() -> tuple[torch.Tensor, torch.Tensor]:
    """``y | x ~ N(x w, NOISE^2)`` with weights from the prior ``N(0, I)``."""
    x = torch.randn(ROWS, FEATURES)
    return x, x @ torch.randn(FEATURES, 1) + NOISE * torch.randn(ROWS, 1)


def best_factorised(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and standard deviations of the factorised Gaussian that is closest to the posterior, in closed form."""
    precision = x.mT @ x / NOISE**2 + torch.eye(FEATURES)
    return torch.linalg.solve(precision, x.mT @ y / NOISE**2)[:, 0], precision.diagonal().rsqrt()


def train(x: torch.Tensor, y: torch.Tensor) -> hk.nn.LocalReparamLinear:
    """Adam on the bound. Every row has noise of its own, so that the gradient's variance falls with the batch."""
    layer = hk.nn.LocalReparamLinear(FEATURES, 1, bias=False)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(ROWS, (BATCH,))
        error = (layer(x[rows]) - y[rows]).square().mean() / (2 * NOISE**2)
        loss = error + layer.kl() / ROWS  # the negative bound a row, up to a constant
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return layer


def main() -> None:
    """Train, and compare with the exact answer."""
    torch.manual_seed(0)
    x, y = make_data()
    loc, scale = best_factorised(x, y)
    layer = train(x, y)
    learned_loc, learned_scale = layer.weight_loc.detach()[0], layer.weight_log_scale.detach()[0].exp()
    print("weight      exact               learned")
    for i in range(FEATURES):
        exact, learned = f"{loc[i]:+.4f} ± {scale[i]:.4f}", f"{learned_loc[i]:+.4f} ± {learned_scale[i]:.4f}"
        print(f"{i:6d}  {exact:>18}  {learned:>18}")
    distance = ((learned_loc - loc) / scale).square().mean().sqrt().item()
    ratio = (learned_scale / scale).log().square().mean().sqrt().item()
    print(f"means off by {distance:.2f} posterior standard deviations, log-scales by {ratio:.3f} (root mean squares)")
    assert distance < 1, "the means should be well inside the posterior"
    assert ratio < 0.2, "the posterior's widths should be found"


if __name__ == "__main__":
    main()
