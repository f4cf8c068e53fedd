"""The grid of a group: scale and zero point from the weights, and rounding onto it."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

# The clip search of GPTQ's reference code: shrink the range by 0 to 79 percent.
_CLIP_STEPS = 80
_CLIP_GRID = 100


def group_grid(
    w: Array, *, bits: int, sym: bool, mse: float, scale_dtype: DTypeLike
) -> tuple[Array, Array]:
    """Scale and zero point of one group, per column.

    The range always holds zero. Symmetric: z = 2**(bits-1), scale = 2 max|w| / (2**bits - 1), as
    GPTQ's reference code. `mse` > 0 searches the clipping that minimises sum |w - wq|**mse.

    Args:
      w: f32 [rows, N].
      scale_dtype: scales are rounded to it before anything is measured with them.

    Returns:
      scales f32 [N], values of `scale_dtype`; zeros f32 [N], integers from 0 to 2**bits - 1.
    """
    low = jnp.minimum(w.min(0), 0.0)
    high = jnp.maximum(w.max(0), 0.0)
    if sym:
        high = jnp.maximum(-low, high)
        low = -high
    empty = (low == 0) & (high == 0)
    low, high = jnp.where(empty, -1.0, low), jnp.where(empty, 1.0, high)

    def candidate(shrink):
        return _grid(shrink * low, shrink * high, bits, sym, scale_dtype)

    scales, zeros = candidate(1.0)
    if mse <= 0:
        return scales, zeros

    def step(i, best):
        best_error, best_scales, best_zeros = best
        scales, zeros = candidate(1.0 - i / _CLIP_GRID)
        rounded = dequantize_codes(round_codes(w, scales, zeros, bits), scales, zeros)
        error = jnp.sum(jnp.abs(rounded - w) ** mse, axis=0)
        better = error < best_error
        return (
            jnp.where(better, error, best_error),
            jnp.where(better, scales, best_scales),
            jnp.where(better, zeros, best_zeros),
        )

    start = (jnp.full_like(scales, jnp.inf), scales, zeros)
    return jax.lax.fori_loop(0, _CLIP_STEPS, step, start)[1:]


def _grid(low, high, bits, sym, scale_dtype):
    levels = 2**bits - 1
    scales = storable_scales((high - low) / levels, scale_dtype)
    if sym:
        return scales, jnp.full_like(scales, 2 ** (bits - 1))
    return scales, jnp.clip(jnp.round(-low / scales), 0, levels)


def storable_scales(scales: Array, scale_dtype: DTypeLike) -> Array:
    """f32 scales rounded to the finite, positive values of `scale_dtype`."""
    info = jnp.finfo(scale_dtype)
    # Not a pair of casts: XLA may leave those out, and does so on GPUs.
    rounded = jax.lax.reduce_precision(scales, info.nexp, info.nmant)
    # Below the smallest normal number a scale has few bits left, and some kernels flush it to zero.
    return jnp.clip(rounded, float(info.tiny), float(info.max))


def round_codes(w: Array, scales: Array, zeros: Array, bits: int) -> Array:
    """Nearest codes, f32 integers from 0 to 2**bits - 1; arguments broadcast."""
    return jnp.clip(jnp.round(w / scales) + zeros, 0, 2**bits - 1)


def dequantize_codes(codes: Array, scales: Array, zeros: Array) -> Array:
    """scales * (codes - zeros); arguments broadcast."""
    return scales * (codes - zeros)
