"""The `cpu` layout: an exact bijection for every bit width, group structure and shape."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import assert_same_weight, random_weight

from jax_gptq import host
from jax_gptq.errors import LayoutError
from jax_gptq.packing import pack_codes
from jax_gptq.stores.cpu import CpuStore


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    "k, n, group_size",
    [(128, 64, 32), (320, 33, 128), (100, 1, 100), (96, 70, 24), (7, 5, 128), (64, 31, 8)],
)
def test_unpack_inverts_pack(bits, k, n, group_size):
    weight = random_weight(
        np.random.default_rng(bits * 1000 + k + n), k, n, bits=bits, group_size=group_size
    )[0]
    store = CpuStore.pack(weight)
    assert store.perm is None
    assert_same_weight(jax.jit(CpuStore.unpack)(store), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["shuffled", "unequal", "empty group", "sorted unequal"])
def test_any_g_idx(bits, kind):
    rng = np.random.default_rng(bits)
    k, n, groups = 224, 40, 5
    if kind == "shuffled":
        g_idx = rng.permutation(np.arange(k) // 48)
    elif kind == "empty group":
        g_idx = rng.choice([0, 1, 2, 4], k)
    else:
        g_idx = rng.choice(groups, k, p=[0.5, 0.3, 0.1, 0.08, 0.02])
        g_idx = np.sort(g_idx) if kind == "sorted unequal" else g_idx
    weight = random_weight(
        np.random.default_rng(bits), k, n, bits=bits, group_size=48, g_idx=g_idx
    )[0]
    store = CpuStore.pack(weight)
    assert_same_weight(jax.jit(CpuStore.unpack)(store), weight)
    np.testing.assert_array_equal(np.sort(g_idx), g_idx[np.asarray(store.perm)])


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32])
def test_scales_keep_their_dtype(dtype):
    weight = random_weight(np.random.default_rng(0), 64, 48, group_size=32, scale_dtype=dtype)[0]
    store = CpuStore.pack(weight)
    assert store.scales.dtype == dtype
    assert_same_weight(store.unpack(), weight)


def test_unpack_works_on_shapes_and_stacks():
    stores = [
        CpuStore.pack(random_weight(np.random.default_rng(s), 96, 40, group_size=32)[0])
        for s in range(3)
    ]
    shapes = jax.eval_shape(CpuStore.unpack, stores[0])
    assert shapes.qweight.shape == (12, 40) and shapes.g_idx is None
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stores)
    unpacked = jax.vmap(CpuStore.unpack)(stacked)
    np.testing.assert_array_equal(unpacked.qweight[1], stores[1].unpack().qweight)


def test_tile_words_are_what_the_docstring_draws():
    codes = np.zeros((64, 33), np.uint8)
    codes[32 + 13, 32] = 9  # chunk 1, row 13 = 8 * 1 + 4 + 1: word 1, byte 1, high nibble
    weight = random_weight(np.random.default_rng(0), 64, 33, group_size=64)[0]
    weight = dataclasses.replace(weight, qweight=pack_codes(jnp.asarray(codes), 4))
    tiles = np.asarray(CpuStore.pack(weight).tiles)
    assert tiles.shape == (2, 2, 4, 32)
    assert tiles[1, 1, 1, 0] == 9 << 12 and np.count_nonzero(tiles) == 1


def test_packed_bytes_are_those_of_the_codes():
    store = CpuStore.pack(random_weight(np.random.default_rng(0), 1024, 256)[0])
    assert store.tiles.nbytes == 1024 * 256 // 2
    store = CpuStore.pack(random_weight(np.random.default_rng(0), 1024, 256, bits=3)[0])
    assert store.tiles.nbytes == 1024 * 256 * 3 // 8


def test_groups_that_are_too_small_are_refused_in_words():
    assert (
        CpuStore.unsupported(random_weight(np.random.default_rng(0), 128, 8, group_size=8)[0])
        is None
    )
    weight = random_weight(np.random.default_rng(0), 128, 8, group_size=4)[0]
    assert "too small" in CpuStore.unsupported(weight)
    with pytest.raises(LayoutError, match="too small"):
        CpuStore.pack(weight)


def test_packing_a_large_layer_needs_little_memory():
    import tracemalloc

    weight = random_weight(np.random.default_rng(0), 4096, 4096)[0]
    jax.block_until_ready(weight)
    tracemalloc.start()
    store = CpuStore.pack(weight)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < store.tiles.nbytes + 8 * (1 << 23)


@pytest.mark.parametrize("dtype", [np.uint32, jnp.bfloat16])
def test_host_memory_is_taken_over_uncopied(dtype):
    values = host.empty((5, 3), dtype)
    values[...] = 7
    array = jax.device_put(values, jax.devices("cpu")[0])
    assert array.unsafe_buffer_pointer() == values.ctypes.data
    assert array.dtype == dtype and array.shape == (5, 3) and (array == 7).all()
