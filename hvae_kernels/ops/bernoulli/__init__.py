"""Log-probabilities of independent Bernoulli variables, from their logits, in one pass."""

from hvae_kernels.ops.bernoulli.api import bernoulli_log_prob

__all__ = ["bernoulli_log_prob"]
