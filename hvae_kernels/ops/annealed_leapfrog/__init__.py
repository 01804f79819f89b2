"""Annealed Hamiltonian dynamics: leapfrog steps along bridges from one density to another, and their weight."""

from hvae_kernels.ops.annealed_leapfrog.api import annealed_leapfrog, annealed_leapfrog_update

__all__ = ["annealed_leapfrog", "annealed_leapfrog_update"]
