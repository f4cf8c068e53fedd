"""Whole models: quantized behind their own quantized prefix, killed and resumed, saved."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import jax_gptq
from jax_gptq.cli import main
from jax_gptq.errors import MissingTensorError, ModelError, QuantizationError
from jax_gptq.models import float_tensors, fuse_projections, linears, load, new_model
from jax_gptq.models.config import from_hf
from jax_gptq.models.layers import QuantizedLinear
from jax_gptq.quantize import QuantizeConfig, gptq, quantize_model, round_head, rtn

HF = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}
PLAIN = QuantizeConfig(group_size=16, refine=False)


@pytest.fixture(scope="module")
def model():
    return new_model(from_hf(HF), dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (2, 32)).astype(np.int32) for _ in range(3)]


@pytest.fixture(scope="module")
def quantized(model, batches):
    reports = {}
    return quantize_model(model, batches, PLAIN, on_layer=reports.__setitem__), reports


def weights(model) -> dict:
    return {
        name: jax_gptq.stores.logical_weight(layer.weight.get_value())
        for name, layer in linears(model).items()
        if isinstance(layer, jax_gptq.nnx.GptqLinear)
    }


def assert_same_weights(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    for name in expected:
        for field in ("qweight", "scales", "qzeros"):
            np.testing.assert_array_equal(
                getattr(found[name], field), getattr(expected[name], field), err_msg=name
            )


def test_every_layer_is_quantized_and_the_float_model_is_left_alone(model, quantized, batches):
    result, reports = quantized
    assert list(reports) == [
        f"model.layers.{i}.{layer}"
        for i in range(2)
        for layer in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )
    ]  # fmt: skip
    assert set(weights(result)) == set(reports) and not weights(model)
    wanted, found = np.asarray(model(batches[0])), np.asarray(result(batches[0]))
    assert 0 < np.linalg.norm(found - wanted) < 0.2 * np.linalg.norm(wanted)


def test_layers_are_calibrated_on_what_the_quantized_prefix_makes(model, quantized, batches):
    result, reports = quantized
    last = nnx.clone(model)  # everything before the last layer as it was quantized
    dense = {name: jax_gptq.dequantize(weight) for name, weight in weights(result).items()}
    name = "model.layers.1.mlp.down_proj"
    for other, layer in linears(last).items():
        if other != name:
            layer.kernel = nnx.Param(dense[other])
    seen = []
    block = last.blocks[1]
    original = block.mlp.down_proj

    def record(x):
        seen.append(np.asarray(x).reshape(-1, 64))
        return original(x)

    block.mlp.down_proj = record
    for ids in batches:
        block(last.blocks[0](last.embed(ids), last.context(ids)), last.context(ids))
    x = np.concatenate(seen).astype(np.float64)
    H = (2 / len(x) * x.T @ x).astype(np.float32)
    _, report = gptq(original.kernel[...], H, group_size=16, refine=False)
    assert reports[name].loss == pytest.approx(report.loss, rel=0.02)


def test_a_layer_alone_any_module_and_layers_that_are_never_called(batches):
    class Net(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(24, 40, rngs=nnx.Rngs(0))
            self.rest = nnx.List([nnx.Linear(40, 8, rngs=nnx.Rngs(i)) for i in (1, 2)])

        def __call__(self, x):
            return self.rest[0](nnx.relu(self.a(x)))

    net = Net()
    x = np.random.default_rng(0).standard_normal((300, 24)).astype(np.float32)
    reports = {}
    config = QuantizeConfig(group_size=8, bits=8, refine=False)
    result = quantize_model(net, [x], config, on_layer=reports.__setitem__)
    np.testing.assert_allclose(result(x), net(x), atol=0.05)
    assert isinstance(result.rest[0], jax_gptq.nnx.GptqLinear)
    assert "never called" in reports["rest.1"].notes[0]
    one = quantize_model(net, [x], config, names=["a"])
    assert isinstance(one.rest[0], nnx.Linear)
    assert isinstance(one.a, jax_gptq.nnx.GptqLinear)
    with pytest.raises(MissingTensorError, match="no_such"):
        quantize_model(net, [x], config, names=["no_such"])
    reports.clear()
    quantize_model(net, [x[:5]], config, names=["a"], on_layer=reports.__setitem__)
    assert "5 calibration rows for 24" in reports["a"].notes[-1]
    x[7, 3] = np.nan
    with pytest.raises(QuantizationError, match=r"a: expected finite activations, found 1"):
        quantize_model(net, [x], config)
    for empty in ([], [np.zeros((0, 24), np.float32)]):
        with pytest.raises(QuantizationError, match="calibration data"):
            quantize_model(net, empty, config)
    with pytest.raises(ModelError, match="CausalLM"):
        jax_gptq.save_checkpoint(net, "nowhere")


def test_interrupted_between_layers_resumes_bit_identically(model, quantized, batches, tmp_path):
    class Stop(Exception):
        pass

    done = []

    def stop_in_the_middle_of_a_stage(name, report):
        done.append(name)
        if len(done) == 9:
            raise Stop

    with pytest.raises(Stop):
        quantize_model(
            model, batches, PLAIN, finished=tmp_path, on_layer=stop_in_the_middle_of_a_stage
        )
    solved = {path.name for path in tmp_path.glob("*.safetensors")}
    assert solved == {f"{name}.safetensors" for name in done}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    reports = {}
    resumed = quantize_model(model, batches, PLAIN, finished=tmp_path, on_layer=reports.__setitem__)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert_same_weights(weights(resumed), weights(quantized[0]))
    assert reports == quantized[1]
    with pytest.raises(QuantizationError, match="another"):
        quantize_model(model, batches[:1], PLAIN, finished=tmp_path)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("desc_act", [False, True])
def test_saved_and_loaded_again(model, batches, tmp_path, checkpoint_format, desc_act):
    config = QuantizeConfig(group_size=16, refine=False, desc_act=desc_act)
    names = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    result = quantize_model(model, batches, config, names=names)
    jax_gptq.save_checkpoint(
        result, tmp_path, checkpoint_format=checkpoint_format, max_shard_size=20_000
    )
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = load(tmp_path, dtype=jnp.float32)
    assert_same_weights(weights(again), weights(result))
    np.testing.assert_array_equal(again(batches[0]), result(batches[0]))
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (stored["checkpoint_format"], stored["desc_act"]) == (checkpoint_format, desc_act)


@pytest.mark.parametrize("layout", [None, "reference"])
@pytest.mark.parametrize("desc_act", [False, True])
def test_fused_projections(model, batches, tmp_path, desc_act, layout):
    config = QuantizeConfig(group_size=16, refine=False, desc_act=desc_act)
    layers = [name for name in linears(model) if not name.endswith("0.mlp.gate_proj")]
    result = quantize_model(model, batches, config, names=layers)
    if layout is not None:
        for layer in linears(result).values():
            if isinstance(layer, jax_gptq.nnx.GptqLinear):
                layer.prepare(layout)
    kind = type(result.model.layers[0].self_attn.q_proj.weight.get_value())
    expected = result(batches[0]), result.generate(batches[0][:, :8], max_new_tokens=5)
    fused = nnx.clone(result)
    # One MLP has a float layer.
    assert fuse_projections(fused) == 3
    assert fuse_projections(fused) == 0
    attention = fused.model.layers[0].self_attn
    assert (attention.k_proj, attention.v_proj) == (None, None)
    assert type(attention.q_proj.weight.get_value()) is kind
    found = fused(batches[0]), fused.generate(batches[0][:, :8], max_new_tokens=5)
    assert np.linalg.norm(found[0] - expected[0]) < 1e-6 * np.linalg.norm(expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    with pytest.raises(ModelError, match="fused"):
        jax_gptq.save_checkpoint(fused, tmp_path)
    assert not list(tmp_path.iterdir())
    assert fuse_projections(nnx.clone(model)) == 0
    with pytest.raises(ModelError, match="found Linear"):
        fuse_projections(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_different_layers_are_not_fused(quantized):
    """Of another group size, another act-order, another bias: only the last can be one."""
    model = nnx.clone(quantized[0])
    blocks = model.model.layers
    rng = np.random.default_rng(0)
    W = rng.standard_normal((32, 64)).astype(np.float32)

    def layer(weight, bias=None):
        return QuantizedLinear.from_linear(jax_gptq.GptqLinear.from_weight(weight, bias))

    blocks[0].mlp.up_proj = layer(rtn(W, group_size=8))
    g_idx = np.arange(32) // 16
    other = dataclasses.replace(rtn(W, group_size=16), g_idx=jnp.asarray(g_idx[::-1].copy()))
    blocks[1].mlp.up_proj = layer(other)
    bias = rng.standard_normal(32).astype(np.float32)
    blocks[1].self_attn.k_proj = layer(rtn(W[:, :32], group_size=16), bias)
    ids = np.arange(12).reshape(2, 6)
    expected = model(ids)
    assert fuse_projections(model) == 2
    assert model.model.layers[1].self_attn.q_proj.bias.shape == (96,)
    assert np.linalg.norm(model(ids) - expected) < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_head(batches, quantized, tmp_path, bits, dtype):
    """Tied: the table that the tokens are looked up in stays."""
    stored = nnx.clone(quantized[0])
    table = stored.model.embed_tokens
    table.weight = nnx.Param(table.weight[...].astype(dtype))
    rounded = round_head(stored, bits=bits, group_size=16)
    assert stored.head is table and rounded.model.embed_tokens.weight.dtype == dtype
    weight = jax_gptq.stores.logical_weight(rounded.lm_head.weight.get_value())
    assert weight.bits == bits and weight.shape == (32, 256)
    error = np.abs(np.asarray(jax_gptq.dequantize(weight)) - np.asarray(table.weight[...], float).T)
    assert error.max() <= 0.57 * float(weight.scales.max())  # f16: 127.5 times 2^-11 of a step
    expected = np.asarray(stored(batches[0]))
    found = np.asarray(rounded(batches[0]))
    assert np.linalg.norm(found - expected) < 2.0 ** (1 - bits) * np.linalg.norm(expected)
    jax_gptq.save_checkpoint(rounded, tmp_path)
    again = load(tmp_path, dtype=jnp.float32)
    np.testing.assert_array_equal(again(batches[0]), found)
    with pytest.raises(QuantizationError, match="found a quantized layer"):
        round_head(again)
    with pytest.raises(ModelError, match="found Linear"):
        round_head(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def write_model_folder(model, folder) -> None:
    folder.mkdir()
    save_file({name: np.ascontiguousarray(t) for name, t in float_tensors(model)},
              folder / "model.safetensors")  # fmt: skip
    (folder / "config.json").write_text(json.dumps(HF))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def test_killed_run_leaves_no_checkpoint_and_resumes_bit_identically(model, tmp_path):
    source, data = tmp_path / "float", tmp_path / "text.txt"
    write_model_folder(model, source)
    rng = np.random.default_rng(1)
    data.write_text("".join(map(chr, rng.integers(97, 123, 2000))))

    def command(out) -> list[str]:
        return [
            sys.executable, "-P", "-m", "jax_gptq.cli", "quantize", str(source), str(out),
            "--data", str(data), "--context=32", "--group-size=16", "--no-refine",
        ]  # fmt: skip

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(command(killed), stdout=subprocess.PIPE, text=True)
    for _ in range(4):
        assert "model.layers.0" in process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not killed.exists()
    partial = tmp_path / "killed.partial"
    assert not list(partial.rglob("model*.safetensors.index.json"))
    assert not list(partial.rglob("config.json"))
    assert len(list((partial / "layers").glob("*.safetensors"))) >= 4
    for out in (killed, whole):
        subprocess.run(command(out), check=True, capture_output=True)
    assert not partial.exists()
    files = sorted(path.name for path in whole.iterdir())
    assert "model.safetensors" in files and "tokenizer.json" in files
    assert files == sorted(path.name for path in killed.iterdir())
    for name in files:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
    refused = subprocess.run(command(whole), capture_output=True, text=True)
    assert refused.returncode == 2 and "not there yet" in refused.stderr


def test_command_line_refusals(model, tmp_path, capsys):
    source, text, out = tmp_path / "float", tmp_path / "text.txt", tmp_path / "out"
    write_model_folder(model, source)
    short, latin = tmp_path / "short.txt", tmp_path / "latin.txt"
    text.write_text("a text of some words " * 20)
    short.write_text("")
    latin.write_bytes(b"\xff")
    for folder, data, more, words in [
        (source, tmp_path / "none.txt", [], "none.txt: expected a text file"),
        (source, latin, [], "latin.txt: expected UTF-8"),
        (source, short, [], "at least one window of 64 tokens, found 0"),
        (source, text, ["--context=500"], "pass more text or a smaller --context"),
        (source, text, ["--samples=0"], "--samples"),
        (source, text, ["--group-size=0"], "model.layers.0.self_attn.q_proj: group_size"),
        (source, text, ["--desc-act", "--act-group-aware"], "choose one"),
        (tmp_path / "none", text, [], "none"),
    ]:
        command = ["quantize", str(folder), str(out), "--data", str(data), *more]
        assert main(command) == 2
        assert words in capsys.readouterr().err
        assert not out.exists()
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)
