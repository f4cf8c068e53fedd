"""Products of matrices in full f32: on GPUs and TPUs an f32 product is otherwise less than that."""

import jax
import jax.numpy as jnp
from jax import Array


def product(left: Array, right: Array) -> Array:
    """left @ right."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
