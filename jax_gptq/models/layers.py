"""Norms, embedding, output head, and linear layers that are dense or quantized alike."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jax_gptq.models.config import DecoderConfig
from jax_gptq.models.table import table_logits
from jax_gptq.nnx import GptqLinear

_INIT = nnx.initializers.normal(0.02)


def dense(
    in_features: int, out_features: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Linear:
    """A float layer. HIGHEST: on GPU and TPU an f32 dot would otherwise be less than f32."""
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=bias,
        param_dtype=dtype,
        kernel_init=_INIT,
        precision=jax.lax.Precision.HIGHEST,
        rngs=rngs,
    )


class QuantizedLinear(GptqLinear):
    """A `GptqLinear` that knows with which others it shares an act-order.

    Attributes:
      order: layers with the same name here have equal `perm` arrays, bit for bit; None: unknown.
    """

    order: str | None = None


class FusedLinear(QuantizedLinear):
    """Several layers of one input as one (see `fuse_projections`).

    Attributes:
      ends: where the output of each of them but the last ends.
    """

    ends: tuple[int, ...] = ()


def project(x: Array, layers: Sequence[Any]) -> list[Array]:
    """Each layer on the same x; columns that all of them want in one act-order are gathered once.

    x [..., in_features] -> one [..., out_features] per layer, whether or not they are fused.
    """
    if isinstance(layers[0], FusedLinear):
        return jnp.split(layers[0](x), layers[0].ends, axis=-1)
    perm = _common_perm(layers)
    if perm is None:
        return [layer(x) for layer in layers]
    x = jnp.take(x, perm, axis=-1)
    return [layer.linear(x, x_permuted=True) for layer in layers]


def _common_perm(layers: Sequence[Any]) -> Array | None:
    first = layers[0]
    if not isinstance(first, QuantizedLinear) or first.order is None:
        return None
    kind = type(first.weight.get_value())
    for layer in layers:
        if not isinstance(layer, QuantizedLinear) or layer.order != first.order:
            return None
        if type(layer.weight.get_value()) is not kind:  # one of them was repacked by itself
            return None
    return getattr(first.weight.get_value(), "perm", None)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight, in f32 (Zhang and Sennrich, arXiv:1910.07467).

    `unit_offset`: times 1 + weight instead, as Gemma stores it.
    """

    def __init__(self, features: int, *, eps: float, unit_offset: bool, dtype: DTypeLike):
        start = jnp.zeros if unit_offset else jnp.ones
        self.weight = nnx.Param(start((features,), dtype))
        self.eps = eps
        self.unit_offset = unit_offset

    def __call__(self, x: Array) -> Array:
        """x [..., features] -> the same shape and dtype."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        weight = self.weight[...].astype(jnp.float32)
        return (y * (weight + 1 if self.unit_offset else weight)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std * weight + bias, in f32 (Ba et al., arXiv:1607.06450)."""

    def __init__(self, features: int, *, eps: float, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones((features,), dtype))
        self.bias = nnx.Param(jnp.zeros((features,), dtype))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """x [..., features] -> the same shape and dtype."""
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        y = y * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x.dtype)


class Embedding(nnx.Module):
    """A table [count, features]; read by rows, or as an output head (tied or not) by all.

    Attributes:
      dtype: of what the rows are given in; the table may be stored in another one.
    """

    def __init__(self, count: int, features: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        table = _INIT(rngs.params(), (count, features), dtype)
        self.weight = nnx.Param(table)
        self.dtype = dtype

    def __call__(self, ids: Array) -> Array:
        """ids int [...] -> [..., features]."""
        # Behind the barrier a 16-bit table is not loop-invariant: XLA's CPU backend would gather
        # from a float32 copy of all of it, made ahead of the loop over tokens.
        table, ids = jax.lax.optimization_barrier((self.weight[...], ids))
        return jnp.take(table, ids, axis=0).astype(self.dtype)

    def logits(self, x: Array) -> Array:
        """x [..., features] -> f32 [..., count]: the table as the output head."""
        return table_logits(x, self.weight[...])


def activate(name: str, x: Array) -> Array:
    """The activation function of `DecoderConfig.activation`, in f32."""
    y = x.astype(jnp.float32)
    if name == "silu":
        y = jax.nn.silu(y)
    elif name == "relu":
        y = jax.nn.relu(y)
    else:
        y = jax.nn.gelu(y, approximate=name == "gelu_tanh")
    return y.astype(x.dtype)


def head_logits(config: DecoderConfig, head: Any, x: Array) -> Array:
    """x [..., hidden_size] -> f32 [..., vocab_size] through a table or a quantized head."""
    if isinstance(head, Embedding):
        y = head.logits(x)
    else:
        y = head.linear(x, preferred_element_type=jnp.float32)
    if config.logits_softcap is None:
        return y
    return config.logits_softcap * jnp.tanh(y / config.logits_softcap)
