"""Every public function, flat. All are differentiable, draw no random numbers and return new tensors.

Those with kernels take ``implementation=``, the choice of :func:`hvae_kernels.use_impl` for one call: forward, backward
and all further derivatives. What it names is used or raises ``RuntimeError``, saying why not.
"""

from hvae_kernels.ops.affine_autoregressive import Gate, affine_autoregressive
from hvae_kernels.ops.bernoulli_log_prob import bernoulli_log_prob
from hvae_kernels.ops.draw import draw_read, draw_write
from hvae_kernels.ops.gaussian_leapfrog import dense_gaussian_leapfrog, gaussian_leapfrog, gaussian_leapfrog_with_vjp
from hvae_kernels.ops.gaussian_mixture import gaussian_mixture_log_prob, gaussian_mixture_responsibilities
from hvae_kernels.ops.iwae import dreg_surrogate, iwae_bound, stl_surrogate
from hvae_kernels.ops.leapfrog import leapfrog
from hvae_kernels.ops.local_reparam_linear import local_reparam_linear
from hvae_kernels.ops.masked_linear import masked_linear
from hvae_kernels.ops.planar_flow import constrain_planar, planar_flow, planar_flow_with_vjp
from hvae_kernels.ops.radial_flow import radial_flow
from hvae_kernels.ops.rational_quadratic_spline import Spline, rational_quadratic_spline

__all__ = [
    "Gate",
    "Spline",
    "affine_autoregressive",
    "bernoulli_log_prob",
    "constrain_planar",
    "dense_gaussian_leapfrog",
    "draw_read",
    "draw_write",
    "dreg_surrogate",
    "gaussian_leapfrog",
    "gaussian_leapfrog_with_vjp",
    "gaussian_mixture_log_prob",
    "gaussian_mixture_responsibilities",
    "iwae_bound",
    "leapfrog",
    "local_reparam_linear",
    "masked_linear",
    "planar_flow",
    "planar_flow_with_vjp",
    "radial_flow",
    "rational_quadratic_spline",
    "stl_surrogate",
]
