"""Calibration against the float model's activations (GPTAQ, Li et al., arXiv:2504.02692)."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jax_gptq.quantize.product import product


@functools.partial(jax.jit, static_argnames="alpha")
def asymmetric_target(W: Array, U: Array, rows: Array, cross: Array, alpha: float) -> Array:
    """The weights whose rounding makes quantized inputs give the float model's outputs.

    GPTAQ minimises |W^T x' - Wq^T x|^2, where x is what the layer is given behind quantized layers
    and x' what the float model gives it. Completing the square turns that into GPTQ's own loss, up
    to a constant, around W + H^-1 C W with C = (2/n) sum x (x' - x)^T. GPTAQ approximates this
    shift row by row while it solves; here it is exact, and damped as H is.

    Args:
      W: f32 [K, N].
      U: from `factoring.factor` of H in the order `rows`, f32 [size, size].
      rows: int32 [K].
      cross: C, f32 [K, K].
      alpha: how much of the shift is taken.
    """
    pad = U.shape[0] - W.shape[0]
    moved = product(cross, W)
    moved = jnp.pad(moved[rows], ((pad, 0), (0, 0)))
    for transpose in (True, False):
        moved = jax.lax.linalg.triangular_solve(U, moved, left_side=True, transpose_a=transpose)
    return W + alpha * jnp.zeros_like(W).at[rows].set(moved[pad:])
