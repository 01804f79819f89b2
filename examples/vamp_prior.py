"""A VampPrior: the prior is the mixture of the posteriors of learned pseudo-inputs, and learns where the codes are."""

import torch
from hvae.densities import normal_log_prob, standard_normal_log_prob
from torch import nn

import hvae_kernels as hk

FEATURES, LATENT, HIDDEN, COMPONENTS, STEPS, BATCH = 10, 2, 32, 12, 400, 200


def data(count: int, project: torch.Tensor) -> torch.Tensor:
    """Three clusters on a ring, seen through a linear map and noise."""
    angle = 2 * torch.pi * (torch.randint(3, (count,)) / 3 + 0.02 * torch.randn(count))
    ring = 3 * torch.stack([angle.cos(), angle.sin()], -1)
    return ring @ project + 0.3 * torch.randn(count, FEATURES)


class VAE(nn.Module):
    """Gaussian encoder and decoder; without ``components`` a standard normal prior."""

    def __init__(self, components: torch.Tensor | None):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, FEATURES))
        self.log_noise = nn.Parameter(torch.zeros(()))
        self.pseudo_inputs = None if components is None else nn.Parameter(components)

    def log_prior(self, z: torch.Tensor) -> torch.Tensor:
        """``log p(z)``: of C components, without anything of size (batch, C, d) in memory."""
        if self.pseudo_inputs is None:
            return standard_normal_log_prob(z)
        loc, log_scale = self.encoder(self.pseudo_inputs).chunk(2, -1)
        return hk.functional.gaussian_mixture_log_prob(z, z.new_zeros(len(loc)), loc, log_scale)

    def bound(self, x: torch.Tensor) -> torch.Tensor:
        """One sample of the evidence lower bound for each row."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        z = loc + log_scale.exp() * torch.randn_like(loc)
        log_likelihood = normal_log_prob(x, self.decoder(z), self.log_noise.expand(x.shape))
        return log_likelihood + self.log_prior(z) - normal_log_prob(z, loc, log_scale)


def train(model: VAE, project: torch.Tensor) -> float:
    """Adam on the bound; its mean on fresh data."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(STEPS):
        loss = -model.bound(data(BATCH, project)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return model.bound(data(5000, project)).mean().item()


def main() -> None:
    """The same auto-encoder with both priors."""
    torch.manual_seed(0)
    project = torch.randn(2, FEATURES)
    standard = train(VAE(None), project)
    vamp = train(VAE(data(COMPONENTS, project)), project)
    print(f"standard normal prior: {standard:.3f} nats")
    print(f"VampPrior of {COMPONENTS}: {vamp:.3f} nats")
    assert vamp > standard, "the learned prior should fit the three clusters better"


if __name__ == "__main__":
    main()
