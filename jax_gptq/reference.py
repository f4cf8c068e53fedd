"""The specification: what every backend must compute, in plain `jax.numpy`."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jax_gptq.packing import unpack_codes
from jax_gptq.weight import GptqWeight


def dequantize(weight: GptqWeight, dtype: DTypeLike = jnp.float32) -> Array:
    """W [in_features, out_features] = scales * (q - qzeros), computed in f32, rounded to `dtype`.

    q - qzeros is taken in integers: rounding scale * zero into one constant would lose bits. With
    float16 scales the f32 product is exact (11 + 9 significant bits).
    """
    codes = unpack_codes(weight.qweight, weight.bits, weight.in_features).astype(jnp.int32)
    centred = (codes - _per_row(weight, weight.qzeros.astype(jnp.int32))).astype(jnp.float32)
    return (_per_row(weight, weight.scales.astype(jnp.float32)) * centred).astype(dtype)


def _per_row(weight: GptqWeight, per_group: Array) -> Array:
    """Spread [G, N] over the rows of W: [K, N]."""
    if weight.g_idx is not None:
        return jnp.take(per_group, weight.g_idx, axis=0)
    # A repeat is a broadcast that XLA fuses; a gather would be materialised.
    rows = min(weight.group_size, weight.in_features)
    return jnp.repeat(per_group, rows, axis=0)[: weight.in_features]


def reference_matmul(x: Array, weight: GptqWeight, bias: Array | None = None) -> Array:
    """x [..., K] @ W + bias -> [..., N] in x's dtype: f32 arithmetic, one rounding."""
    return dense_matmul(x, dequantize(weight), bias)


def dense_matmul(x: Array, w: Array, bias: Array | None) -> Array:
    """x [..., K] @ w f32 [K, N] + bias in f32, rounded once to x's dtype.

    HIGHEST: on GPU and TPU an f32 dot would otherwise run in tf32 or bf16 passes.
    """
    y = jnp.matmul(
        x.astype(jnp.float32),
        w,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    if bias is not None:
        y += bias.astype(jnp.float32)
    return y.astype(x.dtype)
