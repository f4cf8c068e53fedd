"""Every format that the readers know, against float64 and against the writers' own answers."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_makers import (
    autogptq_v1_zeros,
    awq_tensors,
    ct_tensors,
    gptq_config,
    gptq_tensors,
    gptqmodel_v1_zeros,
    marlin_tensors,
    write_checkpoint,
    write_tensors,
)
from oracle import RawWeight, pack_bits, rel_error
from real_checkpoints import FOLDERS, needs_checkpoints

import jax_gptq
from jax_gptq.checkpoint.compressed_tensors import ActOrderWarning
from jax_gptq.checkpoint.gptq import ZeroRuleWarning

NAME = "model.layers.0.mlp.up_proj"


def load(folder, name=NAME):
    return jax_gptq.load_weights(folder)[name]


def check(folder, raw, name=NAME):
    """The loaded weight is the oracle's, bit for bit."""
    weight = load(folder, name)
    assert weight.shape == (raw.k, raw.n)
    assert weight.bits == raw.bits
    assert weight.scales.dtype == raw.scales.dtype
    assert np.array_equal(weight.scales, raw.scales)
    assert np.array_equal(weight.qzeros, raw.z)
    assert np.array_equal(np.asarray(weight.qweight).view(np.int32), pack_bits(raw.q, raw.bits))
    size = raw.k if raw.group_size == -1 else raw.group_size
    rows = np.arange(raw.k) // size
    found = np.arange(raw.k) // weight.group_size if weight.g_idx is None else weight.g_idx
    assert np.array_equal(found, rows if raw.g_idx is None else raw.g_idx)
    return weight


# Real files -----------------------------------------------------------------------------------


@needs_checkpoints
def test_real_checkpoints_match_their_writers():
    dequantize = jax.jit(jax_gptq.dequantize)
    for folder in FOLDERS:
        reference = np.load(folder / "ref.npz")
        answers = {k.removeprefix("deq:"): reference[k] for k in reference if k.startswith("deq:")}
        assert answers, folder
        tolerance = 5e-4 if "mixed" in folder.name else 1e-6
        weights = jax_gptq.load_weights(folder)
        linears = jax_gptq.load_linears(folder, "reference")
        assert list(weights) == list(linears)
        for name, expected in answers.items():
            found = np.asarray(dequantize(weights[name]))
            error = np.abs(found - expected).max() / np.abs(expected).max()
            assert error <= tolerance, (folder.name, name, error)
        with_bias = {name for name, linear in linears.items() if linear.bias is not None}
        expects_bias = "qwen2" in folder.name
        assert with_bias == {n for n in linears if expects_bias and n[-6:-5] in "qkv"}, folder


# GPTQ -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["gptq", "gptq_v2", "gptq_p"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_and_version(tmp_path, bits, version):
    rng = np.random.default_rng(bits)
    raw = RawWeight(rng, 96, 64, bits=bits, group_size=32)
    raw.z[:] = np.maximum(raw.z, 1)  # z = 0 in v1 has its own test
    config = gptq_config(bits=bits, checkpoint_format=version)
    check(write_checkpoint(tmp_path, {NAME: gptq_tensors(raw, version)}, config), raw)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 16, 32, 128, 1024])
@pytest.mark.parametrize("sym", [True, False])
def test_group_sizes_with_a_partial_last_group(tmp_path, bits, group_size, sym):
    raw = RawWeight(np.random.default_rng(1), 328, 24, bits=bits, group_size=group_size, sym=sym)
    config = gptq_config(bits=bits, group_size=group_size, sym=sym, checkpoint_format="gptq_v2")
    weight = check(write_checkpoint(tmp_path, {NAME: gptq_tensors(raw, "gptq_v2")}, config), raw)
    assert weight.group_size == (328 if group_size == -1 else group_size)
    assert weight.g_idx is None


@pytest.mark.parametrize(("k", "n"), [(33, 7), (100, 50), (64, 1)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_features_that_are_no_multiple_of_anything(tmp_path, k, n, bits):
    raw = RawWeight(np.random.default_rng(2), k, n, bits=bits, group_size=32)
    config = gptq_config(bits=bits, checkpoint_format="gptq_v2")
    check(write_checkpoint(tmp_path, {NAME: gptq_tensors(raw, "gptq_v2")}, config), raw)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_scales_keep_their_dtype(tmp_path, dtype):
    raw = RawWeight(np.random.default_rng(3), 64, 32, group_size=32, scale_dtype=dtype)
    config = gptq_config(checkpoint_format="gptq_v2")
    check(write_checkpoint(tmp_path, {NAME: gptq_tensors(raw, "gptq_v2")}, config), raw)


def test_act_order_in_any_order(tmp_path):
    rng = np.random.default_rng(4)
    raw = RawWeight(rng, 128, 32, group_size=32, g_idx="random")
    config = gptq_config(desc_act=True, checkpoint_format="gptq_v2")
    folder = write_checkpoint(tmp_path / "a", {NAME: gptq_tensors(raw, "gptq_v2")}, config)
    weight = check(folder, raw)
    assert weight.g_idx.tolist() == raw.g_idx.tolist()
    uneven = np.sort(rng.integers(0, 4, 128)).astype(np.int32)  # sorted, of unequal sizes
    raw = RawWeight(rng, 128, 32, group_size=32, g_idx=uneven)
    folder = write_checkpoint(tmp_path / "b", {NAME: gptq_tensors(raw, "gptq_v2")}, config)
    assert check(folder, raw).g_idx.tolist() == uneven.tolist()


@pytest.mark.parametrize("changes", [{}, {"group_size": -1, "desc_act": True}])
def test_missing_g_idx_where_it_can_be_inferred(tmp_path, changes):
    config = gptq_config(checkpoint_format="gptq_v2", **changes)
    raw = RawWeight(np.random.default_rng(5), 96, 32, group_size=config["group_size"])
    tensors = gptq_tensors(raw, "gptq_v2", g_idx=False)
    check(write_checkpoint(tmp_path, {NAME: tensors}, config), raw)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_rule_of_gptqmodel(tmp_path, bits):
    """z = 0 in v1: GPTQModel borrows from the neighbouring field, and says who it is."""
    raw = RawWeight(np.random.default_rng(6), 64, 64, bits=bits, group_size=32)
    raw.z[:, 1] = 0
    tensors = gptq_tensors(raw) | {"qzeros": gptqmodel_v1_zeros(raw)}
    folder = write_checkpoint(tmp_path, {NAME: tensors}, gptq_config(bits=bits))
    with pytest.warns(ZeroRuleWarning, match=r"model.safetensors: model.layers.0.*'word'"):
        check(folder, raw)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_rule_of_autogptq(tmp_path, bits):
    """z = 0 in v1: AutoGPTQ ORs in 0xFFFFFFFF; its own kernels then read each field plus one."""
    raw = RawWeight(np.random.default_rng(7), 64, 64, bits=bits, group_size=32)
    raw.z[raw.z == 0] = 1
    raw.z[:, 5] = 0
    raw.z[:, 32 // bits - 1] = 0  # the top field of a word: nothing above it to spoil
    per = 32 // bits
    fields = raw.z.reshape(2, -1, per)
    expected = fields.copy()
    for i in range(1, per):  # Above a field of ones, every field of that word is ones: zero.
        expected[:, :, i][(expected[:, :, :i] == 0).any(-1)] = 0
    tensors = gptq_tensors(raw) | {"qzeros": autogptq_v1_zeros(raw)}
    config = gptq_config(bits=bits, meta=None, checkpoint_format=None)
    folder = write_checkpoint(tmp_path, {NAME: tensors}, config)
    with pytest.warns(ZeroRuleWarning, match="'field'"):
        assert load(folder).qzeros.tolist() == expected.reshape(2, 64).tolist()


def test_zero_rule_warns_once_for_a_checkpoint(tmp_path):
    raw = RawWeight(np.random.default_rng(6), 64, 64, group_size=32)
    raw.z[:, 1] = 0
    tensors = gptq_tensors(raw) | {"qzeros": gptqmodel_v1_zeros(raw)}
    folder = write_checkpoint(tmp_path, {f"layers.{i}": tensors for i in range(3)}, gptq_config())
    with pytest.warns(ZeroRuleWarning) as record:
        jax_gptq.load_weights(folder)
    assert len(record) == 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("label", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("stored", ["gptq", "gptq_v2"])
def test_symmetric_data_decide_between_v1_and_v2(tmp_path, bits, label, stored):
    raw = RawWeight(np.random.default_rng(8), 64, 32, bits=bits, group_size=32, sym=True)
    config = gptq_config(bits=bits, sym=True, checkpoint_format=label)
    check(write_checkpoint(tmp_path, {NAME: gptq_tensors(raw, stored)}, config), raw)


def test_lengths_rounded_down_by_old_writers(tmp_path):
    raw = RawWeight(np.random.default_rng(9), 64, 44, group_size=32, sym=True)
    tensors = gptq_tensors(raw)
    assert tensors["qzeros"].shape[1] == 6
    for width in (5, 4):  # 44 * 4 // 32 and 44 // 32 * 4
        short = tensors | {"qzeros": tensors["qzeros"][:, :width]}
        folder = write_checkpoint(tmp_path / str(width), {NAME: short}, gptq_config(sym=True))
        check(folder, raw)
        folder = write_checkpoint(tmp_path / f"asym{width}", {NAME: short}, gptq_config())
        with pytest.raises(jax_gptq.errors.ShapeError, match=r"qzeros.*lost"):
            load(folder)


def test_dynamic_rules_lm_head_and_a_dense_module(tmp_path):
    rng = np.random.default_rng(10)
    raws = {
        "model.layers.0.self_attn.q_proj": RawWeight(rng, 64, 32, bits=4, group_size=32),
        "model.layers.1.self_attn.q_proj": RawWeight(rng, 64, 32, bits=8, group_size=16),
        "model.layers.1.mlp.up_proj": RawWeight(rng, 64, 32, bits=2, group_size=64, g_idx="random"),
        "model.layers.10.mlp.up_proj": RawWeight(rng, 64, 32, bits=3, group_size=-1, sym=True),
        "lm_head": RawWeight(rng, 64, 96, bits=4, group_size=32),
    }
    config = gptq_config(
        checkpoint_format="gptq_v2",
        lm_head=True,
        dynamic={
            "-:.*layers\\.0\\.mlp.*": {},
            ".*layers\\.1\\.self_attn.*": {"bits": 8, "group_size": 16},
            "self_attn": {"bits": 2},  # does not match from the start of a name
            "+:.*layers\\.1\\.mlp.*": {"bits": 2, "group_size": 64, "desc_act": True},
            "+:.*layers\\.1\\..*": {"bits": 6},  # a later rule: the first that matches wins
            "model.layers.10": {"bits": 3, "group_size": -1, "sym": True},
        },
    )
    modules = {name: gptq_tensors(raw, "gptq_v2") for name, raw in raws.items()}
    dense = rng.normal(size=(32, 64)).astype(np.float32)
    modules["model.layers.0.mlp.up_proj"] = {"weight": dense}
    folder = write_checkpoint(tmp_path, modules, config)
    weights = jax_gptq.load_weights(folder)
    order = ["lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    order += ["model.layers.1.self_attn.q_proj", "model.layers.10.mlp.up_proj"]
    assert list(weights) == order
    for name, raw in raws.items():
        check(folder, raw, name)
    checkpoint = jax_gptq.open_checkpoint(folder)
    np.testing.assert_array_equal(checkpoint.tensor("model.layers.0.mlp.up_proj.weight"), dense)
    assert checkpoint.config.module("model.layers.0.mlp.up_proj").skipped


def test_bits_and_group_size_come_from_the_shapes_where_the_configuration_is_silent(tmp_path):
    raw = RawWeight(np.random.default_rng(11), 96, 64, bits=3, group_size=32)
    config = gptq_config(bits=None, group_size=None, checkpoint_format="gptq_v2")
    check(write_checkpoint(tmp_path, {NAME: gptq_tensors(raw, "gptq_v2")}, config), raw)


def test_conv1d_is_stored_like_any_other(tmp_path):
    raw = RawWeight(np.random.default_rng(12), 256, 768, group_size=128)
    name = "transformer.h.0.attn.c_attn"
    config = gptq_config(group_size=128, checkpoint_format="gptq_v2")
    folder = write_checkpoint(tmp_path, {name: gptq_tensors(raw, "gptq_v2")}, config)
    assert load(folder, name).qweight.shape == (32, 768)
    check(folder, raw, name)


def test_biases(tmp_path):
    rng = np.random.default_rng(13)
    raw = RawWeight(rng, 64, 32, group_size=32, sym=True)
    bias = rng.normal(size=32).astype(np.float16)
    modules = {
        "a": gptq_tensors(raw) | {"bias": bias},
        "b": gptq_tensors(raw) | {"bias": np.zeros(32, np.float16)},  # AutoGPTQ
        "c": gptq_tensors(raw),
    }
    linears = jax_gptq.load_linears(write_checkpoint(tmp_path, modules, gptq_config(sym=True)))
    assert linears["b"].bias is None
    assert linears["c"].bias is None
    assert linears["a"].bias.dtype == jnp.float16
    x = rng.normal(size=(3, 64)).astype(np.float32)
    y = jax.jit(lambda layer, x: layer(x))(linears["a"], x)
    assert rel_error(y, x.astype(np.float64) @ raw.matrix + bias) < 3e-6


# Other writers --------------------------------------------------------------------------------


def ct_config(**weights) -> dict:
    scheme = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    scheme |= {"symmetric": True, "actorder": None} | weights
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
        "ignore": ["lm_head"],
    }


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel"])
def test_compressed_tensors(tmp_path, bits, symmetric, strategy):
    size = -1 if strategy == "channel" else 32
    raw = RawWeight(
        np.random.default_rng(bits), 96, 40, bits=bits, group_size=size, sym=symmetric,
        scale_dtype=ml_dtypes.bfloat16,
    )  # fmt: skip
    config = ct_config(
        num_bits=bits,
        symmetric=symmetric,
        strategy=strategy,
        group_size=None if strategy == "channel" else 32,
    )
    modules = {NAME: ct_tensors(raw, symmetric=symmetric)}
    check(write_checkpoint(tmp_path, modules, config, config_file="config.json"), raw)


def test_compressed_tensors_with_a_partial_word(tmp_path):
    raw = RawWeight(np.random.default_rng(1), 100, 30, bits=3, group_size=50, sym=False)
    modules = {NAME: ct_tensors(raw, symmetric=False)}
    check(write_checkpoint(tmp_path, modules, ct_config(num_bits=3, symmetric=False, group_size=50),
                           config_file="config.json"), raw)  # fmt: skip


@pytest.mark.parametrize("actorder", ["group", "dynamic", "weight", "static", None, True])
@pytest.mark.parametrize("g_idx", ["random", "negative", "unused", None])
def test_compressed_tensors_act_order(tmp_path, actorder, g_idx):
    rng = np.random.default_rng(14)
    order = "random" if g_idx in ("random", "negative") else None
    raw = RawWeight(rng, 128, 32, group_size=32, sym=True, g_idx=order)
    tensors = ct_tensors(raw, symmetric=True)
    if order is not None:
        tensors["weight_g_idx"] = raw.g_idx.copy()
    if g_idx == "negative":  # Counted from the end; -1 would be the mark for "unused".
        tensors["weight_g_idx"][raw.g_idx < 3] -= 4
    if g_idx == "unused":
        tensors["weight_g_idx"] = np.full(128, -1, np.int32)
    config = ct_config(actorder=actorder)
    folder = write_checkpoint(tmp_path, {NAME: tensors}, config, config_file="config.json")
    if g_idx is None and actorder in ("group", "dynamic", True):
        with pytest.warns(ActOrderWarning, match="taken in order"):
            check(folder, raw)
    else:
        check(folder, raw)


def test_compressed_tensors_of_several_schemes(tmp_path):
    rng = np.random.default_rng(15)
    raws = {
        "a": RawWeight(rng, 64, 32, bits=4, group_size=32, sym=True),
        "b": RawWeight(rng, 64, 32, bits=8, group_size=-1, sym=True),
        "c": RawWeight(rng, 64, 32, bits=4, group_size=16),
    }
    config = ct_config()
    config["format"] = "mixed-precision"
    weights = config["config_groups"]["group_0"]["weights"]
    others = [
        {"num_bits": 8, "strategy": "channel", "group_size": None},
        {"group_size": 16, "symmetric": False},
    ]
    for number, changes in enumerate(others, 1):
        group = {"weights": weights | changes, "format": "pack-quantized"}
        config["config_groups"][f"group_{number}"] = group
    modules = {name: ct_tensors(raw, symmetric=name != "c") for name, raw in raws.items()}
    folder = write_checkpoint(tmp_path, modules, config, config_file="config.json")
    for name, raw in raws.items():
        check(folder, raw, name)


@pytest.mark.parametrize("group_size", [-1, 32, 64])
def test_awq(tmp_path, group_size):
    raw = RawWeight(np.random.default_rng(16), 96, 40, group_size=group_size)
    config = {"zero_point": True, "q_group_size": group_size, "w_bit": 4, "version": "GEMM"}
    folder = tmp_path / "own"  # AutoAWQ's own file has no quant_method.
    write_checkpoint(folder, {NAME: awq_tensors(raw)}, config, config_file="quant_config.json")
    check(folder, raw)
    config = {
        "quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True,
        "version": "gemm",
    }  # fmt: skip
    folder = tmp_path / "transformers"
    write_checkpoint(folder, {NAME: awq_tensors(raw)}, config, config_file="config.json")
    check(folder, raw)


@pytest.mark.parametrize("stored", [True, False])
def test_awq_without_zero_points(tmp_path, stored):
    raw = RawWeight(np.random.default_rng(17), 64, 32, group_size=32, sym=True)
    tensors = awq_tensors(raw)
    if not stored:
        del tensors["qzeros"]
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": False}
    check(write_checkpoint(tmp_path, {NAME: tensors}, config | {"version": "gemm"}), raw)


@pytest.mark.parametrize(("k", "group_size"), [(256, 128), (256, -1), (128, 128), (384, 128)])
def test_marlin(tmp_path, k, group_size):
    raw = RawWeight(np.random.default_rng(18), k, 256, group_size=group_size, sym=True)
    bias = np.linspace(-1, 1, 256).astype(np.float16)
    config = gptq_config(group_size=group_size, sym=True, is_marlin_format=True)
    modules = {NAME: marlin_tensors(raw) | {"bias": bias}}
    folder = write_checkpoint(tmp_path, modules, config)
    check(folder, raw)
    assert jax_gptq.load_linears(folder)[NAME].bias.tolist() == bias.tolist()


# Laziness and memory --------------------------------------------------------------------------


def test_opening_reads_headers_only(tmp_path):
    raw = RawWeight(np.random.default_rng(19), 64, 32, group_size=32, sym=True)
    folder = write_checkpoint(tmp_path, {NAME: gptq_tensors(raw)}, gptq_config(sym=True))
    checkpoint = jax_gptq.open_checkpoint(folder)
    assert checkpoint.quantized_modules() == [NAME]
    assert not checkpoint.files._maps
    scales = checkpoint.tensor(f"{NAME}.scales")
    assert not scales.flags.writeable
    assert not scales.flags.owndata


def test_a_loaded_layer_holds_packed_bytes(tmp_path):
    k, n = 1024, 512
    raw = RawWeight(np.random.default_rng(20), k, n, group_size=128, sym=True)
    config = gptq_config(group_size=128, sym=True)
    folder = write_checkpoint(tmp_path, {NAME: gptq_tensors(raw)}, config)
    parts = k * n // 2 + 8 * n * 2 + 8 * n  # codes, scales, zero points
    for layout in ("reference", "cpu"):
        linear = jax_gptq.load_linears(folder, layout)[NAME]
        found = sum(leaf.nbytes for leaf in jax.tree.leaves(linear))
        assert parts <= found <= 1.02 * parts, layout


def test_weights_outlive_the_files(tmp_path):
    raw = RawWeight(np.random.default_rng(21), 64, 32, group_size=32, sym=True)
    folder = write_checkpoint(tmp_path / "c", {NAME: gptq_tensors(raw)}, gptq_config(sym=True))
    weight = load(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 4096)
    shutil.rmtree(folder)
    assert np.array_equal(np.asarray(weight.qweight).view(np.int32), pack_bits(raw.q, 4))


# Files and configurations ---------------------------------------------------------------------


def test_a_linear_split_across_two_shards_and_a_stale_index(tmp_path):
    raw = RawWeight(np.random.default_rng(22), 64, 32, group_size=32, sym=True)
    tensors = gptq_tensors(raw)
    first = {key: tensors[key] for key in ("qweight", "g_idx")}
    second = {key: tensors[key] for key in ("qzeros", "scales")}
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    write_tensors(tmp_path / names[0], {NAME: first})
    write_tensors(tmp_path / names[1], {NAME: second})
    (tmp_path / "quantize_config.json").write_text(json.dumps(gptq_config(sym=True)))
    check(tmp_path, raw)  # no index at all
    stale = {f"{NAME}.weight": names[0]}  # the float model's, and only one of the shards
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": stale}))
    check(tmp_path, raw)


@pytest.mark.parametrize(
    "name",
    ["gptq_model-4bit-128g.safetensors", "gptq_model-8bit--1g.safetensors", "weights.safetensors"],
)
def test_other_file_names(tmp_path, name):
    raw = RawWeight(np.random.default_rng(23), 64, 32, group_size=32, sym=True)
    write_tensors(tmp_path / name, {NAME: gptq_tensors(raw)})
    (tmp_path / "quantize_config.json").write_text(json.dumps(gptq_config(sym=True)))
    check(tmp_path, raw)
    check(tmp_path / name, raw)  # the file itself
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check(tmp_path, raw)  # the index of the float model, which names none of the files


def test_configuration_lookup_order(tmp_path):
    raw = RawWeight(np.random.default_rng(24), 64, 32, bits=8, group_size=32, sym=True)
    good, bad = gptq_config(bits=8, sym=True), gptq_config(bits=2, sym=True)
    folder = write_checkpoint(tmp_path, {NAME: gptq_tensors(raw)}, good)
    (folder / "quant_config.json").write_text(json.dumps(bad))
    (folder / "config.json").write_text(json.dumps({"quantization_config": bad}))
    check(folder, raw)
    (folder / "quantize_config.json").rename(folder / "quant_config.json")
    check(folder, raw)
    (folder / "quant_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"quantization_config": good}))
    check(folder, raw)


def test_configuration_in_the_metadata_of_a_file(tmp_path):
    raw = RawWeight(np.random.default_rng(25), 64, 32, group_size=32, sym=True, g_idx="random")
    metadata = {"gptq_bits": "4", "gptq_group_size": "32", "gptq_desc_act": "True"}
    path = tmp_path / "model.safetensors"
    write_tensors(path, {NAME: gptq_tensors(raw)}, metadata | {"auto_gptq_version": "0.7.1"})
    with pytest.warns(UserWarning, match="sym: expected true or false"):
        check(path, raw)


@pytest.mark.parametrize(
    ("key", "alias"), [("bits", "w_bit"), ("bits", "wbits"), ("group_size", "q_group_size"),
                       ("checkpoint_format", "format"), ("quant_method", "method")],
)  # fmt: skip
def test_aliases(tmp_path, key, alias):
    raw = RawWeight(np.random.default_rng(26), 64, 32, group_size=32)
    config = gptq_config(checkpoint_format="gptq_v2")
    config[alias] = config.pop(key)
    check(write_checkpoint(tmp_path, {NAME: gptq_tensors(raw, "gptq_v2")}, config), raw)


def test_is_marlin_format_false_is_harmless_and_sym_defaults_to_true(tmp_path):
    raw = RawWeight(np.random.default_rng(27), 64, 32, group_size=32, sym=True)
    config = gptq_config(sym=None, is_marlin_format=False)
    folder = write_checkpoint(tmp_path, {NAME: gptq_tensors(raw)}, config)
    with pytest.warns(UserWarning, match=r"quantize_config.json: sym"):
        check(folder, raw)


def test_a_float_checkpoint_has_no_configuration(tmp_path):
    values = np.arange(8, dtype=ml_dtypes.bfloat16).reshape(2, 4)
    write_checkpoint(tmp_path, {"lm_head": {"weight": values}}, None)
    checkpoint = jax_gptq.open_checkpoint(tmp_path)
    assert checkpoint.config is None
    assert checkpoint.names() == ["lm_head.weight"]
    assert checkpoint.quantized_modules() == []
    assert checkpoint.shape("lm_head.weight") == (2, 4)
    assert checkpoint.tensor("lm_head.weight").dtype == ml_dtypes.bfloat16
    assert checkpoint.tensor("lm_head.weight").tolist() == values.tolist()
    assert "lm_head.weight" in checkpoint
    assert checkpoint.bias("lm_head") is None
