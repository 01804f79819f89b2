"""An ensemble of flows trained at once: torch.func's vmap and grad go through the ops as through torch's own."""

import torch
from hvae.densities import standard_normal_log_prob
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

import hvae_kernels as hk

MEMBERS, FEATURES, STEPS, BATCH = 4, 3, 150, 128


def data(count: int) -> torch.Tensor:
    """A banana in three dimensions."""
    x, y, noise = torch.randn(3, count)
    return torch.stack([x, y + x.square() - 1, noise + 0.5 * x * y], -1)


def main() -> None:
    """Train four members on batches of their own; compare their densities."""
    torch.manual_seed(0)
    flows = [hk.nn.FlowStack.autoregressive(hk.nn.MaskedAutoregressiveFlow, 2, FEATURES, 32) for _ in range(MEMBERS)]
    parameters, buffers = stack_module_state(flows)

    def loss(parameters: dict, buffers: dict, x: torch.Tensor) -> torch.Tensor:
        z, log_abs_det = functional_call(flows[0], (parameters, buffers), (x,))
        return -(standard_normal_log_prob(z) + log_abs_det).mean()

    step = vmap(grad_and_value(loss))
    momentum = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for index in range(STEPS):
        gradients, losses = step(parameters, buffers, data(MEMBERS * BATCH).view(MEMBERS, BATCH, FEATURES))
        if index in (0, STEPS - 1):
            print(f"step {index + 1}: negative log-likelihoods {[round(x, 3) for x in losses.tolist()]}")
        for name, gradient in gradients.items():
            momentum[name] = 0.9 * momentum[name] + gradient.detach()
            parameters[name] = (parameters[name] - 0.01 * momentum[name]).detach()

    x = data(1000)
    together = vmap(loss, in_dims=(0, 0, None))(parameters, buffers, x)
    alone = [loss({n: p[i] for n, p in parameters.items()}, {n: b[i] for n, b in buffers.items()}, x) for i in range(4)]
    print(f"on fresh data: {together.mean().item():.3f} ± {together.std().item():.3f}")
    torch.testing.assert_close(together, torch.stack(alone), msg="the ensemble should be its members")


if __name__ == "__main__":
    main()
