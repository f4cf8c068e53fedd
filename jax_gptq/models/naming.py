"""Layers by the checkpoint's module names, which are the attribute paths of a model."""

from typing import Any

from flax import nnx

from jax_gptq.errors import MissingTensorError
from jax_gptq.nnx import GptqLinear


def linears(model: nnx.Module) -> dict[str, Any]:
    """Every linear layer by name: `nnx.Linear` where it is float, `GptqLinear` where quantized.

    In the model's order, block by block; the output head only where it is quantized.
    """
    found = {
        ".".join(map(str, path)): (path, module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, (nnx.Linear, GptqLinear))
    }

    def order(item):
        path = item[1][0]
        return [(isinstance(key, int), str(key) if isinstance(key, str) else key) for key in path]

    return {name: module for name, (_, module) in sorted(found.items(), key=order)}


def layer_at(model: nnx.Module, name: str) -> Any:
    """The layer of that name. Raises MissingTensorError."""
    layer: Any = model
    try:
        for key in name.split("."):
            layer = layer[int(key)] if key.isdigit() else getattr(layer, key)
    except (AttributeError, IndexError) as error:
        raise MissingTensorError(f"the model has no layer {name!r}") from error
    return layer


def set_layer(model: nnx.Module, name: str, layer: Any) -> None:
    """Put `layer` (anything called as layer(x)) in the place of that name.

    Raises MissingTensorError where the model has none.
    """
    layer_at(model, name)
    parent, _, child = name.rpartition(".")
    setattr(layer_at(model, parent) if parent else model, child, layer)
