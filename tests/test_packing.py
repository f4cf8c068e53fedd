"""Bit streams against an oracle that places one bit at a time."""

import jax
import numpy as np
import pytest
from oracle import pack_bits

from jax_gptq.packing import pack_codes, packed_rows, unpack_codes, unpack_codes_on_host


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 7, 31, 32, 33, 100, 256])
def test_streams(bits, count):
    rng = np.random.default_rng(bits * 1000 + count)
    codes = rng.integers(0, 2**bits, (count, 5)).astype(np.uint8)
    words = pack_bits(codes, bits).view(np.uint32)
    assert words.shape == (packed_rows(count, bits), 5)
    np.testing.assert_array_equal(pack_codes(codes, bits), words)
    np.testing.assert_array_equal(unpack_codes_on_host(words, bits, count), codes)
    np.testing.assert_array_equal(
        jax.jit(unpack_codes, static_argnums=(1, 2))(words, bits, count), codes
    )


def test_unpack_ignores_what_follows_the_stream():
    codes = np.arange(10, dtype=np.uint8)[:, None]
    words = np.asarray(pack_codes(codes, 4))
    poisoned = np.concatenate([words, np.full((3, 1), 0xFFFFFFFF, np.uint32)])
    np.testing.assert_array_equal(unpack_codes(poisoned, 4, 10), codes)


def test_codes_ten_and_twentyone_straddle_at_three_bits():
    codes = np.zeros((32, 1), np.uint8)
    codes[[10, 21]] = 7
    words = np.asarray(pack_codes(codes, 3))[:, 0]
    assert words.tolist() == [0b11 << 30, 0b1 | 1 << 31, 0b11]
