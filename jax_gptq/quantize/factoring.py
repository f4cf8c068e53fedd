"""Damped Cholesky factor of H, U^T U, in the order in which rows are solved."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

from jax_gptq.errors import QuantizationError
from jax_gptq.quantize.layout import part
from jax_gptq.quantize.product import product

_PANEL = 256  # rows that are factored at once


def factor(H: Array, rows: Array, size: int, damp: float, damp_step: float, where: str):
    """Factor H, with more damping where it is needed.

    Args:
      H: f32 [K, K], symmetric.
      rows: int32 [K], the rows of H in the order of the factor.
      size: at least K; identity rows are put in front to reach it.
      damp: fraction of the mean diagonal that is added to the diagonal; dead rows count as 1.
      damp_step: added to `damp` on failure, twice as much every time.
      where: "name: " for messages.

    Returns:
      U f32 [size, size] upper triangular, with U^T U the damped H; the `damp` that it took; the
      number that this added to the diagonal.

    Raises:
      QuantizationError: not positive definite even at damp = 1.
    """
    used = damp
    while True:
        damped, added = _damped(H, rows, used, size)
        U = _cholesky(damped)
        if math.isfinite(float(jnp.sum(jnp.diagonal(U)))):
            return U, used, float(added)
        if used >= 1:
            raise QuantizationError(
                f"{where}H: expected a positive semidefinite matrix, found one that has no "
                f"Cholesky factor even with its mean diagonal added; accumulate it in float32 from "
                f"(2/n) sum x x^T, or use more calibration data"
            )
        used, damp_step = min(1.0, used + damp_step), 2 * damp_step


@functools.partial(jax.jit, static_argnames="size")
def _damped(H: Array, rows: Array, damp: float, size: int) -> tuple[Array, Array]:
    """The upper triangle of the damped H in the order `rows`, and what was added."""
    pad = size - rows.shape[0]
    diagonal = jnp.diagonal(H)
    dead = diagonal == 0
    added = damp * jnp.mean(jnp.where(dead, 1.0, diagonal))
    ordered = jnp.pad(H[rows[:, None], rows[None, :]], ((pad, 0), (pad, 0)))
    more = jnp.pad((jnp.where(dead, 1.0, 0.0) + added)[rows], (pad, 0), constant_values=1.0)
    row, column = jnp.arange(size)[:, None], jnp.arange(size)
    # In one piece, for one matrix of memory.
    return jnp.where(row <= column, ordered + jnp.where(row == column, more, 0.0), 0.0), added


@functools.partial(jax.jit, donate_argnums=0)
def _cholesky(A: Array) -> Array:
    """Panel of rows after panel, in the place of A: one call for all would hold it thrice."""
    size = A.shape[0]
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        width = stop - start
        panel = A[start:stop, start:] - product(A[:start, start:stop].T, A[:start, start:])
        own = jax.lax.linalg.cholesky(part(panel[:, :width].T), symmetrize_input=False)
        # Its inverse, as products of matrices run at twice the rate of triangular solves.
        inverse = jax.lax.linalg.triangular_solve(
            own, jnp.eye(width, dtype=A.dtype), left_side=True, lower=True
        )
        right = product(part(inverse), panel[:, width:])
        A = A.at[start:stop, start:].set(jnp.concatenate([part(own.T), right], axis=1))
    return A
