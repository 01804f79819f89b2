"""Reference: the affine tail in plain PyTorch, beside its formula. Any dtype, any device, any order of derivatives."""

from __future__ import annotations

from torch import Tensor

from hvae_kernels.ops.affine_autoregressive.gates import Gate, scale_of


def affine_autoregressive(z: Tensor, shift: Tensor, log_scale: Tensor, gate: Gate) -> tuple[Tensor, Tensor]:
    """``z' = sigma z + tau shift`` and ``log_abs_det = sum log sigma``."""
    scale, rest, log_abs = scale_of(gate, log_scale)
    return scale * z + (shift if rest is None else rest * shift), log_abs.sum(-1)
