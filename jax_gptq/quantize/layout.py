"""Keeps XLA from copying a whole matrix into the layout that an operation on a part of it wants."""

import jax
from jax import Array


def part(x: Array) -> Array:
    """x, a slice of a large matrix, as an array of its own.

    LAPACK's operations want columns to be contiguous. XLA would carry that wish back through the
    slice to the matrix and copy it; a flat array has one layout only, where the wish ends.
    """
    return jax.lax.optimization_barrier(x.reshape(-1)).reshape(x.shape)
