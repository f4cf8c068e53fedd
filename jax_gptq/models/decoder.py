"""`Decoder`: Llama, Mistral, Qwen2, Qwen3, Gemma 2 and Gemma 3, told apart by configuration."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jax_gptq.models.attention import Context, KeyValue, attention, layer_kinds
from jax_gptq.models.causal_lm import CausalLM
from jax_gptq.models.config import DecoderConfig
from jax_gptq.models.layers import Embedding, RMSNorm, activate, dense, head_logits, project
from jax_gptq.models.rope import apply_rope


class Attention(nnx.Module):
    """Projections, head norms and rope around `attention`."""

    def __init__(self, config: DecoderConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        self.kind = layer_kinds(config).index(config.layers[index])
        hidden, head_dim = config.hidden_size, config.head_dim
        q_features, kv_features = config.num_heads * head_dim, config.num_kv_heads * head_dim
        qkv: dict[str, Any] = dict(bias=config.qkv_bias, dtype=dtype, rngs=rngs)
        self.q_proj = dense(hidden, q_features, **qkv)
        self.k_proj = dense(hidden, kv_features, **qkv)
        self.v_proj = dense(hidden, kv_features, **qkv)
        self.o_proj = dense(q_features, hidden, bias=config.out_bias, dtype=dtype, rngs=rngs)
        if config.qk_norm:
            self.q_norm = _norm(config, head_dim, dtype)
            self.k_norm = _norm(config, head_dim, dtype)

    def __call__(
        self, x: Array, context: Context, cached: KeyValue | None
    ) -> tuple[Array, KeyValue]:
        """x [B, T, hidden_size] -> the same shape, and this layer's keys and values."""
        q, k, v = (
            y.reshape(*y.shape[:2], -1, self.config.head_dim)
            for y in project(x, (self.q_proj, self.k_proj, self.v_proj))
        )
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        tables = context.tables[self.kind]
        if tables is not None:
            q, k = apply_rope(q, tables), apply_rope(k, tables)
        mixed, key_value = attention(
            q,
            k,
            v,
            context.masks[self.kind],
            cached,
            context.positions,
            scale=self.config.attention_scale,
            softcap=self.config.attention_softcap,
        )
        return self.o_proj(mixed), key_value


class Mlp(nnx.Module):
    """down(act(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.activation = config.activation
        hidden, inner = config.hidden_size, config.intermediate_size
        options: dict[str, Any] = dict(bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.gate_proj = dense(hidden, inner, **options)
        self.up_proj = dense(hidden, inner, **options)
        self.down_proj = dense(inner, hidden, **options)

    def __call__(self, x: Array) -> Array:
        """x [..., hidden_size] -> the same shape."""
        gate, up = project(x, (self.gate_proj, self.up_proj))
        return self.down_proj(activate(self.activation, gate) * up)


class Block(nnx.Module):
    """Attention and MLP with their norms and residual sums."""

    def __init__(self, config: DecoderConfig, index: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        hidden = config.hidden_size
        self.post_norms = config.post_norms
        self.self_attn = Attention(config, index, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)
        self.input_layernorm = _norm(config, hidden, dtype)
        # With post norms (Gemma) this one follows attention; otherwise it precedes the MLP.
        self.post_attention_layernorm = _norm(config, hidden, dtype)
        if self.post_norms:
            self.pre_feedforward_layernorm = _norm(config, hidden, dtype)
            self.post_feedforward_layernorm = _norm(config, hidden, dtype)

    def __call__(self, x: Array, context: Context) -> Array:
        """x [B, T, hidden_size] -> the same shape."""
        return self.step(x, context, None)[0]

    def step(self, x: Array, context: Context, cached: KeyValue | None) -> tuple[Array, KeyValue]:
        """As a call, with cached keys and values to extend (see `attention`)."""
        mixed, key_value = self.self_attn(self.input_layernorm(x), context, cached)
        if not self.post_norms:
            x = x + mixed
            return x + self.mlp(self.post_attention_layernorm(x)), key_value
        x = x + self.post_attention_layernorm(mixed)
        mixed = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(mixed), key_value


class Backbone(nnx.Module):
    """Token embedding, blocks, final norm."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [Block(config, i, dtype=dtype, rngs=rngs) for i in range(len(config.layers))]
        )
        self.norm = _norm(config, config.hidden_size, dtype)


class Decoder(CausalLM):
    """A model of any family but GPT-2; see `CausalLM` for how to call it."""

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        """Random float weights, to be trained or to be filled by `jax_gptq.models.load`."""
        self.config = config
        self.model = Backbone(config, dtype=dtype, rngs=rngs)
        if not config.tie_embeddings:
            self.lm_head = Embedding(config.vocab_size, config.hidden_size, dtype=dtype, rngs=rngs)

    @property
    def blocks(self) -> nnx.List:
        return self.model.layers

    @property
    def head(self) -> Any:
        return self.model.embed_tokens if self.config.tie_embeddings else self.lm_head

    def embed(self, input_ids: Array, positions: Array | None = None) -> Array:
        x = self.model.embed_tokens(input_ids)
        scale = self.config.embedding_scale
        return x if scale is None else x * jnp.asarray(scale, x.dtype)

    def logits(self, x: Array) -> Array:
        return head_logits(self.config, self.head, self.model.norm(x))


def _norm(config: DecoderConfig, features: int, dtype: DTypeLike) -> RMSNorm:
    return RMSNorm(features, eps=config.norm_eps, unit_offset=config.norm_unit_offset, dtype=dtype)
