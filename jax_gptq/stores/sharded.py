"""A weight in parts, one on each device along an axis of a mesh.

The cuts are those of tensor parallelism (Shoeybi et al., "Megatron-LM", arXiv:1909.08053): along N
every device computes its own columns of y, along K its own share of every sum.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jax_gptq.errors import ShapeError, ShardingError
from jax_gptq.pytree import static_field

# `gptq_matmul` on one device, its options chosen; hashable.
Product: TypeAlias = Callable[..., Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ShardedStore:
    """A `GptqWeight` W [K, N] cut into D parts of equal shape, D the size of `axis`.

    Columns ("columns"): part i holds columns i * ceil(N / D) and on. Rows ("rows"): part i holds
    rows perm[i * R] and on, R rows each. Where they end beyond N or K, y is cut off and x is zero.
    Such a store has no way back (to save it or cut it in another way, keep the weight), and cannot
    be exported or used inside another `shard_map`.

    Attributes:
      parts: a store of one part, every leaf with a leading axis [D] that is sharded over `axis`.
      perm: int32 [K], of "rows": the row of W at each row of the parts together; None: in order.
      mesh, axis: where the parts are.
      batch_axis: axis of the mesh over which the first dimension of x is split, or None.
      cut: "columns" or "rows".
      whole: whether every device has all of the activations along the cut: y of "columns", x of
        "rows"; else its own part.
      in_features, out_features: K and N.
    """

    parts: Any
    perm: Array | None
    mesh: Mesh = static_field()
    axis: str = static_field()
    batch_axis: str | None = static_field()
    cut: str = static_field()
    whole: bool = static_field()
    in_features: int = static_field()
    out_features: int = static_field()

    def matmul(self, x: Array, bias: Array | None, product: Product, out_dtype: DTypeLike) -> Array:
        """x [..., K] @ W + bias -> [..., N] in `out_dtype`, through `jax.shard_map`.

        Cut along N, y is sharded over `axis` in its last dimension unless `whole`. Cut along K, so
        is x; the devices' sums are added in f32, and the bias to those.

        Raises:
          ShapeError: the devices along `batch_axis` cannot share x's first dimension.
          ShardingError: another mesh is set.
        """
        check_context(self.mesh)
        self._check_batch(x)
        return _matmul(product, jnp.dtype(out_dtype), x, self, bias)

    def _check_batch(self, x: Array) -> None:
        if self.batch_axis is None:
            return
        devices = self.mesh.shape[self.batch_axis]
        if x.ndim < 2 or x.shape[0] % devices:
            raise ShapeError(
                f"gptq_matmul: x: expected a first dimension that {devices} devices along "
                f"batch_axis {self.batch_axis!r} can share, found shape {x.shape}"
            )


# Under jit because JAX differentiates a `shard_map` only there.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _matmul(
    product: Product, out_dtype: jnp.dtype, x: Array, store: ShardedStore, bias: Array | None
) -> Array:
    by_columns = store.cut == "columns"
    devices, features = store.mesh.shape[store.axis], store.parts.out_features
    padded_k, padded_n = devices * store.parts.in_features, devices * features
    lead = (store.batch_axis, *[None] * (x.ndim - 2)) if x.ndim > 1 else ()
    whole, split = P(*lead, None), P(*lead, store.axis)
    if not by_columns and (store.whole or store.perm is not None or padded_k > store.in_features):
        x = _placed(store, x, whole)
        x = x if store.perm is None else jnp.take(x, store.perm, axis=-1)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padded_k - store.in_features)])
    if by_columns and bias is not None:
        bias = jnp.pad(_placed(store, bias, P(None)), (0, padded_n - store.out_features))

    def local(x, parts, bias):
        part = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[1:]), parts)
        if by_columns:
            return product(x, part, bias=bias, preferred_element_type=out_dtype)
        y = jax.lax.psum(product(x, part, preferred_element_type=jnp.float32), store.axis)
        if bias is not None:
            y = y + bias.astype(jnp.float32)
        return y.astype(out_dtype)

    x_spec, bias_spec = (whole, P(store.axis)) if by_columns else (split, P(None))
    y = jax.shard_map(
        local,
        mesh=store.mesh,
        in_specs=(x_spec, P(store.axis), bias_spec),
        out_specs=split if by_columns else whole,
    )(
        _placed(store, x, x_spec),
        store.parts,
        None if bias is None else _placed(store, bias, bias_spec),
    )
    if by_columns and (store.whole or padded_n > store.out_features):
        y = _placed(store, y, whole)[..., : store.out_features]
    return y


def _placed(store: ShardedStore, x: Array, spec: P) -> Array:
    """x as `spec` says; explicit axes of a mesh are only moved when told to."""
    kinds = dict(zip(store.mesh.axis_names, store.mesh.axis_types))
    explicit = kinds[store.axis] == AxisType.Explicit
    move = jax.sharding.reshard if explicit else jax.lax.with_sharding_constraint
    return move(x, NamedSharding(store.mesh, spec))


def check_context(mesh: Mesh | None) -> None:
    """Raises ShardingError inside `jax.set_mesh` or `jax.shard_map` of another mesh than `mesh`.

    None, of what is not cut, goes with every mesh.
    """
    context = jax.sharding.get_abstract_mesh()
    if mesh is not None and not context.empty and context != mesh.abstract_mesh:
        raise ShardingError(
            f"the weights are cut over {mesh.abstract_mesh}, but the jax.set_mesh or jax.shard_map "
            f"around this is of {context}; use them outside it, or cut them over that mesh"
        )
