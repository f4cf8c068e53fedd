"""models/: configuration, loading, the logits of real checkpoints, the tokenizer."""

import dataclasses
import json
import shutil

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import rel_error
from real_checkpoints import FOLDERS, each_checkpoint, logits_tolerance, needs_checkpoints
from safetensors.numpy import load_file, save_file

import jax_gptq
from jax_gptq import errors
from jax_gptq.models import act_order
from jax_gptq.models.config import from_hf, read_config
from jax_gptq.models.rope import RopeConfig, apply_rope, rope_tables
from jax_gptq.models.table import _split_dot, table_logits
from jax_gptq.models.tokenizer import Tokenizer

TINY = dict(
    model_type="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def tiny(**options):
    return from_hf({**TINY, **options})


@each_checkpoint
def test_logits(folder):
    answers = np.load(folder / "ref.npz")
    model = jax_gptq.models.load(folder, dtype=jnp.float32)
    logits = model(answers["input_ids"])
    assert logits.dtype == jnp.float32
    assert rel_error(logits, answers["logits"]) < logits_tolerance(folder)


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_table_stays_in_16_bits_under_float32(tmp_path, stored):
    """It would take twice the memory, and twice the time of a token, for the same logits."""
    model = jax_gptq.models.new_model(tiny(), dtype=stored, rngs=nnx.Rngs(0))
    save_file(dict(jax_gptq.models.float_tensors(model)), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    ids = np.arange(14).reshape(2, 7)
    loaded = jax_gptq.models.load(tmp_path, dtype=jnp.float32)
    assert loaded.embed(ids).dtype == jnp.float32
    logits = loaded(ids)
    for table in (loaded.model.embed_tokens, loaded.lm_head):
        assert table.weight.dtype == stored
        table.weight = nnx.Param(table.weight[...].astype(jnp.float32))
    assert rel_error(loaded(ids), logits) < 1e-5
    other = {"bfloat16": "float16", "float16": "bfloat16"}[stored]
    assert jax_gptq.models.load(tmp_path, dtype=other).model.embed_tokens.weight.dtype == other


@needs_checkpoints
def test_dtype_leaves_scales_alone():
    model = jax_gptq.models.load(FOLDERS[-1])
    assert model.model.embed_tokens.weight.dtype == jnp.bfloat16
    answers = np.load(FOLDERS[-1] / "ref.npz")
    assert rel_error(model(answers["input_ids"]), answers["logits"]) < 3e-2
    quantized = 0
    for layer in jax_gptq.models.linears(model).values():
        if isinstance(layer, jax_gptq.nnx.GptqLinear):
            assert layer.weight.get_value().scales.dtype == jnp.float16
            quantized += 1
    assert quantized == 14


@pytest.fixture
def copied(tmp_path):
    """A real checkpoint to be damaged: (folder, tensors, write)."""
    if not FOLDERS:
        pytest.skip("shared/checkpoints is neither in the repository nor beside it")
    source = next(folder for folder in FOLDERS if folder.name.startswith("qwen2"))
    for file in source.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, tmp_path)
            (tmp_path / file.name).chmod(0o644)
    tensors = load_file(source / "model.safetensors")
    return tmp_path, tensors, lambda: save_file(tensors, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj",
        "lm_head.weight",
    ],
)
def test_missing_tensor_is_named(copied, name):
    folder, tensors, write = copied
    for key in [key for key in tensors if key == name or key.startswith(f"{name}.")]:
        del tensors[key]
    write()
    with pytest.raises(errors.MissingTensorError, match=name.replace(".", r"\.")):
        jax_gptq.models.load(folder)


def test_wrong_shape_is_named(copied):
    folder, tensors, write = copied
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1]
    write()
    with pytest.raises(errors.ShapeError, match=r"model\.norm\.weight.*256.*255"):
        jax_gptq.models.load(folder)


def test_unused_tensor_is_warned_of(copied):
    folder, tensors, write = copied
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(64, np.float32)
    write()
    with pytest.warns(UserWarning, match=r"self_attn\.q_norm\.weight"):
        jax_gptq.models.load(folder)


def test_load_refuses(tmp_path):
    with pytest.raises(errors.MissingFileError, match=r"config\.json"):
        jax_gptq.models.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(errors.ConfigError, match="JSON"):
        jax_gptq.models.load(tmp_path)
    with pytest.raises(errors.ModelError, match="int8"):
        jax_gptq.models.load(tmp_path, dtype="int8")


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(model_type="mamba"), "mamba"),
        (dict(rope_scaling=dict(rope_type="longrope")), "longrope"),
        (dict(rope_scaling=dict(type="linear")), "factor"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(hidden_act="tanh"), "tanh"),
        (dict(model_type="qwen3", layer_types=["full_attention"]), "layer_types"),
        (dict(model_type="gemma2", layer_types=["full_attention", "linear"]), "linear"),
    ],
)
def test_unknown_configuration(options, words):
    with pytest.raises(errors.JaxGptqError, match=words):
        tiny(**options)


def test_missing_key():
    with pytest.raises(errors.ConfigError, match="vocab_size"):
        from_hf({key: value for key, value in TINY.items() if key != "vocab_size"})


def test_old_and_new_rope_keys_agree():
    scaling = dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    )
    old = tiny(rope_theta=5e5, rope_scaling=scaling)
    new = tiny(rope_parameters={"rope_theta": 5e5, **scaling})
    assert old.layers == new.layers
    assert old.layers != tiny(rope_theta=5e5).layers


def test_gemma3_ropes():
    old = dict(
        rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling={"factor": 8.0, "type": "linear"}
    )
    new = dict(
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
            sliding_attention=dict(rope_type="default", rope_theta=1e4),
        )
    )
    options = dict(model_type="gemma3_text", sliding_window=8, num_hidden_layers=6)
    layers = tiny(**options, **old).layers
    assert layers == tiny(**options, **new).layers
    assert [layer.window for layer in layers] == [8] * 5 + [None]
    assert layers[0].rope.frequencies[1] > 8 * layers[5].rope.frequencies[1]


def test_windows():
    assert {layer.window for layer in tiny(model_type="mistral", sliding_window=5).layers} == {5}
    assert {layer.window for layer in tiny(model_type="qwen2", sliding_window=5).layers} == {None}
    half = dict(model_type="qwen2", sliding_window=5, use_sliding_window=True, max_window_layers=1)
    assert [layer.window for layer in tiny(**half).layers] == [None, 5]


def test_generation_config_has_the_stop_tokens(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "eos_token_id": 1}))
    assert read_config(tmp_path).stop_tokens == (1,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    assert read_config(tmp_path).stop_tokens == (2, 3)
    assert read_config(tmp_path).to_hf()["vocab_size"] == 64


def test_rope_turns_pairs():
    rope = RopeConfig.from_hf({}, 6, 100.0, 32)
    x = np.random.default_rng(0).standard_normal((1, 5, 2, 6))
    turned = np.asarray(apply_rope(jnp.float32(x), rope_tables(rope, jnp.arange(5)[None])))
    as_complex = x[..., :3] + 1j * x[..., 3:]
    angle = np.arange(5)[:, None, None] * 100.0 ** -(np.arange(3) / 3)
    expected = as_complex * np.exp(1j * angle)
    assert rel_error(turned, np.concatenate([expected.real, expected.imag], -1)) < 1e-6


def test_dynamic_rope_has_a_bound():
    model = jax_gptq.models.new_model(
        tiny(rope_scaling=dict(type="dynamic", factor=2.0)), dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    with pytest.raises(errors.ModelError, match="64 positions"):
        model(np.zeros((1, 65), np.int32))


def test_input_ids_are_checked():
    model = jax_gptq.models.new_model(tiny(), dtype=jnp.float32, rngs=nnx.Rngs(0))
    with pytest.raises(errors.ModelError, match="float32"):
        model(np.zeros((1, 5), np.float32))
    with pytest.raises(errors.ModelError, match=r"\(5,\)"):
        model(np.zeros(5, np.int32))


def test_float32_rows_are_split_into_three():
    """Where no native kernel reads the table: exact products, also of what is not finite."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((6, 300)) * 10.0 ** rng.integers(-9, 9, (6, 1))).astype(np.float32)
    table = jnp.asarray(rng.standard_normal((70, 300)), jnp.bfloat16)
    exact = x.astype(np.float64) @ np.asarray(table, np.float64).T
    for found, row in zip(jax.jit(_split_dot)(x, table), exact):
        assert rel_error(found, row) < 1e-5
    integers = rng.integers(-(2**12), 2**12, (3, 64)).astype(np.float32)
    small = jnp.asarray(rng.integers(-4, 5, (5, 64)), jnp.bfloat16)
    expected = integers @ np.asarray(small, np.float32).T
    np.testing.assert_array_equal(_split_dot(integers, small), expected)
    ones = jnp.ones((2, 64), jnp.bfloat16)
    infinite = jnp.ones((1, 64)).at[0, 3].set(-jnp.inf)
    np.testing.assert_array_equal(_split_dot(infinite, ones), [[-np.inf, -np.inf]])


@pytest.mark.host
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_table_in_16_bits(dtype):
    """The native kernel, where it is built, and the rule of its gradient."""
    rng = np.random.default_rng(0)
    for rows, features, count in [
        (1, 64, 33),
        (5, 100, 257),
        (4, 130, 7),
        (9, 3, 300),
        (70, 65, 9),
    ]:
        x = rng.standard_normal((rows, features)).astype(np.float32)
        table = jnp.asarray(rng.standard_normal((count, features)), dtype)
        exact = x.astype(np.float64) @ np.asarray(table, np.float64).T
        logits = jax.jit(table_logits)(x, table)
        assert logits.dtype == jnp.float32
        assert rel_error(logits, exact) < 1e-6
        if rows < 70:  # more than the native kernel takes
            np.testing.assert_array_equal(table_logits(x[:1], table), logits[:1])
        wide = table.astype(jnp.float32)
        found = jax.grad(lambda x, t: (table_logits(x, t) ** 2).sum(), (0, 1))(x, wide)
        dy = 2 * (x @ np.asarray(wide).T)
        assert rel_error(found[0], dy @ np.asarray(wide)) < 1e-5
        assert rel_error(found[1], dy.T @ x) < 1e-5


def test_bfloat16_table_is_exported_for_two_platforms():
    x, table = jnp.ones((2, 8)), jnp.ones((5, 8), jnp.bfloat16)
    exported = jax.export.export(
        jax.jit(table_logits),
        platforms=["cpu", "cuda"],
        disabled_checks=jax_gptq.EXPORT_DISABLED_CHECKS,
    )(x, table)
    found = jax.export.deserialize(exported.serialize()).call(x, table)
    np.testing.assert_array_equal(found, np.full((2, 5), 8.0))
    rows = jax.vmap(table_logits, (0, None))(x, table)
    np.testing.assert_array_equal(rows, np.full((2, 5), 8.0))


def test_layer_by_layer_equals_the_whole():
    model = jax_gptq.models.new_model(tiny(), dtype=jnp.float32, rngs=nnx.Rngs(0))
    ids = np.arange(14).reshape(2, 7)
    x, context = model.embed(ids), model.context(ids)
    for block in model.blocks:
        x = block(x, context)
    assert rel_error(model.logits(x), model(ids)) < 1e-6


def test_layers_by_name():
    model = jax_gptq.models.new_model(tiny(), dtype=jnp.float32, rngs=nnx.Rngs(0))
    layers = jax_gptq.models.linears(model)
    assert len(layers) == 14
    inputs = []

    class Recorder(nnx.Module):
        def __init__(self, layer):
            self.layer = layer

        def __call__(self, x):
            inputs.append(x)
            return self.layer(x)

    name = "model.layers.1.mlp.down_proj"
    before = model(np.zeros((1, 3), np.int32))
    jax_gptq.models.set_layer(model, name, Recorder(jax_gptq.models.layer_at(model, name)))
    with jax.disable_jit():
        after = model(np.zeros((1, 3), np.int32))
    assert [x.shape for x in inputs] == [(1, 3, 48)]
    assert rel_error(after, before) < 1e-6
    with pytest.raises(errors.MissingTensorError, match="no_such"):
        jax_gptq.models.set_layer(model, "model.layers.1.no_such", None)


def test_gradient_reaches_every_float():
    model = jax_gptq.models.new_model(
        tiny(tie_word_embeddings=True), dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    ids = np.random.default_rng(0).integers(0, 64, (2, 9))
    grads = nnx.grad(lambda m: jax.nn.log_softmax(m(ids))[..., 0].mean())(model)
    for leaf in jax.tree.leaves(grads):
        assert np.abs(leaf).max() > 0


def quantized_twin(order_seed: int, name: str = "q"):
    rng = np.random.default_rng(order_seed)
    g_idx = rng.permutation(np.arange(64) // 32).astype(np.int32)
    codes = np.random.default_rng(1).integers(0, 16, (64, 32)).astype(np.uint8)
    weight = jax_gptq.GptqWeight(
        jax_gptq.packing.pack_codes(codes, 4),
        jnp.ones((2, 32), jnp.float16),
        jnp.full((2, 32), 8, jnp.uint8),
        jnp.asarray(g_idx),
        *(4, 32, 64, 32),
    )
    linear = jax_gptq.GptqLinear.from_weight(weight, layout="cpu")
    return jax_gptq.models.layers.QuantizedLinear.from_linear(linear)


def test_act_order_is_shared_only_when_equal():
    q, k, v = quantized_twin(0), quantized_twin(0), quantized_twin(2)
    assert not act_order.share_act_order((q, k, v), "attn")
    assert q.order is None
    assert act_order.share_act_order((q, k), "attn")
    assert q.weight.get_value().perm is k.weight.get_value().perm
    x = jnp.asarray(np.random.default_rng(3).standard_normal((3, 64)), jnp.float32)
    gathers = str(jax.make_jaxpr(lambda x: jax_gptq.models.layers.project(x, (q, k)))(x))
    assert "take" in gathers
    for shared, alone in zip(
        jax_gptq.models.layers.project(x, (q, k)), jax_gptq.models.layers.project(x, (q, v))
    ):
        assert shared.shape == alone.shape
    assert rel_error(jax_gptq.models.layers.project(x, (q, k))[1], k(x)) < 1e-6


def test_act_order_of_a_replaced_layer_is_its_own():
    q, k, v = quantized_twin(0), quantized_twin(0), quantized_twin(2)
    act_order.share_act_order((q, k), "attn")
    x = jnp.asarray(np.random.default_rng(3).standard_normal((3, 64)), jnp.float32)
    found = jax_gptq.models.layers.project(x, (q, v))
    assert rel_error(found[1], v(x)) < 1e-6


def test_permuted_weights():
    rng = np.random.default_rng(5)
    layer = quantized_twin(0)
    weight = jax_gptq.stores.logical_weight(layer.weight.get_value())
    dense = np.asarray(jax_gptq.dequantize(weight))
    rows, columns = rng.permutation(64), rng.permutation(32)
    np.testing.assert_array_equal(
        jax_gptq.dequantize(act_order.permute_rows(weight, rows)), dense[rows]
    )
    np.testing.assert_array_equal(
        jax_gptq.dequantize(act_order.permute_columns(weight, columns)), dense[:, columns]
    )
    sorted_rows = act_order.permute_rows(weight, act_order.folding_order(weight))
    assert sorted_rows.g_idx is None
    assert act_order.folding_order(dataclasses.replace(weight, g_idx=None)) is None


@pytest.fixture
def tokenizer_folder(tmp_path):
    """A byte-level tokenizer: what it decodes can end within a character."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)} | {"<|im_start|>": 256, "</s>": 257}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_tokenizer_streams_whole_characters(tokenizer_folder):
    tokenizer = Tokenizer(tokenizer_folder)
    text = "caf\u00e9 \u732b\n  two  lines\n\u00e9"
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text
    pieces = list(tokenizer.decode_stream(iter(tokens)))
    assert "".join(pieces) == text
    assert "\u732b" in pieces
    assert "".join(tokenizer.decode_stream(tokens[:4])) == "caf\N{REPLACEMENT CHARACTER}"


def test_chat_template(tokenizer_folder):
    with pytest.raises(errors.ModelError, match="no chat template"):
        Tokenizer(tokenizer_folder).encode_chat([{"role": "user", "content": "hi"}])
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
        "{% endif %}<|im_start|>{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    config = {"chat_template": template, "eos_token": {"content": "</s>"}}
    (tokenizer_folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(tokenizer_folder)
    tokens = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert tokens[0] == 256
    assert 257 in tokens
    assert tokenizer.decode(tokens) == "user: hiassistant:"
    with pytest.raises(errors.ModelError, match="no tools"):
        tokenizer.encode_chat([{"role": "tool", "content": ""}])
    (tokenizer_folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert Tokenizer(tokenizer_folder).encode_chat(
        [{"role": "user", "content": "x"}]
    ) == tokenizer.encode("x")


def test_tokenizer_files(tmp_path):
    with pytest.raises(errors.MissingFileError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(errors.ConfigError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
