"""The CUDA kernels on a GPU, against float64: run where there is one and the module was built."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import random_weight, rel_error

import jax_gptq
from jax_gptq import ffi
from jax_gptq.stores.cuda import target

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu" or not ffi.has("cuda"),
    reason="needs a GPU and jax_gptq built with CUDA",
)

LIMIT = {"bfloat16": 5e-3, "float16": 6e-4}


@functools.partial(jax.jit, static_argnames="out")
def matmul(x, store, bias=None, out=None):
    return jax_gptq.gptq_matmul(x, store, "cuda", bias=bias, preferred_element_type=out)


def rows(rng, m, k, dtype):
    return jnp.asarray(rng.normal(size=(m, k)), dtype)


def double(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 32, 48, 64, 96, 128, -1])
def test_formats(bits, group_size, dtype):
    rng = np.random.default_rng(bits * 1000 + group_size + 1)
    for k, n in ((256, 192), (392, 257), (130, 100)):
        weight, matrix = random_weight(rng, k, n, bits=bits, group_size=group_size)
        store = jax_gptq.prepare(weight, layout="cuda")
        bias = rng.normal(size=n).astype(np.float32)
        for m in (1, 2, 3, 7, 16, 17, 33, 100):
            x = rows(rng, m, k, dtype)
            found = matmul(x, store, jnp.asarray(bias))
            assert rel_error(double(found), double(x) @ matrix + bias) < LIMIT[dtype], (m, k, n)


@pytest.mark.parametrize("scale_dtype", ["float16", "float32"])
@pytest.mark.parametrize("m", [1, 2, 4, 5, 16, 17, 64, 129, 300, 1100])
def test_many_tiles(m, scale_dtype):
    rng = np.random.default_rng(m)
    for k, n in ((1024, 1000), (4096, 1536)):
        weight, matrix = random_weight(rng, k, n, scale_dtype=scale_dtype)
        x = rows(rng, m, k, "bfloat16")
        found = matmul(x, jax_gptq.prepare(weight, layout="cuda"))
        assert rel_error(double(found), double(x) @ matrix) < LIMIT["bfloat16"]


@pytest.mark.parametrize("m", [1, 16, 40])
def test_act_order(m):
    rng = np.random.default_rng(m)
    weight, matrix = random_weight(rng, 512, 320, g_idx="random")
    x = rows(rng, m, 512, "float16")
    found = matmul(x, jax_gptq.prepare(weight, layout="cuda"))
    assert rel_error(double(found), double(x) @ matrix) < LIMIT["float16"]


@pytest.mark.parametrize("m", [1, 2, 4, 16, 33, 200])
def test_small_integers_are_exact(m):
    rng = np.random.default_rng(m)
    weight, matrix = random_weight(rng, 256, 256, exact=True, group_size=64)
    x = jnp.asarray(rng.integers(-1, 2, (m, 256)), "float16")
    store = jax_gptq.prepare(weight, layout="cuda")
    expected = double(x) @ matrix
    np.testing.assert_array_equal(np.asarray(matmul(x, store)), expected.astype(np.float16))
    sums = matmul(x, store, out="float32")
    np.testing.assert_array_equal(np.asarray(sums), expected.astype(np.float32))


@pytest.mark.parametrize("m", [1, 2, 4, 16, 64, 256])
def test_hundred_runs_give_the_same_bits(m):
    rng = np.random.default_rng(m)
    weight, _ = random_weight(rng, 4096, 1024)
    store = jax_gptq.prepare(weight, layout="cuda")
    x = rows(rng, m, 4096, "bfloat16")
    first = matmul(x, store)
    for _ in range(100):
        assert bool((matmul(x, store) == first).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("g_idx", [None, "random"])
def test_device_repack_is_a_bijection(bits, g_idx):
    weight, _ = random_weight(np.random.default_rng(bits), 384, 200, bits=bits, g_idx=g_idx)
    back = jax.jit(lambda store: store.unpack())(jax_gptq.prepare(weight, layout="cuda"))
    np.testing.assert_array_equal(np.asarray(back.qweight), np.asarray(weight.qweight))
    np.testing.assert_array_equal(np.asarray(back.qzeros), np.asarray(weight.qzeros))


def test_decode_loop_in_a_jitted_scan():
    """A loop over tokens, each step a few products: what XLA records as command buffers."""
    rng = np.random.default_rng(0)
    weight, matrix = random_weight(rng, 512, 512)
    store = jax_gptq.prepare(weight, layout="cuda")

    @jax.jit
    def loop(x, store):
        def step(x, _):
            y = jax_gptq.gptq_matmul(x, store, "cuda")
            return (y / jnp.linalg.norm(y.astype(jnp.float32))).astype(x.dtype), y

        return jax.lax.scan(step, x, length=8)[1]

    x = rows(rng, 1, 512, "bfloat16")
    for _ in range(3):
        found = loop(x, store)
    assert rel_error(double(found[0]), double(x) @ matrix) < LIMIT["bfloat16"]
    assert target("cuda", "matmul") in loop.lower(x, store).as_text()
