"""`jax-gptq inspect`: the report, its text, and what it finds suspicious."""

import json
import re

import numpy as np
import pytest
from checkpoint_makers import (
    ct_tensors,
    gptq_config,
    gptq_tensors,
    gptqmodel_v1_zeros,
    write_checkpoint,
    write_tensors,
)
from oracle import RawWeight

from jax_gptq.checkpoint.inspect import inspect_checkpoint
from jax_gptq.cli import main

K, N = 128, 64


def make(rng=0, **options):
    options = {"group_size": 32, "sym": True} | options
    return RawWeight(np.random.default_rng(rng), K, N, **options)


def suspicious(folder) -> str:
    report = inspect_checkpoint(folder)
    assert not report.errors
    assert ("nothing suspicious" in report.text()) == (not report.suspicious)
    return "\n".join(report.suspicious)


def test_report(tmp_path):
    modules = {
        "layers.0.up": gptq_tensors(make()),
        "layers.1.up": gptq_tensors(make(1)) | {"bias": np.ones(N, np.float16)},
        "layers.2.up": gptq_tensors(make(2, g_idx="random")),
        "norm": {"weight": np.ones(K, np.float16)},
    }
    folder = write_checkpoint(tmp_path, modules, gptq_config(sym=True, desc_act=True))
    report = inspect_checkpoint(folder)
    assert (report.quant_method, report.checkpoint_format) == ("gptq", "gptq")
    assert report.quantizer == "gptqmodel:7.7.0"
    assert report.files == ["model.safetensors"]
    assert (report.dense_tensors, report.dense_bytes) == (1, 2 * K)
    disk = 4 * (K // 8 * N + 4 * N // 8 + K) + 2 * 4 * N  # qweight, qzeros, g_idx, scales
    assert [m.disk_bytes for m in report.modules] == [disk, disk + 2 * N, disk]
    assert report.disk_bytes == 3 * disk + 2 * N + 2 * K
    reference = K * N // 2 + 2 * 4 * N + 4 * N  # codes, scales, zero points
    assert [m.memory_bytes["reference"] for m in report.modules] == [
        reference, reference, reference + 4 * K,
    ]  # fmt: skip
    assert report.modules[0].memory_bytes["dense"] == 4 * K * N
    assert report.modules[0].memory_bytes["cpu"] == reference  # nothing is padded here
    assert [m.order for m in report.modules] == ["none", "none", "permuted"]
    assert [m.bias for m in report.modules] == [False, True, False]
    first = report.modules[0]
    assert (first.bits, first.group_size, first.in_features, first.out_features) == (4, 32, K, N)
    assert (first.sym, first.scale_dtype) == (True, "float16")
    assert not report.suspicious
    text = report.text()
    assert "3 quantized; 1 other tensors" in text
    row = next(line for line in text.splitlines() if "permuted" in line)
    assert row.split()[:8] == ["1", str(K), str(N), "4", "32", "sym", "permuted", "no"]


def test_layouts_that_cannot_hold_a_layer(tmp_path):
    small = make(group_size=4)
    config = gptq_config(sym=True, group_size=4)
    report = inspect_checkpoint(write_checkpoint(tmp_path, {"a": gptq_tensors(small)}, config))
    (module,) = report.modules
    assert module.memory_bytes["cpu"] is None
    assert "too small" in module.unsupported["cpu"]
    assert re.search(
        r"held in the reference layout instead:\n  - a: not cpu: 32 groups", report.text()
    )


def test_all_zero_bias(tmp_path):
    tensors = gptq_tensors(make()) | {"bias": np.zeros(N, np.float16)}
    found = suspicious(write_checkpoint(tmp_path, {"a": tensors}, gptq_config(sym=True)))
    assert found == "a: have a bias of zeros (AutoGPTQ writes them); it is dropped"


def test_zero_scales(tmp_path):
    raw = make()
    raw.scales[2, 5] = 0
    modules = {"a": gptq_tensors(raw), "b": gptq_tensors(raw)}
    found = suspicious(write_checkpoint(tmp_path, modules, gptq_config(sym=True)))
    assert found.startswith("2 modules (a, ...): have scales of 0")


@pytest.mark.parametrize(("label", "stored"), [("gptq", "gptq_v2"), ("gptq_v2", "gptq")])
def test_version_label_that_the_data_contradict(tmp_path, label, stored):
    modules = {"a": gptq_tensors(make(), stored)}
    config = gptq_config(sym=True, checkpoint_format=label)
    assert "other version than checkpoint_format" in suspicious(
        write_checkpoint(tmp_path, modules, config)
    )


def test_zero_points_that_depend_on_the_writer(tmp_path):
    raw = make(sym=False)
    raw.z[:, 0] = 0
    tensors = gptq_tensors(raw) | {"qzeros": gptqmodel_v1_zeros(raw)}
    found = suspicious(write_checkpoint(tmp_path, {"a": tensors}, gptq_config()))
    assert "zero points depend on who wrote the file" in found


def test_configuration_that_the_tensors_do_not_bear_out(tmp_path):
    tensors = gptq_tensors(make())
    config = gptq_config(sym=False, desc_act=True, lm_head=True, dynamic={"-:a": {}})
    config["checkpoint_format"] = "gptq_v2"
    modules = {"a": gptq_tensors(make(), "gptq_v2")}
    found = suspicious(write_checkpoint(tmp_path / "1", modules, config))
    assert "a: are quantized, though a `dynamic` rule" in found
    assert "desc_act is true, but every g_idx is in order" in found
    assert "sym is false, but every zero point is symmetric" in found
    assert "no quantized lm_head" in found
    permuted = {"a": gptq_tensors(make(g_idx="random"))}
    found = suspicious(write_checkpoint(tmp_path / "2", permuted, gptq_config(sym=True)))
    assert "a: have a permuted g_idx, though desc_act is false" in found
    folder = write_checkpoint(tmp_path / "3", {"a": tensors}, gptq_config(sym=True))
    other = {"quantization_config": gptq_config(sym=True, group_size=64)}
    (folder / "config.json").write_text(json.dumps(other))
    assert "disagree: group_size 32 and 64" in suspicious(folder)


def test_stale_index_and_stray_files(tmp_path):
    folder = write_checkpoint(tmp_path, {"a": gptq_tensors(make())}, gptq_config(sym=True))
    weight_map = {"a.weight": "model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    write_tensors(folder / "adapter_model.safetensors", {"b": {"weight": np.ones(3, np.float32)}})
    found = suspicious(folder)
    assert "adapter_model.safetensors: not part of the checkpoint" in found
    assert "stale for 5 tensors (a.g_idx, ...)" in found


def test_modules_that_cannot_be_loaded(tmp_path, capsys):
    bad = gptq_tensors(make())
    del bad["scales"]
    modules = {"a": gptq_tensors(make()), "b": bad}
    folder = write_checkpoint(tmp_path, modules, gptq_config(sym=True))
    report = inspect_checkpoint(folder)
    assert [module.name for module in report.modules] == ["a"]
    (error,) = report.errors
    assert "b.scales: expected a tensor" in error
    assert main(["inspect", str(folder)]) == 1
    assert error in capsys.readouterr().out


def test_command_line(tmp_path, capsys):
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 32, "symmetric": True}}},
    }
    modules = {"a": ct_tensors(make(), symmetric=True)}
    folder = write_checkpoint(tmp_path, modules, config, config_file="config.json")
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "compressed-tensors, pack-quantized" in out
    assert "nothing suspicious" in out
    assert main(["inspect", "--json", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out)["modules"][0]["bits"] == 4
    assert main(["inspect", str(tmp_path / "absent")]) == 2
    assert "expected a checkpoint folder" in capsys.readouterr().err


def test_float_checkpoint(tmp_path):
    folder = write_checkpoint(tmp_path, {"a": {"weight": np.ones((4, 8), np.float32)}}, None)
    report = inspect_checkpoint(folder)
    assert report.quant_method is None
    assert "float: 1 tensors, 128 B" in report.text()
