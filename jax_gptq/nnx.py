"""Flax NNX layers: `GptqLinear`, a drop-in for `nnx.Linear`, and swapping by name."""

from collections.abc import Mapping
from typing import Any, Self

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from jax_gptq import flax_serialization  # noqa: F401  (registers the pytrees with Flax)
from jax_gptq import linear as core
from jax_gptq.errors import MissingTensorError, ShapeError
from jax_gptq.stores import logical_weight, prepare
from jax_gptq.weight import GptqWeight


class GptqVariable(nnx.Variable):
    """Holds a `GptqWeight` or a store: a type of its own, so that no `nnx.Param` filter (gradients,
    optimizers, weight decay, dtype casts) touches packed codes."""


class GptqLinear(nnx.Module):
    """y = x @ W + bias with a quantized W; constructor and call as `nnx.Linear`.

    A new layer holds zero codes in normal form, ready for `nnx.eval_shape` and restore; checkpoints
    hold that form, so that what was saved on one machine runs fast on another. `prepare()` repacks
    it for the backend at hand. `from_linear` wraps a loaded layer.

    Attributes:
      weight: `GptqVariable` of a `GptqWeight` or a store.
      bias: `nnx.Param` [out_features] or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bits: int = 4,
        group_size: int = 128,
        desc_act: bool = False,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        """
        Args:
          in_features, out_features: K and N.
          bits, group_size: of the checkpoint to restore; -1 means K.
          desc_act: keep a `g_idx`.
          use_bias: keep a bias of `param_dtype`.
          dtype: x is cast to it; None computes in x's own dtype.
          rngs: accepted as Flax passes it; nothing here is random.
        """
        del rngs
        weight = GptqWeight.zeros(
            in_features, out_features, bits=bits, group_size=group_size, desc_act=desc_act
        )
        bias = jnp.zeros((out_features,), param_dtype) if use_bias else None
        self._set(weight, bias, dtype, None)

    @classmethod
    def from_linear(cls, linear: core.GptqLinear, *, dtype: DTypeLike | None = None) -> Self:
        """Wrap a loaded `jax_gptq.GptqLinear`, its store as it is."""
        layer = cls(1, 1, use_bias=False)  # Flax needs its own constructor; then filled
        layer._set(linear.store, linear.bias, dtype, linear.activations)
        return layer

    def _set(self, store, bias, dtype, activations) -> None:
        self.weight = GptqVariable(store)
        self.bias = nnx.data(None if bias is None else nnx.Param(bias))
        self.in_features = store.in_features
        self.out_features = store.out_features
        self.dtype = dtype
        self.activations = activations

    @property
    def linear(self) -> core.GptqLinear:
        """This layer as an immutable `jax_gptq.GptqLinear`."""
        bias = None if self.bias is None else self.bias[...]
        return core.GptqLinear(self.weight.get_value(), bias, self.activations)

    def __call__(self, x: Array) -> Array:
        """x [..., in_features] -> [..., out_features]."""
        return self.linear(x if self.dtype is None else jnp.asarray(x, self.dtype))

    def prepare(self, layout: str | None = None) -> None:
        """Repack the weight in place (`jax_gptq.prepare`): after a restore, before use."""
        self.weight = GptqVariable(prepare(self.weight.get_value(), layout))

    def unpack(self) -> None:
        """Back to the normal form in place: before saving."""
        self.weight = GptqVariable(logical_weight(self.weight.get_value()))


def replace_linears(
    model: nnx.Module,
    linears: Mapping[str, core.GptqLinear],
    names: Mapping[str, str] | None = None,
) -> list[str]:
    """Swap the `nnx.Linear` layers of `model`, in place, for loaded GPTQ ones by name.

    Args:
      model: any NNX module.
      linears: module name in the checkpoint -> layer, as `load_linears` returns it.
      names: path in `model` ("layers.0.attn.q") -> name in the checkpoint. None: they are equal.

    Returns:
      The paths that were swapped, in the model's order.

    Raises:
      MissingTensorError: a name that `model` or `linears` does not have. Nothing is swapped.
      ShapeError: a layer of other features. Nothing is swapped.
    """
    layers = {
        ".".join(map(str, path)): (path, module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear)
    }
    names = {name: name for name in linears} if names is None else names
    swaps: list[tuple[str, tuple[Any, ...], core.GptqLinear]] = []
    for path, name in names.items():
        linear = _checked(path, name, layers, linears)
        swaps.append((path, layers[path][0], linear))
    for _, keys, linear in swaps:
        parent: Any = model
        for key in keys[:-1]:
            parent = parent[key] if isinstance(key, int) else getattr(parent, key)
        layer = GptqLinear.from_linear(linear)
        if isinstance(keys[-1], int):
            parent[keys[-1]] = layer
        else:
            setattr(parent, keys[-1], layer)
    return [path for path in layers if path in names]


def _checked(path, name, layers, linears) -> core.GptqLinear:
    if path not in layers:
        raise MissingTensorError(
            f"replace_linears: the model has no nnx.Linear at {path!r}; it has "
            f"{sorted(layers)[:8]}. Pass names={{path: checkpoint name}}"
        )
    if name not in linears:
        raise MissingTensorError(
            f"replace_linears: no loaded layer is named {name!r}; there are {sorted(linears)[:8]}"
        )
    layer, linear = layers[path][1], linears[name]
    expected = (layer.in_features, layer.out_features)
    found = (linear.in_features, linear.out_features)
    if expected != found:
        raise ShapeError(
            f"replace_linears: {path}: the model has a {expected[0]} x {expected[1]} layer, "
            f"{name!r} is {found[0]} x {found[1]}"
        )
    return linear
