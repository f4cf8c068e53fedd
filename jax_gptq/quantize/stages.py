"""What the linear layers of a module are given, and in which order they are called."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jax_gptq.quantize.product import product
from jax_gptq.quantize.run import Path


class _Recorder:
    """Stands in the place of a layer and notes what it is called with."""

    def __init__(self, layer: nnx.Linear, path: Path, calls: list[tuple[Path, Array]]):
        self.layer, self.path, self.calls = layer, path, calls

    def __call__(self, x: Array) -> Array:
        self.calls.append((self.path, x))
        return self.layer(x)


def linear_paths(module: nnx.Module) -> list[Path]:
    """Paths of the `nnx.Linear` layers of a module."""
    return [path for path, child in nnx.iter_modules(module) if isinstance(child, nnx.Linear)]


def child_at(module: Any, path: Path) -> Any:
    """The child of that path."""
    for key in path:
        module = module[key] if isinstance(key, int) else getattr(module, key)
    return module


def set_child(module: Any, path: Path, child: Any) -> None:
    """Put a child in the place of that path."""
    parent = child_at(module, path[:-1])
    if isinstance(path[-1], int):
        parent[path[-1]] = child
    else:
        setattr(parent, path[-1], child)


def stages(module: nnx.Module, paths: Sequence[Path], arguments: tuple) -> list[list[Path]]:
    """Layers in the order in which they are first called; those of one input share a stage."""
    found: list[list[Path]] = []
    graph, state = nnx.split(module)

    def trace(state, arguments):
        found.extend(by_input(_calls(nnx.merge(graph, state), paths, arguments)))

    jax.eval_shape(trace, state, arguments)
    return found


def by_input(calls: Iterable[tuple[Path, Array]]) -> list[list[Path]]:
    """Layers in the order of their first calls; neighbours with the same input in one list."""
    found: list[tuple[Array, list[Path]]] = []
    seen = set()
    for path, x in calls:
        if path in seen:
            continue
        seen.add(path)
        if found and found[-1][0] is x:
            found[-1][1].append(path)
        else:
            found.append((x, [path]))
    return [stage for _, stage in found]


def _calls(module, paths, arguments) -> list[tuple[Path, Array]]:
    calls: list[tuple[Path, Array]] = []
    for path in paths:
        set_child(module, path, _Recorder(child_at(module, path), path, calls))
    module(*arguments)
    return calls


def layer_inputs(module: nnx.Module, path: Path, arguments: tuple) -> list[Array]:
    """Everything that the layer is called with; for use while tracing."""
    return [x for _, x in _calls(module, [path], arguments)]


@functools.partial(jax.jit, static_argnames=("graph", "path"))
def input_moments(graph, state, path: Path, arguments: tuple) -> tuple[Array, Array, Array]:
    """`moments` of a layer's inputs. Nothing behind the layer is computed."""
    return moments(layer_inputs(nnx.merge(graph, state), path, arguments))


@functools.partial(jax.jit, static_argnames=("graph", "path"))
def cross_moment(graph, state, float_state, path: Path, arguments: tuple, float_arguments: tuple):
    """`cross` of a layer's inputs and of those with `float_state`."""
    x = layer_inputs(nnx.merge(graph, state), path, arguments)
    return cross(x, layer_inputs(nnx.merge(graph, float_state), path, float_arguments))


@functools.partial(jax.jit, static_argnames="graph")
def call(graph, state, arguments: tuple):
    """The module on its arguments."""
    return nnx.merge(graph, state)(*arguments)


def moments(inputs: list[Array]) -> tuple[Array, Array, Array]:
    """sum x x^T f32 [K, K] over inputs [..., K]; their rows; how many elements are not finite."""
    x = _rows(inputs)
    return product(x.T, x), jnp.array(x.shape[0]), jnp.sum(~jnp.isfinite(x))


def cross(inputs: list[Array], wanted: list[Array]) -> Array:
    """sum x (x' - x)^T f32 [K, K] over inputs x and those of the float model x', for GPTAQ."""
    x = _rows(inputs)
    return product(x.T, _rows(wanted) - x)


def _rows(inputs: list[Array]) -> Array:
    return jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in inputs]).astype(jnp.float32)
