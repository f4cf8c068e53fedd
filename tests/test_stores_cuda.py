"""The `cuda` layout: an exact bijection where it can hold the weight, refused by name elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import RawWeight, assert_same_weight, random_weight

from jax_gptq import prepare
from jax_gptq.errors import LayoutError
from jax_gptq.stores.cuda import CudaStore


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(
    "k, n, group_size",
    [(128, 64, 32), (320, 33, 128), (100, 1, -1), (96, 70, 48), (7, 130, 128), (257, 65, 16)],
)
def test_unpack_inverts_pack(bits, k, n, group_size):
    weight, _ = random_weight(
        np.random.default_rng(bits * 1000 + k), k, n, bits=bits, group_size=group_size
    )
    store = CudaStore.pack(weight)
    assert store.perm is None
    assert_same_weight(jax.jit(CudaStore.unpack)(store), weight)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("k, group_size", [(256, 64), (320, 128), (130, 16)])
def test_act_order_sorts_rows(bits, k, group_size):
    weight, _ = random_weight(
        np.random.default_rng(k), k, 70, bits=bits, group_size=group_size, g_idx="random"
    )
    store = CudaStore.pack(weight)
    g_idx, perm = np.asarray(weight.g_idx), np.asarray(store.perm)
    np.testing.assert_array_equal(g_idx[perm], np.arange(k) // group_size)
    assert_same_weight(jax.jit(CudaStore.unpack)(store), weight)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32])
def test_scales_keep_their_dtype(dtype):
    weight, _ = random_weight(np.random.default_rng(0), 64, 48, group_size=32, scale_dtype=dtype)
    store = CudaStore.pack(weight)
    assert store.scales.dtype == dtype
    assert_same_weight(store.unpack(), weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_layout_is_the_one_drawn(bits):
    """Every code is where layout.h says, and padding dequantizes to zero."""
    k, n, size = 100, 70, 32
    raw = RawWeight(np.random.default_rng(bits), k, n, bits=bits, group_size=size)
    store = CudaStore.pack(raw.weight())
    data = np.ascontiguousarray(store.codes).view(np.uint8).reshape(-1)
    steps = -(-k // 64)
    assert data.size == 2 * steps * 2048 * bits // 4
    for row in range(steps * 64):
        for column in range(128):
            lane = 4 * (column % 8) + row % 8 // 2
            register = column % 16 // 8 + 2 * (row % 16 // 8)
            fragment, part = column % 64 // 16, row % 64 // 16
            tile = (column // 64 * steps + row // 64) * 2048 * bits // 4
            if bits == 4:
                nibble = register + 4 * (row % 2)
                at = tile + fragment * 512 + lane * 16 + part * 4 + nibble // 2
                code = data[at] >> 4 * (nibble % 2) & 15
            else:
                byte = register // 2 * 4 + row % 2 * 2 + register % 2
                at = tile + part // 2 * 2048 + fragment * 512 + lane * 16 + part % 2 * 8 + byte
                code = data[at]
            if column >= n:
                assert code == 0
            elif row >= k:
                assert code == raw.z[-1, column]
            else:
                assert code == raw.q[row, column], (row, column)
    for padded in (store.scales, store.qzeros):
        assert (np.asarray(padded)[1, :, n - 64 :] == 0).all()


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(group_size=100), "group_size 100"),
        (dict(group_size=24), "group_size 24"),
        (dict(group_size=64, g_idx=np.arange(256) // 65), "64 rows each"),
    ],
)
def test_refused_by_name(options, reason):
    weight, _ = random_weight(np.random.default_rng(0), 256, 64, **options)
    assert reason in CudaStore.unsupported(weight)
    with pytest.raises(LayoutError, match=reason):
        prepare(weight, layout="cuda")


def test_activations_that_the_kernels_take():
    weight, _ = random_weight(np.random.default_rng(0), 64, 64, group_size=32)
    store = CudaStore.pack(weight)
    assert store.supports(jnp.float16, None) is None
    assert store.supports(jnp.bfloat16, None) is None
    assert "float32" in store.supports(jnp.float32, None)
    assert "int8" in store.supports(jnp.float16, "int8")
