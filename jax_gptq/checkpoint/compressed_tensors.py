"""Reads compressed-tensors `pack-quantized` (llm-compressor).

    weight_packed      int32 [N, ceil(K * bits / 32)]: q + 2**(bits - 1), dense stream along K
    weight_scale       float [N, G]
    weight_zero_point  int32 [ceil(N * bits / 32), G]: same offset, packed along N; not if symmetric
    weight_shape       int64 [2]: N, K
    weight_g_idx       integers [K], with actorder "group"

Transposed, these are the dense streams of the normal form as they stand.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_gptq.checkpoint.config import ModuleConfig
from jax_gptq.checkpoint.files import ModuleTensors
from jax_gptq.errors import BitsError, GroupIndexError, MissingTensorError, ShapeError
from jax_gptq.packing import pack_codes, packed_rows
from jax_gptq.weight import GptqWeight

SUFFIXES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
MARKERS = ("weight_packed",)


class ActOrderWarning(UserWarning):
    """The configuration speaks of an activation order that no tensor of the checkpoint holds."""


def read(tensors: ModuleTensors, config: ModuleConfig) -> GptqWeight:
    """The weight of one module; `from_raw` copies the mapped tensors to the device.

    Raises:
      MissingTensorError, BitsError, ShapeError, DtypeError, GroupIndexError, ScalesError: naming
      file and tensor.
    """
    packed, scale = tensors.matrix("weight_packed"), tensors.matrix("weight_scale")
    n, k = _shape(tensors)
    groups = scale.shape[1]
    scheme = _scheme(tensors, config, k)
    bits = scheme["num_bits"]
    expected = (n, packed_rows(k, bits))
    if packed.shape != expected or scale.shape[0] != n:
        raise ShapeError(
            f"{tensors.where('weight_packed')}: expected {expected} and weight_scale [{n}, G] from "
            f"weight_shape {[n, k]}, found {packed.shape} and {scale.shape}; download again"
        )
    if "weight_zero_point" in tensors:
        zeros = tensors.matrix("weight_zero_point").T
    elif scheme.get("symmetric", True):
        middle = jnp.full((n, 1), 2 ** (bits - 1), jnp.uint8)
        zeros = np.repeat(np.asarray(pack_codes(middle, bits)).T, groups, axis=0)
    else:
        raise MissingTensorError(
            f"{tensors.prefix}.weight_zero_point: expected int32 because {config.source} says "
            f"symmetric false, found no such tensor; download the checkpoint again"
        )
    return GptqWeight.from_raw(
        packed.T,
        scale.T,
        zeros,
        _g_idx(tensors, scheme, groups),
        bits=bits,
        group_size=k if groups == 1 else scheme["group_size"],
        in_features=k,
        out_features=n,
        checkpoint_format="gptq_v2",
        name=tensors.prefix,
    )


def _shape(tensors: ModuleTensors) -> tuple[int, int]:
    values = tensors.get("weight_shape")
    if values.shape != (2,):
        raise ShapeError(
            f"{tensors.where('weight_shape')}: expected [N, K] of one matrix, found "
            f"{values.tolist()}; stacked experts are not supported"
        )
    return int(values[0]), int(values[1])


def _scheme(tensors: ModuleTensors, config: ModuleConfig, k: int) -> dict[str, Any]:
    """The configured weight scheme that the module's shapes agree with.

    The shapes name it: `targets` may hold class names of a torch model, unknown here.
    """
    words, groups = tensors.shape("weight_packed")[1], tensors.shape("weight_scale")[1]
    by_bits = [s for s in config.groups if packed_rows(k, s["num_bits"]) == words]
    if not by_bits:
        found = [bits for bits in range(2, 9) if packed_rows(k, bits) == words]
        raise BitsError(
            f"{tensors.where('weight_packed')}: expected num_bits "
            f"{sorted({s['num_bits'] for s in config.groups})} from {config.source}; found {words} "
            f"words for {k} input features, which fit {found or 'no'} bits; correct num_bits"
        )
    asymmetric = "weight_zero_point" in tensors
    matching = [s for s in by_bits if groups == _groups(s, k)]
    # Where several schemes fit, the zero points tell symmetric from asymmetric.
    matching.sort(key=lambda s: s.get("symmetric", True) == asymmetric)
    if not matching:
        raise ShapeError(
            f"{tensors.where('weight_scale')}: expected the groups of group_size "
            f"{[s.get('group_size') for s in by_bits]} ({config.source}) over {k} input features, "
            f"found {groups}; correct group_size in the configuration"
        )
    return matching[0]


def _groups(scheme: dict[str, Any], k: int) -> int:
    if scheme.get("strategy") == "channel" or scheme.get("group_size") in (None, -1):
        return 1
    return -(-k // int(scheme["group_size"]))


def _g_idx(tensors: ModuleTensors, scheme: dict[str, Any], groups: int) -> np.ndarray | None:
    if "weight_g_idx" in tensors:
        values = tensors.get("weight_g_idx")
        if (values == -1).any():  # The writer's mark for "unused".
            return None
        # Old writers count negative entries from the last group.
        return np.where(values < 0, values + groups, values)
    if groups > 1 and scheme.get("actorder") in (True, "group", "dynamic"):
        if any(name.endswith(".weight_g_idx") for name in tensors.files):
            raise GroupIndexError(
                f"{tensors.prefix}.weight_g_idx: expected it as in the other modules (actorder "
                f"{scheme['actorder']!r}), found no such tensor; download the checkpoint again"
            )
        tensors.files.warn_once(
            f"{tensors.prefix}: actorder is {scheme['actorder']!r}, but no module has a "
            f"weight_g_idx; the groups are taken in order",
            ActOrderWarning,
        )
    return None
