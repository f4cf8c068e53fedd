"""Act-order: permutations that layers share are kept and applied once, or folded away."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_gptq.models.layers import QuantizedLinear
from jax_gptq.nnx import GptqVariable
from jax_gptq.packing import pack_codes, unpack_codes
from jax_gptq.weight import GptqWeight


def share_act_order(layers: Sequence[Any], name: str) -> bool:
    """Keep one `perm` array for layers on the same input whose permutations are equal.

    Args:
      layers: of one input (q, k and v; gate and up), in any mix of kinds.
      name: unique in the model, for `QuantizedLinear.order`.

    Returns:
      Whether they were equal, bit for bit; nothing changes otherwise.
    """
    if not all(isinstance(layer, QuantizedLinear) for layer in layers):
        return False
    stores = [layer.weight.get_value() for layer in layers]
    perms = [store.perm for store in stores if getattr(store, "perm", None) is not None]
    if len({type(store) for store in stores}) > 1 or len(perms) < len(stores):
        return False
    if not all(np.array_equal(perms[0], perm) for perm in perms[1:]):
        return False
    for layer, store in zip(layers, stores):
        layer.weight = GptqVariable(dataclasses.replace(store, perm=perms[0]))
        layer.order = name
    return True


def folding_order(down: GptqWeight) -> np.ndarray | None:
    """The order of rows in which `down` needs no `g_idx` of its own, None if it has none."""
    if down.g_idx is None:
        return None
    return np.argsort(np.asarray(down.g_idx), kind="stable")


def permute_rows(weight: GptqWeight, order: np.ndarray) -> GptqWeight:
    """The weight whose row i is row order[i]: x[:, order] @ result = x @ weight."""
    codes = unpack_codes(weight.qweight, weight.bits, weight.in_features)[order]
    rows = np.arange(weight.in_features) // weight.group_size
    g_idx = (rows if weight.g_idx is None else np.asarray(weight.g_idx))[order]
    trivial = np.array_equal(g_idx, rows)
    return dataclasses.replace(
        weight,
        qweight=pack_codes(codes, weight.bits),
        g_idx=None if trivial else jnp.asarray(g_idx, jnp.int32),
    )


def permute_columns(weight: GptqWeight, order: np.ndarray) -> GptqWeight:
    """The weight whose column i is column order[i]."""
    return dataclasses.replace(
        weight,
        qweight=weight.qweight[:, order],
        scales=weight.scales[:, order],
        qzeros=weight.qzeros[:, order],
    )
