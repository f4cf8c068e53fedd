"""Generation: one compiled prefill per prompt bucket, one compiled token loop per cache bucket."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import PyTreeDef
from jax.typing import ArrayLike, DTypeLike

from jax_gptq.errors import ModelError
from jax_gptq.models.attention import KeyValue, make_context
from jax_gptq.models.inputs import checked_ids, checked_lengths, token_positions
from jax_gptq.models.sampling import Sampler
from jax_gptq.stores.sharded import check_context

# Of text on a screen, too short to be seen as a pause.
_PIECE_SECONDS = 0.05


def bucket(count: int) -> int:
    """The padded size for `count` tokens: 16, 32, ... 256, then multiples of 256."""
    if count > 256:
        return -(-count // 256) * 256
    return max(16, 1 << (count - 1).bit_length())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """The state between two tokens; a pytree that the token loop updates in place.

    Attributes:
      cached: per block, keys and values [B * kv_heads, S, head_dim].
      positions: int32 [B]: where the next token of a row goes.
      token: int32 [B], the latest token, not yet in the cache.
      tokens: int32 [B, S], all new tokens; rows that have stopped hold the pad token.
      stopped: bool [B].
      step: int32, how many new tokens there are.
    """

    cached: list[KeyValue]
    positions: Array
    token: Array
    tokens: Array
    stopped: Array
    step: Array


@jax.jit(static_argnames=("structure", "slots", "dtype", "pad"))
def prefill(
    structure: PyTreeDef,
    leaves: list[Array],
    input_ids: Array,
    lengths: Array,
    sampler: Sampler,
    stop: Array,
    *,
    slots: int,
    dtype: DTypeLike | None,
    pad: int,
) -> Progress:
    """Run the prompts [B, T], keep their keys and values in `slots` slots, choose a first token.

    `dtype`: of the cache; None: the model's.
    """
    model = jax.tree.unflatten(structure, leaves)
    batch, count = input_ids.shape
    context = make_context(model.config, token_positions(input_ids), count)
    x, kept = model.forward(input_ids, context, None)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    token = sampler(model.logits(last), jnp.int32(0))
    unused = ((0, 0), (0, slots - count), (0, 0))
    return Progress(
        cached=jax.tree.map(lambda y: jnp.pad(y.astype(dtype or y.dtype), unused), kept),
        positions=lengths,
        token=token,
        tokens=jnp.full((batch, slots), pad, jnp.int32).at[:, 0].set(token),
        stopped=jnp.isin(token, stop),
        step=jnp.int32(1),
    )


@jax.jit(static_argnames=("structure", "pad"), donate_argnames="progress")
def decode(
    structure: PyTreeDef,
    leaves: list[Array],
    progress: Progress,
    sampler: Sampler,
    stop: Array,
    until: Array,
    *,
    pad: int,
) -> Progress:
    """Tokens one after the other, until there are `until` or every row has stopped."""
    model = jax.tree.unflatten(structure, leaves)
    slots = progress.tokens.shape[1]

    def unfinished(now: Progress) -> Array:
        return (now.step < until) & ~now.stopped.all()

    def next_token(now: Progress) -> Progress:
        context = make_context(model.config, now.positions[:, None], slots)
        x, cached = model.forward(now.token[:, None], context, now.cached)
        token = sampler(model.logits(x[:, 0]), now.step)
        token = jnp.where(now.stopped, pad, token)
        return Progress(
            cached=cached,
            positions=now.positions + 1,
            token=token,
            tokens=jax.lax.dynamic_update_slice(now.tokens, token[:, None], (0, now.step)),
            stopped=now.stopped | jnp.isin(token, stop),
            step=now.step + 1,
        )

    return jax.lax.while_loop(unfinished, next_token, progress)


def stream(
    model: Any,
    input_ids: ArrayLike,
    lengths: ArrayLike | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    stop_tokens: Sequence[int] | None = None,
    *,
    chunk: int | None = None,
) -> Iterator[np.ndarray]:
    """`CausalLM.generate`, handing over int32 [B, n] as the tokens come.

    The first piece is one token, the others `chunk` tokens; None: as many as come in about a
    twentieth of a second, since every piece costs the host as long as a GPU takes for one or two
    tokens. The last may be shorter; rows that have stopped hold the pad token. Changes of the model
    while it generates do not reach it.

    Raises:
      ModelError: as `generate`, or a chunk below 1.
    """
    check_context(model.mesh)
    ids = checked_ids(model.config, input_ids, max_new_tokens)
    if max_new_tokens < 1:
        raise ModelError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
    if chunk is not None and chunk < 1:
        raise ModelError(f"chunk: expected at least 1, found {chunk}")
    batch, count = ids.shape
    lengths = checked_lengths(lengths, batch, count)
    sampler = Sampler.make(batch, temperature, top_k, top_p, key)
    stop = jnp.asarray(
        model.config.stop_tokens if stop_tokens is None else tuple(stop_tokens), jnp.int32
    )
    pad = model.config.pad_token
    leaves, structure = jax.tree.flatten(model)  # once: it takes as long as a token on a GPU
    # Device arrays keep their sharding; on the host no length needs a compilation of its own.
    pad_ids = jnp.pad if isinstance(ids, Array) else np.pad
    padded = pad_ids(ids, ((0, 0), (0, bucket(count) - count)))
    slots = bucket(max(padded.shape[1], count + max_new_tokens))
    progress = prefill(
        structure,
        leaves,
        padded,
        lengths,
        sampler,
        stop,
        slots=slots,
        dtype=_cache_dtype(leaves[0]),
        pad=pad,
    )
    done, size, start = 0, chunk or 1, time.perf_counter()
    while True:
        step, stopped = jax.device_get((progress.step, progress.stopped))
        seconds = time.perf_counter() - start
        if chunk is None and done > 0:
            size = max(1, min(2 * size, int(size * _PIECE_SECONDS / seconds)))
        # Copies: a view of a CPU's array would keep it from being updated in place.
        yield np.array(progress.tokens)[:, done:step].copy()
        done = int(step)
        if done >= max_new_tokens or stopped.all():
            return
        start = time.perf_counter()
        until = np.int32(min(done + size, max_new_tokens))
        progress = decode(structure, leaves, progress, sampler, stop, until, pad=pad)


def _cache_dtype(leaf: Array) -> DTypeLike | None:
    """f32 on a CPU: XLA updates a 16-bit array there by way of an f32 copy of all of it."""
    on_cpu = isinstance(leaf, jax.Array) and {d.platform for d in leaf.devices()} == {"cpu"}
    return jnp.float32 if on_cpu else None
