"""A variational auto-encoder on the digits of the package, with and without leapfrog steps through its own decoder."""

import torch
from hvae.data import mnist
from hvae.densities import normal_log_prob, standard_normal_log_prob
from torch import nn

import hvae_kernels as hk

LATENT, HIDDEN, STEPS, BATCH = 16, 128, 120, 100


class Potential(nn.Module):
    """``U(z) = -log p(x, z)`` of one batch of digits."""

    def __init__(self, decoder: nn.Module, x: torch.Tensor):
        super().__init__()
        self.decoder, self.x = decoder, x

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Energies ``(B,)``."""
        return -hk.functional.bernoulli_log_prob(self.decoder(z), self.x) - standard_normal_log_prob(z)


class VAE(nn.Module):
    """An encoder and a decoder of one hidden layer, and K tempered leapfrog steps between them."""

    def __init__(self, n_steps: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(mnist.N_PIXELS, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.Softplus(), nn.Linear(HIDDEN, mnist.N_PIXELS))
        self.flow = hk.nn.HamiltonianFlow(LATENT, n_steps, tempering="free", init_step_size=0.2, init_temperature=1.05)

    def bound(self, x: torch.Tensor) -> torch.Tensor:
        """One sample of the evidence lower bound for each digit, with every constant."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        z = loc + log_scale.exp() * torch.randn_like(loc)
        gamma = torch.randn_like(z)
        potential = Potential(self.decoder, x)
        z_K, rho_K, log_abs_det = self.flow(z, gamma, potential)
        momentum = standard_normal_log_prob(rho_K) - standard_normal_log_prob(gamma)
        return -potential(z_K) + momentum - normal_log_prob(z, loc, log_scale) + log_abs_det


def train(model: VAE, digits: mnist.Digits) -> float:
    """Adam on the bound; its mean on digits that were not trained on."""
    x, unseen = (mnist.binarise(part).float() for part in digits)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        batch = x[torch.randint(len(x), (BATCH,))]
        loss = -model.bound(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 40 == 39:
            print(f"  step {step + 1}: bound {-loss.item():.1f} nats")
    with torch.no_grad():
        return model.bound(unseen).mean().item()


def main() -> None:
    """A VAE, and the same with three leapfrog steps, from the same seed."""
    digits = mnist.load(n_train=5000, n_validation=500)
    for n_steps in (0, 3):
        torch.manual_seed(0)
        print(f"K = {n_steps} leapfrog steps")
        print(f"  unseen digits: {train(VAE(n_steps), digits):.1f} nats")


if __name__ == "__main__":
    main()
