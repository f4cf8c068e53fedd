"""The Linen layer and swapping the Dense layers of an existing module."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import random_weight, rel_error

import jax_gptq
from jax_gptq import errors

linen = pytest.importorskip("flax.linen", reason="needs the flax extra")
X = np.random.default_rng(9).standard_normal((5, 64)).astype(np.float32)


def linear(k=64, n=32, seed=0, bias=True):
    rng = np.random.default_rng(seed)
    weight, matrix = random_weight(rng, k, n, group_size=32)
    b = rng.standard_normal(n).astype(np.float32) if bias else None
    return jax_gptq.GptqLinear.from_weight(weight, b), matrix, b


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(32, name="first")(x)
        x = linen.Dense(32, name="second", use_bias=False)(x)
        return linen.Dense(32, name="third")(x)


def test_dense_layer():
    layer = jax_gptq.linen.GptqDense(32, group_size=32)
    variables = layer.init(jax.random.key(0), X)
    assert set(variables) == {"gptq", "params"}
    assert not layer.apply(variables, X).any()
    lin, matrix, bias = linear()
    loaded = {"gptq": {"weight": lin.store}, "params": {"bias": bias}}
    y = jax.jit(layer.apply)(loaded, X)
    assert rel_error(y, X @ matrix + bias) < 3e-6
    grads = jax.grad(lambda p: layer.apply({**loaded, "params": p}, X).sum())(loaded["params"])
    np.testing.assert_allclose(grads["bias"], 5)
    half = jax_gptq.linen.GptqDense(32, group_size=32, dtype=jnp.bfloat16)
    assert half.apply(loaded, X).dtype == jnp.bfloat16


def test_swapped_by_name():
    net = Net()
    variables = net.init(jax.random.key(0), X)
    first, w0, b0 = linear()
    third, w2, _ = linear(32, 32, 1, bias=False)
    module, swapped = jax_gptq.linen.replace_dense(
        net, variables, {"a": first, "b": third}, {"first": "a", "third": "b"}
    )
    kernel = np.asarray(variables["params"]["second"]["kernel"], np.float64)
    expected = (X @ w0 + b0) @ kernel @ w2
    assert rel_error(jax.jit(module.apply)(swapped, X), expected) < 1e-5
    assert "kernel" not in swapped["params"]["inner"]["first"]
    batched = jax.vmap(lambda x: module.apply(swapped, x))(X[:, None])
    assert rel_error(batched[:, 0], expected) < 1e-5


def test_refusals():
    net = Net()
    variables = net.init(jax.random.key(0), X)
    lin, _, _ = linear()
    swap = jax_gptq.linen.replace_dense
    with pytest.raises(errors.MissingTensorError, match="no Dense kernel at 'fc'"):
        swap(net, variables, {"fc": lin})
    with pytest.raises(errors.MissingTensorError, match="no loaded layer is named 'fc'"):
        swap(net, variables, {}, {"first": "fc"})
    with pytest.raises(errors.ShapeError, match=r"second: .*\(32, 32\), 'fc' is \(64, 32\)"):
        swap(net, variables, {"fc": lin}, {"second": "fc"})
    with pytest.raises(errors.ShapeError, match="use_bias=False"):
        swap(net, variables, {"fc": linear(32, 32)[0]}, {"second": "fc"})


def test_flax_bytes():
    from flax import serialization

    lin, _, _ = linear()
    variables = {"gptq": {"weight": lin.store}, "params": {"bias": lin.bias}}
    data = serialization.to_bytes(variables)
    zeros = jax.tree.map(jnp.zeros_like, variables)
    restored = serialization.from_bytes(zeros, data)
    jax.tree.map(np.testing.assert_array_equal, restored, variables)
