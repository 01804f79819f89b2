"""A variational auto-encoder of N latent nodes, each of which may depend on all later ones, by gates that are learned.

Source: He, Gong, Marino, Mori and Lehrmann, Variational autoencoders with jointly optimized latent dependency
structure, 2019; the inverse autoregressive flows on its nodes are the report's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hvae.autoencoder import AutoEncoder, Code
from hvae.densities import normal_log_prob, standard_normal_log_prob
from hvae_kernels.functional import Gate
from hvae_kernels.nn import FlowStack, InverseAutoregressiveFlow

TOP_DOWN_WIDTH = 128
N_IAF_LAYERS = 5
#: The Concrete relaxation's temperature in the first epoch and in the last in which gates are learned.
TEMPERATURES = 1.0, 0.1
#: What an open gate costs in training, in nats an image: an edge that brings less is closed.
EDGE_COST = 0.01
#: Adam's steps are of one size whatever the gradient; gates are worth larger ones than weights.
GATE_SPEED = 10.0


def fuse(loc: Tensor, log_scale: Tensor, other_loc: Tensor, other_log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-scale of the normalised product of two Gaussians.

    Its precision is the sum of theirs, its mean their precision-weighted mean.
    """
    weight = torch.sigmoid(2 * (log_scale - other_log_scale))  # of the other
    fused = -torch.logaddexp(-2 * log_scale, -2 * other_log_scale) / 2
    return torch.lerp(loc, other_loc, weight), fused


class Gates(nn.Module):
    """A gate in {0, 1} on the edge from each node to each earlier one, relaxed while it is learned.

    Gate ``g = sigmoid((a + L) / temperature)`` with logistic noise L, the Concrete distribution's (Maddison, Mnih and
    Teh, 2017); the learned probability is ``sigmoid(a)``. Evaluated, it is open where ``a > 0``; fixed, where that was
    so at that moment.

    Args:
        nodes: N, of which node n has the parents n + 1, ..., N - 1.
    """

    edges: Tensor
    fixed_logits: Tensor

    def __init__(self, nodes: int):
        super().__init__()
        self.register_buffer("edges", torch.triu_indices(nodes, nodes, 1), persistent=False)
        self.nodes, self.temperature, self.learning = nodes, TEMPERATURES[0], True
        self.scores = nn.Parameter(torch.zeros(self.edges.shape[1]))
        self.register_buffer("fixed_logits", torch.zeros(self.edges.shape[1]))

    @property
    def logits(self) -> Tensor:
        """``a``, one for each edge; constant once they are fixed, whatever an optimiser's momentum does."""
        if self.learning:
            return GATE_SPEED * self.scores
        return self.fixed_logits + 0 * self.scores  # with a gradient for all parameters, which DDP waits for

    def forward(self, noise: Tensor) -> Tensor:
        """Gates as a matrix ``(..., N, N)`` from nodes to parents; ``noise (..., edges)`` is standard normal."""
        if self.training and self.learning:
            logistic = torch.special.log_ndtr(noise) - torch.special.log_ndtr(-noise)
            gates = torch.sigmoid((self.logits + logistic) / self.temperature)
        else:
            logits = self.logits
            gates = (logits > 0) + 0 * logits
        return self._matrix(gates)

    def _matrix(self, gates: Tensor) -> Tensor:
        matrix = gates.new_zeros(*gates.shape[:-1], self.nodes, self.nodes)
        matrix[..., self.edges[0], self.edges[1]] = gates
        return matrix

    def cool(self, progress: float) -> None:
        """Set the temperature: the first where 0 of the gates' learning is done, the last where it is 1."""
        first, last = TEMPERATURES
        self.temperature = first * (last / first) ** progress

    @torch.no_grad()
    def fix(self) -> None:
        """Learn no more."""
        if self.learning:
            self.fixed_logits.copy_(self.logits)
            self.learning = False

    @torch.no_grad()
    def graph(self) -> Tensor:
        """Probabilities of the gates, and the gates themselves, ``(2, N, N)``."""
        logits = self.logits
        return self._matrix(torch.stack([torch.sigmoid(logits), (logits > 0).to(logits.dtype)]))


class StructuredModel(AutoEncoder):
    """N nodes: ``p(z_n | gates * parents)`` top-down, ``q`` its product with what the encoder says of the node.

    The last node is the root: its prior is ``N(0, I)`` and its posterior the encoder's Gaussian. With all gates closed
    every other node has a learned Gaussian for its prior.

    Args:
        encoder: pixels to location and log scale of every node, and the context: ``(B, 2 N d + c)``.
        decoder: all nodes side by side to logits, ``(B, N d)`` to ``(B, 784)``.
        nodes: N.
        width: d, of each node.
        gate_epochs: for how many epochs gates are learned.
        iaf_width: hidden width of the inverse autoregressive flows that a node's sample passes before it becomes a
            parent; 0 for none.
        context: c, which the flows take beside the sample.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        nodes: int,
        width: int,
        gate_epochs: int,
        iaf_width: int = 0,
        context: int = 0,
    ):
        super().__init__()
        self.encoder, self.decoder, self.nodes, self.width = encoder, decoder, nodes, width
        self.latent, self.gate_epochs = nodes * width, gate_epochs
        self.gates = Gates(nodes)
        self.noise_features = self.latent + len(self.gates.scores)
        self.top_down = nn.ModuleList(_perceptron(width * (nodes - 1 - n), 2 * width) for n in range(nodes - 1))
        self.flows = nn.ModuleList()
        if iaf_width:
            kind, gate = InverseAutoregressiveFlow, Gate.sigmoid(2.0)  # affine ones overflow along the nodes
            self.flows.extend(
                FlowStack.autoregressive(kind, N_IAF_LAYERS, width, iaf_width, context_features=context, gate=gate)
                for _ in range(nodes)
            )

    def encode(self, pixels: Tensor) -> Code:
        """What the encoder says of all nodes, side by side, and the flows' context."""
        output = self.encoder(pixels.to(next(self.encoder.parameters()).dtype))
        return Code(*output.split([self.latent, self.latent, output.shape[-1] - 2 * self.latent], dim=-1))

    def log_weights(self, pixels: Tensor, code: Code, noise: Tensor) -> Tensor:
        """``log p(x, z) - log q(z | x)``, ``(S, B)``."""
        z, log_ratio = self.sample(noise, code)
        logits = self.decoder(z.flatten(0, 1))
        return self.log_likelihood(logits.view(*z.shape[:-1], logits.shape[-1]), pixels) + log_ratio

    def sample(self, noise: Tensor, code: Code | None = None) -> tuple[Tensor, Tensor]:
        """All nodes from the root down, ``(S, B, N d)``, and ``log p(z) - log q(z)``, ``(S, B)``.

        q is the posterior of what the encoder said, or without that the prior itself.
        """
        gates, log_ratio = self.gates(noise[..., self.latent :]), noise.new_zeros(noise.shape[:-1])
        nodes: list[Tensor] = []
        drawn = self._of_nodes(noise[..., : self.latent])
        locs, log_scales = (self._of_nodes(x.expand(len(noise), -1, -1)) for x in code[:2]) if code else ((), ())
        for n in reversed(range(self.nodes)):
            prior = self.prior(n, nodes, gates)
            if code is None:
                z = drawn[n] if prior is None else prior[0] + prior[1].exp() * drawn[n]
            else:
                z, log_q = self._posterior(n, (locs[n], log_scales[n]), prior, drawn[n], code.context)
                log_p = standard_normal_log_prob(z) if prior is None else normal_log_prob(z, *prior)
                log_ratio = log_ratio + log_p - log_q
            nodes.insert(0, z)
        return torch.cat(nodes, dim=-1), log_ratio

    def _of_nodes(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.unflatten(-1, (self.nodes, self.width)).unbind(-2)

    def _posterior(
        self,
        n: int,
        encoded: tuple[Tensor, Tensor],
        prior: tuple[Tensor, Tensor] | None,
        noise: Tensor,
        context: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """A sample of node n, and its log density."""
        loc, log_scale = encoded if prior is None else fuse(*encoded, *prior)
        z, log_q = loc + log_scale.exp() * noise, standard_normal_log_prob(noise) - log_scale.sum(-1)
        if not self.flows:
            return z, log_q
        z, log_abs_det = self.flows[n](z, context if context.shape[-1] else None)
        return z, log_q - log_abs_det

    def prior(self, n: int, parents: list[Tensor], gates: Tensor) -> tuple[Tensor, Tensor] | None:
        """Location and log scale of node n, ``(..., d)``, given all later ones; None for the root's ``N(0, I)``."""
        if n == self.nodes - 1:
            return None
        row = gates[..., n, n + 1 :].repeat_interleave(self.width, dim=-1)
        loc, log_scale = self.top_down[n](row * torch.cat(parents, dim=-1)).chunk(2, dim=-1)
        return loc, log_scale

    def reconstruct(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Logits ``(B, 784)``."""
        return self.decoder(self.sample(noise, self.encode(pixels))[0][0])

    def sample_prior(self, count: int, generator: torch.Generator) -> Tensor:
        """Latents ``(count, N d)``."""
        noise = torch.randn(1, count, self.noise_features, generator=generator).to(self.gates.scores.device)
        return self.sample(noise)[0][0]

    def begin_epoch(self, epoch: int) -> None:
        """Cool the gates down, and fix them after their epochs."""
        if epoch < self.gate_epochs:
            self.gates.cool(epoch / max(self.gate_epochs - 1, 1))
        elif epoch == self.gate_epochs:
            self.gates.fix()
        else:  # they were fixed before this run went on
            self.gates.learning = False

    def penalty(self) -> Tensor:
        """What the gates that are likely to be open cost, as long as they are learned."""
        return EDGE_COST * torch.sigmoid(self.gates.logits).sum() * self.gates.learning

    def graph(self) -> Tensor:
        """Probabilities of the gates, and the gates themselves, ``(2, N, N)``."""
        return self.gates.graph()


def _perceptron(inputs: int, outputs: int) -> nn.Sequential:
    """One hidden layer."""
    return nn.Sequential(nn.Linear(inputs, TOP_DOWN_WIDTH), nn.Softplus(), nn.Linear(TOP_DOWN_WIDTH, outputs))
