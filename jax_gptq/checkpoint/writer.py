"""Writes weights as a GPTQ checkpoint: v1, v2 or planar, bit for bit what was loaded."""

import collections
import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jax_gptq.checkpoint.config import GPTQ_FORMATS, METADATA_KEY
from jax_gptq.checkpoint.files import DTYPES
from jax_gptq.checkpoint.planar import PLANES, planar_from_stream
from jax_gptq.errors import BitsError, CheckpointFormatError, DtypeError, ShapeError
from jax_gptq.packing import pack_codes
from jax_gptq.weight import GptqWeight

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_STREAM_BITS = (2, 3, 4, 8)
_pack_codes = jax.jit(pack_codes, static_argnums=1)

Named: TypeAlias = Mapping[str, Any] | Iterable[tuple[str, Any]]


def save_weights(
    weights: Mapping[str, GptqWeight] | Iterable[tuple[str, GptqWeight]],
    path: str | Path,
    *,
    checkpoint_format: str = "gptq",
    biases: Mapping[str, ArrayLike] | None = None,
    other_tensors: Named = (),
    config: Mapping[str, Any] | None = None,
    meta: Mapping[str, Any] | None = None,
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Write a GPTQ checkpoint; reading it back gives every weight bit for bit.

    A folder gets `model.safetensors` (or shards and their index), `quantize_config.json` and, with
    `config`, `config.json`. Weights that differ in bits or group size become rules of `dynamic`,
    and so do dense matrices inside numbered layers. Files are written under temporary names and
    renamed at the end: a reader never sees a half-written one, and what the folder held before is
    replaced. Files in "gptq_v2", and symmetric ones in "gptq", are read by GPTQModel too; it
    refuses asymmetric v1 files that it did not write itself.

    Args:
      weights: module name -> weight, as a mapping or as pairs; pairs are consumed one at a time.
      path: a folder, or a file `*.safetensors`, whose metadata then holds the configuration.
      checkpoint_format: "gptq" (v1, stores z - 1) or "gptq_v2" (stores z) for 2, 3, 4 and 8 bits;
        "gptq_p" (GPTQModel's bit planes) for 2 to 8, of which 3, 5, 6 and 7 need features that are
        multiples of 32.
      biases: module name -> bias [N], kept in its dtype.
      other_tensors: name -> array, as a mapping or as pairs: embeddings, norms, dense layers as
        torch has them ([out, in]).
      config: the model's `config.json`, to which the quantization configuration is added.
      meta: what `meta` of the configuration should tell beyond the writer's name.
      max_shard_size: bytes of data per file of a folder; a module is never split.

    Raises:
      CheckpointFormatError: an unknown checkpoint_format, or a tensor that is given twice.
      BitsError, ShapeError: the format cannot hold this weight.
      DtypeError: an array has a dtype that safetensors does not know.
    """
    if checkpoint_format not in GPTQ_FORMATS:
        raise CheckpointFormatError(
            f"{path}: checkpoint_format: expected one of {GPTQ_FORMATS}, found "
            f"{checkpoint_format!r}"
        )
    path = Path(path)
    single_file = path.suffix == ".safetensors"
    folder = path.parent if single_file else path
    folder.mkdir(parents=True, exist_ok=True)
    summary = _Summary(checkpoint_format)
    limit = None if single_file else max_shard_size
    with _ShardWriter(folder, limit) as shards:
        for name, weight in _pairs(weights):
            tensors = _tensors(name, weight, checkpoint_format)
            if biases is not None and name in biases:
                tensors["bias"] = np.asarray(biases[name])
            shards.add({f"{name}.{key}" if name else key: value for key, value in tensors.items()})
            summary.add(name, weight)
        if not summary.names:
            raise CheckpointFormatError(f"{path}: expected at least one weight, found none")
        unknown = sorted(set(biases or ()) - summary.names)
        if unknown:
            raise CheckpointFormatError(
                f"{path}: {unknown[0]}.bias: expected the bias of one of the weights, found no "
                f"weight of that name; pass it in other_tensors"
            )
        for name, array in _pairs(other_tensors):
            summary.add_other(path, name, np.shape(array))
            shards.add({name: np.asarray(array)})
        quantization = summary.config(meta or {})
        if single_file:
            shards.finish_file(path, {METADATA_KEY: json.dumps(quantization)})
            return
        shards.finish_folder()
    _write_json(folder / "quantize_config.json", quantization)
    if config is not None:
        _write_json(folder / "config.json", {**config, "quantization_config": quantization})


def _pairs(named: Named) -> Iterable[tuple[str, Any]]:
    return named.items() if isinstance(named, Mapping) else named


def _tensors(name: str, weight: GptqWeight, checkpoint_format: str) -> dict[str, np.ndarray]:
    """The four tensors of a module in `checkpoint_format`."""
    bits, k, n = weight.bits, weight.in_features, weight.out_features
    if checkpoint_format != "gptq_p" and bits not in _STREAM_BITS:
        raise BitsError(
            f"{name}.qweight: checkpoint_format {checkpoint_format!r} holds {_STREAM_BITS} bits, "
            f'found {bits}; use "gptq_p"'
        )
    planar = checkpoint_format == "gptq_p" and bits in PLANES
    if planar and (k % 32 or n % 32):
        raise ShapeError(
            f"{name}.qweight: gptq_p at {bits} bits holds whole blocks of 32 codes, found "
            f"in_features={k}, out_features={n}"
        )
    zeros = weight.qzeros
    if checkpoint_format == "gptq":
        zeros = (zeros - 1) & np.uint8(2**bits - 1)
    qweight, zero_words = weight.qweight, _pack_codes(jnp.asarray(zeros).T, bits)
    if planar:
        qweight = planar_from_stream(qweight, bits)
        zero_words = planar_from_stream(zero_words, bits)
    return {
        "qweight": np.asarray(qweight).view(np.int32),
        "qzeros": np.ascontiguousarray(np.asarray(zero_words).T).view(np.int32),
        "scales": np.asarray(weight.scales),
        "g_idx": _g_idx(weight),
    }


def _g_idx(weight: GptqWeight) -> np.ndarray:
    if weight.g_idx is not None:
        return np.asarray(weight.g_idx, np.int32)
    return (np.arange(weight.in_features) // weight.group_size).astype(np.int32)


class _Summary:
    """Collects what the configuration must say of the weights written."""

    def __init__(self, checkpoint_format: str):
        self._format = checkpoint_format
        self._modules: dict[str, tuple[int, int, bool]] = {}  # bits, group size, which is K
        self._dense: list[str] = []
        self._sym = True
        self._desc_act = False

    @property
    def names(self) -> set[str]:
        """Names of the modules written."""
        return set(self._modules)

    def add(self, name: str, weight: GptqWeight) -> None:
        """One more weight."""
        one_group = weight.group_size == weight.in_features and weight.groups == 1
        self._modules[name] = weight.bits, weight.group_size, one_group
        self._sym &= bool((np.asarray(weight.qzeros) == 2 ** (weight.bits - 1)).all())
        self._desc_act |= weight.g_idx is not None

    def add_other(self, path: Path, name: str, shape: tuple[int, ...]) -> None:
        """One more float tensor."""
        module, _, suffix = name.rpartition(".")
        if suffix == "weight" and module in self._modules:
            raise CheckpointFormatError(
                f"{path}: {name}: expected no dense weight for a module that is quantized; leave "
                f"it out of other_tensors"
            )
        if suffix == "weight" and len(shape) == 2 and re.search(r"\.\d+\.", module):
            self._dense.append(module)

    def config(self, meta: Mapping[str, Any]) -> dict[str, Any]:
        """The contents of `quantize_config.json`."""
        bits = _most_common(bits for bits, _, _ in self._modules.values())
        if all(one_group for _, _, one_group in self._modules.values()):
            group_size = -1
        else:
            group_size = _most_common(size for _, size, _ in self._modules.values())
        dynamic: dict[str, dict[str, int]] = {
            f"-:^{re.escape(name)}$": {} for name in sorted(self._dense)
        }
        for name, (own_bits, own_size, one_group) in self._modules.items():
            rule = {}
            if own_bits != bits:
                rule["bits"] = own_bits
            if own_size != group_size and not (one_group and group_size == -1):
                rule["group_size"] = own_size
            if rule:
                dynamic[f"+:^{re.escape(name)}$"] = rule
        config = {
            "bits": bits,
            "group_size": group_size,
            "desc_act": self._desc_act,
            "sym": self._sym,
            "lm_head": any(name.rpartition(".")[2] == "lm_head" for name in self._modules),
            "quant_method": "gptq",
            "checkpoint_format": self._format,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["jax_gptq"], **meta},
        }
        return {**config, "dynamic": dynamic} if dynamic else config


def _most_common(values: Iterable[int]) -> int:
    return max(collections.Counter(values).items(), key=lambda item: (item[1], item[0]))[0]


class _ShardWriter:
    """Streams tensors to disk; files appear under their names only when all are complete.

    The data of a shard goes to a temporary file as it comes; `finish_*` puts the header in front.
    Tensors are ordered by item size, as the reference implementation does, so that each is aligned.
    """

    def __init__(self, folder: Path, limit: int | None):
        self._folder, self._limit = folder, limit
        self._names: set[str] = set()
        self._shards: list[dict[str, tuple[str, tuple[int, ...], int, int]]] = []
        self._bodies: list[Path] = []
        self._temporary: list[Path] = []
        self._size = 0

    def __enter__(self) -> "_ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for path in self._temporary:
            path.unlink(missing_ok=True)

    def add(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Append tensors that belong together to the current shard, or start the next."""
        for name, array in tensors.items():
            if name in self._names:
                raise CheckpointFormatError(
                    f"{self._folder}: {name}: expected once, found twice; module and tensor names "
                    f"must be unique"
                )
            if array.dtype not in _DTYPE_NAMES:
                raise DtypeError(
                    f"{self._folder}: {name}: expected a dtype of {sorted(DTYPES)}, found "
                    f"{array.dtype}"
                )
            self._names.add(name)
        size = sum(array.nbytes for array in tensors.values())
        full = self._limit is not None and self._size > 0 and self._size + size > self._limit
        if not self._shards or full:
            self._shards.append({})
            self._bodies.append(self._temporary_path())
            self._size = 0
        with self._bodies[-1].open("ab") as file:
            for name, array in tensors.items():
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                entry = (_DTYPE_NAMES[array.dtype], array.shape, self._size, array.nbytes)
                self._shards[-1][name] = entry
                self._size += array.nbytes

    def finish_file(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Everything as one file `path`."""
        os.replace(self._complete(0, metadata), path)

    def finish_folder(self) -> None:
        """`model.safetensors`, or numbered shards and their index."""
        complete = [self._complete(i, {}) for i in range(max(1, len(self._shards)))]
        single, index = self._folder / "model.safetensors", "model.safetensors.index.json"
        if len(complete) == 1:
            os.replace(complete[0], single)
            return
        total = len(complete)
        weight_map: dict[str, str] = {}
        for number, (temporary, shard) in enumerate(zip(complete, self._shards, strict=True), 1):
            name = f"model-{number:05d}-of-{total:05d}.safetensors"
            os.replace(temporary, self._folder / name)
            weight_map |= dict.fromkeys(shard, name)
        size = sum(entry[3] for shard in self._shards for entry in shard.values())
        _write_json(
            self._folder / index, {"metadata": {"total_size": size}, "weight_map": weight_map}
        )
        single.unlink(missing_ok=True)  # It would be read before the shards.

    def _complete(self, number: int, metadata: Mapping[str, str]) -> Path:
        """Header and data of one shard in a temporary file."""
        shard = self._shards[number] if self._shards else {}
        order = sorted(shard, key=lambda name: (-DTYPES[shard[name][0]].itemsize, name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
        position = 0
        for name in order:
            dtype, shape, _, size = shard[name]
            offsets = [position, position + size]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
            position += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        path = self._temporary_path()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            if shard:
                with self._bodies[number].open("rb") as body:
                    for name in order:
                        _, _, start, size = shard[name]
                        body.seek(start)
                        _copy(body, file, size)
            file.flush()
            os.fsync(file.fileno())
        if shard:
            self._bodies[number].unlink()
        return path

    def _temporary_path(self) -> Path:
        path = self._folder / f".{uuid.uuid4().hex}.tmp"
        self._temporary.append(path)
        return path


def _copy(source: Any, target: Any, size: int) -> None:
    block = 1 << 24
    for start in range(0, size, block):
        target.write(source.read(min(block, size - start)))


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Atomically: under a temporary name first."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)
