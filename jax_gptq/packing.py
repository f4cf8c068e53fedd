"""Codes <-> dense little-endian bit streams.

Code i of a column occupies bits [i * bits, (i + 1) * bits) of that column's stream, least
significant bit first; the stream is cut into 32-bit words. Codes may straddle words (3, 5, 6, 7
bits). The pattern repeats every `32 / gcd(bits, 32)` codes, and both functions work period by
period, so that XLA sees static shifts only.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array


def packed_rows(count: int, bits: int) -> int:
    """Number of 32-bit words that hold `count` codes of `bits` bits."""
    return -(-count * bits // 32)


def _period(bits: int) -> tuple[int, int]:
    """Words and codes after which the stream is word-aligned again."""
    divisor = math.gcd(bits, 32)
    return bits // divisor, 32 // divisor


def pack_codes(codes: Array, bits: int) -> Array:
    """Pack `codes` (unsigned integers [K, N], each < 2**bits) into uint32 [ceil(K*bits/32), N].

    Bits past the last code are zero.
    """
    count, columns = codes.shape
    words, per = _period(bits)
    periods = -(-count // per)
    codes = jnp.pad(jnp.asarray(codes).astype(jnp.uint32), ((0, periods * per - count), (0, 0)))
    codes = codes.reshape(periods, per, columns)
    packed = []
    for word in range(words):
        value = jnp.zeros((periods, columns), jnp.uint32)
        for i in range(word * 32 // bits, min(-(-(word + 1) * 32 // bits), per)):
            shift = i * bits - word * 32
            code = codes[:, i]
            value |= code << shift if shift >= 0 else code >> -shift
        packed.append(value)
    return jnp.stack(packed, axis=1).reshape(periods * words, columns)[: packed_rows(count, bits)]


def unpack_codes(packed: Array, bits: int, count: int) -> Array:
    """Unpack uint32 [>= ceil(count*bits/32), N] into codes uint8 [count, N]."""
    columns = packed.shape[1]
    words, per = _period(bits)
    periods = -(-count // per)
    packed = packed[: periods * words]
    packed = jnp.pad(packed, ((0, periods * words - packed.shape[0]), (0, 0)))
    packed = packed.reshape(periods, words, columns)
    start = np.arange(per, dtype=np.uint32) * bits
    word, shift = start // 32, (start % 32)[None, :, None]
    # words == 1 broadcasts one word over its codes instead of gathering it once per code.
    low = packed if words == 1 else packed[:, word]
    codes = low >> shift
    if words > 1:
        straddles = shift + bits > 32
        high = packed[:, np.minimum(word + 1, words - 1)]
        codes |= jnp.where(straddles, high << np.where(straddles, 32 - shift, 0), 0)
    codes = (codes & np.uint32(2**bits - 1)).astype(jnp.uint8)
    return codes.reshape(periods * per, columns)[:count]


def unpack_codes_on_host(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`unpack_codes` in NumPy: nothing is compiled while a model is loaded."""
    codes = np.empty((count, packed.shape[1]), np.uint8)
    words, per = _period(bits)
    for i in range(min(per, count)):
        word, shift = divmod(i * bits, 32)
        field = packed[word::words] >> np.uint32(shift)
        if shift + bits > 32:
            high = packed[word + 1 :: words]
            field[: len(high)] |= high << np.uint32(32 - shift)
        codes[i::per] = (field & np.uint32(2**bits - 1))[: len(codes[i::per])]
    return codes
