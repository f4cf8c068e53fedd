"""The float Llama decoder as a training step needs it: whole sequences, no cache, float32.

Parameters are a flat dict under the names a Hugging Face checkpoint has, each linear as
[in_features, out_features]; `checkpoint_tensors` transposes them for the file.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, jax.Array]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the decoder; every linear width is a multiple of 128, so every layout holds it."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 768
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 256
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Normal(0, 0.02), and the projections into the residual stream smaller by sqrt(2 layers)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    into_residual = 0.02 / np.sqrt(2 * config.num_hidden_layers)
    params = {
        "model.embed_tokens.weight": 0.02 * jax.random.normal(key, (config.vocab_size, hidden)),
        "model.norm.weight": jnp.ones(hidden),
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, shape in shapes.items():
            key, sub = jax.random.split(key)
            std = into_residual if name.endswith(("o_proj", "down_proj")) else 0.02
            params[f"{prefix}.{name}.weight"] = std * jax.random.normal(sub, shape)
        params[f"{prefix}.input_layernorm.weight"] = jnp.ones(hidden)
        params[f"{prefix}.post_attention_layernorm.weight"] = jnp.ones(hidden)
    return params


def apply(params: Params, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    """Logits [B, T, vocab] of tokens int32 [B, T]."""
    positions = jnp.arange(tokens.shape[1])
    cos, sin = _rope(positions, config)
    causal = positions[:, None] >= positions[None, :]
    x = params["model.embed_tokens.weight"][tokens]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        h = _rms_norm(x, params[f"{prefix}.input_layernorm.weight"], config.rms_norm_eps)
        x = x + _attention(params, f"{prefix}.self_attn", h, cos, sin, causal, config)
        h = _rms_norm(x, params[f"{prefix}.post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = jax.nn.silu(h @ params[f"{prefix}.mlp.gate_proj.weight"])
        up = h @ params[f"{prefix}.mlp.up_proj.weight"]
        x = x + (gate * up) @ params[f"{prefix}.mlp.down_proj.weight"]
    x = _rms_norm(x, params["model.norm.weight"], config.rms_norm_eps)
    return x @ params["model.embed_tokens.weight"].T


def loss(params: Params, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    """Mean cross entropy in nats of predicting tokens [B, T + 1] one ahead."""
    logits = apply(params, tokens[:, :-1], config)
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def checkpoint_tensors(params: Params) -> dict[str, np.ndarray]:
    """The parameters as a checkpoint stores them: f16, linears as [out_features, in_features]."""
    tensors = {}
    for name, value in params.items():
        array = np.asarray(value, np.float32)
        is_linear = name.endswith("_proj.weight")
        tensors[name] = np.ascontiguousarray(array.T if is_linear else array).astype(np.float16)
    return tensors


def _rms_norm(x, weight, eps):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _rope(positions, config):
    """cos and sin [T, head_dim / 2]; the halves of a head are rotated against each other."""
    half = config.head_dim // 2
    angles = positions[:, None] / config.rope_theta ** (jnp.arange(half) / half)
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x, cos, sin):
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _attention(params, name, x, cos, sin, causal, config):
    batch, length, _ = x.shape
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q = (x @ params[f"{name}.q_proj.weight"]).reshape(batch, length, heads, dim)
    k = (x @ params[f"{name}.k_proj.weight"]).reshape(batch, length, kv_heads, dim)
    v = (x @ params[f"{name}.v_proj.weight"]).reshape(batch, length, kv_heads, dim)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    # Heads first: twice as fast on a CPU as products over strided heads.
    q, k, v = q.transpose(0, 2, 3, 1, 4), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkgtd,bksd->bkgts", q, k) / np.sqrt(dim)
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    mixed = jnp.einsum("bkgts,bksd->bkgtd", weights, v).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, heads * dim) @ params[f"{name}.o_proj.weight"]
