"""Generation: one compiled prefill per prompt bucket, one compiled token loop per cache bucket."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jax_gptq.errors import ModelError
from jax_gptq.models.attention import KeyValue, make_context
from jax_gptq.models.inputs import checked_ids, checked_lengths, token_positions
from jax_gptq.models.sampling import Sampler


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


@jax.jit(static_argnames=("graph", "slots", "dtype", "pad"))
def prefill(
    graph: nnx.GraphDef,
    state: nnx.State,
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
    model = nnx.merge(graph, state)
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


@jax.jit(static_argnames=("graph", "pad"), donate_argnames="progress")
def decode(
    graph: nnx.GraphDef,
    state: nnx.State,
    progress: Progress,
    sampler: Sampler,
    stop: Array,
    until: Array,
    *,
    pad: int,
) -> Progress:
    """Tokens one after the other, until there are `until` or every row has stopped."""
    model = nnx.merge(graph, state)
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
    chunk: int = 1,
) -> Iterator[np.ndarray]:
    """`CausalLM.generate`, handing over int32 [B, n] as the tokens come, `chunk` at a time.

    The last piece may be shorter; rows that have stopped hold the pad token.
    """
    ids = checked_ids(model.config, input_ids, max_new_tokens)
    if max_new_tokens < 1:
        raise ModelError(f"max_new_tokens: expected at least 1, found {max_new_tokens}")
    batch, count = ids.shape
    lengths = checked_lengths(lengths, batch, count)
    sampler = Sampler.make(batch, temperature, top_k, top_p, key)
    stop = jnp.asarray(
        model.config.stop_tokens if stop_tokens is None else tuple(stop_tokens), jnp.int32
    )
    pad = model.config.pad_token
    graph, state = nnx.split(model)
    padded = bucket(count)
    slots = bucket(max(padded, count + max_new_tokens))
    ids = jnp.pad(ids, ((0, 0), (0, padded - count)))
    progress = prefill(
        graph, state, ids, lengths, sampler, stop, slots=slots, dtype=_cache_dtype(state), pad=pad
    )
    done = 0
    while True:
        step = int(progress.step)
        yield np.asarray(progress.tokens[:, done:step])
        done = step
        if done >= max_new_tokens or bool(progress.stopped.all()):
            return
        until = jnp.int32(min(done + chunk, max_new_tokens))
        progress = decode(graph, state, progress, sampler, stop, until, pad=pad)


def _cache_dtype(state: nnx.State) -> DTypeLike | None:
    """f32 on a CPU: XLA updates a 16-bit array there by way of an f32 copy of all of it."""
    leaf = jax.tree.leaves(state)[0]
    on_cpu = isinstance(leaf, jax.Array) and {d.platform for d in leaf.devices()} == {"cpu"}
    return jnp.float32 if on_cpu else None
