"""The quantization configuration of a checkpoint, whoever wrote it, in one form."""

import dataclasses
import functools
import json
import re
import warnings
from pathlib import Path
from typing import Any

from jax_gptq.checkpoint.files import read_json
from jax_gptq.errors import BitsError, CheckpointFormatError, ConfigError

QUANT_METHODS = ("gptq", "awq", "compressed-tensors", "marlin")
GPTQ_FORMATS = ("gptq", "gptq_v2", "gptq_p")
CONFIG_FILES = ("quantize_config.json", "quant_config.json")
# The key under which `save_weights` puts the whole configuration into a file's own metadata.
METADATA_KEY = "quantization_config"
_ALIASES = {
    "bits": ("bits", "w_bit", "wbits"),
    "group_size": ("group_size", "q_group_size", "groupsize"),
    "checkpoint_format": ("checkpoint_format", "format"),
    "quant_method": ("quant_method", "method"),
}


@dataclasses.dataclass(frozen=True)
class ModuleConfig:
    """What the configuration says of one module; None where it leaves that to the tensors."""

    bits: int | None
    group_size: int | None
    sym: bool
    desc_act: bool
    checkpoint_format: str
    zero_add: str
    groups: tuple[dict[str, Any], ...]
    skipped: bool
    source: str


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """A checkpoint's quantization configuration.

    Attributes:
      quant_method: "gptq", "awq", "compressed-tensors" or "marlin".
      checkpoint_format: "gptq" (v1), "gptq_v2" or "gptq_p"; "gemm"; "pack-quantized"; "marlin".
      bits, group_size: as configured (group_size -1 means K), or None where the configuration does
        not say; the tensors' shapes are checked against them.
      desc_act, sym, static_groups, lm_head: as configured.
      dynamic: (pattern, overrides) in order: GPTQModel's per-module rules.
      zero_add: "word" where GPTQModel wrote the file, else "field" (`GptqWeight.from_raw`).
      groups: compressed-tensors' `config_groups.*.weights`.
      source: the file that the configuration was found in.
      raw: the configuration itself.
    """

    quant_method: str
    checkpoint_format: str
    bits: int | None
    group_size: int | None
    desc_act: bool
    sym: bool
    static_groups: bool
    lm_head: bool
    dynamic: tuple[tuple[str, dict[str, Any]], ...]
    zero_add: str
    groups: tuple[dict[str, Any], ...]
    source: str
    raw: dict[str, Any]

    def module(self, name: str) -> ModuleConfig:
        """The configuration of one module: the first `dynamic` pattern that matches from the start
        of its name overrides the rest; a "-:" pattern says that the module is not quantized."""
        skipped, overrides = self._dynamic_rule(name)
        return ModuleConfig(
            bits=_integer(overrides, "bits", self.source, self.bits),
            group_size=_integer(overrides, "group_size", self.source, self.group_size),
            sym=_boolean(overrides, "sym", self.source, self.sym),
            desc_act=_boolean(overrides, "desc_act", self.source, self.desc_act),
            checkpoint_format=self.checkpoint_format,
            zero_add=self.zero_add,
            groups=self.groups,
            skipped=skipped,
            source=self.source,
        )

    def _dynamic_rule(self, name: str) -> tuple[bool, dict[str, Any]]:
        for pattern, overrides in self.dynamic:
            negative = pattern.startswith("-:")
            expression = pattern[2:] if pattern.startswith(("-:", "+:")) else pattern
            if _compiled(expression, self.source).match(name):
                return negative, {} if negative else overrides
        return False, {}


def find_config(
    folder: Path, hf_config: dict[str, Any], metadata: dict[str, str], metadata_first: bool = False
) -> QuantConfig | None:
    """Look the configuration up, or None where nothing says that the checkpoint is quantized.

    In order: `quantize_config.json`, `quant_config.json`, `config.json["quantization_config"]`,
    the safetensors metadata (`gptq_bits`, ...). `metadata_first` (a single file was asked for):
    a configuration that the file itself holds goes before its neighbours.

    Raises:
      ConfigError, CheckpointFormatError, BitsError: see `parse_config`.
    """
    embedded = metadata.get(METADATA_KEY)
    if embedded is not None and metadata_first:
        return parse_config(_metadata_json(embedded), f"{folder}: safetensors metadata")
    for name in CONFIG_FILES:
        if (folder / name).exists():
            return parse_config(read_json(folder / name), str(folder / name))
    nested = hf_config.get("quantization_config") or hf_config.get("compression_config")
    if nested:
        source = str(folder / "config.json")
        if not isinstance(nested, dict):
            raise ConfigError(
                f"{source}: quantization_config: expected an object, found {type(nested).__name__}"
            )
        return parse_config(nested, source)
    if embedded is not None:
        return parse_config(_metadata_json(embedded), f"{folder}: safetensors metadata")
    old = {key.removeprefix("gptq_"): v for key, v in metadata.items() if key.startswith("gptq_")}
    if old:
        return parse_config(old, f"{folder}: safetensors metadata")
    return None


def parse_config(raw: dict[str, Any], source: str) -> QuantConfig:
    """Parse a configuration; `source` names its file in messages.

    Raises:
      CheckpointFormatError: an unknown quant_method, checkpoint_format or pack_dtype.
      BitsError: bits that are not 2 to 8.
      ConfigError: a value that is not of its key's type.
    """
    method = _method(raw, source)
    pack_dtype = str(raw.get("pack_dtype") or "int32").removeprefix("torch.")
    if pack_dtype != "int32":
        raise CheckpointFormatError(
            f"{source}: pack_dtype: expected int32, found {pack_dtype!r}; repack the checkpoint "
            f"with pack_dtype int32"
        )
    checkpoint_format = _format(raw, method, source)
    if "sym" in raw or method in ("compressed-tensors", "marlin"):
        sym = _boolean(raw, "sym", source, True)
    elif "zero_point" in raw or method == "awq":
        sym = not _boolean(raw, "zero_point", source, True)
    else:
        sym = True
        warnings.warn(
            f"{source}: sym: expected true or false, found nothing; true is assumed, and the zero "
            f"points are checked against it",
            stacklevel=2,
        )
    dynamic = raw.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise ConfigError(
            f"{source}: dynamic: expected an object of patterns, found {type(dynamic).__name__}"
        )
    return QuantConfig(
        quant_method=method,
        checkpoint_format=checkpoint_format,
        bits=_integer(raw, "bits", source, None),
        group_size=_integer(raw, "group_size", source, None),
        desc_act=_boolean(raw, "desc_act", source, False),
        sym=sym,
        static_groups=_boolean(raw, "static_groups", source, False),
        lm_head=_boolean(raw, "lm_head", source, False),
        dynamic=tuple((pattern, overrides or {}) for pattern, overrides in dynamic.items()),
        zero_add="word" if "gptqmodel" in _quantizer(raw) else "field",
        groups=_weight_groups(raw, source) if method == "compressed-tensors" else (),
        source=source,
        raw=raw,
    )


def _method(raw: dict[str, Any], source: str) -> str:
    found = _first(raw, "quant_method")
    if found is None:
        # AutoAWQ's own file names no method; its keys and version do.
        awq = "zero_point" in raw or str(raw.get("version", "")).lower().startswith("gem")
        found = "awq" if awq else "gptq"
    method = str(found).lower().replace("_", "-")
    if method not in QUANT_METHODS:
        raise CheckpointFormatError(
            f"{source}: quant_method: expected one of {QUANT_METHODS}, found {found!r}; jax_gptq "
            f"cannot read this kind of checkpoint"
        )
    marlin = raw.get("is_marlin_format", False) in (True, "True", "true")
    if marlin or str(_first(raw, "checkpoint_format")).lower() == "marlin":
        return "marlin"
    return method


def _format(raw: dict[str, Any], method: str, source: str) -> str:
    """The tensor format, checked against those that the method's reader knows."""
    if method == "marlin":
        return "marlin"
    if method == "awq":
        known: tuple[str, ...] = ("gemm",)
        found = raw.get("version") or _first(raw, "checkpoint_format") or "gemm"
    elif method == "compressed-tensors":
        known = ("pack-quantized", "mixed-precision")
        found = raw.get("format") or "pack-quantized"
    else:
        known = GPTQ_FORMATS
        found = _first(raw, "checkpoint_format") or "gptq"
    if str(found).lower() not in known:
        raise CheckpointFormatError(
            f"{source}: checkpoint_format: expected one of {known} for quant_method {method}, "
            f"found {found!r}; convert the checkpoint with the tool that wrote it"
        )
    return str(found).lower()


def _weight_groups(raw: dict[str, Any], source: str) -> tuple[dict[str, Any], ...]:
    """The weight schemes of compressed-tensors' config_groups, each an integer one."""
    groups = []
    for name, group in (raw.get("config_groups") or {}).items():
        weights = group.get("weights")
        if not weights:
            continue
        own = group.get("format") or "pack-quantized"
        if own != "pack-quantized" or weights.get("type", "int") != "int":
            raise CheckpointFormatError(
                f"{source}: config_groups.{name}: expected format pack-quantized with integer "
                f"weights, found {own!r} with {weights.get('type')!r}"
            )
        if weights.get("num_bits") not in range(2, 9):
            raise BitsError(
                f"{source}: config_groups.{name}.weights.num_bits: expected 2 to 8, found "
                f"{weights.get('num_bits')!r}"
            )
        if weights.get("strategy", "group") not in ("group", "channel"):
            raise CheckpointFormatError(
                f"{source}: config_groups.{name}.weights.strategy: expected group or channel, "
                f"found {weights.get('strategy')!r}"
            )
        groups.append(weights)
    if not groups:
        raise ConfigError(f"{source}: config_groups: expected a group with weights, found none")
    return tuple(groups)


def _quantizer(raw: dict[str, Any]) -> str:
    """`meta.quantizer` in lower case; it is a string or a list of strings."""
    meta = raw.get("meta")
    return str(meta.get("quantizer", "")).lower() if isinstance(meta, dict) else ""


def _first(raw: dict[str, Any], key: str) -> Any:
    """The value of a key or of one of its aliases."""
    return next(
        (raw[name] for name in _ALIASES.get(key, (key,)) if raw.get(name) is not None), None
    )


def _integer(raw: dict[str, Any], key: str, source: str, default: int | None) -> int | None:
    """An integer; the metadata of old files holds it as text."""
    value = _first(raw, key)
    if value is None:
        return default
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, bool) or number != float(value):
        raise ConfigError(f"{source}: {key}: expected an integer, found {value!r}")
    if key == "bits" and number not in range(2, 9):
        raise BitsError(f"{source}: bits: expected 2 to 8, found {value!r}")
    if key == "group_size" and number != -1 and number < 1:
        raise ConfigError(f"{source}: group_size: expected -1 or at least 1, found {value!r}")
    return number


def _boolean(raw: dict[str, Any], key: str, source: str, default: bool) -> bool:
    value = raw.get(key)
    if value is None:
        return default
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise ConfigError(f"{source}: {key}: expected true or false, found {value!r}")
    return value


def _metadata_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"safetensors metadata: {METADATA_KEY}: expected JSON, found {text[:40]!r}"
        ) from error
    return value


@functools.cache
def _compiled(expression: str, source: str) -> re.Pattern:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ConfigError(
            f"{source}: dynamic: expected regular expressions, found {expression!r} ({error})"
        ) from error
