"""`quantize_linen`: the dense layers of a Linen module, as `quantize_model` does it for NNX."""

from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import Any

import jax
from flax import linen, traverse_util
from jax import Array

from jax_gptq.errors import MissingTensorError, QuantizationError
from jax_gptq.linear import GptqLinear
from jax_gptq.linen import WithGptq, replace_dense
from jax_gptq.quantize.config import QuantizeConfig
from jax_gptq.quantize.run import OnLayer, Path, Run, checked_batches, finished_layers, path_name
from jax_gptq.quantize.stages import by_input, cross, moments

# The collection in which a layer leaves its inputs, so that they get out of `linen.remat` too.
_INPUTS = "gptq_inputs"


def quantize_linen(
    module: linen.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    config: QuantizeConfig = QuantizeConfig(),  # noqa: B008  (frozen)
    *,
    names: Iterable[str] | None = None,
    call_options: Mapping[str, Any] | None = None,
    finished: str | FilePath | None = None,
    on_layer: OnLayer | None = None,
) -> tuple[WithGptq, dict[str, Any]]:
    """Quantize the `flax.linen.Dense` layers of a module with GPTQ.

    Layers go in the order in which they are called, and those that are given the same input
    together; every layer is calibrated on what the quantized layers before it make of the data
    ("true sequential").

    Args:
      module: any Linen module. Layers inside `linen.scan` or `linen.vmap` cannot be quantized.
      variables: what `module.init` returned, or trained ones. They are left as they are.
      batches: arguments of the module, a tuple where it takes several. They are kept in memory.
      config: options; the same for every layer.
      names: paths of the layers to quantize ("layers_0.mlp.up"). None: every `linen.Dense` that is
        called.
      call_options: keyword arguments of the module, the same for every batch and not traced
        ({"deterministic": True}).
      finished: a folder for finished layers, as of `quantize_model`.
      on_layer: called with name and `Report` of every layer when it is finished.

    Returns:
      As `jax_gptq.linen.replace_dense`: a module that computes as `module` does, and its variables,
      with the quantized weights in collection "gptq".

    Raises:
      MissingTensorError: `names` holds a layer that the module does not have, or never calls.
      QuantizationError: no `linen.Dense` is called, no calibration data, activations that are not
        finite, a `finished` folder of another run, and what `gptq` raises.
    """
    batches = checked_batches(batches)
    variables = dict(linen.meta.unbox(variables))
    block = _LinenBlock(module, variables, call_options or {})
    chosen = _chosen(block, names, batches[0])
    kernels = {path: block.kernel(path) for path in chosen}
    run = Run(config, finished_layers(finished, config, kernels, batches), on_layer)
    run.quantize(block, chosen, batches, batches)
    linears = {
        path_name(path): GptqLinear.from_weight(
            run.weights[path], block.params.get((*path, "bias"))
        )
        for path in chosen
    }
    return replace_dense(module, variables, linears)


class _LinenBlock:
    """A whole Linen module as a `Block`."""

    def __init__(
        self, module: linen.Module, variables: Mapping[str, Any], options: Mapping[str, Any]
    ):
        self.module, self.options = module, options
        self.float_params = traverse_util.flatten_dict(dict(variables.get("params", {})))
        self.params = dict(self.float_params)
        self.others = {key: value for key, value in variables.items() if key != "params"}
        self._moments = jax.jit(self._input_moments, static_argnums=0)
        self._cross = jax.jit(self._cross_moment, static_argnums=0)

    def stages(self, paths, arguments):
        return self.called(arguments, set(paths))

    def called(self, arguments: tuple, paths: set[Path] | None = None) -> list[list[Path]]:
        """As `stages`; without `paths`, of every `linen.Dense`."""
        calls: list[tuple[Path, Array]] = []

        def note(dense, x):
            if paths is None or dense.path in paths:
                calls.append((dense.path, x))

        jax.eval_shape(lambda *a: self._apply(self.params, a, note)[0], *arguments)
        return by_input(calls)

    def kernel(self, path):
        return self.params[(*path, "kernel")]

    def set_kernel(self, path, kernel):
        self.params[(*path, "kernel")] = kernel

    def moments(self, path, arguments):
        return self._moments(path, self.params, arguments)

    def cross(self, path, arguments, float_arguments):
        return self._cross(path, self.params, self.float_params, arguments, float_arguments)

    def _input_moments(self, path, params, arguments):
        return moments(self._inputs(path, params, arguments))

    def _cross_moment(self, path, params, float_params, arguments, float_arguments):
        x = self._inputs(path, params, arguments)
        return cross(x, self._inputs(path, float_params, float_arguments))

    def _inputs(self, path: Path, params, arguments: tuple) -> list[Array]:
        """Everything that the layer is called with, while tracing."""

        def keep(dense, x):
            if dense.path == path:
                dense.sow(_INPUTS, "x", x)

        inputs = self._apply(params, arguments, keep)[1][_INPUTS]
        return list(traverse_util.flatten_dict(inputs)[(*path, "x")])

    def _apply(self, params, arguments: tuple, on_dense):
        """Output and sown inputs; `on_dense` hears of every `linen.Dense` and its input."""

        def intercept(call, call_arguments, call_options, context):
            dense = context.module
            if isinstance(dense, linen.Dense) and context.method_name == "__call__":
                on_dense(dense, *call_arguments, *call_options.values())
            return call(*call_arguments, **call_options)

        variables = {**self.others, "params": traverse_util.unflatten_dict(params)}
        with linen.intercept_methods(intercept):
            return self.module.apply(variables, *arguments, **self.options, mutable=[_INPUTS])


def _chosen(block: _LinenBlock, names: Iterable[str] | None, arguments: tuple) -> list[Path]:
    called = {path_name(path): path for stage in block.called(arguments) for path in stage}
    wanted = list(called) if names is None else list(names)
    if not called:
        raise QuantizationError(
            "expected a module that calls float linen.Dense layers, found none: it may be "
            "quantized already; start from the float module"
        )
    missing = [name for name in wanted if name not in called]
    if missing or not wanted:
        raise MissingTensorError(
            f"expected names of linen.Dense layers, found {missing[:5]} which this module does not "
            f"call; it calls {list(called)[:5]}"
        )
    for name in wanted:
        shape = block.kernel(called[name]).shape
        if len(shape) != 2:
            raise QuantizationError(
                f"{name}: expected a kernel [in_features, out_features], found shape {shape}: "
                f"layers inside linen.scan or linen.vmap share one array; call them in a Python "
                f"loop, or leave them out of names"
            )
    return [called[name] for name in wanted]
