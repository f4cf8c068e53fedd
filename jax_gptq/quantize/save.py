"""`save_checkpoint`: a quantized model -> a folder that others read."""

from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jax_gptq.checkpoint import save_weights
from jax_gptq.errors import ModelError
from jax_gptq.models.causal_lm import CausalLM
from jax_gptq.models.layers import FusedLinear
from jax_gptq.models.loading import float_tensors
from jax_gptq.nnx import GptqLinear
from jax_gptq.stores import logical_weight


def save_checkpoint(
    model: CausalLM,
    path: str | Path,
    *,
    checkpoint_format: str = "gptq",
    dtype: DTypeLike | None = None,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Write a quantized `CausalLM` as a Hugging Face folder: config.json, GPTQ safetensors.

    Layers are written one at a time. What transformers and GPTQModel need is in the folder but for
    the tokenizer's files.

    Args:
      model: with quantized layers, from `quantize_model` or `jax_gptq.models.load`.
      path: a folder; existing weights in it are replaced.
      checkpoint_format: "gptq" (v1), "gptq_v2" or "gptq_p", as of `save_weights`.
      dtype: of embeddings, norms and float layers; None: as they are.
      max_shard_size: bytes of data per file.

    Raises:
      ModelError: not a `CausalLM`, no quantized layer, fused projections, act-order folded into
        other layers, or a sharded model.
      And what `save_weights` raises.
    """
    if not isinstance(model, CausalLM):
        raise ModelError(
            f"save_checkpoint: expected a jax_gptq.models.CausalLM, found {type(model).__name__}; "
            f"write the layers of other models with jax_gptq.save_weights"
        )
    if model.folded_act_order:
        raise ModelError(
            "save_checkpoint: the act-order of this model was folded into other layers; load it "
            "with fold_act_order=False"
        )
    if model.mesh is not None:
        raise ModelError("save_checkpoint: this model is sharded; load it again and save that")
    layers = {
        ".".join(map(str, keys)): layer
        for keys, layer in nnx.iter_modules(model)
        if isinstance(layer, GptqLinear)
    }
    if any(isinstance(layer, FusedLinear) for layer in layers.values()):
        raise ModelError(
            "save_checkpoint: projections of this model are fused; load it again and save it "
            "without fuse_projections"
        )
    if not layers:
        raise ModelError("save_checkpoint: expected quantized layers, found none")
    biases = {
        name: np.asarray(layer.bias[...] if dtype is None else layer.bias[...].astype(dtype))
        for name, layer in layers.items()
        if layer.bias is not None
    }
    others = (
        (name, tensor if dtype is None else tensor.astype(dtype))
        for name, tensor in float_tensors(model)
    )
    config: dict[str, Any] = dict(model.config.to_hf())
    if dtype is not None:
        config["torch_dtype"] = np.dtype(dtype).name
    save_weights(
        ((name, logical_weight(layer.weight.get_value())) for name, layer in layers.items()),
        path,
        checkpoint_format=checkpoint_format,
        biases=biases,
        other_tensors=others,
        config=config,
        max_shard_size=max_shard_size,
    )
