"""`shard`: a model over several devices, by tensor parallelism."""

import dataclasses

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_gptq.errors import ModelError
from jax_gptq.models.causal_lm import CausalLM
from jax_gptq.models.layers import FusedLinear, QuantizedLinear
from jax_gptq.models.naming import linears, set_layer
from jax_gptq.nnx import GptqLinear
from jax_gptq.sharding import check_mesh, column_parallel, row_parallel
from jax_gptq.stores import Store
from jax_gptq.stores.sharded import ShardedStore

# Layers that read what the layers of columns before them have written.
_ROW_PARALLEL = ("o_proj", "down_proj", "c_proj")
_ATTENTION = ("self_attn", "attn")


def shard(model: CausalLM, mesh: Mesh, axis: str, *, batch_axis: str | None = None) -> None:
    """Cut every quantized layer, in place, over an axis of a mesh; then use the model as before.

    q, k, v, gate and up are cut along out_features, o and down along in_features, so that a block
    exchanges two sums. Where the devices can share the kv heads, a single row's keys and values are
    divided by head; otherwise, and for several rows, every device is given q, k and v and attends
    to all of them. Embeddings, norms, float layers and a float output head are copied to every
    device; `jax_gptq.quantize.round_head` before this makes a head that is cut.

    A model that no single device can hold is loaded on the host:

        with jax.default_device(jax.devices("cpu")[0]):
            model = jax_gptq.models.load(path, dtype=jnp.bfloat16)
        jax_gptq.models.shard(model, jax.make_mesh((4,), ("model",)), "model")

    Such a model cannot be saved, fused or cut again. It is called outside `jax.set_mesh`, or inside
    `jax.set_mesh(model.mesh)`.

    Args:
      model: a loaded model.
      mesh: of the devices, with any axis types: `model.mesh` is the same with automatic ones, since
        within the model XLA decides.
      axis: of the mesh, over which weights are cut. Any sizes will do.
      batch_axis: of the mesh, over which every batch is split, or None.

    Raises:
      ModelError: not a `CausalLM`, its projections are fused, or it is cut already.
      ShardingError: not a mesh, or an axis that it does not have.
      LayoutError: a weight in dense layout. Nothing is changed.
    """
    if not isinstance(model, CausalLM):
        raise ModelError(
            f"shard: expected a jax_gptq.models.CausalLM, found {type(model).__name__}"
        )
    if model.mesh is not None:
        raise ModelError(f"shard: this model is cut already, over {model.mesh.abstract_mesh}")
    layers = linears(model)
    for name, layer in layers.items():
        if isinstance(layer, FusedLinear):
            raise ModelError(
                f"shard: {name} is several projections in one (fuse_projections), whose parts do "
                f"not lie on the same devices; shard the model as it was loaded"
            )
    check_mesh(mesh, axis, batch_axis)
    kinds = (AxisType.Auto,) * len(mesh.axis_names)
    mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
    cut = {}
    for name, layer in layers.items():
        if isinstance(layer, GptqLinear):
            store = _cut(model, name, layer.weight.get_value(), mesh, axis, batch_axis)
            linear = dataclasses.replace(layer.linear, store=store)
            cut[name] = QuantizedLinear.from_linear(linear, dtype=layer.dtype)
    for name, layer in cut.items():
        set_layer(model, name, layer)
    whole = NamedSharding(mesh, P())

    def placed(leaf):
        on_mesh = isinstance(leaf.sharding, NamedSharding) and leaf.sharding.mesh == mesh
        return leaf if on_mesh else jax.device_put(leaf, whole)

    nnx.update(model, jax.tree.map(placed, nnx.state(model)))
    model.mesh = mesh


def _cut(
    model: CausalLM, name: str, store: Store, mesh: Mesh, axis: str, batch_axis: str | None
) -> ShardedStore:
    """The weight of the layer of that name; between q, k, v and o parts must be whole heads."""
    config = model.config
    *parents, child = name.removesuffix(".base_module").split(".")  # of nnx.LoRA
    # GPT-2 has q, k and v in one layer, whose parts are not heads.
    heads = config.model_type != "gpt2" and config.num_kv_heads % mesh.shape[axis] == 0
    split = heads or not (parents and parents[-1] in _ATTENTION)
    if child in _ROW_PARALLEL:
        return row_parallel(store, mesh, axis, batch_axis=batch_axis, input_is_parallel=split)
    return column_parallel(store, mesh, axis, batch_axis=batch_axis, gather_output=not split)
