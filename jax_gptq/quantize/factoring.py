"""Damped Cholesky factor of H in the order in which rows are solved."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

from jax_gptq.errors import QuantizationError
from jax_gptq.quantize.layout import part

_PANEL = 512  # columns that are factored at once


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
      L f32 [size, size] lower triangular; the `damp` that it took; the number that this added to
      the diagonal.

    Raises:
      QuantizationError: not positive definite even at damp = 1.
    """
    used = damp
    while True:
        damped, added = _damped(H, rows, used, size)
        L = _cholesky(damped)
        if math.isfinite(float(jnp.sum(jnp.diagonal(L)))):
            return L, used, float(added)
        if used >= 1:
            raise QuantizationError(
                f"{where}H: expected a positive semidefinite matrix, found one that has no "
                f"Cholesky factor even with its mean diagonal added; accumulate it in float32 from "
                f"(2/n) sum x x^T, or use more calibration data"
            )
        used, damp_step = min(1.0, used + damp_step), 2 * damp_step


@functools.partial(jax.jit, static_argnames="size")
def _damped(H: Array, rows: Array, damp: float, size: int) -> tuple[Array, Array]:
    pad = size - rows.shape[0]
    diagonal = jnp.diagonal(H)
    dead = diagonal == 0
    added = damp * jnp.mean(jnp.where(dead, 1.0, diagonal))
    ordered = jnp.pad(H[rows[:, None], rows[None, :]], ((pad, 0), (pad, 0)))
    ones = jnp.ones((pad,), H.dtype)
    every = jnp.arange(size)
    ordered = ordered.at[every, every].add(
        jnp.concatenate([ones, (jnp.where(dead, 1.0, 0.0) + added)[rows]])
    )
    return ordered, added


@functools.partial(jax.jit, donate_argnums=0)
def _cholesky(A: Array) -> Array:
    """Panel of columns after panel, in the place of A: one call for all would hold it thrice."""
    size = A.shape[0]
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        panel = A[start:, start:stop] - jnp.matmul(
            A[start:, :start], A[start:stop, :start].T, precision=jax.lax.Precision.HIGHEST
        )
        panel = part(panel)
        top = jax.lax.linalg.cholesky(panel[: stop - start], symmetrize_input=False)
        below = jax.lax.linalg.triangular_solve(
            top, panel[stop - start :], lower=True, transpose_a=True
        )
        zeros = jnp.zeros((start, stop - start), A.dtype)
        A = A.at[:, start:stop].set(part(jnp.concatenate([zeros, top, below])))
    return A
