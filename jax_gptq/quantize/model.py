"""`quantize_model`: layer after layer, each calibrated behind the quantized ones before it."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path as FilePath
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jax_gptq.errors import MissingTensorError, QuantizationError
from jax_gptq.linear import GptqLinear
from jax_gptq.models.causal_lm import CausalLM
from jax_gptq.models.layers import QuantizedLinear
from jax_gptq.models.loading import share_act_orders
from jax_gptq.nnx import GptqLinear as NnxGptqLinear
from jax_gptq.quantize.config import QuantizeConfig
from jax_gptq.quantize.finished import FinishedLayers, fingerprint
from jax_gptq.quantize.layer import gptq, rtn
from jax_gptq.quantize.report import Report
from jax_gptq.quantize.stages import (
    Path,
    call,
    child_at,
    cross_moment,
    input_moments,
    linear_paths,
    set_child,
    stages,
)
from jax_gptq.reference import dequantize
from jax_gptq.weight import GptqWeight

M = TypeVar("M", bound=nnx.Module)
OnLayer = Callable[[str, Report], None]


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
    batches = [_arguments(batch) for batch in batches]
    if not batches or not any(leaf.size for leaf in jax.tree.leaves(batches)):
        raise QuantizationError(
            "batches: expected calibration data, found none; pass at least one batch of tokens"
        )
    chosen = _chosen(model, names)
    kept = None
    if finished is not None:
        arrays = [np.asarray(child_at(model, path).kernel[...]) for path in chosen]
        arrays += [np.asarray(leaf) for leaf in jax.tree.leaves(batches)]
        facts = [dataclasses.asdict(config), [_name(path) for path in chosen]]
        kept = FinishedLayers(finished, fingerprint(facts, arrays))
    run = _Run(config, kept, on_layer)
    work = nnx.clone(model)
    if isinstance(work, CausalLM) and isinstance(model, CausalLM):
        _quantize_blocks(run, work, model, chosen, [ids for (ids,) in batches])
    else:
        run.quantize(work, model, (), chosen, batches, batches)
    for path in chosen:
        layer = child_at(work, path)
        bias = None if layer.bias is None else layer.bias[...]
        linear = GptqLinear.from_weight(run.weights[path], bias)
        kind = QuantizedLinear if isinstance(model, CausalLM) else NnxGptqLinear
        set_child(work, path, kind.from_linear(linear))
    if isinstance(work, CausalLM):
        share_act_orders(work)
    return work


def _quantize_blocks(run: "_Run", work: CausalLM, model: CausalLM, chosen, batches) -> None:
    """Block by block, with the hidden states of all batches in between."""
    contexts = [work.context(ids) for ids in batches]
    hidden = float_hidden = [work.embed(ids) for ids in batches]
    places = {id(child): path for path, child in nnx.iter_modules(work)}
    for block, float_block in zip(work.blocks, model.blocks):
        prefix = places[id(block)]
        inside = [path for path in chosen if path[: len(prefix)] == prefix]
        arguments = list(zip(hidden, contexts))
        float_arguments = list(zip(float_hidden, contexts))
        run.quantize(block, float_block, prefix, inside, arguments, float_arguments)
        hidden = _outputs(block, arguments)
        if run.config.asymmetric:
            float_hidden = _outputs(float_block, float_arguments)


def _outputs(block: nnx.Module, batches: list[tuple]) -> list[Array]:
    graph, state = nnx.split(block)
    return [call(graph, state, arguments) for arguments in batches]


class _Run:
    """One call of `quantize_model`: its options, and the weights that are finished."""

    def __init__(self, config: QuantizeConfig, kept: FinishedLayers | None, on_layer):
        self.config, self.kept, self.on_layer = config, kept, on_layer
        self.weights: dict[Path, GptqWeight] = {}

    def quantize(self, block, float_block, prefix: Path, paths, batches, float_batches) -> None:
        """Quantize the layers `paths` of a block whose own path is `prefix`.

        Their kernels become the dequantized ones: the module keeps its structure, so that what is
        compiled for one block serves the next.
        """
        inside = [path[len(prefix) :] for path in paths]
        float_state = nnx.split(float_block)[1]
        called = stages(block, inside, batches[0])
        for stage in called:
            finished = {}
            for path in stage:
                name = _name(prefix + path)
                finished[path] = self.kept.load(name) if self.kept is not None else None
            if None in finished.values():
                H, rows = self._hessian(block, stage[0], prefix, batches)
                cross = None
                if self.config.asymmetric:
                    cross = self._cross(block, float_state, stage[0], batches, float_batches, rows)
            # Kernels change when the whole stage is done: a resumed run sees the same inputs.
            for path in stage:
                result = finished[path]
                if result is None:
                    result = self._solve(block, prefix, path, H, rows, cross)
                self._finish(prefix + path, *result)
            for path in stage:
                self._replace(block, prefix, path)
        for path in set(inside).difference(*called):
            self._uncalled(block, prefix, path)

    def _hessian(self, block, path: Path, prefix: Path, batches) -> tuple[Array, int]:
        graph, state = nnx.split(block)
        total, rows, bad = input_moments(graph, state, path, batches[0])
        for arguments in batches[1:]:
            more = input_moments(graph, state, path, arguments)
            total, rows, bad = total + more[0], rows + more[1], bad + more[2]
        if int(bad):
            raise QuantizationError(
                f"{_name(prefix + path)}: expected finite activations, found {int(bad)} elements "
                f"of its input that are not; run the model in float32 or bfloat16, and look for "
                f"damaged weights"
            )
        return total * (2 / max(int(rows), 1)), int(rows)

    def _cross(self, block, float_state, path: Path, batches, float_batches, rows) -> Array:
        graph, state = nnx.split(block)
        total = jnp.zeros(())
        for arguments, float_arguments in zip(batches, float_batches):
            total += cross_moment(graph, state, float_state, path, arguments, float_arguments)
        return total * (2 / max(rows, 1))

    def _solve(self, block, prefix: Path, path: Path, H, rows: int, cross):
        name = _name(prefix + path)
        kernel = child_at(block, path).kernel[...]
        options = self.config.layer_options()
        weight, report = gptq(kernel, H, cross=cross, name=name, **options)
        if rows < kernel.shape[0]:
            note = f"{rows} calibration rows for {kernel.shape[0]} input features: H is singular"
            report = dataclasses.replace(report, notes=(*report.notes, note))
        return weight, report

    def _finish(self, path: Path, weight: GptqWeight, report: Report) -> None:
        name = _name(path)
        if self.kept is not None and self.kept.load(name) is None:
            self.kept.save(name, weight, report)
        self.weights[path] = weight
        if self.on_layer is not None:
            self.on_layer(name, report)

    def _replace(self, block, prefix: Path, path: Path) -> None:
        layer = child_at(block, path)
        kernel = dequantize(self.weights[prefix + path], layer.kernel[...].dtype)
        layer.kernel = nnx.Param(kernel)

    def _uncalled(self, block, prefix: Path, path: Path) -> None:
        """A layer that saw nothing: rounded to nearest, and said so."""
        kernel = child_at(block, path).kernel[...]
        config = self.config
        weight = rtn(
            kernel,
            bits=config.bits,
            group_size=config.group_size,
            sym=config.sym,
            mse=config.mse,
            name=_name(prefix + path),
        )
        note = "the layer was never called: rounded to nearest"
        nothing = float("nan")
        report = Report(nothing, nothing, nothing, config.damp, kernel.shape[0], (note,))
        self._finish(prefix + path, weight, report)
        self._replace(block, prefix, path)


def _chosen(model: nnx.Module, names: Iterable[str] | None) -> list[Path]:
    paths = {_name(path): path for path in linear_paths(model)}
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


def _name(path: Path) -> str:
    return ".".join(map(str, path))


def _arguments(batch: Any) -> tuple:
    batch = batch if isinstance(batch, tuple) else (batch,)
    return tuple(jnp.asarray(each) for each in batch)
