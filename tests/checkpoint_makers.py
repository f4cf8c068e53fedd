"""Synthetic checkpoints, written from the formats' descriptions and without the package's code."""

import json
from pathlib import Path

import numpy as np
from oracle import RawWeight, pack_bits
from safetensors.numpy import save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PLANES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def planar_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [K, N], K a multiple of 32 -> int32 words in gptq_p order."""
    blocks = []
    for block in codes.reshape(-1, 32, codes.shape[1]):
        low = 0
        for width in PLANES[bits]:
            blocks.append(pack_bits(block >> low & (2**width - 1), width))
            low += width
    return np.concatenate(blocks)


def gptq_tensors(raw: RawWeight, version: str = "gptq", *, g_idx: bool = True) -> dict:
    """qweight, qzeros, scales and (with `g_idx`) g_idx of one module; 5 to 7 bits are planar."""
    stored = raw.z if version != "gptq" else (raw.z.astype(int) - 1) % 2**raw.bits
    planar = version == "gptq_p" or raw.bits in (5, 6, 7)
    pack = planar_bits if planar else pack_bits
    tensors = {
        "qweight": pack(raw.q, raw.bits),
        "qzeros": np.ascontiguousarray(pack(stored.T.astype(np.uint8), raw.bits).T),
        "scales": raw.scales,
    }
    if g_idx:
        size = raw.k if raw.group_size == -1 else raw.group_size
        rows = np.arange(raw.k) // size if raw.g_idx is None else raw.g_idx
        tensors["g_idx"] = rows.astype(np.int32)
    return tensors


def gptqmodel_v1_zeros(raw: RawWeight) -> np.ndarray:
    """qzeros as GPTQModel writes v1: 0x1111... taken from the whole word, borrows and all."""
    words = np.ascontiguousarray(pack_bits(raw.z.T, raw.bits).T).view(np.uint32)
    return (words - np.uint32(sum(1 << i for i in range(0, 32, raw.bits)))).view(np.int32)


def autogptq_v1_zeros(raw: RawWeight) -> np.ndarray:
    """qzeros as AutoGPTQ writes v1: z - 1 as uint32, shifted and ORed together."""
    words = np.zeros((raw.z.shape[0], raw.n * raw.bits // 32), np.uint32)
    per = 32 // raw.bits
    less_one = raw.z.astype(np.uint32) - np.uint32(1)
    for i in range(per):
        words |= less_one[:, i::per] << np.uint32(i * raw.bits)
    return words.view(np.int32)


def ct_tensors(raw: RawWeight, *, symmetric: bool) -> dict:
    """compressed-tensors pack-quantized."""
    tensors = {
        "weight_packed": np.ascontiguousarray(pack_bits(raw.q, raw.bits).T),
        "weight_scale": np.ascontiguousarray(raw.scales.T),
        "weight_shape": np.array([raw.n, raw.k], np.int64),
    }
    if not symmetric:
        tensors["weight_zero_point"] = pack_bits(raw.z.T, raw.bits)
    return tensors


def awq_pack(codes: np.ndarray) -> np.ndarray:
    """4-bit codes [R, N] -> int32 [R, N / 8]: nibble i of word c holds column 8 c + ORDER[i]."""
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for nibble, column in enumerate(AWQ_ORDER):
        words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


def awq_tensors(raw: RawWeight) -> dict:
    """AWQ gemm."""
    return {"qweight": awq_pack(raw.q), "qzeros": awq_pack(raw.z), "scales": raw.scales}


def marlin_tensors(raw: RawWeight) -> dict:
    """Marlin: word 128 nt + 4 lane + j of row kt, nibble e, one element at a time."""
    kt, nt, lane, j, e = np.ix_(
        range(raw.k // 16), range(raw.n // 64), range(32), range(4), range(8)
    )
    t = np.array(AWQ_ORDER)[e]
    h, i = t >> 2, t & 3
    k = 16 * kt + 2 * (lane & 3) + np.array([0, 1, 8, 9])[i]
    n = 64 * nt + 16 * j + (lane >> 2) + 8 * h
    words = (raw.q[k, n].astype(np.uint64) << (4 * e).astype(np.uint64)).sum(-1)
    words = words.astype(np.uint32).reshape(raw.k // 16, 2 * raw.n)
    groups = raw.scales.shape[0]
    if groups > 1:
        p = np.arange(64)
        scales = raw.scales.reshape(groups, -1, 64)[:, :, 8 * (p % 8) + p // 8]
    else:
        order = [2 * i + s for i in range(4) for s in (0, 1, 8, 9, 16, 17, 24, 25)]
        scales = raw.scales.reshape(groups, -1, 32)[:, :, order]
    return {"B": words.view(np.int32), "s": np.ascontiguousarray(scales.reshape(groups, raw.n))}


def gptq_config(**changes) -> dict:
    """A configuration as GPTQModel writes it."""
    config = {
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "sym": False,
        "lm_head": False,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    }
    config |= changes
    return {key: value for key, value in config.items() if value is not None}


def write_tensors(path: Path, modules: dict[str, dict], metadata: dict | None = None) -> None:
    """One safetensors file of {module: {suffix: array}}."""
    flat = {f"{m}.{s}": np.ascontiguousarray(a) for m, ts in modules.items() for s, a in ts.items()}
    save_file(flat, path, metadata={"format": "pt", **(metadata or {})})


def write_checkpoint(
    folder: Path,
    modules: dict[str, dict],
    config: dict | None,
    *,
    config_file: str = "quantize_config.json",
) -> Path:
    """A folder with model.safetensors and a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "model.safetensors", modules)
    if config is not None:
        if config_file == "config.json":
            config = {"model_type": "llama", "quantization_config": config}
        (folder / config_file).write_text(json.dumps(config))
    return folder
