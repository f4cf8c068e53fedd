"""Opens a checkpoint of any format and hands out its linears one at a time, in normal form."""

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jax_gptq.checkpoint import awq, compressed_tensors, gptq, marlin
from jax_gptq.checkpoint.config import QuantConfig, find_config
from jax_gptq.checkpoint.files import ModuleTensors, TensorInfo, open_files, read_json
from jax_gptq.checkpoint.memory import release_freed_memory
from jax_gptq.errors import ConfigError, CorruptFileError, MissingTensorError, ShapeError
from jax_gptq.linear import GptqLinear
from jax_gptq.weight import GptqWeight

_READERS = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "marlin": marlin,
}
# Freed memory goes back to the system each time this many bytes of tensors have been decoded.
_RELEASE_BYTES = 1 << 27


class Checkpoint:
    """A checkpoint folder or file, quantized or float; only headers are read when it is opened.

    Attributes:
      path: the folder or file.
      hf_config: `config.json` of the folder, or {}.
      config: the quantization configuration, or None for a float checkpoint.
      files: the tensors of its files.
    """

    def __init__(self, path: str | Path):
        """See `open_checkpoint`."""
        self.path = Path(path)
        self.files = open_files(self.path)
        single = self.path.is_file()
        folder = self.path.parent if single else self.path
        hf_config = folder / "config.json"
        self.hf_config: dict[str, Any] = read_json(hf_config) if hf_config.exists() else {}
        self.config: QuantConfig | None = find_config(
            folder, self.hf_config, self.files.metadata, metadata_first=single
        )
        self._decoded = 0
        packed = [name for name in self.files if name.rpartition(".")[2] in ("qweight", "B")]
        if self.config is None and packed:
            raise ConfigError(
                f"{self.path}: {packed[0]}: expected a quantization configuration beside packed "
                f"tensors, found neither quantize_config.json, quant_config.json nor "
                f"quantization_config in config.json; add a quantize_config.json with bits, "
                f"group_size, desc_act, sym and checkpoint_format"
            )

    def names(self) -> list[str]:
        """Names of all tensors, of every shard."""
        return list(self.files)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def info(self, name: str) -> TensorInfo:
        """File, dtype, shape and byte range of a tensor, from its header."""
        return self.files.info(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from its header."""
        return self.files.info(name).shape

    def tensor(self, name: str) -> np.ndarray:
        """A tensor as a read-only view of the mapped file (bfloat16 through `ml_dtypes`).

        Raises:
          MissingTensorError: no file holds it.
        """
        return self.files.tensor(name)

    def quantized_modules(self) -> list[str]:
        """Names of the quantized modules, from the headers, in natural order ("2" before "10")."""
        return list(self._modules)

    @cached_property
    def _modules(self) -> dict[str, None]:
        if self.config is None:
            return {}
        markers = _READERS[self.config.quant_method].MARKERS
        found = {n.rpartition(".")[0] for n in self.files if n.rpartition(".")[2] in markers}
        return dict.fromkeys(sorted(found, key=_natural))

    def weight(self, module: str) -> GptqWeight:
        """Decode one module; nothing is kept.

        Raises:
          MissingTensorError: no such module, or one of its tensors is missing.
          BitsError, ShapeError, DtypeError, GroupIndexError, ScalesError, ZeroPointError: the
            tensors contradict each other or the configuration; the message names file and tensor.
        """
        if module not in self._modules:
            raise MissingTensorError(
                f"{self.path}: {module}: expected a quantized module, found no packed tensors of "
                f"it; quantized_modules() lists those there are"
            )
        assert self.config is not None  # it has quantized modules
        tensors = ModuleTensors(self.files, module)
        self._decoded += sum(self.files.info(name).nbytes for name in tensors.names())
        if self._decoded > _RELEASE_BYTES:
            self._decoded = 0
            release_freed_memory()
        return _READERS[self.config.quant_method].read(tensors, self.config.module(module))

    def bias(self, module: str) -> np.ndarray | None:
        """A module's bias [N] in its stored dtype, or None.

        AutoGPTQ writes a bias of zeros for layers that have none: such a bias is None.

        Raises:
          CorruptFileError: it holds a NaN or an infinity.
        """
        tensors = ModuleTensors(self.files, module)
        if "bias" not in tensors:
            return None
        bias = tensors.get("bias")
        if not np.isfinite(bias.astype(np.float32)).all():
            raise CorruptFileError(
                f"{tensors.where('bias')}: expected finite values, found a NaN or an infinity; the "
                f"checkpoint is damaged or was written from a failed quantization"
            )
        return np.array(bias) if module not in self._modules or bias.any() else None

    def linear(self, module: str, layout: str | None = None) -> GptqLinear:
        """Decode one module and repack it with `prepare(weight, layout)`, with its bias."""
        weight, bias = self.weight(module), self.bias(module)
        if bias is not None and bias.shape != (weight.out_features,):
            raise ShapeError(
                f"{ModuleTensors(self.files, module).where('bias')}: expected shape "
                f"({weight.out_features},), found {bias.shape}; the tensors do not belong together"
            )
        return GptqLinear.from_weight(weight, bias, layout=layout)

    def items(self) -> Iterator[tuple[str, GptqWeight]]:
        """(module, weight) of every quantized module, decoded one at a time."""
        for module in self._modules:
            yield module, self.weight(module)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint: a folder as Hugging Face lays it out, or one `.safetensors` file.

    Reads GPTQ (v1, v2, planar), compressed-tensors `pack-quantized`, AWQ `gemm`,
    Marlin-serialized and float checkpoints. Only configuration and headers are read.

    Raises:
      MissingFileError: no such path, no safetensors in it, or a shard is missing.
      CorruptFileError: a Git LFS pointer, a truncated or damaged file.
      ConfigError, CheckpointFormatError, BitsError: the configuration is missing or unknown.
    """
    return Checkpoint(path)


def load_weights(path: str | Path) -> dict[str, GptqWeight]:
    """Every quantized module of a checkpoint: name -> `GptqWeight`.

    Args:
      path: as for `open_checkpoint`.

    Raises:
      MissingTensorError: there is no quantized module.
      Also what `open_checkpoint` and `Checkpoint.weight` raise.
    """
    checkpoint = _open_quantized(path)
    return dict(checkpoint.items())


def load_linears(path: str | Path, layout: str | None = None) -> dict[str, GptqLinear]:
    """Every quantized module of a checkpoint: name -> `GptqLinear` with its bias.

    Each is decoded and repacked (`prepare(weight, layout)`) before the next is read, so that
    beyond what is kept one linear at a time is in memory. Raises what `load_weights` raises.
    """
    checkpoint = _open_quantized(path)
    return {name: checkpoint.linear(name, layout) for name in checkpoint.quantized_modules()}


def _open_quantized(path: str | Path) -> Checkpoint:
    checkpoint = open_checkpoint(path)
    if not checkpoint.quantized_modules():
        raise MissingTensorError(
            f"{path}: expected quantized modules, found none; "
            + (
                "this is a float checkpoint: quantize it, or load it with jax_gptq.models.load"
                if checkpoint.config is None
                else f"{checkpoint.config.source} says {checkpoint.config.quant_method}, but no "
                f"header has such tensors; a shard may be missing"
            )
        )
    return checkpoint


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which layer 2 precedes layer 10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]
