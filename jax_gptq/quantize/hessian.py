"""The Hessian of a layer's loss, accumulated batch by batch."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jax_gptq.errors import ShapeError
from jax_gptq.quantize.product import product


class Hessian:
    """H = (2/n) sum x x^T over the rows x [K] that a layer is given, in f32.

    Attributes:
      rows: n, how many rows were seen.
      non_finite: how many of their elements were NaN or infinite.
    """

    def __init__(self, features: int):
        self.rows = 0
        self._sum = jnp.zeros((features, features), jnp.float32)
        self._non_finite = jnp.zeros((), jnp.int32)

    def add(self, x: ArrayLike) -> None:
        """Take in activations float [..., K]. Raises ShapeError."""
        x = jnp.asarray(x)
        if x.ndim < 1 or x.shape[-1] != self._sum.shape[0]:
            raise ShapeError(
                f"activations: expected [..., {self._sum.shape[0]}], found shape {x.shape}"
            )
        x = x.reshape(-1, x.shape[-1])
        self._sum, self._non_finite = _accumulate(self._sum, self._non_finite, x)
        self.rows += x.shape[0]

    @property
    def non_finite(self) -> int:
        return int(self._non_finite)

    @property
    def value(self) -> Array:
        """H, f32 [K, K]; zero where no row was seen."""
        return self._sum * (2 / max(self.rows, 1))


@jax.jit(donate_argnums=0)
def _accumulate(total: Array, non_finite: Array, x: Array) -> tuple[Array, Array]:
    x = x.astype(jnp.float32)
    return total + product(x.T, x), non_finite + jnp.sum(~jnp.isfinite(x), dtype=jnp.int32)
