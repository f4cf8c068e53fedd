"""Linen modules: the same weights as of the same module in NNX, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jax_gptq
from jax_gptq.errors import MissingTensorError, QuantizationError
from jax_gptq.quantize import QuantizeConfig, gptq, quantize_linen, quantize_model

PLAIN = QuantizeConfig(group_size=8, refine=False)


class Attention(linen.Module):
    """One head, and a gate whose layer is called twice inside `remat`."""

    @linen.compact
    def __call__(self, x, scale=None, *, deterministic=False):
        assert deterministic  # dropout would need a key
        q, k, v = (linen.Dense(32, use_bias=False, name=name)(x) for name in "qkv")
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / 5)
        x = x + linen.Dense(32, name="o")(weights @ v)
        dense = linen.remat(linen.Dense)(32, name="gate")
        return x * jax.nn.sigmoid(dense(dense(x))) * (1 if scale is None else scale)


class NnxAttention(nnx.Module):
    def __init__(self, params):
        rngs = nnx.Rngs(0)
        self.q, self.k, self.v = (nnx.Linear(32, 32, use_bias=False, rngs=rngs) for _ in "qkv")
        self.o, self.gate = nnx.Linear(32, 32, rngs=rngs), nnx.Linear(32, 32, rngs=rngs)
        for name, values in params.items():
            for key, value in values.items():
                setattr(getattr(self, name), key, nnx.Param(value))

    def __call__(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + self.o(jax.nn.softmax(q @ k.swapaxes(-1, -2) / 5) @ v)
        return x * jax.nn.sigmoid(self.gate(self.gate(x)))


@pytest.fixture(scope="module")
def attention():
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((2, 40, 32)).astype(np.float32) for _ in range(3)]
    variables = Attention().init(jax.random.key(0), batches[0], deterministic=True)
    return Attention(), variables, batches


def weight(variables, name):
    return jax_gptq.stores.logical_weight(variables["gptq"]["inner"][name]["weight"])


@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_same_as_nnx(attention, asymmetric):
    module, variables, batches = attention
    config = QuantizeConfig(group_size=8, refine=False, asymmetric=asymmetric)
    reports, nnx_reports = {}, {}
    result, found = quantize_linen(
        module,
        variables,
        batches,
        config,
        call_options={"deterministic": True},
        on_layer=reports.__setitem__,
    )
    same = NnxAttention(variables["params"])
    expected = quantize_model(same, batches, config, on_layer=nnx_reports.__setitem__)
    assert list(reports) == list(nnx_reports) == ["q", "k", "v", "o", "gate"]
    for name in reports:
        theirs = jax_gptq.stores.logical_weight(getattr(expected, name).weight.get_value())
        assert np.mean(weight(found, name).qweight == theirs.qweight) > 0.98, name
        assert reports[name].loss == pytest.approx(nnx_reports[name].loss, rel=1e-2)
    assert "kernel" not in found["params"]["inner"]["o"] and "kernel" in variables["params"]["o"]
    y = result.apply(found, batches[0], deterministic=True)
    np.testing.assert_allclose(y, expected(batches[0]), atol=0.02)
    assert 0 < np.abs(y - module.apply(variables, batches[0], deterministic=True)).max() < 0.5


def test_some_layers_behind_the_quantized_ones_before_them(attention):
    module, variables, batches = attention
    reports = {}
    arguments = [(x, np.float32(2)) for x in batches]
    _, found = quantize_linen(
        module,
        variables,
        arguments,
        PLAIN,
        names=["gate", "o"],
        call_options={"deterministic": True},
        on_layer=reports.__setitem__,
    )
    assert list(reports) == ["o", "gate"]
    assert set(found["gptq"]["inner"]) == {"o", "gate"}
    # By hand: the two inputs of the gate behind the quantized "o".
    params = jax.tree.map(np.asarray, variables["params"])
    seen = []
    for x in batches:
        q, k, v = (x @ params[name]["kernel"] for name in "qkv")
        mixed = jax.nn.softmax(q @ k.swapaxes(-1, -2) / 5) @ v
        x = x + mixed @ jax_gptq.dequantize(weight(found, "o")) + params["o"]["bias"]
        seen += [x, x @ params["gate"]["kernel"] + params["gate"]["bias"]]
    rows = np.concatenate([np.asarray(x).reshape(-1, 32) for x in seen]).astype(np.float64)
    H = (2 / len(rows) * rows.T @ rows).astype(np.float32)
    by_hand, report = gptq(params["gate"]["kernel"], H, group_size=8, refine=False)
    assert np.mean(by_hand.qweight == weight(found, "gate").qweight) > 0.98
    assert reports["gate"].loss == pytest.approx(report.loss, rel=1e-2)


def test_resumes_bit_identically(attention, tmp_path):
    module, variables, batches = attention
    options = {"call_options": {"deterministic": True}}
    options["names"] = ["q", "o", "gate"]
    whole = quantize_linen(module, variables, batches, PLAIN, **options)[1]
    done = []

    def stop(name, report):
        done.append(name)
        if name == "o":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_linen(
            module, variables, batches, PLAIN, finished=tmp_path, on_layer=stop, **options
        )
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    resumed = quantize_linen(module, variables, batches, PLAIN, finished=tmp_path, **options)[1]
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    with pytest.raises(QuantizationError, match="another"):
        quantize_linen(module, variables, batches[:1], PLAIN, finished=tmp_path, **options)


def test_refusals(attention):
    module, variables, batches = attention
    options = {"call_options": {"deterministic": True}}
    with pytest.raises(MissingTensorError, match=r"\['p'\].*it calls \['q', 'k', 'v', 'o'"):
        quantize_linen(module, variables, batches, PLAIN, names=["q", "p"], **options)
    for empty in ([], [np.zeros((0, 4, 32), np.float32)]):
        with pytest.raises(QuantizationError, match="calibration data"):
            quantize_linen(module, variables, empty, PLAIN, **options)
    bad = batches[0].copy()
    bad[0, 3, 5] = np.inf
    with pytest.raises(QuantizationError, match="q: expected finite activations, found 1"):
        quantize_linen(module, variables, [bad], PLAIN, **options)
    reports = {}
    quantize_linen(
        module, variables, [batches[0][:1, :7]], PLAIN, names=["q"],
        on_layer=reports.__setitem__, **options,
    )  # fmt: skip
    assert "7 calibration rows for 32" in reports["q"].notes[-1]
    with pytest.raises(QuantizationError, match="found none: it may be quantized"):
        quantize_linen(linen.LayerNorm(), {"params": {"scale": jnp.ones(4), "bias": jnp.ones(4)}},
                       [np.ones((2, 4), np.float32)])  # fmt: skip

    class Body(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            return linen.Dense(32, name="up")(x), None

    scanned = linen.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
    x = (batches[0], np.zeros(2, np.float32))
    stacked = scanned.init(jax.random.key(0), *x)
    with pytest.raises(QuantizationError, match=r"up: .* found shape \(2, 32, 32\): .*linen.scan"):
        quantize_linen(scanned, stacked, [x])
