"""Drop-in modules on the fused ops."""

from hvae_kernels.nn.autoregressive import (
    MADE,
    FlowStack,
    FlowTransform,
    InverseAutoregressiveFlow,
    MaskedAutoregressiveFlow,
    MaskedLinear,
)
from hvae_kernels.nn.hamiltonian import GaussianPotential, HamiltonianFlow
from hvae_kernels.nn.local_reparam import LocalReparamLinear
from hvae_kernels.nn.residual import PlanarFlow, RadialFlow

__all__ = [
    "MADE",
    "FlowStack",
    "FlowTransform",
    "GaussianPotential",
    "HamiltonianFlow",
    "InverseAutoregressiveFlow",
    "LocalReparamLinear",
    "MaskedAutoregressiveFlow",
    "MaskedLinear",
    "PlanarFlow",
    "RadialFlow",
]
