"""Log-probabilities of independent Bernoulli variables, from their logits, in one pass."""

from hvae_kernels.ops.bernoulli_log_prob.api import bernoulli_log_prob

__all__ = ["bernoulli_log_prob"]
