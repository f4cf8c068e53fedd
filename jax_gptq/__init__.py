"""GPTQ-quantized weights in JAX: load once, multiply inside `jax.jit`.

The core needs jax, numpy and safetensors. `jax_gptq.nnx`, `jax_gptq.linen` and `jax_gptq.models`
need extras and load on first use.
"""

import importlib
from typing import Any

from jax_gptq.checkpoint import load_linears, load_weights, open_checkpoint, save_weights
from jax_gptq.errors import JaxGptqError, MissingExtraError
from jax_gptq.linear import GptqLinear
from jax_gptq.matmul import gptq_matmul
from jax_gptq.reference import dequantize
from jax_gptq.stores import EXPORT_DISABLED_CHECKS, prepare
from jax_gptq.weight import GptqWeight

# Submodule -> the extra it needs (None: the core suffices), loaded on first use.
_SUBMODULES = {
    "errors": None,
    "packing": None,
    "quantize": None,
    "sharding": None,
    "nnx": "flax",
    "linen": "flax",
    "models": "models",
}

__all__ = [
    "EXPORT_DISABLED_CHECKS",
    "GptqLinear",
    "GptqWeight",
    "JaxGptqError",
    "dequantize",
    "gptq_matmul",
    "load_linears",
    "load_weights",
    "open_checkpoint",
    "prepare",
    "save_checkpoint",
    "save_weights",
]


def __getattr__(name: str) -> Any:
    if name == "save_checkpoint":
        return importlib.import_module("jax_gptq.quantize.save").save_checkpoint
    if name not in _SUBMODULES:
        raise AttributeError(f"module 'jax_gptq' has no attribute {name!r}")
    try:
        return importlib.import_module(f"jax_gptq.{name}")
    except ModuleNotFoundError as error:
        extra = _SUBMODULES[name]
        if extra is None or (error.name or "").startswith("jax_gptq"):
            raise
        raise MissingExtraError(
            f"jax_gptq.{name} needs the package {error.name!r}: pip install 'jax_gptq[{extra}]'"
        ) from error
