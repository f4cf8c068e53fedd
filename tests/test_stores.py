"""`prepare`: layouts, defaults, inverses and refusals."""

import jax
import numpy as np
import pytest
from oracle import random_weight

import jax_gptq
from jax_gptq import errors, ffi
from jax_gptq.stores import PACKED_LAYOUTS
from jax_gptq.stores.dense import DenseStore


def weight(**options):
    return random_weight(np.random.default_rng(0), 128, 64, **({"group_size": 32} | options))[0]


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("layout", PACKED_LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"bits": 3}, {"bits": 8}, {"g_idx": "random"}])
def test_packed_layouts_are_bijections(layout, options):
    w = weight(**options)
    store = jax_gptq.prepare(w, layout)
    equal(jax_gptq.prepare(store, "reference"), w)
    equal(jax.jit(lambda s: s.unpack())(store), w)
    assert jax_gptq.prepare(store, layout) is store
    abstract = jax.eval_shape(lambda s: s.unpack(), store)
    assert abstract.qweight.shape == w.qweight.shape


def test_default_is_what_the_platform_computes_with():
    store = jax_gptq.prepare(weight())
    platform = jax.devices()[0].platform
    expected = {"cpu": "cpu", "gpu": "cuda"}.get(platform)
    if expected and ffi.has(expected):
        assert isinstance(store, PACKED_LAYOUTS[expected])
    else:
        assert isinstance(store, jax_gptq.GptqWeight)


def test_dense_is_terminal():
    dense = jax_gptq.prepare(weight(), "dense")
    assert isinstance(dense, DenseStore) and dense.w.dtype == np.float32
    with pytest.raises(errors.LayoutError, match=r"DenseStore.*no way back"):
        jax_gptq.prepare(dense, "reference")


def test_refusals():
    with pytest.raises(errors.LayoutError, match=r'"metal" is unsupported.*dense'):
        jax_gptq.prepare(weight(), "metal")
    with pytest.raises(errors.LayoutError, match="marlin"):
        jax_gptq.prepare(weight(), "marlin")
    with pytest.raises(errors.DtypeError, match="expected a GptqWeight"):
        jax_gptq.prepare(np.ones((3, 4)))
    with pytest.raises(errors.TracingError, match=r"outside jax\.jit"):
        jax.jit(jax_gptq.prepare)(weight())
