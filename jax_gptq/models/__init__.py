"""Decoder-only language models from checkpoint folders."""

from jax_gptq.models.causal_lm import CausalLM
from jax_gptq.models.config import DecoderConfig, read_config
from jax_gptq.models.embedded import embedded_path
from jax_gptq.models.fusing import fuse_projections
from jax_gptq.models.loading import float_tensors, load, new_model
from jax_gptq.models.naming import layer_at, linears, set_layer
from jax_gptq.models.sharding import shard

__all__ = [
    "CausalLM",
    "DecoderConfig",
    "embedded_path",
    "float_tensors",
    "fuse_projections",
    "layer_at",
    "linears",
    "load",
    "new_model",
    "read_config",
    "set_layer",
    "shard",
]
