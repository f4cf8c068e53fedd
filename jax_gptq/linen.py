"""Flax Linen layers: `GptqDense`, a drop-in for `linen.Dense`, and swapping by name."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen, traverse_util
from jax import Array
from jax.typing import DTypeLike

from jax_gptq import flax_serialization  # noqa: F401  (registers the pytrees with Flax)
from jax_gptq.errors import MissingTensorError, ShapeError
from jax_gptq.linear import GptqLinear
from jax_gptq.weight import GptqWeight

# Quantized weights live in a collection of their own: an optimizer over "params" never sees them.
COLLECTION = "gptq"


class GptqDense(linen.Module):
    """y = x @ W + bias with a quantized W; as `linen.Dense`.

    The weight is variable "weight" of collection "gptq": zero codes in normal form after `init`, to
    be replaced by a loaded `GptqWeight` or by any store that `prepare` returns. The bias is the
    parameter "bias".

    Attributes:
      features: N.
      bits, group_size: of the weight to be loaded; -1 means K.
      desc_act: keep a `g_idx`.
      use_bias: add a bias.
      dtype: x is cast to it; None computes in x's own dtype.
      param_dtype: dtype of the bias.
      activations: None, or "int8" (see `gptq_matmul`).
    """

    features: int
    bits: int = 4
    group_size: int = 128
    desc_act: bool = False
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    activations: str | None = None

    @linen.compact
    def __call__(self, x: Array) -> Array:
        """x [..., K] -> [..., features]."""
        weight = self.variable(
            COLLECTION,
            "weight",
            GptqWeight.zeros,
            x.shape[-1],
            self.features,
            bits=self.bits,
            group_size=self.group_size,
            desc_act=self.desc_act,
        )
        bias = None
        if self.use_bias:
            zeros = linen.initializers.zeros_init()
            bias = self.param("bias", zeros, (self.features,), self.param_dtype)
        if self.dtype is not None:
            x = x.astype(self.dtype)
        store = weight.value
        assert not isinstance(store, linen.meta.AxisMetadata)  # nothing here boxes it
        return GptqLinear(store, bias, self.activations)(x)


class WithGptq(linen.Module):
    """`inner` with the `linen.Dense` layers of `replace_dense` computed from collection "gptq"."""

    inner: linen.Module

    @linen.compact
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `inner` returns."""

        def swap(call, call_args, call_kwargs, context):
            dense = context.module
            if not isinstance(dense, linen.Dense) or context.method_name != "__call__":
                return call(*call_args, **call_kwargs)
            if not dense.has_variable(COLLECTION, "weight"):
                return call(*call_args, **call_kwargs)
            (x,) = call_args
            x = x if dense.dtype is None else x.astype(dense.dtype)
            bias = dense.get_variable("params", "bias") if dense.use_bias else None
            return GptqLinear(dense.get_variable(COLLECTION, "weight"), bias)(x)

        with linen.intercept_methods(swap):
            return self.inner(*args, **kwargs)


def replace_dense(
    module: linen.Module,
    variables: Mapping[str, Any],
    linears: Mapping[str, GptqLinear],
    names: Mapping[str, str] | None = None,
) -> tuple[WithGptq, dict[str, Any]]:
    """Swap `linen.Dense` layers of an existing module for loaded GPTQ ones by name.

    Args:
      module: any Linen module.
      variables: what `module.init` returned (or its shapes from `jax.eval_shape`).
      linears: module name in the checkpoint -> layer, as `load_linears` returns it.
      names: path in `module` ("layers_0.mlp.up") -> name in the checkpoint. None: they are equal.

    Returns:
      A module that computes as `module` does, and its variables: the dense kernels are gone, the
      stores are in collection "gptq", the biases in "params".

    Raises:
      MissingTensorError: a name that `module` or `linears` does not have.
      ShapeError: a layer of other features, or a bias where the Dense layer has none.
    """
    params = traverse_util.flatten_dict(dict(variables["params"]), sep=".")
    kernels = {path[: -len(".kernel")]: v for path, v in params.items() if path.endswith(".kernel")}
    stores = {}
    names = {name: name for name in linears} if names is None else names
    for path, name in names.items():
        if path not in kernels:
            raise MissingTensorError(
                f"replace_dense: the module has no Dense kernel at {path!r}; it has "
                f"{sorted(kernels)[:8]}. Pass names={{path: checkpoint name}}"
            )
        if name not in linears:
            raise MissingTensorError(
                f"replace_dense: no loaded layer is named {name!r}; there are {sorted(linears)[:8]}"
            )
        linear, expected = linears[name], tuple(kernels[path].shape)
        if expected != (linear.in_features, linear.out_features):
            raise ShapeError(
                f"replace_dense: {path}: the module has a kernel {expected}, {name!r} is "
                f"{(linear.in_features, linear.out_features)}"
            )
        if linear.bias is not None and f"{path}.bias" not in params:
            raise ShapeError(
                f"replace_dense: {path}: {name!r} has a bias, the Dense layer has use_bias=False"
            )
        stores[f"{path}.weight"] = linear.store
        del params[f"{path}.kernel"]
        if f"{path}.bias" in params:
            like = params[f"{path}.bias"]
            zeros = jnp.zeros(like.shape, like.dtype)
            params[f"{path}.bias"] = zeros if linear.bias is None else linear.bias
    rest = {k: {"inner": v} for k, v in variables.items() if k != "params"}
    return WithGptq(module), {
        **rest,
        "params": {"inner": traverse_util.unflatten_dict(params, sep=".")},
        COLLECTION: {"inner": traverse_util.unflatten_dict(stores, sep=".")},
    }
