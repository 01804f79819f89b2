"""Importance-weighted training whose encoder takes the doubly reparameterised gradient, which K does not drown."""

import torch
from hvae.densities import normal_log_prob, standard_normal_log_prob
from torch import nn

import hvae_kernels as hk

FEATURES, BATCH, DRAWS = 5, 32, 200


class Model(nn.Module):
    """``z ~ N(theta, I)``, ``x | z ~ N(z, I)``, and ``q(z | x)`` Gaussian with a linear mean: K samples at once."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(FEATURES))
        self.encoder = nn.Linear(FEATURES, FEATURES)
        self.log_scale = nn.Parameter(torch.full((FEATURES,), -0.5 * torch.log(torch.tensor(1.5)).item()))

    def log_weights(self, x: torch.Tensor, samples: int, detach: bool) -> torch.Tensor:
        """``log p(x, z_k) - log q(z_k | x)``, ``(K, B)``; with ``detach`` q's own parameters are constants."""
        loc, log_scale = self.encoder(x), self.log_scale.expand(x.shape)
        z = loc + log_scale.exp() * torch.randn(samples, *x.shape)
        if detach:
            loc, log_scale = loc.detach(), log_scale.detach()
        log_joint = standard_normal_log_prob(z - self.theta) + standard_normal_log_prob(x - z)
        # q's densities take no broadcasting
        log_q = normal_log_prob(z, loc.expand(z.shape), log_scale.expand(z.shape))
        return log_joint - log_q


def encoder_gradient(model: Model, x: torch.Tensor, samples: int, dreg: bool) -> torch.Tensor:
    """One draw of the gradient of the bound by the encoder's weights."""
    log_weights = model.log_weights(x, samples, detach=dreg)
    objective = hk.functional.dreg_surrogate(log_weights) if dreg else hk.functional.iwae_bound(log_weights)
    (gradient,) = torch.autograd.grad(objective.mean(), [model.encoder.weight])
    return gradient.flatten()


def main() -> None:
    """The same gradient from both, and how much each varies."""
    torch.manual_seed(0)
    model, x = Model(), torch.randn(BATCH, FEATURES)
    with torch.no_grad():  # near the optimum, where the noise is all that is left
        model.encoder.weight.copy_(0.5 * torch.eye(FEATURES) + 0.05 * torch.randn(FEATURES, FEATURES))
        model.encoder.bias.zero_()
    print("samples   mean apart by   variance, plain   variance, DReG")
    for samples in (1, 8, 64):
        plain, dreg = (
            torch.stack([encoder_gradient(model, x, samples, chosen) for _ in range(DRAWS)]) for chosen in (False, True)
        )
        apart = (plain.mean(0) - dreg.mean(0)).norm().item()
        noise = ((plain.var(0) + dreg.var(0)).sum() / DRAWS).sqrt().item()
        print(f"{samples:7d}   {apart:13.4f}   {plain.var(0).sum():15.2e}   {dreg.var(0).sum():14.2e}")
        assert apart < 3 * noise, "both estimate the same gradient"
        assert dreg.var(0).sum() < plain.var(0).sum(), "DReG should vary less"


if __name__ == "__main__":
    main()
