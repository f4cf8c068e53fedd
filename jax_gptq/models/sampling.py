"""From logits to the next token: greedy, temperature, top-k, top-p."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jax_gptq.errors import ModelError
from jax_gptq.pytree import static_field


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """How to choose tokens; a pytree, so that other temperatures need no other compilation.

    Attributes:
      temperature: f32 scalar, or None for the most likely token.
      top_p: f32 scalar: the fewest tokens whose probabilities reach it (nucleus sampling,
        Holtzman et al., arXiv:1904.09751), or None. Applied after top_k.
      keys: one random key per row [B], or None with temperature None.
      top_k: only the most likely k, or None.
    """

    temperature: Array | None
    top_p: Array | None
    keys: Array | None
    top_k: int | None = static_field()

    @classmethod
    def make(
        cls,
        batch: int,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        key: Array | None,
    ) -> "Sampler":
        """Checks `generate`'s arguments. Row i draws the same numbers in a batch of any size.

        Raises:
          ModelError: a value out of range, or a temperature without a key.
        """
        if temperature < 0:
            raise ModelError(f"temperature: expected 0 (greedy) or above, found {temperature}")
        if top_k is not None and top_k < 1:
            raise ModelError(f"top_k: expected at least 1, found {top_k}")
        if top_p is not None and not 0 < top_p <= 1:
            raise ModelError(f"top_p: expected above 0 and at most 1, found {top_p}")
        if temperature == 0:
            return cls(None, None, None, None)
        if key is None:
            raise ModelError("temperature above 0 draws random tokens: pass key=jax.random.key(0)")
        keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))
        nucleus = None if top_p is None else jnp.float32(top_p)
        return cls(jnp.float32(temperature), nucleus, keys, top_k)

    def __call__(self, logits: Array, step: Array) -> Array:
        """f32 [B, vocab_size] and the number of the token -> int32 [B]."""
        if self.temperature is None or self.keys is None:
            return most_likely(logits)
        logits = logits / self.temperature
        keys = jax.vmap(jax.random.fold_in, (0, None))(self.keys, step)
        vocabulary = logits.shape[-1]
        if self.top_k is None and self.top_p is None:
            return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        logits, tokens = jax.lax.top_k(logits, min(self.top_k or vocabulary, vocabulary))
        if self.top_p is not None:
            probabilities = jax.nn.softmax(logits, axis=-1)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities
            logits = jnp.where(before < self.top_p, logits, -jnp.inf)
        chosen = jax.vmap(jax.random.categorical)(keys, logits)
        return jnp.take_along_axis(tokens, chosen[:, None], axis=-1)[:, 0].astype(jnp.int32)


def most_likely(logits: Array) -> Array:
    """f32 [B, vocab_size] -> int32 [B]: the first of the largest, as `jnp.argmax` finds it.

    As two plain reductions: XLA does not vectorize argmax's own one on a CPU. A row with a NaN
    gives some token.
    """
    # Both reductions must see the same bits, not compute the logits each in its own way.
    logits = jax.lax.optimization_barrier(logits)
    tokens = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    largest = logits.max(axis=-1, keepdims=True)
    last = logits.shape[-1] - 1
    return jnp.where(logits == largest, tokens, last).min(axis=-1)
