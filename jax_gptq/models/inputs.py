"""Checks of what a model is given."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jax_gptq.errors import ModelError
from jax_gptq.models.config import DecoderConfig


def token_positions(input_ids: Array) -> Array:
    """0, 1, ... along T: int32 [B, T]."""
    return jnp.broadcast_to(jnp.arange(input_ids.shape[1], dtype=jnp.int32), input_ids.shape)


def checked_ids(
    config: DecoderConfig, input_ids: ArrayLike, new_tokens: int = 0
) -> Array | np.ndarray:
    """input_ids as int32 [B, T] that fit the model, or a ModelError. NumPy's stay on the host."""
    on_device = any(isinstance(leaf, Array) for leaf in jax.tree.leaves(input_ids))
    ids = jnp.asarray(input_ids) if on_device else np.asarray(input_ids)
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ModelError(
            f"input_ids: expected integers [batch, length], found {ids.dtype} of shape {ids.shape}"
        )
    if 0 in ids.shape:
        raise ModelError(f"input_ids: expected at least one token per row, found shape {ids.shape}")
    narrow = ids.astype(np.int32)
    if not on_device and (narrow != ids).any():
        raise ModelError(
            f"input_ids: expected token ids of 32 bits, found {ids.min()} to {ids.max()}"
        )
    limit = position_limit(config)
    if limit is not None and ids.shape[1] + new_tokens > limit:
        raise ModelError(
            f"input_ids: this model has {limit} positions, found {ids.shape[1]} tokens and "
            f"{new_tokens} to generate"
        )
    return narrow


def position_limit(config: DecoderConfig) -> int | None:
    """The number of positions that the model can tell apart, None where there is no bound."""
    limits = [
        config.max_positions if kind.rope is None else kind.rope.max_positions
        for kind in config.layers
    ]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def checked_lengths(lengths: ArrayLike | None, batch: int, count: int) -> Array:
    """lengths as an int32 array [B] between 1 and `count`, or a ModelError."""
    if lengths is None:
        return jnp.full((batch,), count, jnp.int32)
    found = np.asarray(lengths)
    if found.shape != (batch,) or not np.issubdtype(found.dtype, np.integer):
        raise ModelError(
            f"lengths: expected {batch} integers, one per row, found {found.dtype} of shape "
            f"{found.shape}"
        )
    if batch and not 1 <= found.min() <= found.max() <= count:
        raise ModelError(
            f"lengths: expected 1 to {count} (the width of input_ids), found {found.tolist()}"
        )
    return jnp.asarray(found, jnp.int32)
