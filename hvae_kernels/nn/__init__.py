"""Drop-in modules on the fused ops."""

from hvae_kernels.nn.hamiltonian import GaussianPotential, HamiltonianFlow

__all__ = ["GaussianPotential", "HamiltonianFlow"]
