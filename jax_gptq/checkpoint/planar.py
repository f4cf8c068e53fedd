"""GPTQModel's `gptq_p` order: bit planes instead of one dense stream.

Every 32 codes are `bits` words, low plane first, and a plane of width w is a dense stream of its
own: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1 bits. 2, 4 and 8 bits are one plane, which is
the ordinary order (gptqmodel/utils/planar_packing.py).
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jax_gptq.packing import pack_codes, unpack_codes

PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


@functools.partial(jax.jit, static_argnums=1)
def stream_from_planar(words: Array, bits: int) -> Array:
    """uint32 [blocks * bits, N] in planar order -> the dense stream of the same shape."""
    if bits not in PLANES:
        return words
    columns = words.shape[1]
    blocks = words.reshape(-1, bits, columns)
    codes = jnp.zeros((blocks.shape[0] * 32, columns), jnp.uint8)
    offset = 0
    for width in PLANES[bits]:
        plane = blocks[:, offset : offset + width].reshape(-1, columns)
        codes |= unpack_codes(plane, width, codes.shape[0]) << offset
        offset += width
    return pack_codes(codes, bits)


@functools.partial(jax.jit, static_argnums=1)
def planar_from_stream(words: Array, bits: int) -> Array:
    """The inverse of `stream_from_planar`."""
    if bits not in PLANES:
        return words
    columns = words.shape[1]
    codes = unpack_codes(words, bits, words.shape[0] // bits * 32)
    planes, offset = [], 0
    for width in PLANES[bits]:
        plane = pack_codes(codes >> offset & (2**width - 1), width)
        planes.append(plane.reshape(-1, width, columns))
        offset += width
    return jnp.concatenate(planes, axis=1).reshape(-1, columns)
