"""Lazy access to the tensors of safetensors files: headers first, data mapped when asked for.

A safetensors file is a little-endian u64 header length, that many bytes of JSON (name -> dtype,
shape, byte range; `__metadata__` -> strings), then the data
(https://github.com/huggingface/safetensors#format).
"""

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jax_gptq.errors import (
    ConfigError,
    CorruptFileError,
    DtypeError,
    MissingFileError,
    MissingTensorError,
)

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_LFS_POINTER = b"version https://git-lfs"
_MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, its dtype's name in the header, shape and byte range."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.stop - self.start


class TensorFiles:
    """The tensors of one checkpoint, whichever of its files they are in."""

    def __init__(self, paths: list[Path], index: dict[str, str] | None = None):
        """Reads the headers of `paths`; `index` (tensor -> file name) settles duplicates only.

        Raises:
          CorruptFileError: a Git LFS pointer, a truncated or damaged file, or a tensor that two
            files hold.
        """
        self.paths = paths
        self.metadata: dict[str, str] = {}
        self._tensors: dict[str, TensorInfo] = {}
        self._maps: dict[Path, np.ndarray] = {}
        self._warned: set[type[Warning]] = set()
        for path in paths:
            metadata, tensors = read_header(path)
            self.metadata.update(metadata)
            for name, info in tensors.items():
                other = self._tensors.get(name)
                if other is not None and (index or {}).get(name) == other.path.name:
                    continue
                if other is not None and (index or {}).get(name) != path.name:
                    raise CorruptFileError(
                        f"{path}: {name}: expected in one file, found in {other.path.name} too; "
                        f"remove the file that does not belong to this checkpoint"
                    )
                self._tensors[name] = info

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    @cached_property
    def by_module(self) -> dict[str, list[str]]:
        """Module -> names of its own tensors."""
        modules: dict[str, list[str]] = {}
        for name in self:
            modules.setdefault(name.rpartition(".")[0], []).append(name)
        return modules

    def info(self, name: str) -> TensorInfo:
        """Where tensor `name` lies.

        Raises:
          MissingTensorError: no file holds it.
        """
        if name not in self._tensors:
            files = ", ".join(str(path) for path in self.paths)
            raise MissingTensorError(
                f"{files}: {name}: expected a tensor of this name, found none in any header; the "
                f"download may be incomplete, or a shard is missing"
            )
        return self._tensors[name]

    def warn_once(self, message: str, category: type[Warning]) -> None:
        """Warn of a cause that every module of a checkpoint shares, for the first one only."""
        if category not in self._warned:
            self._warned.add(category)
            warnings.warn(message, category, stacklevel=2)

    def tensor(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the mapped file; nothing is copied.

        Raises:
          MissingTensorError: no file holds it.
          DtypeError: its dtype has no NumPy equivalent.
        """
        info = self.info(name)
        if info.dtype not in DTYPES:
            raise DtypeError(
                f"{info.path}: {name}: expected a dtype of {sorted(DTYPES)}, found {info.dtype}"
            )
        if info.start == info.stop:
            return np.zeros(info.shape, DTYPES[info.dtype])
        if info.path not in self._maps:
            self._maps[info.path] = np.memmap(info.path, np.uint8, mode="r").view(np.ndarray)
        data = self._maps[info.path][info.start : info.stop]
        return data.view(DTYPES[info.dtype]).reshape(info.shape)


@dataclasses.dataclass(frozen=True)
class ModuleTensors:
    """The tensors `<module>.<suffix>` of one module, with names for error messages."""

    files: TensorFiles
    module: str

    def name(self, suffix: str) -> str:
        """The tensor's name in the checkpoint."""
        return f"{self.module}.{suffix}" if self.module else suffix

    def __contains__(self, suffix: str) -> bool:
        return self.name(suffix) in self.files

    def shape(self, suffix: str) -> tuple[int, ...]:
        """Shape from the header."""
        return self.files.info(self.name(suffix)).shape

    def get(self, suffix: str) -> np.ndarray:
        """Mapped tensor; MissingTensorError where there is none."""
        return self.files.tensor(self.name(suffix))

    def matrix(self, suffix: str) -> np.ndarray:
        """Mapped 2-D tensor; CorruptFileError where it has another rank."""
        values = self.get(suffix)
        if values.ndim != 2:
            raise CorruptFileError(
                f"{self.where(suffix)}: expected 2 dimensions, found shape {values.shape}; the "
                f"checkpoint was damaged or is of another format"
            )
        return values

    def where(self, suffix: str) -> str:
        """`file: tensor`, for messages."""
        return f"{self.files.info(self.name(suffix)).path}: {self.name(suffix)}"

    def names(self) -> list[str]:
        """The module's own tensors."""
        return self.files.by_module.get(self.module, [])

    @cached_property
    def prefix(self) -> str:
        """`file: module`, for messages that append the tensor's suffix; all files if several."""
        unique = list(dict.fromkeys(str(self.files.info(name).path) for name in self.names()))
        return f"{' + '.join(unique)}: {self.module}"


def read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Metadata and tensors of one safetensors file, checked against the file's size.

    Raises:
      MissingFileError: there is no such file.
      CorruptFileError: a Git LFS pointer, a truncated file, or not a safetensors file.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: expected a safetensors file, found none")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise CorruptFileError(
                f"{path}: expected safetensors data, found a Git LFS pointer; run `git lfs pull` "
                f"in that folder or download the file itself"
            )
        length = int.from_bytes(start[:8], "little")
        if size >= 8 and length > _MAX_HEADER_BYTES:
            raise CorruptFileError(
                f"{path}: expected a safetensors header, found a header length of {length} bytes; "
                f"this is not a safetensors file"
            )
        if size < 8 + length or size < 8:
            raise CorruptFileError(
                f"{path}: expected a header of {length} bytes, found a file of {size} bytes; it is "
                f"truncated, download it again"
            )
        file.seek(8)
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {name: _info(path, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(
            f"{path}: expected a safetensors header in JSON, found {text[:40]!r} ({error}); the "
            f"file is damaged or is not a safetensors file"
        ) from error
    for name, info in tensors.items():
        if info.stop > size:
            raise CorruptFileError(
                f"{path}: {name}: expected the tensor's data up to byte {info.stop}, found a file "
                f"of {size} bytes; it is truncated, download it again"
            )
        dtype = DTYPES.get(info.dtype)
        expected = None if dtype is None else math.prod(info.shape) * dtype.itemsize
        if info.start > info.stop or expected not in (None, info.stop - info.start):
            raise CorruptFileError(
                f"{path}: {name}: expected {expected} bytes for {info.dtype} {info.shape}, found "
                f"{info.stop - info.start}; the header is damaged, download the file again"
            )
    return metadata, tensors


def _info(path: Path, entry: dict[str, Any], data: int) -> TensorInfo:
    start, stop = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    return TensorInfo(path, str(entry["dtype"]), shape, data + int(start), data + int(stop))


def open_files(path: Path) -> TensorFiles:
    """The tensors of a checkpoint folder, or of one `.safetensors` file.

    In a folder: `model.safetensors`, else the shards of the index, else the shards or the one file
    that is there (`gptq_model-4bit-128g.safetensors`). The headers decide which shard holds a
    tensor: the index may be stale. A shard that it names must be there, unless none of them is.

    Raises:
      MissingFileError: no such path, no safetensors file in it, or a shard is missing.
      ConfigError: several files, and nothing says which is meant.
      CorruptFileError: see `TensorFiles`.
    """
    if path.is_file():
        return TensorFiles([path])
    if not path.is_dir():
        raise MissingFileError(
            f"{path}: expected a checkpoint folder or a .safetensors file, found nothing there"
        )
    if (path / "model.safetensors").exists():
        return TensorFiles([path / "model.safetensors"])
    found = sorted(path.glob("*.safetensors"))
    found = [file for file in found if not file.name.startswith("adapter_")]
    index = _index(path, found)
    if index is not None:
        return _indexed(index)
    if not found:
        others = sorted(file.name for file in path.glob("*") if file.suffix in (".bin", ".pt"))
        raise MissingFileError(
            f"{path}: expected *.safetensors, found {others or 'no weights'}; jax_gptq reads "
            f"safetensors only"
        )
    shards = [match for file in found if (match := _SHARD.fullmatch(file.name))]
    if len(found) > 1 and (
        len(shards) < len(found) or len({(m["stem"], m["total"]) for m in shards}) > 1
    ):
        raise ConfigError(
            f"{path}: expected one checkpoint, found {[file.name for file in found]}; pass the "
            f"path of the file that is meant"
        )
    for match in shards[:1]:
        _expect_all_shards(path, match)
    return TensorFiles(found)


def _index(folder: Path, found: list[Path]) -> Path | None:
    """The index to follow. One that names none of the files is left from another model."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    indices.sort(key=lambda index: index.name != "model.safetensors.index.json")
    names = {file.name for file in found}
    for index in indices:
        if not names or names & set(_weight_map(index).values()):
            return index
    return None


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index}: expected a `weight_map` from tensors to files, found none")
    return weight_map


def _indexed(index: Path) -> TensorFiles:
    """The shards that an index names, and their siblings of the same numbering."""
    weight_map = _weight_map(index)
    paths = {index.parent / str(name) for name in weight_map.values()}
    for path in sorted(paths):
        if not path.exists():
            example = next(tensor for tensor, name in weight_map.items() if name == path.name)
            raise MissingFileError(
                f"{index}: {example}: expected its shard {path.name} beside the index, found no "
                f"such file; download the missing shard"
            )
    for path in sorted(paths):
        if match := _SHARD.fullmatch(path.name):
            paths |= _expect_all_shards(path.parent, match)
    return TensorFiles(sorted(paths), weight_map)


def _expect_all_shards(folder: Path, match: re.Match) -> set[Path]:
    """The files 1 to `total` of a sharded checkpoint; each must be there."""
    total = int(match["total"])
    paths = [
        folder / f"{match['stem']}-{number:05d}-of-{total:05d}.safetensors"
        for number in range(1, total + 1)
    ]
    for path in paths:
        if not path.exists():
            raise MissingFileError(
                f"{path}: expected {total} shards, found no such file; download the missing shard"
            )
    return set(paths)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ConfigError: the file holds something else.
      CorruptFileError: it is a Git LFS pointer.
    """
    data = path.read_bytes()
    if data.startswith(_LFS_POINTER):
        raise CorruptFileError(
            f"{path}: expected JSON, found a Git LFS pointer; run `git lfs pull` in that folder"
        )
    try:
        value = json.loads(data)
    except ValueError as error:
        raise ConfigError(f"{path}: expected JSON, found {data[:40]!r} ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
