"""The learned models, R of each (one a data set) in one flat tensor, with their gradients written by hand.

At ten samples of a few dozen dimensions a training step is all overhead. So a model is one ``(R, P)`` tensor of
parameters and one of gradients, with a named view ``(R, 1, size)`` for each block; optimiser and clipping are one
operation on the whole. ``bound`` is the formula to read, ``write_gradient`` its gradient in as few operations as it
takes; the tests hold the second to autograd of the first.
"""

from hvae.gaussian.models.annealed import AnnealedVAE
from hvae.gaussian.models.autoregressive import AutoregressiveVAE, draw_network
from hvae.gaussian.models.hamiltonian import HamiltonianVAE
from hvae.gaussian.models.mean_field import MeanField, PublishedMeanField
from hvae.gaussian.models.model import N_SAMPLES, Model
from hvae.gaussian.models.planar import PlanarVAE

__all__ = [
    "N_SAMPLES",
    "AnnealedVAE",
    "AutoregressiveVAE",
    "HamiltonianVAE",
    "MeanField",
    "Model",
    "PlanarVAE",
    "PublishedMeanField",
    "draw_network",
]
