"""The native host kernel against float64: every instruction set this CPU runs, every layout."""

import dataclasses
import functools
import os

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from child import run_script
from jax.sharding import AxisType, PartitionSpec
from oracle import random_weight, rel_error

import jax_gptq
from jax_gptq import ffi
from jax_gptq.models.table import table_logits
from jax_gptq.packing import pack_codes, unpack_codes
from jax_gptq.stores.cpu import CpuStore
from jax_gptq.weight import GptqWeight

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not ffi.has("cpu"), reason="the module _cpu was not built"),
]

KERNELS = ffi.load("cpu").kernels() if ffi.has("cpu") else []
# Relative Frobenius error against float64. f32 is the requirement; the others are the rounding of
# the output (1.66e-3 and 2.08e-4 on average) with room for chance.
TOLERANCE = {"float32": 1e-6, "bfloat16": 2.5e-3, "float16": 3e-4}


@pytest.fixture(params=KERNELS)
def kernel(request):
    """Runs the test once per instruction set."""
    ffi.load("cpu").use_kernel(request.param)
    yield request.param
    ffi.load("cpu").use_kernel()


def groups_of(weight):
    if weight.g_idx is not None:
        return np.asarray(weight.g_idx)
    return np.arange(weight.in_features) // weight.group_size


def dense(weight):
    """W in float64."""
    codes = np.asarray(unpack_codes(weight.qweight, weight.bits, weight.in_features), np.float64)
    group = groups_of(weight)
    zeros = np.asarray(weight.qzeros, np.float64)
    return np.asarray(weight.scales, np.float64)[group] * (codes - zeros[group])


@functools.partial(jax.jit, static_argnames=("activations", "x_permuted"))
def run(x, store, bias=None, activations=None, x_permuted=False):
    return jax_gptq.gptq_matmul(
        x, store, "cpu", bias=bias, activations=activations, x_permuted=x_permuted
    )


def same_bits(a, b):
    return np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_odd_shapes(kernel, bits, x_dtype):
    rng = np.random.default_rng(bits)
    for k, n, group_size, m in [(320, 70, 128, 1), (100, 33, 100, 3), (77, 1, 24, 12)]:
        weight = random_weight(rng, k, n, bits=bits, group_size=group_size)[0]
        x = jnp.asarray(rng.standard_normal((m, k)), x_dtype)
        bias = jnp.asarray(rng.standard_normal(n), jnp.float32)
        y = run(x, CpuStore.pack(weight), bias)
        assert y.shape == (m, n) and y.dtype == x_dtype
        expected = np.asarray(x, np.float64) @ dense(weight) + np.asarray(bias, np.float64)
        # A handful of outputs may round worse than the average.
        assert rel_error(y, expected) < TOLERANCE[x_dtype] * (
            1 if n > 1 or x_dtype == "float32" else 2
        )


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_act_order_unequal_and_empty_groups(kernel, bits):
    rng = np.random.default_rng(bits)
    k, n = 260, 50
    for g_idx in (
        rng.permutation(np.arange(k) // 52),
        rng.choice([0, 1, 3, 4], k, p=[0.7, 0.2, 0.09, 0.01]),
    ):
        weight = random_weight(rng, k, n, bits=bits, group_size=52, g_idx=g_idx)[0]
        store = CpuStore.pack(weight)
        for m in (2, 9):
            x = rng.standard_normal((m, k)).astype(np.float32)
            y = run(x, store)
            assert rel_error(y, x @ dense(weight)) < 1e-6
            permuted = run(x[:, np.asarray(store.perm)], store, x_permuted=True)
            assert same_bits(permuted, y)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32])
def test_scale_dtypes(kernel, dtype):
    rng = np.random.default_rng(0)
    weight = random_weight(rng, 256, 40, group_size=64, scale_dtype=dtype)[0]
    x = rng.standard_normal((5, 256)).astype(np.float32)
    assert rel_error(run(x, CpuStore.pack(weight)), x @ dense(weight)) < 1e-6


def test_every_kernel_gives_the_same_bits():
    rng = np.random.default_rng(3)
    module = ffi.load("cpu")
    for bits in (2, 3, 4, 8):
        store = CpuStore.pack(random_weight(rng, 288, 66, bits=bits, group_size=96)[0])
        for m in (1, 6, 13):
            x = jnp.asarray(rng.standard_normal((m, 288)), jnp.float32)
            outputs = []
            for name in KERNELS:
                module.use_kernel(name)
                outputs.append(np.asarray(run(x, store)))
            module.use_kernel()
            assert all(same_bits(y, outputs[0]) for y in outputs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_kernel_gives_the_same_bits_of_table_logits(dtype):
    rng = np.random.default_rng(4)
    table = rng.standard_normal((301, 203)).astype(dtype)
    table[:5] *= 2.0**-14  # subnormal in float16
    x = rng.standard_normal((6, 203)).astype(np.float32)
    module, outputs = ffi.load("cpu"), []
    for name in KERNELS:
        module.use_kernel(name)
        outputs.append(np.asarray(jax.jit(table_logits)(x, table)))
        module.use_kernel()
    assert rel_error(outputs[0][:, :5], x @ table[:5].astype(np.float64).T) < 1e-6
    assert rel_error(outputs[0], x @ table.astype(np.float64).T) < 1e-6
    assert all(same_bits(y, outputs[0]) for y in outputs)


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activations", [None, "int8"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rows_do_not_depend_on_the_batch(kernel, bits, activations, x_dtype):
    """At every M: few rows and many rows take different paths to the same integers."""
    rng = np.random.default_rng(4)
    store = CpuStore.pack(random_weight(rng, 256, 40, bits=bits, group_size=64)[0])
    x = rng.standard_normal((135, 256)).astype(np.float32)
    x[5, 3] = 1e4  # an outlier, by f32 FMA
    x[130, 0] = np.nan
    x = jnp.asarray(x, x_dtype)
    y = run(x, store, activations=activations)
    assert same_bits(run(x, store, activations=activations), y)
    for rows in ([0], [5], [130], [134], range(3), range(4, 11), range(60, 97), range(128, 135)):
        rows = np.asarray(rows)
        assert same_bits(run(x[rows], store, activations=activations), np.asarray(y)[rows]), rows


def bound(x, weight):
    """2**-21 * sum over groups of max|x_g| * sum|W_g|, per output."""
    group, w = groups_of(weight), np.abs(dense(weight))
    return 2.0**-21 * sum(
        np.abs(x[:, group == g]).max(1, keepdims=True) * w[group == g].sum(0)
        for g in np.unique(group)
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "constant", "wide range", "q equals z"])
def test_fixed_point_bound_holds_for_every_output(kind, bits):
    rng = np.random.default_rng(bits)
    k, n = 4096, 64
    weight = random_weight(rng, k, n, bits=bits, group_size=32)[0]
    x = rng.standard_normal((3, k)).astype(np.float32)
    if kind == "heavy tails":
        x = x * np.abs(x) * rng.standard_normal((3, k)).astype(np.float32)
    elif kind == "constant":  # every term alike: the roundings of plain f32 sums would add up
        x[:] = np.float32(1.2345678)
        codes = jnp.full((k, n), 2**bits - 1, jnp.uint8)
        weight = dataclasses.replace(
            weight,
            qweight=pack_codes(codes, bits),
            qzeros=jnp.zeros_like(weight.qzeros),
            scales=jnp.full_like(weight.scales, 0.0123),
        )
    elif kind == "wide range":
        x *= np.exp2(rng.uniform(-3, 3, (3, k))).astype(np.float32)
        x *= np.exp2(np.repeat(rng.integers(-20, 20, k // 32), 32)).astype(np.float32)
    elif kind == "q equals z":  # rows that cancel must not leave the rounding of z * sum(x) behind
        codes = np.asarray(unpack_codes(weight.qweight, bits, k)).copy()
        codes[:] = np.repeat(np.asarray(weight.qzeros), 32, axis=0)
        codes[::32] ^= 1
        weight = dataclasses.replace(weight, qweight=pack_codes(jnp.asarray(codes), bits))
    y = np.asarray(run(x, CpuStore.pack(weight)), np.float64)
    assert (np.abs(y - x.astype(np.float64) @ dense(weight)) <= bound(x, weight)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_and_powers_of_two_are_exact(kernel, bits):
    rng = np.random.default_rng(bits)
    k, n = 160, 40
    weight = random_weight(rng, k, n, bits=bits, group_size=80)[0]
    scales = np.exp2(rng.integers(-6, 3, weight.scales.shape)).astype(np.float16)
    weight = dataclasses.replace(weight, scales=jnp.asarray(scales))
    store = CpuStore.pack(weight)
    for m in (1, 9):
        small = rng.integers(-15, 16, (m, k)).astype(np.float32)
        np.testing.assert_array_equal(run(small, store), small @ dense(weight))
        # One integer below 2**22 per row meets the others' zeros: nothing of it may be lost.
        large = np.zeros((m, k), np.float32)
        large[np.arange(m), rng.integers(0, k, m)] = rng.integers(-(2**22) + 1, 2**22, m)
        expected = (large @ dense(weight)).astype(np.float32)
        np.testing.assert_array_equal(run(large, store), expected)


def test_integers_below_2_to_the_22_keep_every_bit(kernel):
    """Ones pick out sums of integers that use all 22 bits and still fit f32."""
    k, n = 128, 32
    codes = np.zeros((k, n), np.uint8)
    codes[np.arange(n), np.arange(n)] = 1
    weight = GptqWeight(
        pack_codes(jnp.asarray(codes), 4),
        jnp.ones((1, n), jnp.float16),
        jnp.zeros((1, n), jnp.uint8),
        None,
        4,
        k,
        k,
        n,
    )
    x = np.random.default_rng(0).integers(-(2**22) + 1, 2**22, (9, k)).astype(np.float32)
    np.testing.assert_array_equal(run(x, CpuStore.pack(weight)), x[:, :n])


def test_outliers_leave_fixed_point(kernel):
    """A huge element next to small ones: columns that ignore it must not lose the small ones."""
    rng = np.random.default_rng(7)
    k, n = 256, 40
    weight = random_weight(rng, k, n)[0]
    codes = np.asarray(unpack_codes(weight.qweight, 4, k)).copy()
    codes[17] = np.asarray(weight.qzeros)[0]  # W is zero where the outlier is
    weight = dataclasses.replace(weight, qweight=pack_codes(jnp.asarray(codes), 4))
    x = rng.standard_normal((6, k)).astype(np.float32)
    x[[1, 4], 17] = 1e6
    y = run(x, CpuStore.pack(weight))
    expected = x.astype(np.float64) @ dense(weight)
    for row in range(6):
        assert rel_error(y[row], expected[row]) < 1e-6, row


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("m", [1, 12])
def test_non_finite_rows_stay_in_their_row(kernel, value, m):
    rng = np.random.default_rng(8)
    weight = random_weight(rng, 128, 40, group_size=64)[0]
    x = rng.standard_normal((m, 128)).astype(np.float32)
    clean = np.asarray(run(x, CpuStore.pack(weight)))
    x[0, 77] = value
    y = np.asarray(run(x, CpuStore.pack(weight)))
    with np.errstate(invalid="ignore"):
        expected = x.astype(np.float64)[0] @ dense(weight)
    np.testing.assert_array_equal(np.isnan(y[0]), np.isnan(expected))
    infinite = np.isinf(expected)
    np.testing.assert_array_equal(y[0][infinite], expected[infinite].astype(np.float32))
    assert same_bits(y[1:], clean[1:])


@pytest.mark.parametrize("scale", [1e-20, 1e-34, 1e30])
def test_tiny_and_huge_rows(kernel, scale):
    rng = np.random.default_rng(9)
    weight = random_weight(rng, 128, 40, group_size=64, scale_dtype=np.float32)[0]
    x = (rng.standard_normal((9, 128)) * scale).astype(np.float32)
    x[3] = 0
    y = run(x, CpuStore.pack(weight))
    assert rel_error(np.asarray(y, np.float64) / scale, (x / scale) @ dense(weight)) < 2e-6
    assert not np.asarray(y)[3].any()


def test_denormals_are_kept_or_flushed_not_garbled():
    weight = random_weight(np.random.default_rng(1), 64, 32, group_size=64)[0]
    x = np.full((2, 64), 1e-42, np.float32)
    y = np.asarray(run(x, CpuStore.pack(weight)), np.float64)
    assert (np.abs(y) <= np.abs(x.astype(np.float64)) @ np.abs(dense(weight)) * 1.01).all()


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
def test_int8_activations_are_opt_in_and_coarse(kernel, x_dtype):
    rng = np.random.default_rng(10)
    weight = random_weight(rng, 1024, 96)[0]
    x = jnp.asarray(rng.standard_normal((9, 1024)), x_dtype)
    store = CpuStore.pack(weight)
    expected = np.asarray(x, np.float64) @ dense(weight)
    assert 1e-3 < rel_error(run(x, store, activations="int8"), expected) < 8e-3
    assert rel_error(run(x, store), expected) < TOLERANCE[x_dtype]


def test_bfloat16_adds_less_than_an_eighth_of_its_rounding():
    rng = np.random.default_rng(11)
    weight = random_weight(rng, 2048, 256)[0]
    x = jnp.asarray(rng.standard_normal((16, 2048)), jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ dense(weight)
    rounding = rel_error(jnp.asarray(exact, jnp.bfloat16), exact)
    assert rel_error(run(x, CpuStore.pack(weight)), exact) < rounding * np.hypot(1, 1 / 8)


def test_zero_rows_and_single_elements(kernel):
    weight = random_weight(np.random.default_rng(0), 1, 1)[0]
    store = CpuStore.pack(weight)
    assert run(jnp.zeros((0, 1)), store).shape == (0, 1)
    y = run(jnp.full((1, 1), 2.0), store)
    np.testing.assert_allclose(y, 2 * dense(weight), rtol=1e-6)


def test_under_jit_vmap_scan_grad_and_export():
    rng = np.random.default_rng(12)
    weights = [
        random_weight(rng, 96, 96, group_size=32, g_idx=rng.permutation(np.arange(96) // 32))[0]
    ] * 2
    stores = [CpuStore.pack(w) for w in weights]
    x = rng.standard_normal((2, 3, 96)).astype(np.float32)
    expected = x @ dense(weights[0])
    matmul = functools.partial(jax_gptq.gptq_matmul, backend="cpu")
    assert rel_error(matmul(x, stores[0]), expected) < 1e-6
    assert rel_error(jax.jit(jax.vmap(matmul, (0, None)))(x, stores[0]), expected) < 1e-6
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stores)
    assert rel_error(jax.jit(jax.vmap(matmul))(x, stacked), expected) < 1e-6
    y, _ = jax.jit(lambda x, s: jax.lax.scan(lambda x, s: (matmul(x, s), None), x, s))(x, stacked)
    assert rel_error(y, expected @ dense(weights[1])) < 1e-6
    dx = jax.grad(lambda x: matmul(x, stores[0]).sum())(x)
    assert rel_error(dx, np.ones_like(expected) @ dense(weights[0]).T) < 3e-6

    (rows,) = jax.export.symbolic_shape("rows")
    exported = jax.export.export(
        jax.jit(lambda x, s: matmul(x, s)),
        platforms=["cpu"],
        disabled_checks=jax_gptq.EXPORT_DISABLED_CHECKS,
    )(jax.ShapeDtypeStruct((rows, 96), np.float32), stores[0])
    again = jax.export.deserialize(exported.serialize())
    assert rel_error(again.call(x[0], stores[0]), expected[0]) < 1e-6


def test_under_shard_map():
    mesh = jax.make_mesh(
        (1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:1]
    )
    rng = np.random.default_rng(13)
    weight = random_weight(rng, 64, 48, group_size=32)[0]
    x = rng.standard_normal((4, 64)).astype(np.float32)
    sharded = jax.shard_map(
        lambda x, s: jax_gptq.gptq_matmul(x, s, "cpu"),
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec("data"),
    )
    assert rel_error(jax.jit(sharded)(x, CpuStore.pack(weight)), x @ dense(weight)) < 1e-6


def test_memory_that_outputs_are_written_to_is_not_read():
    """Every output is written: a donated buffer full of NaN leaves nothing behind."""
    rng = np.random.default_rng(14)
    weight = random_weight(rng, 64, 70, group_size=32)[0]
    store = CpuStore.pack(weight)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    call = jax.jit(lambda old, x: run(x, store) + 0 * jnp.isnan(old), donate_argnums=0)
    for _ in range(3):
        y = call(jnp.full((5, 70), jnp.nan), x)
        assert rel_error(y, x @ dense(weight)) < 1e-6


CHILD = """
import os
os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]} if %(pinned)r else
                     os.sched_getaffinity(0))
import jax, jax.numpy as jnp, numpy as np
from jax_gptq.stores.cpu import CpuStore
from oracle import random_weight
from test_cpu_kernel import run
rng = np.random.default_rng(0)
stores = [CpuStore.pack(random_weight(rng, 256, 256, group_size=64)[0]) for _ in range(16)]
x = jnp.asarray(rng.standard_normal((20, 256)), jnp.float32)
independent = jax.jit(lambda x, stores: [run(x, s) for s in stores])
for _ in range(20):
    ys = independent(x, stores)
print(np.asarray(sum(ys)).tobytes().hex()[:4096])
"""


def run_child(pinned):
    return run_script(CHILD % {"pinned": pinned}, timeout=120)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity (Linux)")
def test_independent_calls_on_one_thread_finish_and_agree_with_many():
    """16 calls that may run at once on a one-thread pool: a handler that waits would deadlock."""
    assert run_child(pinned=True) == run_child(pinned=False)


def test_the_handler_refuses_what_does_not_fit():
    store = CpuStore.pack(random_weight(np.random.default_rng(0), 64, 32, group_size=32)[0])
    broken = dataclasses.replace(store, tiles=store.tiles[:, :1])
    with pytest.raises(Exception, match="chunks"):
        jax.block_until_ready(run(jnp.ones((1, 64)), broken))


def test_a_backend_asked_for_by_name_runs_in_a_fresh_process():
    script = """
import jax.numpy as jnp, jax_gptq
from jax_gptq import GptqWeight
weight = GptqWeight(
    jnp.zeros((8, 3), jnp.uint32), jnp.ones((2, 3)), jnp.ones((2, 3), jnp.uint8), None, 4, 32, 64, 3
)
store = jax_gptq.prepare(weight, layout="cpu")
y = jax_gptq.gptq_matmul(jnp.ones((1, 64)), store, backend="cpu")
assert y.tolist() == [[-64.0] * 3], y
"""
    run_script(script)


@pytest.mark.parametrize(("backend", "device"), [("cpu", "cpu"), ("cuda", "gpu")])
def test_a_backend_that_was_not_built_is_refused(backend, device, monkeypatch):
    weight, _ = random_weight(np.random.default_rng(0), 64, 8)
    store = jax_gptq.prepare(weight, layout=backend)
    monkeypatch.setattr(ffi, "has", lambda module: False)
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    with pytest.raises(jax_gptq.errors.BackendError, match="not built"):
        jax_gptq.gptq_matmul(jnp.ones((1, 64), jnp.bfloat16), store, backend=backend)
