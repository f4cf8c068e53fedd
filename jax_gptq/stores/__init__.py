"""Layouts: what a backend computes with. `prepare` repacks a weight once, at load."""

from typing import Any, TypeAlias

import jax
import jax.export
import jax.numpy as jnp

from jax_gptq import ffi
from jax_gptq.errors import DtypeError, LayoutError, TracingError
from jax_gptq.stores.cpu import CpuStore
from jax_gptq.stores.cuda import CudaStore
from jax_gptq.stores.dense import DenseStore
from jax_gptq.stores.protocol import PackedStore
from jax_gptq.stores.sharded import ShardedStore
from jax_gptq.weight import GptqWeight, is_concrete

Store: TypeAlias = GptqWeight | DenseStore | PackedStore | ShardedStore
# Stores without a way back to the weight.
TERMINAL = (DenseStore, ShardedStore)

PACKED_LAYOUTS: dict[str, type[PackedStore]] = {"cpu": CpuStore, "cuda": CudaStore}
LAYOUTS = ("reference", "dense", *PACKED_LAYOUTS)

# What `jax.export.export(..., disabled_checks=)` must be told: jax_gptq's FFI targets are stable.
EXPORT_DISABLED_CHECKS = tuple(
    jax.export.DisabledSafetyCheck.custom_call(target)
    for targets in (*(store.targets for store in PACKED_LAYOUTS.values()), (ffi.TABLE_LOGITS,))
    for target in targets
)


def prepare(weight: Store, layout: str | None = None) -> Store:
    """Repack a weight (or re-pack a packed store) into the layout that a backend computes with.

    Args:
      weight: a `GptqWeight` or a packed store.
      layout: "cpu" or "cuda" (tiles for the native kernels), "dense" (dequantized once to f32),
        "reference" (the `GptqWeight` itself), or None: the tiles of the platform that the arrays
        are on, where its kernel was built and its layout can hold the weight, else "reference".
        TPU and ROCm have no kernel, so None is "reference" there.

    Returns:
      A store for `gptq_matmul`: `CpuStore`, `CudaStore`, `DenseStore` or `GptqWeight`.

    Raises:
      LayoutError: an unknown or unsupported layout ("metal"), one that cannot hold this weight, or
        a dense or sharded store, which has no way back.
      TracingError: called inside `jax.jit`; repacking is done once, outside.
    """
    _check_layout(layout)
    if isinstance(weight, TERMINAL):
        raise LayoutError(
            f"prepare: expected a GptqWeight or a packed store, found a {type(weight).__name__}, "
            f"which has no way back; prepare from the original weight"
        )
    if not isinstance(weight, (GptqWeight, PackedStore)):
        raise DtypeError(
            f"prepare: weight: expected a GptqWeight or a store, found {type(weight).__name__}"
        )
    if not all(is_concrete(leaf) for leaf in jax.tree.leaves(weight)):
        raise TracingError(
            "prepare: the weight is being traced; repack once outside jax.jit and pass the store "
            "in as an argument"
        )
    if layout is None:
        layout = _default_layout(weight)
    if layout in PACKED_LAYOUTS and isinstance(weight, PACKED_LAYOUTS[layout]):
        return weight
    normal = weight if isinstance(weight, GptqWeight) else jax.jit(type(weight).unpack)(weight)
    if layout == "reference":
        return normal
    if layout == "dense":
        return jax.jit(DenseStore.pack)(normal)
    return PACKED_LAYOUTS[layout].pack(normal)


def logical_weight(store: Store) -> GptqWeight:
    """The `GptqWeight` that a store stands for.

    Raises:
      LayoutError: a dense or sharded store has no way back.
    """
    if isinstance(store, TERMINAL):
        raise LayoutError(
            f"a {type(store).__name__} has no way back to its weight; keep the GptqWeight"
        )
    return store if isinstance(store, GptqWeight) else store.unpack()


def _check_layout(layout: str | None) -> None:
    if layout == "metal":
        raise LayoutError(
            'layout "metal" is unsupported: jax_gptq has no Metal kernel. Use layout="dense" or '
            '"reference" on the CPU of that machine (JAX_PLATFORMS=cpu)'
        )
    if layout is not None and layout not in LAYOUTS:
        raise LayoutError(f"layout must be None or one of {LAYOUTS}, found {layout!r}")


def _default_layout(weight: GptqWeight | PackedStore) -> str:
    platform = _platform(weight)
    if platform == "metal":
        _check_layout(platform)
    if platform not in PACKED_LAYOUTS or not ffi.has(platform):
        return "reference"
    if isinstance(weight, PACKED_LAYOUTS[platform]):
        return platform
    normal = weight if isinstance(weight, GptqWeight) else jax.eval_shape(weight.unpack)
    return "reference" if PACKED_LAYOUTS[platform].unsupported(normal) else platform


def _platform(tree: Any) -> str:
    """ "cpu", "cuda", "rocm", "tpu" or "metal": where the arrays are, else the default device."""
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    device = min((arrays[0] if arrays else jnp.zeros(())).devices(), key=lambda d: d.id)
    platform = device.platform.lower()
    if platform == "gpu":
        return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
    return platform
