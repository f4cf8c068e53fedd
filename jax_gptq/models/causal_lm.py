"""`CausalLM`: what every decoder-only model can do, whatever its blocks are."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jax_gptq.models import generation
from jax_gptq.models.attention import Context, KeyValue, make_context
from jax_gptq.models.config import DecoderConfig
from jax_gptq.models.inputs import checked_ids, token_positions
from jax_gptq.stores.sharded import check_context


class CausalLM(nnx.Module):
    """A decoder-only language model; attribute paths are the checkpoint's module names.

    A subclass provides `blocks`, `head`, `embed` and `logits`. The layer-by-layer form of
    `model(ids)` is

        x, context = model.embed(ids), model.context(ids)
        for block in model.blocks:
            x = block(x, context)
        logits = model.logits(x)

    Attributes:
      config: the `DecoderConfig`.
      lm_head: the output head, where it is not the embedding's table.
      folded_act_order: columns were reordered for speed (see `load`); not to be saved.
      mesh: over which `shard` has cut it, or None.
    """

    config: DecoderConfig
    lm_head: Any
    folded_act_order: bool = False
    mesh: Mesh | None = None

    @property
    def blocks(self) -> Sequence[Any]:
        """The blocks in order, called as block(x, context) and block.step(x, context, cached)."""
        raise NotImplementedError

    @property
    def head(self) -> Any:
        """The output head: an `Embedding`, maybe that of the tokens, or a quantized layer."""
        raise NotImplementedError

    def embed(self, input_ids: Array, positions: Array | None = None) -> Array:
        """int [B, T] -> [B, T, hidden_size]; positions [B, T], None: from zero."""
        raise NotImplementedError

    def logits(self, x: Array) -> Array:
        """The last block's [..., hidden_size] -> f32 [..., vocab_size]."""
        raise NotImplementedError

    def context(self, input_ids: Array) -> Context:
        """What the blocks need beside x, for whole sequences int [B, T]."""
        return make_context(self.config, token_positions(input_ids), input_ids.shape[1])

    def __call__(self, input_ids: ArrayLike) -> Array:
        """int [B, T] -> f32 [B, T, vocab_size]. Token ids are not checked against the vocabulary.

        Raises:
          ModelError: not two-dimensional integers, or longer than the model's positions.
          ShardingError: the model is sharded, and another mesh is set.
        """
        check_context(self.mesh)
        ids = checked_ids(self.config, input_ids)
        return _logits(self, ids)

    def forward(
        self, input_ids: Array, context: Context, cached: Sequence[KeyValue] | None
    ) -> tuple[Array, list[KeyValue]]:
        """All blocks, unrolled: a scan over layers would copy the packed weights.

        Args:
          input_ids: int [B, T].
          context: for these tokens.
          cached: per block, keys and values to extend by one token; None: whole prompts.

        Returns:
          [B, T, hidden_size], and the keys and values of every block.
        """
        x = self.embed(input_ids, context.positions)
        kept = []
        for i, block in enumerate(self.blocks):
            x, key_value = block.step(x, context, None if cached is None else cached[i])
            kept.append(key_value)
        return x, kept

    def generate(
        self,
        input_ids: ArrayLike,
        lengths: ArrayLike | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        key: Array | None = None,
        stop_tokens: Sequence[int] | None = None,
    ) -> Array:
        """Continue each row of a batch of prompts.

        Compiles once per bucket of prompt length and of total length (`generation.bucket`); other
        temperatures, top_p, stop tokens and shorter outputs reuse it.

        Args:
          input_ids: int [B, T], padded on the right; what the padding holds does not matter.
          lengths: int [B], tokens of each prompt; None: all are T long.
          max_new_tokens: at most this many per row.
          temperature: 0 takes the most likely token; above 0 draws.
          top_k: draw from the k most likely.
          top_p: draw from the fewest tokens whose probabilities reach top_p.
          key: random key, needed when drawing.
          stop_tokens: a row ends with the first of these; None: the checkpoint's own end tokens;
            (): none.

        Returns:
          The new tokens, without the prompts: int32 [B, max_new_tokens]; a row that has stopped is
          filled up with `config.pad_token`.

        Raises:
          ModelError: an argument of the wrong shape, dtype or range.
          ShardingError: the model is sharded, and another mesh is set.
        """
        pieces = generation.stream(
            self,
            input_ids,
            lengths,
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            key,
            stop_tokens,
            chunk=max_new_tokens,
        )
        tokens = np.concatenate(list(pieces), axis=1)
        unused = ((0, 0), (0, max_new_tokens - tokens.shape[1]))
        return jnp.asarray(np.pad(tokens, unused, constant_values=self.config.pad_token))


@jax.jit  # the model is a pytree, like every Flax module
def _logits(model: CausalLM, input_ids: Array) -> Array:
    x, _ = model.forward(input_ids, model.context(input_ids), None)
    return model.logits(x)
