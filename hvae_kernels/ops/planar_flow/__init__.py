"""Stacked planar layers: two skinny products and one scalar recursion a row, however many layers."""

from hvae_kernels.ops.planar_flow.api import constrain_planar, planar_flow, planar_flow_with_vjp

__all__ = ["constrain_planar", "planar_flow", "planar_flow_with_vjp"]
