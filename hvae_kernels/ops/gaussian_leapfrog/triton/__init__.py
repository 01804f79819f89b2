"""GPU kernels of ``gaussian_leapfrog``: one pass over the batch whatever K is.

The K steps of a dimension are one 2x2 map ``P_K = M_K ... M_1`` of ``(z - loc, rho)``. Composing it ("the chain") costs
O(d K) and runs in float64; the batch runs in float32, or float64 for float64 tensors. The double backward is the
backward on dual numbers, ``dual.py``: chain and kernels are written once. Launches:

- forward: 1, every program composes the map of its own features while its first tile is in flight.
- backward and double backward: 1 when the batch is small (each replica is one program) or when no parameter needs a
  gradient; otherwise 2, a pass that leaves partial column sums and one that adds them in a fixed order and runs the
  chain backwards; 3 when that second one splits the features, because tempering's gradient sums over them.
- one more where K is long and many programs would repeat the chain.

There are no atomics, so results are bitwise repeatable; launch configurations depend on shapes only, so they are the
same on every GPU.
"""

from hvae_kernels.ops.gaussian_leapfrog.triton.launch import (
    gaussian_leapfrog,
    gaussian_leapfrog_backward,
    gaussian_leapfrog_double_backward,
)

__all__ = ["gaussian_leapfrog", "gaussian_leapfrog_backward", "gaussian_leapfrog_double_backward"]
