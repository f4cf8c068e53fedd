"""Round trips through files: bit for bit, whatever the bits, groups, order and format."""

import dataclasses
import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracle import RawWeight, random_weight
from real_checkpoints import FOLDERS, needs_checkpoints
from safetensors import safe_open
from safetensors.numpy import load_file

import jax_gptq
from jax_gptq import errors

FORMATS = ("gptq", "gptq_v2", "gptq_p")


def assert_same(found, expected):
    """Same statics, same dtypes, same bits."""
    for field in dataclasses.fields(expected):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if b is None or isinstance(b, int):
            assert a == b, field.name
        else:
            assert a.dtype == b.dtype, field.name
            assert np.array_equal(np.asarray(a), np.asarray(b)), field.name


def round_trip(tmp_path, weights, **options):
    jax_gptq.save_weights(weights, tmp_path, **options)
    assert not list(tmp_path.glob(".*")), "a temporary file was left behind"
    loaded = jax_gptq.load_weights(tmp_path)
    assert set(loaded) == set(weights)
    for name, weight in weights.items():
        assert_same(loaded[name], weight)
    return jax_gptq.open_checkpoint(tmp_path)


@pytest.mark.filterwarnings("ignore::jax_gptq.checkpoint.gptq.ZeroRuleWarning")
@pytest.mark.parametrize("checkpoint_format", FORMATS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_group_and_order(tmp_path, bits, checkpoint_format):
    if checkpoint_format != "gptq_p" and bits in (5, 6, 7):
        weight, _ = random_weight(np.random.default_rng(0), 64, 32, bits=bits)
        with pytest.raises(errors.BitsError, match=r"layer.qweight.*gptq_p"):
            jax_gptq.save_weights({"layer": weight}, tmp_path, checkpoint_format=checkpoint_format)
        assert not list(tmp_path.iterdir())
        return
    rng = np.random.default_rng(bits)
    uneven = rng.integers(0, 9, 160).astype(np.int32)
    variants = {
        "symmetric": {"sym": True, "group_size": 32},
        "asymmetric": {"group_size": 32},
        "one_group": {"group_size": -1},
        "larger_than_k": {"group_size": 1024},
        "partial_group": {"group_size": 128, "scale_dtype": np.float32},
        "act_order": {"group_size": 32, "g_idx": "random"},
        "any_order": {"group_size": 32, "g_idx": uneven, "scale_dtype": ml_dtypes.bfloat16},
    }
    weights = {
        f"model.layers.{i}.{name}": random_weight(rng, 160, 32, bits=bits, **options)[0]
        for i, (name, options) in enumerate(variants.items())
    }
    round_trip(tmp_path / "all", weights, checkpoint_format=checkpoint_format)
    for name in ("model.layers.0.symmetric", "model.layers.2.one_group"):
        folder = tmp_path / name
        round_trip(folder, {name: weights[name]}, checkpoint_format=checkpoint_format)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_odd_features(tmp_path, bits, checkpoint_format):
    rng = np.random.default_rng(bits)
    options = {"bits": bits, "group_size": 32, "sym": True}
    weights = {f"m{k}_{n}": random_weight(rng, k, n, **options)[0] for k, n in [(33, 7), (100, 50)]}
    round_trip(tmp_path, weights, checkpoint_format=checkpoint_format)


def test_mixed_widths_become_dynamic_rules(tmp_path):
    rng = np.random.default_rng(1)
    sizes = [(4, 32), (4, 32), (8, 32), (2, -1), (4, 16)]
    weights = {
        f"model.layers.{i}.up-proj": random_weight(rng, 64, 32, bits=b, group_size=g, sym=True)[0]
        for i, (b, g) in enumerate(sizes)
    }
    weights["lm_head"] = random_weight(rng, 64, 96, bits=4, group_size=32, sym=True)[0]
    dense = rng.normal(size=(32, 64)).astype(np.float16)
    checkpoint = round_trip(
        tmp_path, weights, other_tensors={"model.layers.0.down_proj.weight": dense}
    )
    config = checkpoint.config
    assert (config.bits, config.group_size, config.sym, config.desc_act) == (4, 32, True, False)
    assert config.lm_head
    assert [rule for _, rule in config.dynamic] == [
        {}, {"bits": 8}, {"bits": 2, "group_size": 64}, {"group_size": 16},
    ]  # fmt: skip
    assert config.module("model.layers.0.down_proj").skipped
    assert not config.module("model.layers.0.up-proj").skipped


def test_shards_biases_and_other_tensors(tmp_path):
    rng = np.random.default_rng(2)
    weights = {
        f"layers.{i}": random_weight(rng, 128, 64, group_size=32, sym=True)[0] for i in range(5)
    }
    biases = {"layers.3": np.arange(64, dtype=np.float16)}
    others = {
        "norm.weight": np.ones(7, ml_dtypes.bfloat16),
        "embed.weight": jnp.arange(40, dtype=jnp.float32).reshape(8, 5).T,
        "scalar": np.float64(3.5),
        "empty": np.zeros((0, 4), np.float16),
    }
    config = {"model_type": "llama", "hidden_size": 128}
    checkpoint = round_trip(
        tmp_path, weights, biases=biases, other_tensors=others, config=config, max_shard_size=12_000
    )
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    held = {name: shard for shard in shards for name in load_file(tmp_path / shard)}
    assert index["weight_map"] == held
    sizes = [value.nbytes for shard in shards for value in load_file(tmp_path / shard).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    for name, value in others.items():
        value = np.asarray(value)
        assert checkpoint.tensor(name).dtype == value.dtype
        assert np.array_equal(checkpoint.tensor(name), value)
    assert checkpoint.bias("layers.3").tolist() == list(range(64))
    assert checkpoint.hf_config["hidden_size"] == 128
    assert checkpoint.hf_config["quantization_config"] == checkpoint.config.raw
    with safe_open(tmp_path / shards[0], "numpy") as file:  # as transformers asks of a file
        assert file.metadata() == {"format": "pt"}

    round_trip(tmp_path, weights)  # one file now, and it is the one that is read
    assert checkpoint.path == tmp_path
    round_trip(tmp_path, weights, max_shard_size=12_000)
    assert not (tmp_path / "model.safetensors").exists()


def test_tensors_are_aligned_for_other_readers(tmp_path):
    weight, _ = random_weight(np.random.default_rng(3), 64, 33, group_size=32)
    jax_gptq.save_weights(
        {"a": weight}, tmp_path, checkpoint_format="gptq_v2",
        other_tensors={"b": np.ones(3, np.float16), "c": np.ones(3, np.float64)},
    )  # fmt: skip
    checkpoint = jax_gptq.open_checkpoint(tmp_path)
    for name in checkpoint.names():
        info = checkpoint.info(name)
        assert info.start % checkpoint.tensor(name).dtype.itemsize == 0, name


def test_pairs_are_consumed_one_at_a_time(tmp_path):
    rng = np.random.default_rng(4)
    weights = {f"m{i}": random_weight(rng, 64, 32, group_size=32, sym=True)[0] for i in range(3)}
    jax_gptq.save_weights(iter(weights.items()), tmp_path, other_tensors=iter([]))
    for name, weight in jax_gptq.load_weights(tmp_path).items():
        assert_same(weight, weights[name])


def test_a_single_file_holds_its_configuration(tmp_path):
    weight, _ = random_weight(np.random.default_rng(5), 64, 32, bits=3, group_size=16)
    path = tmp_path / "layer.safetensors"
    jax_gptq.save_weights({"layer": weight}, path, checkpoint_format="gptq_v2")
    assert [p.name for p in tmp_path.iterdir()] == ["layer.safetensors"]
    assert_same(jax_gptq.load_weights(path)["layer"], weight)
    (tmp_path / "quantize_config.json").write_text('{"bits": 8, "sym": true}')  # of another file
    assert_same(jax_gptq.load_weights(path)["layer"], weight)


def test_nothing_changes_when_writing_fails(tmp_path):
    weight, _ = random_weight(np.random.default_rng(6), 64, 32, group_size=32, sym=True)
    round_trip(tmp_path, {"a": weight})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def failing():
        yield "a", dataclasses.replace(weight, scales=weight.scales * 2)
        raise RuntimeError("the solver failed")

    with pytest.raises(RuntimeError, match="solver"):
        jax_gptq.save_weights(failing(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_refusals(tmp_path):
    rng = np.random.default_rng(7)
    weight, _ = random_weight(rng, 64, 32, group_size=32, sym=True)
    partial, _ = random_weight(rng, 33, 32, bits=5, group_size=32)

    def refuses(error, match, weights=None, **options):
        weights = {"a": weight} if weights is None else weights
        with pytest.raises(error, match=match):
            jax_gptq.save_weights(
                {"a": weight} if weights is None else weights, tmp_path, **options
            )
        assert not list(tmp_path.iterdir())

    refuses(errors.CheckpointFormatError, "marlin", checkpoint_format="marlin")
    refuses(errors.CheckpointFormatError, "at least one weight", {})
    refuses(errors.CheckpointFormatError, r"b\.bias", biases={"b": np.zeros(3)})
    refuses(
        errors.CheckpointFormatError, "found twice", other_tensors={"a.scales": np.zeros((2, 2))}
    )
    refuses(
        errors.CheckpointFormatError, "is quantized", other_tensors={"a.weight": np.zeros((2, 2))}
    )
    refuses(errors.DtypeError, "complex64", other_tensors={"x": np.zeros(2, np.complex64)})
    refuses(errors.ShapeError, "in_features=33", {"a": partial}, checkpoint_format="gptq_p")


@needs_checkpoints
def test_real_checkpoints_survive_a_round_trip(tmp_path):
    for folder in FOLDERS:
        if not any(kind in folder.name for kind in ("asym_act", "dyn_mixed", "w3")):
            continue  # The others differ in nothing that the writer sees.
        version = "gptq_v2" if "asym" in folder.name else "gptq"
        weights = jax_gptq.load_weights(folder)
        round_trip(tmp_path / folder.name, weights, checkpoint_format=version)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_bytes_equal_what_the_format_prescribes(tmp_path, bits):
    """The tensors on disk, not only what our own reader makes of them."""
    for version in ("gptq", "gptq_v2"):
        rng = np.random.default_rng(8)
        made = RawWeight(rng, 64, 32, bits=bits, group_size=32, version=version)
        jax_gptq.save_weights({"a": made.weight()}, tmp_path / version, checkpoint_format=version)
        tensors = load_file(tmp_path / version / "model.safetensors")
        assert np.array_equal(tensors["a.qweight"], made.qweight)
        assert np.array_equal(tensors["a.qzeros"], made.qzeros)
        assert np.array_equal(tensors["a.scales"], made.scales)
        assert tensors["a.g_idx"].tolist() == [k // 32 for k in range(64)]
        assert all(value.dtype == np.int32 for key, value in tensors.items() if key[2] in "qg")
