"""The CUDA kernels' own source on the host, through the public op, against float64.

The emulator (xla_ffi/emulator) checks every access on the way: bounds, alignment, poison, order of
threads, and that the output is written. It is built with -C cmake.define.JAX_GPTQ_EMULATOR=ON.
"""

import dataclasses
import functools
import itertools

import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracle import RawWeight, random_weight, rel_error

import jax_gptq
from jax_gptq import errors, ffi
from jax_gptq.packing import pack_codes, unpack_codes
from jax_gptq.stores.cuda import CudaStore, target
from jax_gptq.weight import GptqWeight

emulated = ffi.load("cuda_emulated")
pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(emulated is None, reason="built without JAX_GPTQ_EMULATOR"),
]

# One rounding of the output; kernels but decode may also round each weight once.
BOUNDS = {"bfloat16": (2e-3, 5e-3), "float16": (2.6e-4, 6e-4)}

PARAMETERS = {
    "m": [*range(1, 18), 33, 64, 100],
    "k": [16, 63, 64, 65, 100, 127, 128, 129, 130, 191, 193, 257, 512],
    "n": [1, 63, 64, 65, 100, 127, 128, 129, 130, 255, 257],
    "bits": [2, 3, 4, 8],
    "group_size": [16, 32, 48, 64, 80, 128, -1],
    "zeros": ["asym", "sym"],
    "order": ["sorted", "act_order", "x_permuted"],
    "dtype": ["bfloat16", "float16"],
    "scales": ["float16", "bfloat16", "float32"],
    "bias": [False, True],
    "arch": [80, 86, 89, 90, 100, 120],
    "processors": [1, 2, 3, 132],
    "seed": [0, 1, 2],
}


def pairwise(parameters: dict[str, list], rng: np.random.Generator) -> list[dict]:
    """Cases in which every two values of every two parameters meet, chosen greedily."""
    names = list(parameters)
    missing = {
        (a, x, b, y)
        for a, b in itertools.combinations(range(len(names)), 2)
        for x in range(len(parameters[names[a]]))
        for y in range(len(parameters[names[b]]))
    }
    sizes = [len(parameters[name]) for name in names]
    cases = []
    while missing:
        a, x, b, y = min(missing)
        candidates = rng.integers(0, sizes, (24, len(names)))
        candidates[:, [a, b]] = x, y
        covered = [
            {(a, c[a], b, c[b]) for a, b in itertools.combinations(range(len(c)), 2)} & missing
            for c in candidates.tolist()
        ]
        best = max(range(len(covered)), key=lambda i: len(covered[i]))
        missing -= covered[best]
        cases.append({name: parameters[name][i] for name, i in zip(names, candidates[best])})
    return cases


CASES = pairwise(PARAMETERS, np.random.default_rng(0))


@pytest.fixture(autouse=True)
def default_device():
    emulated.set()


@functools.partial(jax.jit, static_argnames=("x_permuted", "backend", "out"))
def matmul(x, store, bias=None, x_permuted=False, backend="cuda-emulated", out=None):
    return jax_gptq.gptq_matmul(
        x, store, backend, bias=bias, x_permuted=x_permuted, preferred_element_type=out
    )


def scale_type(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def setup(m, k, n, *, dtype="bfloat16", exact=False, bias=False, seed=0, **options):
    """(x, store, bias, float64 result)."""
    rng = np.random.default_rng([m, k, n, seed])
    raw = RawWeight(rng, k, n, exact=exact, **({"group_size": 32} | options))
    x = (rng.integers(-2, 3, (m, k)) if exact else rng.standard_normal((m, k))).astype(dtype)
    offset = rng.integers(-8, 9, n).astype(np.float32) if bias else None
    y = x.astype(np.float64) @ raw.matrix + (offset if bias else 0)
    return jnp.asarray(x), CudaStore.pack(normal_form(raw)), offset, y


def normal_form(raw):
    """The weight without the compilations of `GptqWeight.from_raw`, one per shape."""
    group_size = raw.k if raw.group_size == -1 else raw.group_size
    return GptqWeight(
        raw.qweight.view(np.uint32),
        raw.scales,
        raw.z,
        raw.g_idx,
        raw.bits,
        group_size,
        raw.k,
        raw.n,
    )


def case_setup(case, exact):
    emulated.set(arch=case["arch"], processors=case["processors"], seed=case["seed"])
    x, store, bias, y = setup(
        case["m"],
        case["k"],
        case["n"],
        dtype=case["dtype"],
        exact=exact,
        bias=case["bias"],
        bits=case["bits"],
        group_size=case["group_size"],
        sym=case["zeros"] == "sym",
        g_idx=None if case["order"] == "sorted" else "random",
        scale_dtype=scale_type(case["scales"]),
    )
    permuted = case["order"] == "x_permuted" and store.perm is not None
    return x[:, store.perm] if permuted else x, store, bias, permuted, y


def case_name(case):
    return "-".join(str(value) for value in case.values())


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_integers_are_exact(case):
    x, store, bias, permuted, y = case_setup(case, exact=True)
    found = np.asarray(matmul(x, store, bias, permuted))
    np.testing.assert_array_equal(found, y.astype(found.dtype))


@pytest.mark.parametrize("case", CASES[::3], ids=case_name)
def test_random_numbers(case):
    x, store, bias, permuted, y = case_setup(case, exact=False)
    error = rel_error(matmul(x, store, bias, permuted), y)
    bound = BOUNDS[case["dtype"]]["decode" not in emulated.launches()]
    # The few outputs of a small result may all lie where rounding is coarsest.
    assert error < bound * (1 + 4 / np.sqrt(y.size))


# Device and shape of every kernel, and of every way in which it adds up parts of K.
KERNELS = {
    "decode": (80, 108, (7, 192, 100), ["decode"]),
    "decode, many strips": (90, 2, (3, 600, 700), ["decode"]),
    "decode, workspace": (80, 108, (16, 8192, 64), ["decode", "reduce"]),
    "decode, x shared": (90, 132, (5, 712, 100), ["decode"]),
    "decode, x shared, many strips": (90, 3, (6, 2056, 600), ["decode"]),
    "decode, x shared, many rows": (90, 132, (14, 2056, 100), ["decode"]),
    "decode, cluster": (90, 132, (8, 16384, 64), ["decode"]),
    "digits, workspace": (80, 108, (2, 32768, 64), ["decode", "reduce"]),
    "digits, cluster": (90, 132, (2, 32768, 64), ["decode"]),
    "mma": (80, 2, (40, 192, 130), ["mma"]),
    "mma, workspace": (80, 108, (40, 512, 130), ["mma", "reduce"]),
    "wgmma": (90, 2, (40, 192, 130), ["wgmma"]),
    "wgmma, shares": (90, 132, (40, 1024, 130), ["wgmma, shares"]),
    "wgmma, multicast": (90, 2, (256, 128, 600), ["wgmma, multicast"]),
    "wgmma, steps shared": (90, 132, (20, 192, 128), ["wgmma"]),
    "wgmma, steps and tiles shared": (90, 132, (20, 1024, 130), ["wgmma, shares"]),
    "wgmma, tiles begun and ended": (90, 2, (20, 1920, 640), ["wgmma, shares"]),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 4), ("float16", 8)])
def test_same_bits_in_any_order(kernel, dtype, bits):
    arch, processors, shape, launches = KERNELS[kernel]
    x, store, _, y = setup(*shape, dtype=dtype, bits=bits)
    results = []
    for seed in range(3):
        emulated.set(arch=arch, processors=processors, seed=seed)
        results.append(np.asarray(matmul(x, store)))
        assert emulated.launches() == launches
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    assert rel_error(results[0], y) < BOUNDS[dtype]["decode" not in launches]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", BOUNDS)
def test_sums_in_float32(kernel, dtype):
    """What of decode is rounded at all, then, is the f32 sums; of the others, each weight."""
    arch, processors, shape, launches = KERNELS[kernel]
    emulated.set(arch=arch, processors=processors)
    x, store, bias, y = setup(*shape, dtype=dtype, bias=True)
    found = np.asarray(matmul(x, store, bias, out="float32"))  # launches are known once it has run
    assert emulated.launches() == launches
    assert found.dtype == jnp.float32
    weight_rounding = {"bfloat16": 2e-3, "float16": 2.6e-4}[dtype]
    assert rel_error(found, y) < (2e-6 if "decode" in launches else weight_rounding)
    np.testing.assert_array_equal(found.astype(dtype), matmul(x, store, bias))


# dtype, bits, dtype of the scales, group_size.
FORMATS = [
    ("bfloat16", 4, "bfloat16", 128),
    ("bfloat16", 4, "float16", 64),
    ("float16", 8, "float32", 192),
    ("bfloat16", 8, "bfloat16", 32),
    ("float16", 4, "float16", 48),
]


def launched(columns, shares):
    return "wgmma, shares" if shares else "wgmma, multicast" if columns > 1 else "wgmma"


@pytest.mark.parametrize(
    ("columns", "shares"), [(1, 0), (2, 0), (1, 1), (1, 2), (1, 3), (1, 7), (1, 16), (2, 1), (2, 5)]
)
@pytest.mark.parametrize(
    ("block_n", "block_m"),
    [(256, 16), (256, 32), (256, 64), (128, 32), (128, 64), (128, 128), (128, 256)],
)
def test_every_plan_of_wgmma(block_n, block_m, columns, shares):
    """Also those that no shape of this file leads to. Shares of K hold parts of a tile, tiles that
    they begin or end, or several whole ones."""
    plan = [block_n, block_m, columns, shares]
    processors = columns * max(2, shares)
    first = (block_n // 128 + block_m // 32 + columns + shares) % len(FORMATS)
    for i, (m, k, n) in enumerate([(block_m // 2 + 1, 648, 640), (block_m + 9, 200, 650)]):
        dtype, bits, scales, group_size = FORMATS[(first + i) % len(FORMATS)]
        options = {"bits": bits, "group_size": group_size, "scale_dtype": scale_type(scales)}
        emulated.set(arch=90, processors=processors, seed=i, wgmma=plan)
        x, store, bias, y = setup(m, k, n, dtype=dtype, exact=True, bias=True, **options)
        found = np.asarray(matmul(x, store, bias))
        assert emulated.launches() == [launched(columns, shares)]
        np.testing.assert_array_equal(found, y.astype(found.dtype))
        sums = np.asarray(matmul(x, store, bias, out="float32"))
        np.testing.assert_array_equal(sums, y.astype(np.float32))


@pytest.mark.parametrize(
    ("dtype", "scales", "group_size"),
    [
        ("bfloat16", "float16", 128),
        ("bfloat16", "float32", 256),
        ("float16", "bfloat16", 384),
        ("float16", "float32", -1),
    ],
)
@pytest.mark.parametrize(("block_n", "block_m"), [(256, 16), (256, 32), (128, 64), (128, 128)])
@pytest.mark.parametrize(("columns", "shares"), [(1, 0), (2, 0), (1, 7)])
def test_scales_applied_to_sums_of_wgmma(
    columns, shares, block_n, block_m, dtype, scales, group_size
):
    """Weights are then not rounded. One stage of K (128), an even and an odd number of them, and
    groups that end within a part of K."""
    processors = columns * max(2, shares)
    emulated.set(arch=90, processors=processors, wgmma=[block_n, block_m, columns, shares])
    options = {"dtype": dtype, "scale_dtype": scale_type(scales), "group_size": group_size}
    for k in (96, 512, 648, 1304):
        x, store, bias, y = setup(block_m - 3, k, 300, bias=True, **options)
        found = np.asarray(matmul(x, store, bias, out="float32"))
        assert emulated.launches() == [launched(columns, shares)]
        assert rel_error(found, y) < 1e-6
        x, store, bias, y = setup(block_m + 5, k, 300, exact=True, bias=True, **options)
        np.testing.assert_array_equal(matmul(x, store, bias, out="float32"), y.astype(np.float32))


def test_a_tile_of_more_shares_than_a_warp_has_lanes():
    emulated.set(arch=90, processors=40, wgmma=[256, 16, 1, 40])
    x, store, bias, y = setup(8, 40 * 128, 64, group_size=128, bias=True)
    found = np.asarray(matmul(x, store, bias, out="float32"))
    assert emulated.launches() == ["wgmma, shares"]
    assert rel_error(found, y) < 1e-6


def test_shares_without_room_for_their_sums_are_refused():
    emulated.set(arch=90, processors=280, wgmma=[128, 256, 2, 140])
    x, store, *_ = setup(256, 640, 140 * 128, exact=True)
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="CUDA error 9"):
        matmul(x, store).block_until_ready()


@pytest.mark.parametrize("scales", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(("group_size", "launches"), [(128, ["wgmma, shares"]), (64, ["decode"])])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_weights_of_few_rows_are_not_rounded(dtype, group_size, launches, scales):
    """Of 5 to 8 rows and a K that decode would split wgmma takes what it need not round."""
    emulated.set(arch=90)
    options = {"dtype": dtype, "scale_dtype": scale_type(scales), "group_size": group_size}
    x, store, bias, y = setup(8, 16392, 40, bias=True, **options)
    together = np.asarray(matmul(x, store, bias, out="float32"))
    assert emulated.launches() == launches
    assert rel_error(together, y) < 2e-6
    fewer = np.asarray(matmul(x[:5], store, bias, out="float32"))
    np.testing.assert_array_equal(together[:5], fewer)
    x, store, bias, y = setup(6, 16392, 40, exact=True, bias=True, **options)
    np.testing.assert_array_equal(matmul(x, store, bias, out="float32"), y.astype(np.float32))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("rows", "fewer"),
    [(4, 3), (8, 5), (16, 9), (32, 17), (64, 33), (128, 65), (192, 129), (256, 193)],
)
@pytest.mark.parametrize(("k", "n"), [(512, 130), (8832, 40)])
def test_a_row_does_not_depend_on_the_others(arch, rows, fewer, k, n):
    """3 or 4, 5 to 8, 9 to 16 rows and so on are multiplied in one way each."""
    emulated.set(arch=arch)
    x, store, _, _ = setup(rows, k, n)
    together = np.asarray(matmul(x, store))
    np.testing.assert_array_equal(together[:fewer], np.asarray(matmul(x[:fewer], store)))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scales", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_every_weight_is_rounded_once(dtype, scales, bits, arch):
    """Unit vectors as rows of x: the output is the weight."""
    emulated.set(arch=arch)
    _, store, _, _ = setup(1, 64, 130, bits=bits, scale_dtype=scale_type(scales))
    weight = np.asarray(jax_gptq.dequantize(store.unpack())).astype(dtype)
    x = jnp.eye(64, dtype=dtype)
    np.testing.assert_array_equal(np.asarray(matmul(x, store)), weight)
    np.testing.assert_array_equal(np.asarray(matmul(x[:5], store)), weight[:5])


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "special", [np.inf, -np.inf, np.nan, 3000.0, 6e-8, 1e30, 0.0], ids=lambda value: f"{value:g}"
)
@pytest.mark.parametrize("rows", [1, 2, 4, 6])
def test_decode_with_special_values(rows, special, bits, dtype):
    """The last row holds a special value in some parts of K, the others only ordinary ones.

    One and two rows are digits, where those hold the value; more are floats.
    """
    x, store, _, _ = setup(rows, 700, 50, dtype=dtype, bits=bits, group_size=64)
    special_row = x.at[-1, 5:300:90].set(jnp.asarray(special).astype(dtype))
    found = np.asarray(matmul(special_row, store))
    assert emulated.launches() == ["decode"]
    np.testing.assert_array_equal(found[:-1], np.asarray(matmul(x, store))[:-1])
    weight = np.asarray(jax_gptq.dequantize(store.unpack()), np.float64)
    with np.errstate(invalid="ignore"):
        y = np.asarray(special_row[-1:], np.float64) @ weight
    if np.isfinite(np.asarray(special_row, np.float32)).all():
        assert rel_error(found[-1:], y) < BOUNDS[dtype][0] * 1.5
    else:
        np.testing.assert_array_equal(found[-1:].astype(np.float64), y)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("power", [4, 12, 16, 20, 60])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_rows_of_any_range(rows, dtype, power):
    """Values of very different size in one part of K, weights such that the small ones decide."""
    rng = np.random.default_rng(power)
    raw = RawWeight(rng, 512, 64, group_size=128)
    weight = normal_form(raw)
    codes = unpack_codes(jnp.asarray(weight.qweight), 4, 512).at[::16].set(raw.z.repeat(8, 0))
    store = CudaStore.pack(dataclasses.replace(weight, qweight=pack_codes(codes, 4)))
    matrix = np.asarray(jax_gptq.dequantize(store.unpack()), np.float64)
    largest, least = float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).tiny)
    for exponent in (-100, -40, -12, 0, 40):
        x = rng.standard_normal((rows, 512)) * 2.0**exponent
        x[:, ::16] *= 2.0**power
        x = jnp.asarray(np.clip(x, -largest, largest).astype(dtype))
        y = np.asarray(x, np.float64) @ matrix
        if 64 * least < np.abs(y).max() < largest:  # else float16 cannot hold it
            assert rel_error(matmul(x, store), y) < BOUNDS[dtype][0] * 1.5


@pytest.mark.parametrize("dtype", BOUNDS)
def test_decode_keeps_small_values_beside_a_huge_one(dtype):
    """With zeros as the weights of the huge value, only the small ones count."""
    rng = np.random.default_rng(0)
    raw = RawWeight(rng, 256, 64, group_size=32)
    weight = normal_form(raw)
    codes = unpack_codes(jnp.asarray(weight.qweight), 4, 256).at[3].set(raw.z[0])
    store = CudaStore.pack(dataclasses.replace(weight, qweight=pack_codes(codes, 4)))
    x = jnp.asarray(rng.standard_normal((1, 256)), dtype).at[0, 3].set(60000)
    matrix = np.asarray(jax_gptq.dequantize(store.unpack()), np.float64)
    assert not matrix[3].any()
    assert rel_error(matmul(x, store), np.asarray(x, np.float64) @ matrix) < BOUNDS[dtype][0] * 1.5
    assert emulated.launches() == ["decode"]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [16, 80, 128, -1])
@pytest.mark.parametrize("shape", [(100, 130), (257, 63), (128, 64)])
def test_dequantize(dtype, bits, group_size, shape):
    rng = np.random.default_rng(bits)
    raw = RawWeight(rng, *shape, bits=bits, group_size=group_size)
    store = CudaStore.pack(normal_form(raw))
    call = jax.ffi.ffi_call(
        target("cuda-emulated", "dequantize"), jax.ShapeDtypeStruct(shape[::-1], dtype)
    )
    found = call(
        store.codes,
        store.scales,
        store.qzeros,
        group_size=np.int32(store.group_size),
        bits=np.int32(4 if bits <= 4 else 8),
    )
    # (q - z) is exact, and its product with the scale exact in float64: one rounding.
    np.testing.assert_array_equal(np.asarray(found), raw.matrix.T.astype(found.dtype))


def test_many_rows_are_dequantized_first():
    x, store, bias, y = setup(1100, 1024, 1024, bits=4, group_size=128, exact=True, bias=True)
    found = np.asarray(matmul(x, store, bias))
    assert emulated.launches() == ["dequantize"]
    np.testing.assert_array_equal(found, y.astype(found.dtype))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize(("k", "n"), [(100, 130), (257, 63), (64, 64), (1, 1), (130, 257)])
@pytest.mark.parametrize("act_order", [False, True])
def test_repacking(bits, k, n, act_order):
    rng = np.random.default_rng(k)
    g_idx = "random" if act_order else None
    weight = normal_form(RawWeight(rng, k, n, bits=bits, group_size=32, g_idx=g_idx))
    store = CudaStore.pack(weight)
    none = jnp.zeros(0, jnp.int32)
    perm = none if store.perm is None else store.perm
    codes = jax.ffi.ffi_call(
        target("cuda-emulated", "pack"), jax.ShapeDtypeStruct(store.codes.shape, jnp.uint32)
    )(
        weight.qweight,
        store.qzeros,
        perm,
        bits=np.int32(bits),
        group_size=np.int32(32),
        in_features=np.int32(k),
    )
    np.testing.assert_array_equal(np.asarray(codes), np.asarray(store.codes))
    inverse = none if store.perm is None else jnp.argsort(store.perm).astype(jnp.int32)
    qweight = jax.ffi.ffi_call(
        target("cuda-emulated", "unpack"), jax.ShapeDtypeStruct(weight.qweight.shape, jnp.uint32)
    )(codes, inverse, bits=np.int32(bits), in_features=np.int32(k))
    np.testing.assert_array_equal(np.asarray(qweight), np.asarray(weight.qweight))


@pytest.mark.parametrize("m", [0, 3])
def test_rows_need_not_exist(m):
    x, store, bias, y = setup(m, 64, 64, exact=True, bias=True)
    found = np.asarray(matmul(x, store, bias))
    assert found.shape == (m, 64)
    np.testing.assert_array_equal(found, y.astype(found.dtype))


def test_a_symbolic_number_of_rows_is_seen_by_the_handler():
    x, store, _, y = setup(33, 128, 64, exact=True)
    rows = jax.export.symbolic_shape("rows")[0]
    exported = jax.export.export(
        jax.jit(lambda x, store: jax_gptq.gptq_matmul(x, store, "cuda-emulated")),
        disabled_checks=jax_gptq.EXPORT_DISABLED_CHECKS,
    )(jax.ShapeDtypeStruct((rows, 128), x.dtype), store)
    for m in (1, 16, 33):
        found = np.asarray(exported.call(x[:m], store))
        np.testing.assert_array_equal(found, y[:m].astype(found.dtype))


def test_a_group_size_of_100_is_refused_by_name_and_runs_on_the_reference():
    rng = np.random.default_rng(0)
    weight, matrix = random_weight(rng, 200, 64, group_size=100)
    with pytest.raises(errors.LayoutError, match="group_size 100"):
        jax_gptq.prepare(weight, "cuda")
    x = rng.standard_normal((3, 200)).astype(np.float32)
    assert rel_error(jax_gptq.gptq_matmul(x, weight), x @ matrix) < 3e-6
    with pytest.raises(errors.BackendError, match="cuda"):
        jax_gptq.gptq_matmul(x, weight, "cuda")


@pytest.mark.parametrize("backend", ["cuda", "cuda-emulated"])
def test_float32_activations_are_refused_by_name_and_run_on_the_reference(backend):
    x, store, _, y = setup(3, 64, 64)
    x = x.astype(jnp.float32)
    with pytest.raises(errors.BackendError, match="float32"):
        jax_gptq.gptq_matmul(x, store, backend)
    assert rel_error(jax_gptq.gptq_matmul(x, store), y) < 3e-6


def test_old_architectures_are_refused():
    x, store, _, _ = setup(3, 64, 64)
    emulated.set(arch=75)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no kernel for sm_75"):
        matmul(x, store).block_until_ready()


def test_the_handler_checks_what_it_is_given():
    x, store, _, _ = setup(3, 100, 130, group_size=32)
    good = dict(
        x=x, codes=store.codes, scales=store.scales, zeros=store.qzeros, bias=jnp.zeros(0),
        n=130, workspace=17 << 20, group_size=32, bits=4,
    )  # fmt: skip

    def call(**changes):
        a = good | changes
        y, _ = jax.ffi.ffi_call(
            target("cuda-emulated", "matmul"),
            (
                jax.ShapeDtypeStruct((a["x"].shape[0], a["n"]), a["x"].dtype),
                jax.ShapeDtypeStruct((a["workspace"],), jnp.uint8),
            ),
        )(
            a["x"],
            a["codes"],
            a["scales"],
            a["zeros"],
            a["bias"],
            group_size=np.int32(a["group_size"]),
            bits=np.int32(a["bits"]),
        )
        return y.block_until_ready()

    call()
    for changes, message in [
        (dict(x=x.astype(jnp.float32)), "f16 or bf16"),
        (dict(n=200), r"codes \[ceil\(N / 64\)"),
        (dict(group_size=50), "multiple of 16"),
        (dict(group_size=64), r"scales and zeros .* found \[3, 4, 64\]"),
        (dict(bits=3), "4 or 8 bits, found 3"),
        (dict(bias=jnp.zeros(129)), "bias must be empty"),
        (dict(workspace=1 << 20), "workspace"),
        (dict(codes=store.codes[:2]), "codes"),
    ]:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            call(**changes)
