"""Small random Hugging Face models, quantized by round-to-nearest, for the tests of models/."""

import json

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jax_gptq.packing import pack_codes


def round_to_nearest(w: np.ndarray, bits: int, group_size: int, g_idx: np.ndarray | None) -> dict:
    """W [K, N] -> its GPTQ v2 tensors, asymmetric, and "matrix", what they stand for."""
    rows = np.arange(w.shape[0]) // group_size if g_idx is None else g_idx
    groups = rows.max() + 1
    low = np.stack([np.minimum(w[rows == g].min(0), 0) for g in range(groups)])
    high = np.stack([np.maximum(w[rows == g].max(0), 0) for g in range(groups)])
    scales = np.maximum((high - low) / (2**bits - 1), 1e-4).astype(np.float16)
    zeros = np.clip(np.round(-low / scales), 0, 2**bits - 1)
    codes = np.clip(np.round(w / scales[rows]) + zeros[rows], 0, 2**bits - 1)
    return {
        "qweight": _words(codes, bits),
        "qzeros": np.ascontiguousarray(_words(zeros.T, bits).T),
        "scales": scales,
        "g_idx": rows.astype(np.int32),
        "matrix": scales[rows].astype(np.float32) * (codes - zeros[rows]).astype(np.float32),
    }


def _words(codes: np.ndarray, bits: int) -> np.ndarray:
    return np.asarray(pack_codes(jnp.asarray(codes.astype(np.uint8)), bits)).view(np.int32)


def save_quantized(model, folder, *, bits=4, group_size=32, desc_act=False, seed=0) -> None:
    """Quantize the matrices inside the blocks of a transformers model, in place, and save both.

    The folder gets the GPTQ tensors; `model` keeps their dequantized values. Layers on the same
    input share their act-order, as GPTQ makes it.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    rng = np.random.default_rng(seed)
    orders: dict = {}
    tensors = {}
    for name, module in model.named_modules():
        if not isinstance(module, (torch.nn.Linear, Conv1D)) or name == "lm_head":
            continue
        transposed = isinstance(module, torch.nn.Linear)
        w = module.weight.detach().numpy()
        w = np.ascontiguousarray(w.T if transposed else w)
        g_idx = None
        if desc_act:
            parent, _, child = name.rpartition(".")
            source = "input" if child[0] in "qkvgu" else child
            order = rng.permutation(np.arange(w.shape[0]) // group_size)
            g_idx = orders.setdefault((parent, source), order)
        packed = round_to_nearest(w, bits, group_size, g_idx)
        matrix = torch.from_numpy(packed.pop("matrix"))
        module.weight.data = (matrix.T if transposed else matrix).contiguous()
        tensors |= {f"{name}.{key}": value for key, value in packed.items()}
        if module.bias is not None:
            tensors[f"{name}.bias"] = module.bias.detach().numpy()
    quantized = {name.rpartition(".")[0] for name in tensors}
    for name, value in model.state_dict().items():
        tied = name == "lm_head.weight" and model.config.tie_word_embeddings
        if name.rpartition(".")[0] not in quantized and not tied:
            tensors[name] = np.ascontiguousarray(value.numpy())
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    quantization = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": bits,
        "group_size": group_size,
        "desc_act": desc_act,
        "sym": False,
    }
    config = {**model.config.to_dict(), "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
