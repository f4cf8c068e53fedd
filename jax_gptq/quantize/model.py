"""`quantize_model`: layer after layer, each calibrated behind the quantized ones before it."""

from collections.abc import Iterable
from pathlib import Path as FilePath
from typing import Any, TypeVar

from flax import nnx
from jax import Array

from jax_gptq.errors import MissingTensorError, QuantizationError
from jax_gptq.linear import GptqLinear
from jax_gptq.models.causal_lm import CausalLM
from jax_gptq.models.layers import QuantizedLinear
from jax_gptq.models.loading import share_act_orders
from jax_gptq.nnx import GptqLinear as NnxGptqLinear
from jax_gptq.quantize.config import QuantizeConfig
from jax_gptq.quantize.run import OnLayer, Path, Run, checked_batches, finished_layers, path_name
from jax_gptq.quantize.stages import (
    call,
    child_at,
    cross_moment,
    input_moments,
    linear_paths,
    set_child,
    stages,
)

M = TypeVar("M", bound=nnx.Module)


def quantize_model(
    model: M,
    batches: Iterable[Any],
    config: QuantizeConfig = QuantizeConfig(),  # noqa: B008  (frozen)
    *,
    names: Iterable[str] | None = None,
    finished: str | FilePath | None = None,
    on_layer: OnLayer | None = None,
) -> M:
    """Quantize the linear layers of a model with GPTQ.

    A `CausalLM` goes block by block, and holds the hidden states of one block at a time; any other
    NNX module is one block. Within a block, layers go in the order in which they are called, and
    those that are given the same input together; every layer is calibrated on what the quantized
    layers before it make of the data ("true sequential").

    Args:
      model: with `flax.nnx.Linear` layers. It is left as it is.
      batches: of token ids int [B, T] for a `CausalLM`; otherwise arguments of the model, a tuple
        where it takes several. They are kept in memory.
      config: options; the same for every layer.
      names: paths of the layers to quantize ("model.layers.0.mlp.up_proj"). None: all `nnx.Linear`.
      finished: a folder for finished layers. A run that was killed goes on behind the last of
        them, bit-identical on the same machine; the folder is left for the caller to delete.
      on_layer: called with name and `Report` of every layer when it is finished.

    Returns:
      A model with `jax_gptq.nnx.GptqLinear` layers, in the layout of the default device.

    Raises:
      MissingTensorError: `names` holds a layer that the model does not have.
      QuantizationError: no calibration data, activations that are not finite, a `finished` folder
        of another run, and what `gptq` raises.
    """
    batches = checked_batches(batches)
    chosen = _chosen(model, names)
    kernels = {path: child_at(model, path).kernel[...] for path in chosen}
    run = Run(config, finished_layers(finished, config, kernels, batches), on_layer)
    work = nnx.clone(model)
    if isinstance(work, CausalLM) and isinstance(model, CausalLM):
        _quantize_blocks(run, work, model, chosen, [ids for (ids,) in batches])
    else:
        run.quantize(_NnxBlock(work, model, ()), chosen, batches, batches)
    for path in chosen:
        layer = child_at(work, path)
        bias = None if layer.bias is None else layer.bias[...]
        linear = GptqLinear.from_weight(run.weights[path], bias)
        kind = QuantizedLinear if isinstance(model, CausalLM) else NnxGptqLinear
        set_child(work, path, kind.from_linear(linear))
    if isinstance(work, CausalLM):
        share_act_orders(work)
    return work


def _quantize_blocks(run: Run, work: CausalLM, model: CausalLM, chosen, batches) -> None:
    """Block by block, with the hidden states of all batches in between."""
    contexts = [work.context(ids) for ids in batches]
    hidden = float_hidden = [work.embed(ids) for ids in batches]
    places = {id(child): path for path, child in nnx.iter_modules(work)}
    for block, float_block in zip(work.blocks, model.blocks):
        prefix = places[id(block)]
        inside = [path for path in chosen if path[: len(prefix)] == prefix]
        arguments = list(zip(hidden, contexts))
        float_arguments = list(zip(float_hidden, contexts))
        part = _NnxBlock(block, float_block, prefix)
        run.quantize(part, inside, arguments, float_arguments)
        hidden = _outputs(block, arguments)
        if run.config.asymmetric:
            float_hidden = _outputs(float_block, float_arguments)


def _outputs(block: nnx.Module, batches: list[tuple]) -> list[Array]:
    graph, state = nnx.split(block)
    return [call(graph, state, arguments) for arguments in batches]


class _NnxBlock:
    """A `Block` of an NNX model; `prefix` is its own path there."""

    def __init__(self, module: nnx.Module, float_module: nnx.Module, prefix: Path):
        self.module, self.prefix = module, prefix
        self.graph, self.state = nnx.split(module)  # once for all batches, until a kernel changes
        self.float_state = nnx.split(float_module)[1]

    def _inside(self, path: Path) -> Path:
        return path[len(self.prefix) :]

    def stages(self, paths, arguments):
        found = stages(self.module, [self._inside(path) for path in paths], arguments)
        return [[self.prefix + path for path in stage] for stage in found]

    def kernel(self, path):
        return child_at(self.module, self._inside(path)).kernel[...]

    def set_kernel(self, path, kernel):
        child_at(self.module, self._inside(path)).kernel = nnx.Param(kernel)
        self.graph, self.state = nnx.split(self.module)

    def moments(self, path, arguments):
        return input_moments(self.graph, self.state, self._inside(path), arguments)

    def cross(self, path, arguments, float_arguments):
        states = self.state, self.float_state
        return cross_moment(self.graph, *states, self._inside(path), arguments, float_arguments)


def _chosen(model: nnx.Module, names: Iterable[str] | None) -> list[Path]:
    paths = {path_name(path): path for path in linear_paths(model)}
    wanted = list(paths) if names is None else list(names)
    missing = [name for name in wanted if name not in paths]
    if not paths:
        raise QuantizationError(
            "expected a model with float nnx.Linear layers, found none: it may be quantized "
            "already; start from the float checkpoint"
        )
    if missing or not wanted:
        raise MissingTensorError(
            f"expected names of nnx.Linear layers, found {missing[:5]} which this model does not "
            f"have; it has {list(paths)[:5]}"
        )
    return [paths[name] for name in wanted]
