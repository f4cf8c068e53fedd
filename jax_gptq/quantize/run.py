"""Layer after layer of a block, each calibrated behind the quantized ones before it."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path as FilePath
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jax_gptq.errors import QuantizationError
from jax_gptq.quantize.config import QuantizeConfig
from jax_gptq.quantize.finished import FinishedLayers, fingerprint
from jax_gptq.quantize.layer import gptq, rtn
from jax_gptq.quantize.report import Report
from jax_gptq.reference import dequantize
from jax_gptq.weight import GptqWeight

Path = tuple[Any, ...]
OnLayer = Callable[[str, Report], None]


class Block(Protocol):
    """A part of a model that is called as a whole. Paths of layers are those in the model."""

    def stages(self, paths: Sequence[Path], arguments: tuple) -> list[list[Path]]:
        """Layers in the order in which they are first called; those of one input share a stage."""

    def kernel(self, path: Path) -> Array:
        """Float weights [K, N] of a layer."""

    def set_kernel(self, path: Path, kernel: Array) -> None:
        """Put others in their place."""

    def moments(self, path: Path, arguments: tuple) -> tuple[Array, Array, Array]:
        """sum x x^T f32 [K, K] over a layer's inputs x; their rows; elements not finite."""

    def cross(self, path: Path, arguments: tuple, float_arguments: tuple) -> Array:
        """sum x (x' - x)^T f32 [K, K], where x' is the input in the float model (GPTAQ)."""


class Run:
    """One quantization of a model: its options, and the weights that are finished."""

    def __init__(self, config: QuantizeConfig, kept: FinishedLayers | None, on_layer):
        self.config, self.kept, self.on_layer = config, kept, on_layer
        self.weights: dict[Path, GptqWeight] = {}

    def quantize(self, block: Block, paths: Sequence[Path], batches, float_batches) -> None:
        """Quantize some layers of a block.

        Their kernels become the dequantized ones: the block keeps its structure, so that what is
        compiled for one block serves the next.
        """
        called = block.stages(paths, batches[0])
        for stage in called:
            finished = {}
            for path in stage:
                kept = self.kept
                finished[path] = None if kept is None else kept.load(path_name(path))
            if None in finished.values():
                H, rows = _hessian(block, stage[0], batches)
                cross = None
                if self.config.asymmetric:
                    cross = _cross(block, stage[0], batches, float_batches, rows)
            # Kernels change when the whole stage is done: a resumed run sees the same inputs.
            for path in stage:
                result = finished[path]
                if result is None:
                    result = self._solve(block, path, H, rows, cross)
                self._finish(path, *result)
            for path in stage:
                self._replace(block, path)
        for path in set(paths).difference(*called):
            self._uncalled(block, path)

    def _solve(self, block: Block, path: Path, H, rows: int, cross):
        kernel = block.kernel(path)
        options = self.config.layer_options()
        weight, report = gptq(kernel, H, cross=cross, name=path_name(path), **options)
        if rows < kernel.shape[0]:
            note = f"{rows} calibration rows for {kernel.shape[0]} input features: H is singular"
            report = dataclasses.replace(report, notes=(*report.notes, note))
        return weight, report

    def _finish(self, path: Path, weight: GptqWeight, report: Report) -> None:
        name = path_name(path)
        if self.kept is not None and name not in self.kept:
            self.kept.save(name, weight, report)
        self.weights[path] = weight
        if self.on_layer is not None:
            self.on_layer(name, report)

    def _replace(self, block: Block, path: Path) -> None:
        block.set_kernel(path, dequantize(self.weights[path], block.kernel(path).dtype))

    def _uncalled(self, block: Block, path: Path) -> None:
        """A layer that saw nothing: rounded to nearest, and said so."""
        kernel = block.kernel(path)
        config = self.config
        weight = rtn(
            kernel,
            bits=config.bits,
            group_size=config.group_size,
            sym=config.sym,
            mse=config.mse,
            name=path_name(path),
        )
        note = "the layer was never called: rounded to nearest"
        nothing = float("nan")
        report = Report(nothing, nothing, nothing, config.damp, kernel.shape[0], (note,))
        self._finish(path, weight, report)
        self._replace(block, path)


def _hessian(block: Block, path: Path, batches) -> tuple[Array, int]:
    total, rows, bad = block.moments(path, batches[0])
    for arguments in batches[1:]:
        more = block.moments(path, arguments)
        total, rows, bad = total + more[0], rows + more[1], bad + more[2]
    if int(bad):
        raise QuantizationError(
            f"{path_name(path)}: expected finite activations, found {int(bad)} elements of its "
            f"input that are not; run the model in float32 or bfloat16, and look for damaged "
            f"weights"
        )
    return total * (2 / max(int(rows), 1)), int(rows)


def _cross(block: Block, path: Path, batches, float_batches, rows: int) -> Array:
    total = jnp.zeros(())
    for arguments, float_arguments in zip(batches, float_batches):
        total += block.cross(path, arguments, float_arguments)
    return total * (2 / max(rows, 1))


def path_name(path: Path) -> str:
    """("layers", 0, "up") -> "layers.0.up"."""
    return ".".join(map(str, path))


def checked_batches(batches: Iterable[Any]) -> list[tuple]:
    """Every batch as a tuple of arrays. Raises QuantizationError where there is no data."""
    result = []
    for batch in batches:
        batch = batch if isinstance(batch, tuple) else (batch,)
        result.append(tuple(jnp.asarray(each) for each in batch))
    if not any(leaf.size for leaf in jax.tree.leaves(result)):
        raise QuantizationError(
            "batches: expected calibration data, found none; pass at least one batch of tokens"
        )
    return result


def finished_layers(
    folder: str | FilePath | None, config: QuantizeConfig, kernels: dict[Path, Array], batches
) -> FinishedLayers | None:
    """The folder of a run, recognised by its options, weights and data; None where none is asked.

    Raises QuantizationError: the folder of another run.
    """
    if folder is None:
        return None
    arrays = [*kernels.values(), *jax.tree.leaves(batches)]
    facts = [dataclasses.asdict(config), [path_name(path) for path in kernels]]
    return FinishedLayers(folder, fingerprint(facts, map(np.asarray, arrays)))
