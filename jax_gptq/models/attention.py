"""Attention over fresh or cached keys and values, and what all layers of a pass share."""

import dataclasses
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from jax_gptq.models.config import DecoderConfig, LayerConfig
from jax_gptq.models.rope import rope_tables

# Keys and values of one layer, [B * kv_heads, S, head_dim] each; the slot is the position.
KeyValue: TypeAlias = tuple[Array, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What every block of one pass needs; a pytree.

    Attributes:
      positions: int32 [B, T], of the tokens of this pass.
      tables: per kind of layer, rope's (cos, sin), or None.
      masks: per kind of layer, bool [B, T, S]: which slots a token sees.
    """

    positions: Array
    tables: tuple[tuple[Array, Array] | None, ...]
    masks: tuple[Array, ...]


def layer_kinds(config: DecoderConfig) -> tuple[LayerConfig, ...]:
    """The distinct layers of a model (two where local and global attention alternate)."""
    return tuple(dict.fromkeys(config.layers))


def make_context(config: DecoderConfig, positions: Array, slots: int) -> Context:
    """Rope tables and masks for tokens at `positions` [B, T] that see up to `slots` slots.

    Prompts are padded on the right: no token sees a padded slot, because it would lie after it.
    """
    query, slot = positions[:, :, None], jnp.arange(slots)[None, None, :]
    masks, tables = [], []
    for kind in layer_kinds(config):
        mask = slot <= query
        if kind.window is not None:
            mask &= slot > query - kind.window
        masks.append(mask)
        tables.append(None if kind.rope is None else rope_tables(kind.rope, positions))
    return Context(positions, tuple(tables), tuple(masks))


def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Array,
    cached: KeyValue | None,
    positions: Array,
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Array, KeyValue]:
    """Grouped-query attention (Ainslie et al., arXiv:2305.13245), softmax in f32.

    Args:
      q: [B, T, heads, head_dim]; heads a multiple of kv_heads.
      k, v: [B, T, kv_heads, head_dim], of the same tokens.
      mask: bool [B, T, S].
      cached: None: tokens see each other (S = T). Else T = 1, and the token, written to its slot,
        sees the cache.
      positions: int32 [B, T]: the slots of the tokens.
      scale, softcap: see `DecoderConfig`.

    Returns:
      [B, T, heads * head_dim] in q's dtype, and the keys and values to keep.
    """
    dtype, (batch, count, heads, head_dim) = q.dtype, q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    # One batch dimension [B * kv_heads], the rows of a group and all its tokens under one another.
    rows = (batch * kv_heads, group * count, head_dim)
    q = q.reshape(batch, count, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4).reshape(rows)
    keys, values = (jnp.swapaxes(y, 1, 2).reshape(-1, count, head_dim) for y in (k, v))
    if cached is not None:
        keys = _write(cached[0], keys.astype(cached[0].dtype), positions[:, 0])
        values = _write(cached[1], values.astype(cached[1].dtype), positions[:, 0])
    scores = scale * jax.lax.dot_general(
        q.astype(keys.dtype),
        keys,
        (((2,), (2,)), ((0,), (0,))),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = scores.reshape(batch, kv_heads, group, *mask.shape[1:])
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).reshape(*rows[:2], -1)
    mixed = jax.lax.dot_general(
        weights.astype(values.dtype),
        values,
        (((2,), (1,)), ((0,), (0,))),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    mixed = mixed.reshape(batch, kv_heads, group, count, head_dim).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, count, heads * head_dim).astype(dtype), (keys, values)


def _write(cache: Array, new: Array, slots: Array) -> Array:
    """new [B * kv_heads, 1, head_dim] into cache [B * kv_heads, S, head_dim] at slots [B]."""
    if slots.shape[0] == 1:  # a slice update happens in place; a batch becomes a scatter
        return jax.lax.dynamic_update_slice(cache, new, (0, slots[0], 0))
    slots = jnp.repeat(slots, cache.shape[0] // slots.shape[0])
    return jax.vmap(lambda c, n, slot: jax.lax.dynamic_update_slice(c, n, (slot, 0)))(
        cache, new, slots
    )
