"""`GptqLinear`: constructors, bias, checks."""

import jax
import jax.export
import numpy as np
import pytest
from oracle import RawWeight, rel_error

import jax_gptq
from jax_gptq import errors

K, N = 96, 40


def raw():
    return RawWeight(np.random.default_rng(0), K, N, group_size=32)


def test_from_raw_to_jit():
    r = raw()
    lin = jax_gptq.GptqLinear.from_raw(
        r.qweight, r.scales, r.qzeros, None, 4, 32, in_features=K, out_features=N
    )
    bias = np.random.default_rng(1).standard_normal(N).astype(np.float32)
    lin = lin.with_bias(bias)
    x = np.random.default_rng(2).standard_normal((2, 3, K)).astype(np.float32)
    y = jax.jit(lambda lin, x: lin(x))(lin, x)
    assert rel_error(y, x @ r.matrix + bias) < 3e-6
    assert rel_error(lin.with_bias(None)(x), x @ r.matrix) < 3e-6
    again = jax_gptq.GptqLinear.from_store(lin.store, in_features=K, out_features=N)
    assert again.bias is None and again.store is lin.store


def test_gradient_of_a_whole_layer():
    lin = jax_gptq.GptqLinear.from_weight(raw().weight(), np.zeros(N, np.float32))
    x = np.random.default_rng(2).standard_normal((5, K)).astype(np.float32)
    grads = jax.grad(lambda lin: lin(x).sum(), allow_int=True)(lin)
    np.testing.assert_allclose(grads.bias, 5)
    assert grads.store.scales.shape == lin.store.scales.shape


def test_activations_are_static():
    lin = jax_gptq.GptqLinear.from_weight(raw().weight())
    assert lin.with_activations("int8").activations == "int8"
    assert jax.tree.structure(lin) != jax.tree.structure(lin.with_activations("int8"))
    with pytest.raises(errors.BackendError, match="int4"):
        lin.with_activations("int4")


def test_refusals():
    w = raw().weight()
    with pytest.raises(errors.ShapeError, match=r"bias: expected shape \(40,\), found \(41,\)"):
        jax_gptq.GptqLinear.from_weight(w, np.ones(41, np.float32))
    with pytest.raises(errors.DtypeError, match="bias: expected a float"):
        jax_gptq.GptqLinear.from_weight(w, np.ones(40, int))
    with pytest.raises(errors.ShapeError, match=r"\(96, 41\), found \(96, 40\)"):
        jax_gptq.GptqLinear.from_store(w, in_features=96, out_features=41)
    with pytest.raises(errors.ShapeError, match="x: expected"):
        jax_gptq.GptqLinear.from_weight(w)(np.ones((2, 97), np.float32))
