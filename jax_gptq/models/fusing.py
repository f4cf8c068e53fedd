"""`fuse_projections`: the layers of one input as one, for speed."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jax_gptq.errors import ModelError
from jax_gptq.linear import GptqLinear
from jax_gptq.models.causal_lm import CausalLM
from jax_gptq.models.decoder import Attention, Mlp
from jax_gptq.models.layers import FusedLinear, QuantizedLinear
from jax_gptq.stores import TERMINAL, logical_weight
from jax_gptq.weight import GptqWeight, side_by_side

_TOGETHER = {Attention: ("q_proj", "k_proj", "v_proj"), Mlp: ("gate_proj", "up_proj")}


def fuse_projections(model: CausalLM) -> int:
    """Make one layer, in place, of q, k and v, and one of gate and up, wherever that is possible.

    A decoder then starts four products per block instead of seven. Possible are quantized layers
    in one layout, of the same bits, group size, act-order and scale dtype. The fused layer takes
    the first one's name, the others become None: for inference; such a model cannot be saved.

    Args:
      model: a loaded model; a family whose checkpoints hold fused layers stays as it is.

    Returns:
      How many layers were made of several.

    Raises:
      ModelError: not a `CausalLM`.
    """
    if not isinstance(model, CausalLM):
        raise ModelError(
            f"fuse_projections: expected a jax_gptq.models.CausalLM, found {type(model).__name__}"
        )
    fused = 0
    for _, module in list(nnx.iter_modules(model)):
        names = _TOGETHER.get(cast(Any, type(module)), ())
        layer = _fused([getattr(module, name) for name in names]) if names else None
        if layer is None:
            continue
        for name in names[1:]:
            setattr(module, name, nnx.data(None))
        setattr(module, names[0], layer)
        fused += 1
    return fused


def _fused(layers: Sequence[Any]) -> FusedLinear | None:
    """The layers side by side; None where they cannot be one."""
    if any(not isinstance(layer, QuantizedLinear) for layer in layers):
        return None
    stores = [layer.weight.get_value() for layer in layers]
    if isinstance(stores[0], TERMINAL) or len({type(store) for store in stores}) > 1:
        return None
    weights = [logical_weight(store) for store in stores]
    if len({_facts(layer, weight) for layer, weight in zip(layers, weights)}) > 1:
        return None
    if any(not _same_order(weights[0].g_idx, weight.g_idx) for weight in weights):
        return None
    sizes = [weight.out_features for weight in weights]
    bias = None
    if any(layer.bias is not None for layer in layers):
        bias = jnp.concatenate(
            [
                jnp.zeros(size, jnp.float32) if layer.bias is None else layer.bias[...]
                for layer, size in zip(layers, sizes)
            ]
        )
    layout = getattr(stores[0], "layout", "reference")  # which a GptqWeight is
    linear = GptqLinear.from_weight(side_by_side(weights), bias, layout=layout)
    linear = dataclasses.replace(linear, activations=layers[0].activations)
    layer = FusedLinear.from_linear(linear, dtype=layers[0].dtype)
    layer.ends = tuple(itertools.accumulate(sizes[:-1]))
    return layer


def _facts(layer: QuantizedLinear, weight: GptqWeight) -> tuple:
    return (
        weight.bits,
        weight.group_size,
        weight.in_features,
        weight.scales.dtype,
        layer.activations,
        layer.dtype,
    )


def _same_order(first: Array | None, other: Array | None) -> bool:
    if first is None or other is None:
        return first is other
    return np.array_equal(first, other)
