"""`GptqWeight.from_raw`: every rule for zero points and g_idx, and every refusal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import RawWeight, pack_bits, rel_error

import jax_gptq
from jax_gptq import errors


def raw(k=96, n=40, **options):
    return RawWeight(np.random.default_rng(0), k, n, **options)


def build(r, **changes):
    arguments = {
        "qweight": r.qweight,
        "scales": r.scales,
        "qzeros": r.qzeros,
        "g_idx": r.g_idx,
        "bits": r.bits,
        "group_size": r.group_size,
        "in_features": r.k,
        "out_features": r.n,
        "checkpoint_format": r.version,
    }
    return jax_gptq.GptqWeight.from_raw(**(arguments | changes))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(
    "k, n, group_size", [(96, 40, 32), (320, 33, 128), (100, 1, -1), (64, 17, 999)]
)
def test_dequantize(bits, version, k, n, group_size):
    r = raw(k, n, bits=bits, version=version, group_size=group_size)
    w = r.weight()
    assert w.g_idx is None
    assert rel_error(jax_gptq.dequantize(w), r.matrix) == 0  # f16 scales: exact in f32


@pytest.mark.parametrize("bits", [3, 4])
def test_act_order(bits):
    r = raw(bits=bits, group_size=32, g_idx="random")
    assert rel_error(jax_gptq.dequantize(r.weight()), r.matrix) == 0
    sizes = np.sort(np.random.default_rng(1).integers(0, 7, 96)).astype(np.int32)  # unequal groups
    r = raw(bits=bits, group_size=16, g_idx=sizes)
    assert rel_error(jax_gptq.dequantize(r.weight()), r.matrix) == 0


def test_trivial_g_idx_is_dropped():
    r = raw(group_size=32)
    assert build(r, g_idx=np.arange(96, dtype=np.int32) // 32).g_idx is None
    assert build(r, g_idx=np.arange(96)[::-1].astype(np.int64) // 32).g_idx.dtype == jnp.int32


def test_features_are_derived_from_the_shapes():
    w = build(raw(), in_features=None, out_features=None)
    assert (w.in_features, w.out_features, w.shape, w.groups) == (96, 40, (96, 40), 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_word_add_undoes_the_borrow(bits):
    """GPTQModel subtracts 0x11.. from the word, so a zero point of 0 borrows from its neighbour."""
    z = np.random.default_rng(2).integers(0, 2**bits, (1, 32)).astype(np.uint8)
    z[0, :3] = 0
    words = pack_bits(z.T, bits).T.view(np.uint32)
    ones = np.uint32(sum(1 << i for i in range(0, 32, bits)))
    r = raw(64, 32, bits=bits, group_size=-1)
    stored = (words - ones).view(np.int32)
    np.testing.assert_array_equal(build(r, qzeros=stored, zero_add="word").qzeros, z)
    assert (np.asarray(build(r, qzeros=stored, zero_add="field").qzeros) != z).any()


def test_field_add_wraps():
    r = raw(64, 32, group_size=-1)
    stored = np.full((1, 4), -1, np.int32)  # every field 15: a true zero point of 0
    assert not np.asarray(build(r, qzeros=stored).qzeros).any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
def test_sym_trusts_the_data(bits, label, stored):
    r = raw(bits=bits, sym=True, version=stored)
    w = build(r, checkpoint_format=label, sym=True)
    assert (np.asarray(w.qzeros) == 2 ** (bits - 1)).all()


def test_replace_is_differentiable():
    r = raw(group_size=32)
    w, x = r.weight(), np.random.default_rng(3).standard_normal((5, 96)).astype(np.float32)
    loss = lambda s: jax_gptq.gptq_matmul(x, dataclasses.replace(w, scales=s)).sum()
    rows = np.arange(96) // 32
    centred = r.q.astype(float) - r.z[rows]
    expected = np.add.reduceat(centred * x.sum(0).astype(float)[:, None], [0, 32, 64])
    assert rel_error(jax.grad(loss)(w.scales.astype(jnp.float32)), expected) < 1e-6


def test_weight_is_a_pytree_that_jit_and_numpy_take():
    w = raw().weight()
    doubled = jax.jit(lambda w: jax.tree.map(lambda a: a, w))(w)
    assert doubled.bits == 4 and isinstance(doubled, jax_gptq.GptqWeight)
    host = jax.tree.map(np.asarray, w)
    np.testing.assert_array_equal(jax_gptq.dequantize(host), jax_gptq.dequantize(w))


def bad(value, at=(0, 0)):
    scales = raw().scales.copy()
    scales[at] = value
    return scales


REFUSED = {
    "bits": (dict(bits=9), errors.BitsError, "2 to 8"),
    "bits against shapes": (dict(bits=8), errors.ShapeError, "qweight.*bits=8"),
    "in_features": (dict(in_features=128), errors.ShapeError, r"qweight.*\(16, 40\).*\(12, 40\)"),
    "out_features": (dict(out_features=41), errors.ShapeError, "qweight"),
    "group_size": (dict(group_size=32), errors.ShapeError, "scales: 1 groups found.*has 3"),
    "group_size 0": (dict(group_size=0), errors.ShapeError, "group_size"),
    "qzeros shape": (dict(qzeros=np.zeros((1, 6), np.int32)), errors.ShapeError, "qzeros"),
    "float qweight": (dict(qweight=np.zeros((12, 40))), errors.DtypeError, "qweight.*float64"),
    "cast qzeros": (dict(qzeros=np.zeros((1, 5), np.int64)), errors.DtypeError, "qzeros.*int64"),
    "integer scales": (dict(scales=np.ones((1, 40), int)), errors.DtypeError, "scales"),
    "NaN scales": (dict(scales=bad(np.nan)), errors.ScalesError, r"scales.*nan at \[0, 0\]"),
    "Inf scales": (dict(scales=bad(np.inf, (0, 7))), errors.ScalesError, r"inf at \[0, 7\]"),
    "g_idx dtype": (dict(g_idx=np.zeros(96)), errors.GroupIndexError, "g_idx.*float64"),
    "g_idx shape": (dict(g_idx=np.zeros(95, int)), errors.GroupIndexError, r"g_idx.*\(96,\)"),
    "g_idx range": (dict(g_idx=np.full(96, 1)), errors.GroupIndexError, "g_idx.*found 1 at row 0"),
    "g_idx sign": (dict(g_idx=np.full(96, -1)), errors.GroupIndexError, "g_idx.*found -1"),
    "format": (dict(checkpoint_format="gptq_v3"), errors.CheckpointFormatError, "gptq_v3"),
    "zero_add": (dict(zero_add="nibble"), errors.CheckpointFormatError, "nibble"),
    "sym": (dict(sym=True), errors.ZeroPointError, "sym is true"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_tensor(case):
    changes, error, match = REFUSED[case]
    with pytest.raises(error, match=match) as info:
        build(raw(), **changes, name="model.layers.0.q_proj")
    assert isinstance(info.value, jax_gptq.JaxGptqError)
    assert "model.layers.0.q_proj" in str(info.value)
