"""Bad checkpoints: one clear error each, naming file and tensor. None of them loads as zeros."""

import json
import re

import numpy as np
import pytest
from checkpoint_makers import (
    awq_tensors,
    ct_tensors,
    gptq_config,
    gptq_tensors,
    marlin_tensors,
    write_checkpoint,
    write_tensors,
)
from oracle import RawWeight

import jax_gptq
from jax_gptq import errors

NAME = "model.layers.3.mlp.up_proj"


@pytest.fixture
def raw():
    return RawWeight(np.random.default_rng(0), 64, 32, group_size=32, sym=True)


def refuses(folder, error, *words):
    """Loading raises `error`, and its message has all the words, in order."""
    pattern = ".*".join(re.escape(word) for word in words)
    with pytest.raises(error, match=f"(?s){pattern}") as info:
        jax_gptq.load_weights(folder)
    assert isinstance(info.value, errors.JaxGptqError)
    with pytest.raises(error):
        jax_gptq.load_linears(folder)


def gptq(tmp_path, raw, tensors=None, **config):
    tensors = gptq_tensors(raw) if tensors is None else tensors
    return write_checkpoint(tmp_path, {NAME: tensors}, gptq_config(sym=True) | config)


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_missing_tensor(tmp_path, raw, suffix):
    tensors = gptq_tensors(raw)
    del tensors[suffix]
    folder = gptq(tmp_path, raw, tensors)
    words = ("model.safetensors", f"{NAME}.{suffix}", "expected", "found none")
    refuses(folder, errors.MissingTensorError, *words)


def test_missing_g_idx_under_desc_act(tmp_path, raw):
    folder = gptq(tmp_path, raw, gptq_tensors(raw, g_idx=False), desc_act=True)
    words = ("model.safetensors", f"{NAME}.g_idx", "expected", "desc_act", "found no", "quantize")
    refuses(folder, errors.GroupIndexError, *words)


@pytest.mark.parametrize("entry", [2, -1])
def test_g_idx_out_of_range(tmp_path, raw, entry):
    tensors = gptq_tensors(raw)
    tensors["g_idx"][5] = entry
    folder = gptq(tmp_path, raw, tensors, desc_act=True)
    words = ("model.safetensors", f"{NAME}.g_idx", "expected", f"found {entry} at row 5")
    refuses(folder, errors.GroupIndexError, *words)


def test_g_idx_that_is_not_an_integer(tmp_path, raw):
    tensors = gptq_tensors(raw)
    tensors["g_idx"] = tensors["g_idx"].astype(np.float32)
    folder = gptq(tmp_path, raw, tensors)
    words = ("model.safetensors", f"{NAME}.g_idx", "expected integers", "found dtype float32")
    refuses(folder, errors.GroupIndexError, *words)


@pytest.mark.parametrize("g_idx", [True, False])
def test_bits_that_contradict_the_shapes(tmp_path, raw, g_idx):
    folder = gptq(tmp_path, raw, gptq_tensors(raw, g_idx=g_idx), bits=8)
    words = ("model.safetensors", f"{NAME}.qweight", "expected bits=8", "quantize_config.json")
    refuses(folder, errors.BitsError, *words, "found (8, 32)", "fit [4] bits", "correct bits")


def test_dynamic_bits_that_contradict_the_shapes(tmp_path, raw):
    folder = gptq(tmp_path, raw, dynamic={".*up_proj": {"bits": 3}})
    refuses(folder, errors.BitsError, f"{NAME}.qweight", "expected bits=3", "`dynamic`")


@pytest.mark.parametrize("group_size", [16, -1, 128])
def test_group_size_that_contradicts_the_shapes(tmp_path, raw, group_size):
    folder = gptq(tmp_path, raw, group_size=group_size)
    words = ("model.safetensors", f"{NAME}.scales", f"group_size={group_size}", "found 2")
    refuses(folder, errors.ShapeError, *words, "correct group_size")


def test_tensors_of_different_modules(tmp_path, raw):
    other = RawWeight(np.random.default_rng(1), 64, 64, group_size=32, sym=True)
    tensors = gptq_tensors(raw) | {"qweight": gptq_tensors(other)["qweight"]}
    words = ("model.safetensors", f"{NAME}.qweight", "expected 32 columns", "(8, 64)")
    refuses(gptq(tmp_path, raw, tensors), errors.ShapeError, *words)


def test_symmetric_zeros_that_are_neither_v1_nor_v2(tmp_path):
    raw = RawWeight(np.random.default_rng(2), 64, 32, group_size=32)
    words = ("model.safetensors", f"{NAME}.qzeros", "sym is true", "found", "Set sym to false")
    refuses(gptq(tmp_path, raw), errors.ZeroPointError, *words)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scales_that_are_not_finite(tmp_path, raw, value):
    tensors = gptq_tensors(raw)
    tensors["scales"] = tensors["scales"].copy()
    tensors["scales"][1, 7] = value
    words = ("model.safetensors", f"{NAME}.scales", "expected finite", "[1, 7]", "damaged")
    refuses(gptq(tmp_path, raw, tensors), errors.ScalesError, *words)


def test_bias_that_is_not_finite(tmp_path, raw):
    tensors = gptq_tensors(raw) | {"bias": np.full(32, np.nan, np.float16)}
    checkpoint = jax_gptq.open_checkpoint(gptq(tmp_path, raw, tensors))
    with pytest.raises(errors.CorruptFileError, match=rf"model.safetensors: {NAME}.bias: expected"):
        checkpoint.linear(NAME)


def test_bias_of_the_wrong_width(tmp_path, raw):
    tensors = gptq_tensors(raw) | {"bias": np.ones(31, np.float16)}
    checkpoint = jax_gptq.open_checkpoint(gptq(tmp_path, raw, tensors))
    with pytest.raises(errors.ShapeError, match=rf"{NAME}.bias: expected shape \(32,\), found"):
        checkpoint.linear(NAME)


@pytest.mark.parametrize(("suffix", "dtype"), [("qweight", np.float32), ("scales", np.int32)])
def test_tensors_cast_to_another_dtype(tmp_path, raw, suffix, dtype):
    tensors = gptq_tensors(raw)
    tensors[suffix] = tensors[suffix].astype(dtype)
    words = ("model.safetensors", f"{NAME}.{suffix}", "expected", f"found {np.dtype(dtype)}")
    refuses(gptq(tmp_path, raw, tensors), errors.DtypeError, *words)


def test_planar_codes_of_a_partial_block(tmp_path):
    raw = RawWeight(np.random.default_rng(3), 64, 32, bits=5, group_size=32, sym=True)
    tensors = gptq_tensors(raw)
    tensors["g_idx"] = tensors["g_idx"][:60]
    folder = gptq(tmp_path, raw, tensors, bits=5)
    refuses(folder, errors.ShapeError, f"{NAME}.qweight", "blocks of 32", "found 60")


# Files ----------------------------------------------------------------------------------------


def test_lfs_pointer(tmp_path, raw):
    folder = gptq(tmp_path, raw)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 4567\n"
    (folder / "model.safetensors").write_text(pointer)
    refuses(folder, errors.CorruptFileError, "model.safetensors", "Git LFS pointer", "git lfs pull")
    gptq(tmp_path, raw)
    (folder / "quantize_config.json").write_text(pointer)
    words = ("quantize_config.json", "Git LFS pointer", "git lfs pull")
    refuses(folder, errors.CorruptFileError, *words)


@pytest.mark.parametrize("kept", [-1, 200, 5, 0])
def test_truncated_file(tmp_path, raw, kept):
    folder = gptq(tmp_path, raw)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    words = ("model.safetensors", "expected", "bytes", "truncated, download it again")
    refuses(folder, errors.CorruptFileError, *words)


@pytest.mark.parametrize("content", [b"<html>not here</html>", b"\x08" + bytes(7) + b"[1,2,3] "])
def test_something_else_than_safetensors(tmp_path, raw, content):
    folder = gptq(tmp_path, raw)
    (folder / "model.safetensors").write_bytes(content)
    refuses(folder, errors.CorruptFileError, "model.safetensors", "expected", "found")


def test_header_that_contradicts_itself(tmp_path, raw):
    folder = gptq(tmp_path, raw)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"shape":[8,32]', b'"shape":[7,32]'))
    words = ("model.safetensors", f"{NAME}.qweight", "expected 896 bytes", "found 1024")
    refuses(folder, errors.CorruptFileError, *words)


def test_index_naming_a_missing_shard(tmp_path, raw):
    write_tensors(tmp_path / "model-00001-of-00002.safetensors", {NAME: gptq_tensors(raw)})
    (tmp_path / "quantize_config.json").write_text(json.dumps(gptq_config(sym=True)))
    weight_map = {"lm_head.weight": "model-00002-of-00002.safetensors"}
    weight_map[f"{NAME}.scales"] = "model-00001-of-00002.safetensors"
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    words = ("index.json", "lm_head.weight", "expected", "model-00002-of-00002.safetensors")
    refuses(tmp_path, errors.MissingFileError, *words, "found no", "download")
    index.unlink()  # The names alone say that a shard is missing.
    words = ("model-00002-of-00002.safetensors", "expected 2 shards", "download")
    refuses(tmp_path, errors.MissingFileError, *words)


def test_a_tensor_in_two_shards(tmp_path, raw):
    for number in (1, 2):
        path = tmp_path / f"model-0000{number}-of-00002.safetensors"
        write_tensors(path, {NAME: gptq_tensors(raw)})
    (tmp_path / "quantize_config.json").write_text(json.dumps(gptq_config(sym=True)))
    refuses(tmp_path, errors.CorruptFileError, "00002-of", NAME, "00001-of", "remove the file")


def test_several_checkpoints_in_a_folder(tmp_path, raw):
    for name in ("a.safetensors", "b.safetensors"):
        write_tensors(tmp_path / name, {NAME: gptq_tensors(raw)})
    words = ("expected one checkpoint", "a.safetensors", "b.safetensors", "pass the path")
    refuses(tmp_path, errors.ConfigError, *words)


def test_nothing_there(tmp_path):
    refuses(tmp_path / "absent", errors.MissingFileError, "absent", "expected a checkpoint folder")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    words = ("expected *.safetensors", "pytorch_model.bin", "safetensors only")
    refuses(tmp_path, errors.MissingFileError, *words)


# Configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("quant_method", "bitsandbytes", errors.CheckpointFormatError),
        ("checkpoint_format", "bitblas", errors.CheckpointFormatError),
        ("pack_dtype", "int16", errors.CheckpointFormatError),
        ("bits", 9, errors.BitsError),
        ("bits", "four", errors.ConfigError),
        ("bits", True, errors.ConfigError),
        ("group_size", 0, errors.ConfigError),
        ("desc_act", "maybe", errors.ConfigError),
        ("dynamic", ["a"], errors.ConfigError),
        ("dynamic", {"*": {"bits": 3}}, errors.ConfigError),
    ],
)
def test_configuration_values(tmp_path, raw, key, value, error):
    folder = gptq(tmp_path, raw, **{key: value})
    found = "*" if isinstance(value, dict) else "list" if key == "dynamic" else repr(value)
    refuses(folder, error, "quantize_config.json", key, "expected", "found", found)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_configuration_that_is_not_an_object(tmp_path, raw, text):
    folder = gptq(tmp_path, raw)
    (folder / "quantize_config.json").write_text(text)
    refuses(folder, errors.ConfigError, "quantize_config.json", "expected")


def test_no_configuration(tmp_path, raw):
    folder = write_checkpoint(tmp_path, {NAME: gptq_tensors(raw)}, None)
    words = (NAME, "expected a quantization configuration", "found neither", "add")
    refuses(folder, errors.ConfigError, *words)


def test_a_quantized_configuration_without_packed_tensors(tmp_path, raw):
    weight = np.zeros((4, 4), np.float32)
    folder = write_checkpoint(tmp_path, {NAME: {"weight": weight}}, gptq_config())
    words = ("expected quantized modules, found none", "quantize_config.json", "gptq")
    refuses(folder, errors.MissingTensorError, *words)
    (folder / "quantize_config.json").unlink()
    refuses(folder, errors.MissingTensorError, "found none", "float checkpoint")


def test_an_unknown_module(tmp_path, raw):
    checkpoint = jax_gptq.open_checkpoint(gptq(tmp_path, raw))
    with pytest.raises(errors.MissingTensorError, match="nowhere: expected a quantized module"):
        checkpoint.weight("nowhere")
    with pytest.raises(errors.MissingTensorError, match="nowhere: expected a tensor"):
        checkpoint.tensor("nowhere")


# Other formats --------------------------------------------------------------------------------


def ct_folder(tmp_path, tensors, config_format="pack-quantized", **weights):
    scheme = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True} | weights
    config = {
        "quant_method": "compressed-tensors",
        "format": config_format,
        "config_groups": {"group_0": {"weights": scheme}},
    }
    modules = tensors if NAME in tensors else {NAME: tensors}
    return write_checkpoint(tmp_path, modules, config, config_file="config.json")


def test_compressed_tensors_refusals(tmp_path, raw):
    tensors = ct_tensors(raw, symmetric=True)
    packed = f"{NAME}.weight_packed"
    refuses(ct_folder(tmp_path, tensors, num_bits=8), errors.BitsError, packed, "[8]", "fit [4]")
    words = (f"{NAME}.weight_scale", "group_size [16]", "found 2", "correct group_size")
    refuses(ct_folder(tmp_path, tensors, group_size=16), errors.ShapeError, *words)
    words = (f"{NAME}.weight_zero_point", "symmetric false", "found no such tensor")
    refuses(ct_folder(tmp_path, tensors, symmetric=False), errors.MissingTensorError, *words)
    words = ("config.json", "checkpoint_format", "marlin-24")
    refuses(ct_folder(tmp_path, tensors, "marlin-24"), errors.CheckpointFormatError, *words)
    words = ("config.json", "strategy", "tensor")
    refuses(ct_folder(tmp_path, tensors, strategy="tensor"), errors.CheckpointFormatError, *words)
    swapped = tensors | {"weight_shape": np.array([64, 32], np.int64)}
    refuses(ct_folder(tmp_path, swapped), errors.BitsError, packed, "8 words")
    for suffix in ("weight_scale", "weight_shape"):
        partial = {key: value for key, value in tensors.items() if key != suffix}
        refuses(ct_folder(tmp_path, partial), errors.MissingTensorError, f"{NAME}.{suffix}")


def test_compressed_tensors_with_one_g_idx_missing(tmp_path, raw):
    tensors = ct_tensors(raw, symmetric=True)
    ordered = tensors | {"weight_g_idx": (np.arange(64) // 32).astype(np.int32)}
    folder = ct_folder(tmp_path, {"a": ordered, NAME: tensors}, actorder="group")
    refuses(folder, errors.GroupIndexError, f"{NAME}.weight_g_idx", "as in the other modules")


def test_awq_refusals(tmp_path):
    raw = RawWeight(np.random.default_rng(4), 64, 32, group_size=32)
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    config["version"] = "gemm"

    def folder(tensors, **changes):
        return write_checkpoint(tmp_path, {NAME: tensors}, config | changes)

    tensors = awq_tensors(raw)
    words = ("checkpoint_format", "gemv")
    refuses(folder(tensors, version="gemv"), errors.CheckpointFormatError, *words)
    refuses(folder(tensors, bits=8), errors.BitsError, f"{NAME}.qweight", "bits=8")
    refuses(folder(gptq_tensors(raw)), errors.BitsError, f"{NAME}.qweight", "quant_method")
    refuses(folder(tensors, group_size=64), errors.ShapeError, f"{NAME}.scales", "q_group_size")
    words = (f"{NAME}.qzeros", "zero_point is false", "found others")
    refuses(folder(tensors, zero_point=False), errors.ZeroPointError, *words)
    del tensors["qzeros"]
    refuses(folder(tensors), errors.MissingTensorError, f"{NAME}.qzeros")


def test_awq_tensors_under_a_gptq_configuration(tmp_path):
    raw = RawWeight(np.random.default_rng(5), 64, 32, group_size=32)
    folder = gptq(tmp_path, raw, awq_tensors(raw), sym=False)
    refuses(folder, errors.ShapeError, f"{NAME}.qweight", "expected", "awq")


def test_marlin_refusals(tmp_path):
    raw = RawWeight(np.random.default_rng(6), 256, 256, group_size=128, sym=True)

    def folder(tensors, **changes):
        config = gptq_config(group_size=128, sym=True, is_marlin_format=True) | changes
        return write_checkpoint(tmp_path, {NAME: tensors}, config)

    tensors = marlin_tensors(raw)
    refuses(folder(tensors, bits=8), errors.BitsError, f"{NAME}.B", "bits=8")
    refuses(folder(tensors, group_size=64), errors.ShapeError, f"{NAME}.s", "group_size=64")
    refuses(folder(tensors, group_size=-1), errors.ShapeError, f"{NAME}.s", "found 2 groups")
    short = tensors | {"B": tensors["B"][:, :-1]}
    refuses(folder(short), errors.ShapeError, f"{NAME}.B", "found (16, 511)")
    refuses(folder({"B": tensors["B"]}), errors.MissingTensorError, f"{NAME}.s")
