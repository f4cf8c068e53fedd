"""The NNX layer: state, gradients, checkpoints, the bridge, swapping by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import random_weight, rel_error

import jax_gptq
from jax_gptq import errors

nnx = pytest.importorskip("flax.nnx", reason="needs the flax extra")


def linear(k=64, n=32, seed=0, bias=True):
    rng = np.random.default_rng(seed)
    weight, matrix = random_weight(rng, k, n, group_size=32)
    b = rng.standard_normal(n).astype(np.float32) if bias else None
    return jax_gptq.GptqLinear.from_weight(weight, b), matrix, b


class Net(nnx.Module):
    def __init__(self, *, rngs):
        self.first = nnx.Linear(64, 32, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(32, 32, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x


def swapped():
    net = Net(rngs=nnx.Rngs(0))
    first, w0, b0 = linear()
    last, w2, _ = linear(32, 32, 1, bias=False)
    assert jax_gptq.nnx.replace_linears(net, {"first": first, "layers.1": last}) == [
        "first",
        "layers.1",
    ]
    kernel = np.asarray(net.layers[0].kernel[...], np.float64)
    return net, lambda x: (x @ w0 + b0) @ kernel @ w2


X = np.random.default_rng(9).standard_normal((5, 64)).astype(np.float32)


def test_swapped_by_name():
    net, expected = swapped()
    assert rel_error(nnx.jit(lambda net, x: net(x))(net, X), expected(X)) < 1e-5
    graph, state = nnx.split(net)
    merged = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, X)
    assert rel_error(merged, expected(X)) < 1e-5


def test_codes_and_scales_are_not_trainable_by_accident():
    net, _ = swapped()
    optax = pytest.importorskip("optax", reason="needs the test extra")
    before = jax.tree.map(np.asarray, net.first.weight.get_value())
    grads = nnx.grad(lambda net: net(X).sum())(net)
    assert len(jax.tree.leaves(grads)) == 3  # two biases and the one dense kernel
    optimizer = nnx.Optimizer(net, optax.adamw(1e-2), wrt=nnx.Param)
    optimizer.update(net, grads)
    jax.tree.map(np.testing.assert_array_equal, before, net.first.weight.get_value())
    assert not np.array_equal(net.layers[0].bias[...], np.zeros(32))


def test_names_and_refusals():
    net = Net(rngs=nnx.Rngs(0))
    first, _, _ = linear()
    loaded = {"model.fc": first}
    with pytest.raises(errors.MissingTensorError, match=r"no nnx.Linear at 'model.fc'"):
        jax_gptq.nnx.replace_linears(net, loaded)
    with pytest.raises(errors.MissingTensorError, match="no loaded layer is named 'fc'"):
        jax_gptq.nnx.replace_linears(net, loaded, {"first": "fc"})
    with pytest.raises(errors.ShapeError, match=r"layers.0: the model has a 32 x 32"):
        jax_gptq.nnx.replace_linears(net, loaded, {"first": "model.fc", "layers.0": "model.fc"})
    assert isinstance(net.first, nnx.Linear), "nothing is swapped when something is refused"
    assert jax_gptq.nnx.replace_linears(net, loaded, {"first": "model.fc"}) == ["first"]


def test_orbax_round_trip_into_an_abstract_layer(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint", reason="needs the test extra")
    lin, matrix, bias = linear()
    layer = jax_gptq.nnx.GptqLinear.from_linear(lin)
    layer.unpack()
    abstract = nnx.eval_shape(lambda: jax_gptq.nnx.GptqLinear(64, 32, group_size=32))
    graph, template = nnx.split(abstract)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "layer", nnx.state(layer))
        checkpointer.wait_until_finished()
        restored = nnx.merge(graph, checkpointer.restore(tmp_path / "layer", template))
    assert rel_error(restored(X), X @ matrix + bias) < 3e-6
    restored.prepare()
    assert rel_error(restored(X), X @ matrix + bias) < 3e-6
    restored.prepare("dense")
    assert rel_error(restored(X), X @ matrix + bias) < 3e-6


def test_bridge_to_linen():
    module = nnx.bridge.to_linen(jax_gptq.nnx.GptqLinear, 64, 32, group_size=32)
    variables = module.init(jax.random.key(0), X)
    assert set(variables) == {"params", "GptqVariable"}
    assert module.apply(variables, X).shape == (5, 32)


def test_constructor_as_nnx_linear():
    layer = jax_gptq.nnx.GptqLinear(
        100, 7, bits=3, group_size=-1, desc_act=True, use_bias=False, dtype=jnp.bfloat16,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    assert layer.bias is None and layer.in_features == 100 and layer.out_features == 7
    assert layer.weight.get_value().g_idx.shape == (100,)
    y = layer(jnp.ones((2, 100)))
    assert y.dtype == jnp.bfloat16 and not y.any()


def test_flax_bytes():
    from flax import serialization

    lin, _, _ = linear()
    data = serialization.to_bytes(lin)
    restored = serialization.from_bytes(jax.tree.map(jnp.zeros_like, lin), data)
    np.testing.assert_array_equal(restored(X), lin(X))


def test_lora_of_flax():
    """Flax's own LoRA around a quantized layer: nothing else is trained, and training fits."""
    rng = np.random.default_rng(0)
    weight, matrix = random_weight(rng, 64, 32, group_size=32)
    base = jax_gptq.nnx.GptqLinear.from_linear(jax_gptq.GptqLinear.from_weight(weight))
    codes = jax.tree.leaves(base.weight.get_value())
    lora = nnx.LoRA(64, 4, 32, base_module=base, rngs=nnx.Rngs(0))
    x = rng.standard_normal((16, 64)).astype(np.float32)
    assert rel_error(lora(x), x.astype(np.float64) @ matrix) < 3e-6
    shift = 0.1 * rng.standard_normal((64, 4)) @ rng.standard_normal((4, 32))
    target = x.astype(np.float64) @ (matrix + shift)

    @nnx.jit
    def step(lora):
        def loss(lora):
            return ((lora(x) - target.astype(np.float32)) ** 2).mean()

        only = nnx.DiffState(0, nnx.LoRAParam)
        value, grads = nnx.value_and_grad(loss, argnums=only)(lora)
        assert set(nnx.to_pure_dict(grads)) == {"lora_a", "lora_b"}
        trained = nnx.state(lora, nnx.LoRAParam)
        nnx.update(lora, jax.tree.map(lambda p, g: p - 0.5 * g, trained, grads))
        return value

    losses = [float(step(lora)) for _ in range(200)]
    assert losses[-1] < 0.05 * losses[0], losses[::40]
    for before, after in zip(codes, jax.tree.leaves(base.weight.get_value())):
        np.testing.assert_array_equal(before, after)
