"""Tensor parallelism: weights cut over an axis of a mesh, one part on each device.

    mesh = jax.make_mesh((4,), ("model",))
    up = GptqLinear.from_store(column_parallel(weight, mesh, "model"), bias=bias)
    down = GptqLinear.from_store(row_parallel(weight, mesh, "model"), bias=bias)

A layer of columns followed by a layer of rows, with nothing but elementwise functions between them,
exchanges only the sums of the second (Shoeybi et al., "Megatron-LM", arXiv:1909.08053).

Gradients: that of 16-bit x is rounded on each device before these add it up; copies of scales in
several row parts have gradients of their own.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_gptq.errors import LayoutError, ShapeError, ShardingError
from jax_gptq.packing import pack_codes, unpack_codes_on_host
from jax_gptq.stores import Store, prepare
from jax_gptq.stores.sharded import ShardedStore
from jax_gptq.weight import GptqWeight

# Groups of a part have a multiple of this many rows, which every kernel's layout can hold.
_GROUP_STEP = 16


def column_parallel(
    weight: Store,
    mesh: Mesh,
    axis: str,
    *,
    layout: str | None = None,
    batch_axis: str | None = None,
    gather_output: bool = False,
) -> ShardedStore:
    """Cut W [K, N] along N: each device computes its own columns of y, which stays sharded.

    Args:
      weight: a `GptqWeight` or a packed store, on any device.
      mesh: with any axis types. Over axes that are not named here everything is replicated.
      axis: of the mesh, over which W is cut. Any N will do; parts have ceil(N / size) columns.
      layout: as in `prepare`, of the parts; None: that of the mesh's platform.
      batch_axis: of the mesh, over which the first dimension of x is split (data parallelism).
      gather_output: give every device all of y.

    Returns:
      A store for `gptq_matmul` and `GptqLinear.from_store`.

    Raises:
      ShardingError: not a mesh, or an axis that it does not have.
      DtypeError, LayoutError, TracingError: as `prepare`. A weight whose parts need tiles of
        different shapes has no layout but "reference", which None then takes.
    """
    check_mesh(mesh, axis, batch_axis)
    normal = _on_host(weight)
    width = -(-normal.out_features // mesh.shape[axis])
    parts = [_columns(normal, i * width, width) for i in range(mesh.shape[axis])]
    return _store(normal, parts, None, mesh, axis, batch_axis, "columns", gather_output, layout)


def row_parallel(
    weight: Store,
    mesh: Mesh,
    axis: str,
    *,
    layout: str | None = None,
    batch_axis: str | None = None,
    input_is_parallel: bool = True,
) -> ShardedStore:
    """Cut W [K, N] along K: each device multiplies its own columns of x, and the sums are added.

    Where K / size is not a whole number of groups, the parts have smaller groups, or are cut after
    whole groups and the last is filled up. An act-order with groups of equal size is undone: x is
    put in the order of W's groups, for which every device needs all of x. With any other `g_idx`
    the parts keep theirs.

    Args:
      weight, mesh, axis, layout, batch_axis: as of `column_parallel`.
      input_is_parallel: each device has its part of x; else all of it.

    Returns:
      A store whose product every device is given whole.

    Raises:
      ShapeError: K is zero. Else as `column_parallel`.
    """
    check_mesh(mesh, axis, batch_axis)
    normal = _on_host(weight)
    if normal.in_features == 0:
        raise ShapeError(f"row_parallel: expected rows to cut, found a weight {normal.shape}")
    parts, perm = _rows(normal, mesh.shape[axis])
    return _store(
        normal, parts, perm, mesh, axis, batch_axis, "rows", not input_is_parallel, layout
    )


def check_mesh(mesh: Mesh, axis: str, batch_axis: str | None) -> None:
    """Raises ShardingError: not a mesh, or an axis that it does not have."""
    if not isinstance(mesh, Mesh):
        raise ShardingError(
            f"mesh: expected a jax.sharding.Mesh (jax.make_mesh), found {type(mesh).__name__}"
        )
    axes = {"axis": axis} if batch_axis is None else {"axis": axis, "batch_axis": batch_axis}
    for name, value in axes.items():
        if value not in mesh.axis_names:
            raise ShardingError(
                f"{name}: expected one of the mesh's axes {mesh.axis_names}, found {value!r}"
            )
    if axis == batch_axis:
        raise ShardingError(f"batch_axis: expected another axis than axis={axis!r}")
    kinds = dict(zip(mesh.axis_names, mesh.axis_types))
    if batch_axis is not None and kinds[axis] != kinds[batch_axis]:
        raise ShardingError(
            f"mesh: expected axes {axis!r} and {batch_axis!r} of one type, found "
            f"{kinds[axis].name} and {kinds[batch_axis].name}"
        )


def _on_host(weight: Store) -> GptqWeight:
    """The normal form, of NumPy arrays."""
    return jax.tree.map(np.asarray, prepare(weight, "reference"))


def _columns(weight: GptqWeight, start: int, width: int) -> GptqWeight:
    """Columns start to start + width; zeros beyond N."""

    def cut(array):
        array = array[:, start : start + width]
        return np.pad(array, ((0, 0), (0, width - array.shape[1])))

    return dataclasses.replace(
        weight,
        qweight=cut(weight.qweight),
        scales=cut(weight.scales),
        qzeros=cut(weight.qzeros),
        out_features=width,
    )


def _rows(weight: GptqWeight, count: int) -> tuple[list[GptqWeight], np.ndarray | None]:
    """`count` parts along K, and the order of W's rows in them, if it is not W's own."""
    k, size = weight.in_features, min(weight.group_size, weight.in_features)
    codes = unpack_codes_on_host(np.asarray(weight.qweight), weight.bits, k)
    perm = None
    if weight.g_idx is not None:
        perm = np.argsort(weight.g_idx, kind="stable").astype(np.int32)
        if not np.array_equal(weight.g_idx[perm], np.arange(k) // size):
            return _rows_of_any_groups(weight, np.asarray(weight.g_idx), codes, count), None
        codes = codes[perm]
    rows = -(-k // count)
    if weight.groups > 1:
        step = math.gcd(rows, size)
        if k % count or step % _GROUP_STEP:
            rows, step = -(-weight.groups // count) * size, size
    else:
        step = rows
    parts = []
    for start in range(0, count * rows, rows):
        groups = np.arange(start, start + rows, step) // size
        parts.append(_part(weight, codes[start : start + rows], rows, groups, None, step))
    return parts, perm


def _rows_of_any_groups(
    weight: GptqWeight, g_idx: np.ndarray, codes: np.ndarray, count: int
) -> list[GptqWeight]:
    """Parts that keep all groups and their rows of `g_idx`."""
    rows, groups = -(-weight.in_features // count), np.arange(weight.groups)
    parts = []
    for start in range(0, count * rows, rows):
        own = slice(start, start + rows)
        own_groups = np.pad(g_idx[own], (0, rows - len(g_idx[own])))
        parts.append(_part(weight, codes[own], rows, groups, own_groups, weight.group_size))
    return parts


def _part(
    weight: GptqWeight,
    codes: np.ndarray,
    rows: int,
    groups: np.ndarray,
    g_idx: np.ndarray | None,
    group_size: int,
) -> GptqWeight:
    """`codes` filled up to `rows`, with the scales and zero points of `groups`; none beyond G."""
    there = groups < weight.groups

    def of_groups(array):
        return np.where(there[:, None], array[np.where(there, groups, 0)], array.dtype.type(0))

    padded = jnp.asarray(np.pad(codes, ((0, rows - len(codes)), (0, 0))))
    return GptqWeight(
        pack_codes(padded, weight.bits),
        jnp.asarray(of_groups(weight.scales)),
        jnp.asarray(of_groups(weight.qzeros)),
        None if g_idx is None else jnp.asarray(g_idx),
        weight.bits,
        group_size,
        rows,
        weight.out_features,
    )


def _store(
    weight: GptqWeight,
    parts: list[GptqWeight],
    perm: np.ndarray | None,
    mesh: Mesh,
    axis: str,
    batch_axis: str | None,
    cut: str,
    whole: bool,
    layout: str | None,
) -> ShardedStore:
    stores = _prepared(parts, mesh, layout)
    if not _alike(stores):
        if layout is not None:
            raise LayoutError(
                f'layout "{layout}": the groups of this weight make {len(parts)} parts of '
                f'different shapes; use layout=None or "reference"'
            )
        stores = [jax.tree.map(np.asarray, part) for part in parts]

    def sharded(*leaves: np.ndarray) -> Array:
        def own(index: Any) -> np.ndarray:
            return leaves[index[0].start or 0][None]

        shape = (len(leaves), *leaves[0].shape)
        return jax.make_array_from_callback(shape, NamedSharding(mesh, P(axis)), own)

    return ShardedStore(
        jax.tree.map(sharded, *stores),
        None if perm is None else jax.device_put(perm, NamedSharding(mesh, P())),
        mesh,
        axis,
        batch_axis,
        cut,
        whole,
        weight.in_features,
        weight.out_features,
    )


def _prepared(parts: list[GptqWeight], mesh: Mesh, layout: str | None) -> list[Any]:
    """Each part repacked, by one device of the mesh, and back on the host."""
    device = mesh.local_devices[0]
    return [
        jax.tree.map(np.asarray, prepare(jax.device_put(part, device), layout)) for part in parts
    ]


def _alike(stores: list[Any]) -> bool:
    """Whether they can be one array per leaf: of one layout, in equal shapes."""
    return (
        len({(jax.tree.structure(s), *(a.shape for a in jax.tree.leaves(s))) for s in stores}) == 1
    )
