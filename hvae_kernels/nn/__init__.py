"""Drop-in modules on the fused ops."""

from hvae_kernels.nn.annealed import AnnealedHamiltonianFlow
from hvae_kernels.nn.annealed_importance import AnnealedImportanceSampling
from hvae_kernels.nn.autoregressive import InverseAutoregressiveFlow, MaskedAutoregressiveFlow
from hvae_kernels.nn.coupling import CouplingFlow
from hvae_kernels.nn.flow import FlowTransform
from hvae_kernels.nn.hamiltonian import GaussianPotential, HamiltonianFlow
from hvae_kernels.nn.local_reparam import LocalReparamLinear
from hvae_kernels.nn.made import MADE, MaskedLinear
from hvae_kernels.nn.planar import PlanarFlow
from hvae_kernels.nn.radial import RadialFlow
from hvae_kernels.nn.stack import FlowStack

__all__ = [
    "MADE",
    "AnnealedHamiltonianFlow",
    "AnnealedImportanceSampling",
    "CouplingFlow",
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
