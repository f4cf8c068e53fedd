"""[G, N] arrays in the order of a layout's tiles of columns, and back."""

import numpy as np
from jax import Array


def by_tile(per_group: np.ndarray, width: int) -> np.ndarray:
    """[G, N] -> [ceil(N / width), G, width], zero-padded, on the host."""
    groups, columns = per_group.shape
    padded = np.zeros((groups, -(-columns // width) * width), per_group.dtype)
    padded[:, :columns] = per_group
    return np.ascontiguousarray(padded.reshape(groups, -1, width).swapaxes(0, 1))


def by_group(per_tile: Array, columns: int) -> Array:
    """[T, G, width] -> [G, columns], in jnp."""
    return per_tile.swapaxes(0, 1).reshape(per_tile.shape[1], -1)[:, :columns]
