"""`GPT2`: learned positions, LayerNorm, one fused projection for queries, keys and values."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jax_gptq.models.attention import Context, KeyValue, attention
from jax_gptq.models.causal_lm import CausalLM, token_positions
from jax_gptq.models.config import DecoderConfig
from jax_gptq.models.layers import Embedding, LayerNorm, activate, dense, head_logits


class Attention(nnx.Module):
    """Fused projection around `attention`."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        hidden = config.hidden_size
        self.c_attn = dense(hidden, 3 * hidden, bias=True, dtype=dtype, rngs=rngs)
        self.c_proj = dense(hidden, hidden, bias=True, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Array, context: Context, cached: KeyValue | None
    ) -> tuple[Array, KeyValue]:
        """x [B, T, hidden_size] -> the same shape, and this layer's keys and values."""
        q, k, v = (
            y.reshape(*y.shape[:2], self.config.num_heads, self.config.head_dim)
            for y in jnp.split(self.c_attn(x), 3, axis=-1)
        )
        mixed, key_value = attention(
            q,
            k,
            v,
            context.masks[0],
            cached,
            context.positions,
            scale=self.config.attention_scale,
            softcap=None,
        )
        return self.c_proj(mixed), key_value


class Mlp(nnx.Module):
    """c_proj(act(c_fc(x)))."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.activation = config.activation
        hidden, inner = config.hidden_size, config.intermediate_size
        self.c_fc = dense(hidden, inner, bias=True, dtype=dtype, rngs=rngs)
        self.c_proj = dense(inner, hidden, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """x [..., hidden_size] -> the same shape."""
        return self.c_proj(activate(self.activation, self.c_fc(x)))


class Block(nnx.Module):
    """Attention and MLP, a norm before each."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.ln_1 = LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.attn = Attention(config, dtype=dtype, rngs=rngs)
        self.ln_2 = LayerNorm(config.hidden_size, eps=config.norm_eps, dtype=dtype)
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, context: Context) -> Array:
        """x [B, T, hidden_size] -> the same shape."""
        return self.step(x, context, None)[0]

    def step(self, x: Array, context: Context, cached: KeyValue | None) -> tuple[Array, KeyValue]:
        """As a call, with cached keys and values to extend (see `attention`)."""
        mixed, key_value = self.attn(self.ln_1(x), context, cached)
        x = x + mixed
        return x + self.mlp(self.ln_2(x)), key_value


class Backbone(nnx.Module):
    """Token and position embeddings, blocks, final norm."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden = config.hidden_size
        self.wte = Embedding(config.vocab_size, hidden, dtype=dtype, rngs=rngs)
        self.wpe = Embedding(config.max_positions, hidden, dtype=dtype, rngs=rngs)
        self.h = nnx.List([Block(config, dtype=dtype, rngs=rngs) for _ in config.layers])
        self.ln_f = LayerNorm(hidden, eps=config.norm_eps, dtype=dtype)


class GPT2(CausalLM):
    """GPT-2; see `CausalLM` for how to call it."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        """Random float weights, to be trained or to be filled by `jax_gptq.models.load`."""
        self.config = config
        self.transformer = Backbone(config, dtype=dtype, rngs=rngs)
        if not config.tie_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)

    @property
    def blocks(self) -> nnx.List:
        return self.transformer.h

    @property
    def head(self) -> Any:
        return self.transformer.wte if self.config.tie_embeddings else self.lm_head

    def embed(self, input_ids: Array, positions: Array | None = None) -> Array:
        positions = token_positions(input_ids) if positions is None else positions
        return self.transformer.wte(input_ids) + self.transformer.wpe(positions)

    def logits(self, x: Array) -> Array:
        return head_logits(self.config, self.head, self.transformer.ln_f(x))
